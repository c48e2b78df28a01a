"""Saving and loading adapters alone, as a qjax checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qjax import checkpoint
from qjax.layout import Axis, Layout
from qjax.lora.adapter import Adapter, Adapters

VERSION = 1
_FIELDS = ("alpha", "rank_stabilized")


def save(
    path: Any,
    adapters: Adapters,
    *,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Saves adapters without their base; `load` needs nothing but the path.

    Args:
      path: a directory that does not exist.
      adapters: from `lora.init`, trained.
      overwrite: whether a checkpoint at `path` may be replaced.
      metadata: a dict that JSON can keep, such as what the base was.

    Raises:
      ValueError: if `path` exists.
    """
    described = {
        name: {field: getattr(adapter, field) for field in _FIELDS}
        | {"layout": [[axis.kind, axis.size] for axis in adapter.layout]}
        for name, adapter in adapters.items()
    }
    arrays = {name: {"a": adapter.a, "b": adapter.b} for name, adapter in adapters.items()}
    head = {"lora": {"version": VERSION, "adapters": described}, "metadata": dict(metadata or {})}
    checkpoint.save(path, arrays, overwrite=overwrite, metadata=head)


def load(path: Any, *, shardings: Any = None) -> Adapters:
    """Loads what `save` saved, bit for bit.

    Args:
      path: what was given to `save`.
      shardings: as for `qjax.load`, of the arrays "<path of the weight>/a" and ".../b".

    Raises:
      CheckpointError: if there is no checkpoint of adapters at `path`.
    """
    head = checkpoint.read_metadata(path).get("lora")
    if not isinstance(head, dict) or head.get("version") != VERSION:
        raise checkpoint.CheckpointError(
            f"{path}: holds no adapters that this qjax reads"
            f" ({'a tree of parameters' if head is None else 'another version'}). `lora.save` makes"
            " such a checkpoint; `qjax.load` reads the others."
        )
    arrays = checkpoint.load(path, shardings=shardings)
    return {
        name: Adapter(
            **arrays[name],
            layout=Layout(Axis(*axis) for axis in spec["layout"]),
            **{field: spec[field] for field in _FIELDS},
        )
        for name, spec in head["adapters"].items()
    }
