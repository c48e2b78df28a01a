"""Where a checkpoint may be written, checked before anything is computed for it."""

from __future__ import annotations

import os
from typing import Any

from etils import epath

from qjax.checkpoint.manifest import FILE, resolve


def check_target(path: Any, *, overwrite: bool = False) -> None:
    """Refuses a path at which `save` would fail, or would replace what is no checkpoint.

    Raises:
      ValueError: naming the path and what to do.
      NotImplementedError: as `check_name` does.
    """
    path = resolve(path)
    check_name(path)
    if not path.exists():
        if "://" not in str(path):
            _check_parent(path)
        return
    if not overwrite:
        raise ValueError(f"{path}: exists. Pass overwrite=True to replace it, or choose another.")
    if not (path / FILE).exists():
        raise ValueError(
            f"{path}: exists and is no qjax checkpoint, so it is not replaced. Remove it yourself,"
            " or choose another path."
        )


def check_name(directory: epath.Path) -> None:
    """Refuses a directory in which orbax would not find what it has written.

    It looks for the files of each process with a glob over the whole path, and goes on without
    those it does not find.

    Raises:
      NotImplementedError: naming the directory.
    """
    if "[" in str(directory):
        raise NotImplementedError(
            f"{directory}: orbax cannot save below a name with a bracket. Choose another path; a"
            " complete checkpoint may be moved there."
        )


def _check_parent(path: epath.Path) -> None:
    # In a directory that cannot be made, orbax leaves threads that wait for it for minutes.
    above = next(parent for parent in path.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "cannot be written to" if above.is_dir() else "is a file"
        raise ValueError(f"{path}: cannot be made, as {above} {why}. Choose another path.")
