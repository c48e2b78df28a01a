"""Checksums of a checkpoint's files: the array store does not notice a flipped bit in its data."""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from qjax.checkpoint.manifest import CheckpointError

FILE = "qjax_checksums.json"
# Written by orbax after the checksums, and not needed to load.
_LATER = frozenset({FILE, "_CHECKPOINT_METADATA", "commit_success.txt"})
_BLOCK = 1 << 20


def write(directory: epath.Path) -> None:
    """Writes the size and CRC-32 of every file below a complete checkpoint directory."""
    names = sorted(n for n in _files(directory) if n not in _LATER)
    with ThreadPoolExecutor(4) as pool:
        sums = pool.map(lambda name: _sum(directory / name), names)
        text = json.dumps(dict(zip(names, sums, strict=True)), indent=1)
    (directory / FILE).write_text(text)


def verify(directory: epath.Path) -> None:
    """Compares every file with its checksum.

    Raises:
      CheckpointError: if a file is missing, cut short or changed; names it.
    """

    def check(item) -> str | None:
        name, (size, crc) = item
        path = directory / name
        if not path.exists():
            return f"the file {name} is missing"
        if (found := path.stat().length) != size:
            return f"the file {name} has {found} bytes, not {size}"
        return None if _sum(path)[1] == crc else f"the file {name} is not what was written"

    try:
        sums = json.loads((directory / FILE).read_text())
        with ThreadPoolExecutor(4) as pool:
            faults = [fault for fault in pool.map(check, sums.items()) if fault]
    except (OSError, ValueError, TypeError, AttributeError):
        faults = [f"the file {FILE} is missing or cannot be read"]
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise CheckpointError(
            f"{directory}: is damaged: {faults[0]}{more}. Restore it from a copy, or save the"
            " model again."
        )


def _files(directory: epath.Path, prefix: str = "") -> list[str]:
    found = []
    for path in directory.iterdir():
        if path.is_dir():
            found += _files(path, f"{prefix}{path.name}/")
        else:
            found.append(prefix + path.name)
    return found


def _sum(path: epath.Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]
