"""Merging adapters into their base: as float weights, or quantized again."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax import qtensor
from qjax.format import Format
from qjax.lora.adapter import Adapter, Adapters
from qjax.lora.transform import check_fits
from qjax.paths import path_str
from qjax.qtensor import QTensor, is_qtensor
from qjax.scale_range import check_range
from qjax.summary import sqnr_db
from qjax.tables import align


@dataclasses.dataclass(frozen=True)
class MergedRow:
    """What merging did to one weight.

    Attributes:
      path: of the weight.
      format: in which it is stored now.
      update: |s A B| / |W|, norms of the update and of the base weight.
      sqnr_db: 20 log10(|W + s A B| / |error|) of the requantized weight; inf where it is exact.
      error_to_update: |error| / |s A B|: from 1 on, rounding changed the weight more than training.
      kept: <Q(W + s A B) - W, s A B> / |s A B|^2, the share of the update that is left: 1 if errors
        are independent of it, 0 if it was rounded away.
    """

    path: str
    format: str
    update: float
    sqnr_db: float
    error_to_update: float
    kept: float


class MergeReport(tuple[MergedRow, ...]):
    """One row for every merged weight. Prints as a table."""

    __slots__ = ()

    def to_json(self) -> str:
        return json.dumps([dataclasses.asdict(row) for row in self], indent=2)

    def __str__(self) -> str:
        lines = [("weight", "format", "update/W", "SQNR dB", "error/update", "kept")]
        lines += [
            (
                r.path,
                r.format,
                f"{r.update:.2e}",
                f"{r.sqnr_db:.1f}",
                f"{r.error_to_update:.2f}",
                f"{r.kept:.2f}",
            )
            for r in self
        ]
        return "\n".join(align(lines, right={2, 3, 4, 5}))


def merge(base: Any, adapters: Adapters) -> Any:
    """Returns the base with W + s * A @ B in place of every weight that has an adapter, as float.

    Computed in float32 and rounded once, to the weight's own (logical) type. Packed weights without
    an adapter stay packed.

    Raises:
      ValueError: for adapters that do not fit the base.
    """
    return _replaced(base, adapters, lambda path, leaf, adapter: _merged(leaf, adapter))


def merge_quantized(
    base: Any, adapters: Adapters, format: Format | None = None
) -> tuple[Any, MergeReport]:
    """Returns the base with W + s * A @ B quantized again, and what that cost.

    The base lies on its grid and the sum does not: rounding it again, in a format of 4 bits, may
    well change a weight by more than the adapter does. The report says so for every weight.

    Args:
      format: in which to store the sums; None: each in the format of its base weight.

    Raises:
      ValueError: for adapters that do not fit the base, or a float weight without a format.
    """
    rows = []

    def one(path, leaf, adapter):
        if format is None and not is_qtensor(leaf):
            raise ValueError(
                f"{path}: is float, it has no format to be merged in. Pass `format`, or use"
                " `lora.merge`."
            )
        fmt = leaf.format if format is None else format
        try:
            qt, largest, energies = _requantized(leaf, adapter, fmt)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        check_range(path, largest, qt)
        base_energy, update, merged, error, kept = energies
        norm_of = lambda energy: math.sqrt(float(energy))
        rows.append(
            MergedRow(
                path,
                str(qt.format),
                norm_of(update) / norm_of(base_energy) if base_energy else math.inf,
                sqnr_db(float(merged), float(error)),
                norm_of(error) / norm_of(update) if update else (math.inf if error else 0.0),
                float(kept) / float(update) if update else 1.0,
            )
        )
        return qt

    return _replaced(base, adapters, one), MergeReport(rows)


def _replaced(base: Any, adapters: Adapters, one: Any) -> Any:
    leaves, tree = jax.tree_util.tree_flatten_with_path(base, is_leaf=is_qtensor)
    named = [(path_str(path), leaf) for path, leaf in leaves]
    if missing := sorted(set(adapters) - {path for path, _ in named}):
        raise ValueError(
            f"{missing[0]}: has an adapter, but the base has no such weight. Merge into the tree"
            " that the adapters were made for."
        )
    out = []
    for path, leaf in named:
        if path in adapters:
            check_fits(path, adapters[path], leaf)
            leaf = one(path, leaf, adapters[path])
        out.append(leaf)
    return jax.tree.unflatten(tree, out)


def _canonical(leaf: Any, adapter: Adapter) -> Array:
    if isinstance(leaf, QTensor):
        return qtensor.dequantize_canonical(leaf)
    return adapter.layout.to_canonical(leaf).astype(jnp.float32)


@jax.jit
def _merged(leaf: Any, adapter: Adapter) -> Array:
    w = _canonical(leaf, adapter) + adapter.update()
    return adapter.layout.from_canonical(w).astype(leaf.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _requantized(
    leaf: Any, adapter: Adapter, fmt: Format
) -> tuple[QTensor, Array, tuple[Array, ...]]:
    """Returns the merged weight, its largest magnitude and the energies of its report."""
    w, update = _canonical(leaf, adapter), adapter.update()
    merged = w + update
    factors = {}
    if isinstance(leaf, QTensor):
        factors = {"pre_scale": leaf.pre_scale, "act_scale": leaf.act_scale}
    logical = adapter.layout.from_canonical(merged)
    qt = qtensor.quantize_array(logical, fmt, adapter.layout, **factors)
    qt = dataclasses.replace(qt, dtype=jnp.dtype(leaf.dtype).name)
    stored = qtensor.dequantize_canonical(qt)
    energies = tuple(jnp.sum(x * x) for x in (w, update, merged, stored - merged))
    return qt, jnp.max(jnp.abs(merged)), (*energies, jnp.sum((stored - w) * update))
