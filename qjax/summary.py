"""Summary: what became of every leaf of a quantized tree, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from qjax.paths import path_str
from qjax.qtensor import QTensor, dequantize_array, is_qtensor
from qjax.tables import align


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf.

    Attributes:
      path: its parameter path.
      shape: logical shape.
      format: the format's short name, or the dtype of a leaf left as it is.
      nbytes: stored bytes.
      bits_per_weight: 8 * nbytes / size.
      sqnr_db: 10 log10(sum w^2 / sum (w - dequantized)^2); None if there was no reference, inf if
        the storage is lossless.
      quantized: whether the leaf is a QTensor.
      note: what a reader should know, e.g. a shorter last group.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    bits_per_weight: float
    sqnr_db: float | None
    quantized: bool
    note: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of a tree, in tree order, and their totals. Prints as a table."""

    rows: tuple[Row, ...]

    @property
    def totals(self) -> dict[str, Any]:
        nbytes = sum(r.nbytes for r in self.rows)
        size = sum(r.size for r in self.rows)
        quantized = [r for r in self.rows if r.quantized]
        quantized_size = sum(r.size for r in quantized)
        known = [r.sqnr_db for r in quantized if r.sqnr_db is not None]
        return {
            "leaves": len(self.rows),
            "quantized_leaves": len(quantized),
            "parameters": size,
            "quantized_parameters": quantized_size,
            "nbytes": nbytes,
            "bits_per_weight": 8 * nbytes / max(size, 1),
            "quantized_bits_per_weight": (
                8 * sum(r.nbytes for r in quantized) / max(quantized_size, 1)
            ),
            "min_sqnr_db": min(known, default=None),
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `json.dumps`; an infinite SQNR becomes the string "inf"."""

        def finite(value):
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        rows = [
            {k: finite(v) for k, v in dataclasses.asdict(r).items() if v != ""} for r in self.rows
        ]
        return {"rows": rows, "totals": {k: finite(v) for k, v in self.totals.items()}}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return self.table()

    def table(self, *, collapse: bool = True) -> str:
        """Returns the table as text.

        Args:
          collapse: whether leaves that differ only in the numbers of their path, as layers do,
            share a line; its SQNR is then the worst of them.
        """
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            path = re.sub(r"\d+", "*", row.path) if collapse else row.path
            groups.setdefault((path, row.shape, row.format, row.note), []).append(row)
        lines = [("leaf", "count", "shape", "format", "bits/w", "SQNR dB", "MB", "note")]
        for (path, shape, fmt, note), rows in groups.items():
            known = [r.sqnr_db for r in rows if r.sqnr_db is not None]
            size = sum(r.size for r in rows)
            nbytes = sum(r.nbytes for r in rows)
            lines.append(
                (
                    path if len(rows) > 1 else rows[0].path,
                    str(len(rows)),
                    "x".join(map(str, shape)) or "scalar",
                    fmt,
                    f"{8 * nbytes / max(size, 1):.3f}",
                    f"{min(known):.1f}" if known else "-",
                    f"{nbytes / 1e6:.2f}",
                    note,
                )
            )
        t = self.totals
        worst = t["min_sqnr_db"]
        lines.append(
            (
                "total",
                str(t["leaves"]),
                f"{t['parameters']:,}",
                f"{t['quantized_leaves']} quantized",
                f"{t['bits_per_weight']:.3f}",
                f"{worst:.1f}" if worst is not None else "-",
                f"{t['nbytes'] / 1e6:.2f}",
                f"{t['quantized_bits_per_weight']:.3f} bits/w where quantized",
            )
        )
        text = align(lines, right={1, 4, 5, 6})
        rule = "-" * max(map(len, text))
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def note_of(qt: QTensor) -> str:
    """Returns what is unusual about a QTensor's storage, or an empty string."""
    K = qt.canonical_shape[-2]
    g = qt.format.group_size
    notes = []
    if g is not None and K % g:
        notes.append(f"last group {K % g}")
    if qt.pad:
        notes.append(f"{qt.pad} padding codes")
    if qt.pre_scale is not None:
        notes.append("inputs scaled")
    if qt.act_scale is not None:
        notes.append("static activation step")
    if qt.perm is not None:
        notes.append("act-order")
    return ", ".join(notes)


def sqnr_db(signal: float, noise: float) -> float:
    """Returns 10 log10(signal / noise) of two energies; inf for no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


@jax.jit
def energies(w, qt):
    """Returns (sum w^2, sum (w - dequantize(qt))^2) in float32."""
    w = w.astype(jnp.float32)
    error = w - dequantize_array(qt).astype(jnp.float32)
    return jnp.sum(w * w), jnp.sum(error * error)


def row_of(path: str, leaf: Any, energy: tuple[float, float] | None, note: str = "") -> Row:
    """Describes one leaf; `energy` as returned by `energies`, if known (and not traced)."""
    if is_qtensor(leaf):
        sqnr = None
        if energy is not None and not isinstance(energy[0], Tracer):
            sqnr = sqnr_db(float(energy[0]), float(energy[1]))
        return Row(
            path, leaf.shape, str(leaf.format), leaf.nbytes, leaf.bits_per_weight, sqnr, True,
            note or note_of(leaf),
        )  # fmt: skip
    shape = tuple(getattr(leaf, "shape", ()))
    dtype = getattr(leaf, "dtype", None)
    size = math.prod(shape)
    nbytes = size * dtype.itemsize if dtype is not None else 0
    name = str(dtype) if dtype is not None else type(leaf).__name__
    return Row(path, shape, name, nbytes, 8 * nbytes / max(size, 1), None, False, note)


def summary(qparams: Any, reference: Any = None) -> Summary:
    """Describes every leaf of a quantized tree.

    Args:
      qparams: tree of QTensors and arrays, or of ShapeDtypeStructs, as from `jax.eval_shape`.
      reference: the float tree, for the SQNR column.

    Raises:
      ValueError: if `reference` has another structure.
    """
    leaves = jax.tree_util.tree_flatten_with_path(qparams, is_leaf=is_qtensor)[0]
    floats = [None] * len(leaves)
    if reference is not None:
        named = jax.tree_util.tree_flatten_with_path(reference)[0]
        theirs, ours = ([path_str(path) for path, _ in tree] for tree in (named, leaves))
        if theirs != ours:
            odd = sorted(set(theirs) ^ set(ours))[:4]
            raise ValueError(
                f"`reference` has {len(theirs)} leaves and `qparams` {len(ours)}, and they differ"
                f" in {odd}; pass the float tree that was quantized."
            )
        floats = [leaf for _, leaf in named]
    rows = []
    for (key_path, leaf), w in zip(leaves, floats, strict=True):
        energy = energies(w, leaf) if w is not None and is_qtensor(leaf) else None
        rows.append(row_of(path_str(key_path), leaf, energy))
    return Summary(tuple(rows))
