"""Checkpoints: a quantized tree on disk, through orbax, that explains itself."""

from typing import TYPE_CHECKING, Any

from qjax.checkpoint.manifest import (
    CheckpointError,
    Leaf,
    Manifest,
    read_manifest,
    read_metadata,
)
from qjax.checkpoint.store import PendingSave, load, save, save_async

if TYPE_CHECKING:
    from qjax.checkpoint.orbax import QTreeHandler, QTreeRestore, QTreeSave
    from qjax.checkpoint.resumable import Resumable

__all__ = [
    "CheckpointError",
    "Leaf",
    "Manifest",
    "PendingSave",
    "QTreeHandler",
    "QTreeRestore",
    "QTreeSave",
    "Resumable",
    "load",
    "read_manifest",
    "read_metadata",
    "save",
    "save_async",
]


def __getattr__(name: str) -> Any:
    """Imports orbax on the first use of a name that needs it; it takes about a second."""
    if name in ("QTreeHandler", "QTreeRestore", "QTreeSave"):
        from qjax.checkpoint import orbax

        return getattr(orbax, name)
    if name == "Resumable":
        from qjax.checkpoint.resumable import Resumable

        return Resumable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
