"""Plain-text tables: rows of cells, aligned in columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def align(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Returns each row as one string, its columns as wide as their widest cell.

    Args:
      lines: rows of equally many cells.
      right: columns that are aligned to the right.

    Example:
      >>> align([("leaf", "MB"), ("w", "0.5")], right={1})
      ['leaf   MB', 'w     0.5']
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
