"""Quantization with data: calibrate a function, solve every weight, report what came of it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.format import Format
from qjax.layout import Layout
from qjax.ptq import gptq
from qjax.qtensor import dequantize_canonical, quantize_array
from qjax.tables import align
from qjax.transform.calibrate import Calibration, calibrate
from qjax.transform.usage import Usage

# Candidates for λ. How much of H to believe depends on how many independent rows it
# was made of, which no formula knows: text is correlated. So it is measured on held-out rows.
_DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# Output columns on which the candidates are compared; they are exchangeable.
_PROBE_COLUMNS = 96


@dataclasses.dataclass(frozen=True)
class Solved:
    """What a solver made of one weight. Errors are squared and relative, ‖X(W-Q)‖² / ‖XW‖².

    Attributes:
      path: of the parameter; a stacked weight has the means over its stack.
      rtn, gptq, final: on the calibration data, after rounding to nearest, after GPTQ, at the end.
      held_out_rtn, held_out: the first and the last on held-out data; None without.
      damping: λ, see `gptq.Options`.
      rows: activations that H was made of.
      dead: inputs that were always zero.
      seconds: spent on it, compilation included.
      note: fallbacks and warnings, e.g. a rank-deficient H.
    """

    path: str
    rtn: float
    gptq: float
    final: float
    held_out_rtn: float | None
    held_out: float | None
    damping: float
    rows: int
    dead: int
    seconds: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class SolveReport:
    """One `Solved` for each weight, in tree order. Prints as a table."""

    solved: tuple[Solved, ...]

    def to_json(self) -> str:
        return json.dumps([dataclasses.asdict(s) for s in self.solved], indent=2)

    def __str__(self) -> str:
        lines = [("weight", "rtn", "gptq", "final", "held-out", "damping", "s", "note")]
        for s in self.solved:
            held = "-" if s.held_out is None else f"{s.held_out_rtn:.5f} > {s.held_out:.5f}"
            lines.append(
                (
                    s.path,
                    f"{s.rtn:.5f}",
                    f"{s.gptq:.5f}",
                    f"{s.final:.5f}",
                    held,
                    f"{s.damping:.3g}",
                    f"{s.seconds:.1f}",
                    s.note,
                )
            )
        return "\n".join(align(lines))


# Made once, so that equal shapes share a compilation.
_round_to_nearest = jax.jit(quantize_array, static_argnums=(1, 2))


@jax.jit
def _relative_error(w: Any, qt: Any, h: Any) -> Any:
    """Returns tr(DᵀHD) / tr(WᵀHW) of canonical w, one for each leading index."""
    d = w - dequantize_canonical(qt)
    hd = jnp.einsum("...kl,...ln->...kn", h, d, precision=jax.lax.Precision.HIGHEST)
    hw = jnp.einsum("...kl,...ln->...kn", h, w, precision=jax.lax.Precision.HIGHEST)
    total = jnp.sum(w * hw, (-2, -1))
    return jnp.sum(d * hd, (-2, -1)) / jnp.where(total == 0, 1.0, total)


def choose_damping(
    w: Any, h: Any, h_held_out: Any, fmt: Format, dampings: Sequence[float] = _DAMPINGS
) -> float:
    """Returns the damping whose GPTQ solution has the least error on held-out second moments.

    Args:
      w: canonical weight [*lead, K, N]; some of its columns are tried.
      h, h_held_out: second moments [*lead, K, K] of disjoint data.
    """
    N = w.shape[-1]
    columns = np.unique(np.linspace(0, N - 1, min(N, _PROBE_COLUMNS)).astype(int))
    probe = w[..., columns]
    layout = Layout.parse("kn", probe.shape)
    # Scales shared by columns, or quantized again, mean something else on a part of the columns.
    fmt = dataclasses.replace(fmt, group_columns=1) if fmt.group_columns != 1 else fmt
    fmt = dataclasses.replace(fmt, scale="float32") if isinstance(fmt.scale, Format) else fmt
    errors = []
    for damping in dampings:
        qt, _ = gptq.solve(probe, h, fmt, layout, gptq.Options(damping=damping, sweeps=1))
        errors.append(float(jnp.mean(_relative_error(probe, qt, h_held_out))))
    return dampings[int(np.argmin(errors))]


def solve_weight(
    path: str,
    w: Any,
    fmt: Format,
    layout: Layout,
    train: Calibration,
    held_out: Calibration | None,
    options: gptq.Options,
) -> tuple[Any, Solved]:
    """Quantizes one weight on its own statistics; returns the QTensor and what happened."""
    start = time.perf_counter()
    site = train[path]
    h = site.stats["hessian"]
    canonical = layout.to_canonical(jnp.asarray(w)).astype(jnp.float32)
    K = canonical.shape[-2]
    h_held_out = held_out[path].stats["hessian"] if held_out is not None else None
    if h_held_out is not None:
        damping = choose_damping(canonical, h, h_held_out, fmt.fit(K))
        options = options._replace(damping=damping)
    qt, d = gptq.solve(w, h, fmt, layout, options)
    rows = int(np.min(np.asarray(site.rows)))
    notes = []
    if rows < K:
        notes.append(f"H has rank at most {rows} of {K}: use more calibration tokens")
    if float(np.max(np.asarray(d.damping))) > options.damping * 1.01 + 1e-6:
        notes.append("damping raised until H factored")
    rtn_held_out = final_held_out = None
    if h_held_out is not None:
        diagonal = jnp.diagonal(h, axis1=-2, axis2=-1)
        rtn = _round_to_nearest(w, fmt, layout, importance=diagonal)
        rtn_held_out = float(jnp.mean(_relative_error(canonical, rtn, h_held_out)))
        final_held_out = float(jnp.mean(_relative_error(canonical, qt, h_held_out)))
    mean = lambda a: float(np.mean(np.asarray(a)))
    solved = Solved(
        path, mean(d.rtn), mean(d.gptq), mean(d.final), rtn_held_out, final_held_out,
        float(np.max(np.asarray(d.damping))), rows, int(np.sum(np.asarray(d.dead))),
        time.perf_counter() - start, "; ".join(notes),
    )  # fmt: skip
    return qt, solved


def split_batches(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Returns (train, held out): every fifth batch is held out, if there are two or more."""
    held_out = list(batches[1::5]) if len(batches) > 1 else []
    train = [b for i, b in enumerate(batches) if not held_out or i % 5 != 1]
    return train, held_out


def statistics(
    fn: Callable,
    params: Any,
    batches: Sequence[Any],
    paths: Sequence[str],
    usage: Usage,
    report: Callable[[str], None] | None,
) -> tuple[Calibration, Calibration | None]:
    """Returns the second moments on the calibration batches and on the held-out ones."""
    train, held_out = split_batches(batches)
    shared = {"usage": usage, "paths": list(paths)}
    first = calibrate(fn, params, train, ("hessian",), report=report, **shared)
    if not held_out:
        return first, None
    return first, calibrate(fn, params, held_out, ("hessian",), report=None, **shared)
