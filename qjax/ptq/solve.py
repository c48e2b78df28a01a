"""One weight: from its calibration moments to a QTensor, and a line of the report."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.format import Format
from qjax.layout import Layout
from qjax.ptq import awq, gptq
from qjax.ptq.moments import Moments
from qjax.qtensor import QTensor, dequantize_canonical, quantize_array
from qjax.transform.calibrate import CalibrationError

# Candidates for λ. How much of H to believe depends on how many independent rows it
# was made of, which no formula knows: text is correlated. So it is measured on held-out rows.
_DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
# Without data to choose by.
_DAMPING = 0.03
# Candidates for α, the part of the error made before a weight that it makes up for.
_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Output columns on which the candidates are compared; they are exchangeable.
_PROBE_COLUMNS = 96
_HIGHEST = jax.lax.Precision.HIGHEST


class SolverOptions(NamedTuple):
    """How weights are solved.

    Attributes:
      method: "rtn" rounds to nearest, "gptq" solves on second moments.
      damping: λ; None: chosen on held-out data for each weight (0.03 if there is none).
      sweeps: rounds of coordinate descent after GPTQ; 0: the paper's GPTQ.
      refit: whether scales are refit between them.
      act_order: whether GPTQ visits inputs by decreasing energy.
      asymmetric: whether each weight also makes up for errors before it (sequential only).
      unseen: "error" or "nearest": what becomes of a weight that no token reaches.
    """

    method: str = "gptq"
    damping: float | None = None
    sweeps: int = 4
    refit: bool = True
    act_order: bool = True
    asymmetric: bool = True
    unseen: str = "error"


@dataclasses.dataclass(frozen=True)
class Solved:
    """What a solver made of one weight. Errors are squared and relative, ‖X̂(W-Q)‖² / ‖X̂W‖².

    Attributes:
      path: of the parameter, with the index of a slice; means over axes solved together.
      rtn, gptq, final: on the calibration data, after rounding to nearest, after GPTQ, at the end.
        With `strength` above 0, GPTQ's and the final errors are against another target than W.
      held_out_rtn, held_out: the first and the last on held-out data; None without. With a
        strength, less the error that the inputs alone make.
      damping: λ, see `gptq.Options`.
      strength: α, see `qjax.ptq.sequential`.
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
    strength: float
    rows: int
    dead: int
    seconds: float
    note: str = ""

    def line(self) -> str:
        """Returns a short text for a progress report."""
        note = f" ({self.note})" if self.note else ""
        return f"{self.path}: {self.rtn:.5f} > {self.final:.5f} in {self.seconds:.1f} s{note}"


# Made once, so that equal shapes share a compilation.
_round_to_nearest = jax.jit(quantize_array, static_argnums=(1, 2))


def _trace(a: Array, h: Array, b: Array) -> Array:
    """Returns tr(aᵀ h b), one for each leading index."""
    hb = jnp.einsum("...kl,...ln->...kn", h, b, precision=_HIGHEST)
    return jnp.sum(a * hb, (-2, -1))


@jax.jit
def relative_error(
    w: Float[Array, "*lead K N"],
    qt: QTensor,
    h: Float[Array, "*lead K K"],
    shift: Float[Array, "*lead K K"] | None = None,
) -> Float[Array, "*lead"]:
    """Returns (‖XW - X̂Q‖² - ‖XW - X̂W‖²) / ‖X̂W‖², from H and the shift C - H.

    Without a shift that is tr(DᵀHD) / tr(WᵀHW), D = W - Q. With it, it may be negative: then Q is
    better than the float weight on these inputs.
    """
    d = w - dequantize_canonical(qt)
    error = _trace(d, h, d)
    if shift is not None:
        error = error + 2 * _trace(d, shift, w)
    total = _trace(w, h, w)
    return error / jnp.where(total == 0, 1.0, total)


@jax.jit
def target(
    w: Float[Array, "K N"],
    h: Float[Array, "K K"],
    shift: Float[Array, "K K"],
    strength: Float[Array, ""],
    damping: Float[Array, ""],
) -> Float[Array, "K N"]:
    """Returns W + α (H + λ diag H)⁻¹ (C - H) W: see `qjax.ptq.sequential`."""
    diagonal = jnp.diagonal(h)
    mean = jnp.mean(diagonal)
    # Dead inputs need something on the diagonal; nothing is moved onto them, C - H is 0 there.
    damped = h + jnp.diag(damping * diagonal + 1e-6 * mean + (mean <= 0))
    factor = jax.scipy.linalg.cho_factor(damped, lower=True)
    move = jnp.dot(shift, w, precision=_HIGHEST)
    return w + strength * jax.scipy.linalg.cho_solve(factor, move)


def _probe(w: Array, fmt: Format) -> tuple[np.ndarray, Format]:
    """Returns columns to try candidates on, and the format that means the same for them."""
    N = w.shape[-1]
    columns = np.unique(np.linspace(0, N - 1, min(N, _PROBE_COLUMNS)).astype(int))
    # Scales shared by columns, or quantized again, mean something else on a part of the columns.
    fmt = dataclasses.replace(fmt, group_columns=1) if fmt.group_columns != 1 else fmt
    fmt = dataclasses.replace(fmt, scale="float32") if isinstance(fmt.scale, Format) else fmt
    return columns, fmt


def choose_strength(w: Any, train: Moments, held_out: Moments, fmt: Format, damping: Any) -> float:
    """Returns the strength α whose solution is nearest to the float outputs on held-out data."""
    columns, fmt = _probe(w, fmt)
    probe = w[..., columns]
    # Columns do not know of each other: all candidates are solved as the columns of one weight.
    targets = [target(probe, train.hessian, train.shift, s, damping) for s in _STRENGTHS]
    wide = jnp.concatenate(targets, -1)
    layout = Layout.parse("kn", wide.shape)
    qt, _ = gptq.solve(wide, train.hessian, fmt, layout, gptq.Options(sweeps=1), damping=damping)
    errors = _column_errors(jnp.tile(probe, (1, len(_STRENGTHS))), qt, held_out)
    return _STRENGTHS[int(np.argmin(np.asarray(errors).reshape(len(_STRENGTHS), -1).sum(1)))]


@jax.jit
def _column_errors(w: Array, qt: QTensor, judge: Moments) -> Float[Array, " N"]:
    """Returns ‖XW - X̂Q‖² - ‖XW - X̂W‖² of every column."""
    d = w - dequantize_canonical(qt)
    error = jnp.sum(d * jnp.dot(judge.hessian, d, precision=_HIGHEST), 0)
    if judge.shift is None:
        return error
    return error + 2 * jnp.sum(d * jnp.dot(judge.shift, w, precision=_HIGHEST), 0)


@functools.partial(jax.jit, static_argnums=1)
def _canonical(w: Array, layout: Layout) -> Array:
    return layout.to_canonical(w).astype(jnp.float32)


def solve_weight(
    name: str,
    w: Array,
    fmt: Format,
    layout: Layout,
    train: Moments,
    held_out: Moments | None,
    options: SolverOptions,
    *,
    pre_scale: Float[Array, "*lead K"] | None = None,
    act_scale: Float[Array, "*lead"] | None = None,
) -> tuple[QTensor, Solved]:
    """Quantizes one weight on the moments of its input; returns the QTensor and what happened.

    Args:
      name: for the report.
      w: the weight in its own layout.
      fmt, layout: of the result.
      train, held_out: moments of disjoint data, of the input before `pre_scale`.
      options: see `SolverOptions`.
      pre_scale: smoothing of the input that stays at the weight.
      act_scale: static step of the activation's codes.
    """
    start = time.perf_counter()
    counts = np.asarray(train.rows)
    empty = [name + "".join(f"[{i}]" for i in at) for at in np.argwhere(counts == 0)]
    if empty and options.unseen == "error":
        raise CalibrationError(
            f"{empty[0]}: no calibration token reached it ({len(empty)} such in this weight). Use"
            ' more data, skip it, or round it to nearest with `unseen = "nearest"` in the recipe.'
        )
    canonical = _canonical(w, layout)
    if pre_scale is not None:
        canonical = canonical / pre_scale[..., :, None]
        train = train.scaled(pre_scale)
        held_out = None if held_out is None else held_out.scaled(pre_scale)
    lead = canonical.shape[:-2]
    K = canonical.shape[-2]
    fmt = fmt.fit(K)
    h = train.hessian
    damping, strength = options.damping, 0.0
    if damping is None:
        damping = _DAMPING
        if held_out is not None:
            candidates = jnp.asarray(_DAMPINGS)
            damping = gptq.choose_damping(canonical, h, held_out.hessian, fmt, candidates)
    solved_for, plain = canonical, Layout.parse("kn", canonical.shape)
    if options.asymmetric and train.shift is not None and not lead:
        strength = 0.5
        if held_out is not None:
            strength = choose_strength(canonical, train, held_out, fmt, damping)
        solved_for = target(canonical, h, train.shift, strength, damping)
    how = gptq.Options(act_order=options.act_order, sweeps=options.sweeps, refit=options.refit)
    qt, d = gptq.solve(solved_for, h, fmt, plain, how, damping=damping)
    if empty:  # their H says nothing, not even which scales are good
        plainly = _round_to_nearest(canonical, fmt, plain)
        has = jnp.asarray(counts > 0)
        qt = jax.tree.map(
            lambda a, b: jnp.where(has.reshape(*has.shape, *[1] * (a.ndim - has.ndim)), a, b),
            qt,
            plainly,
        )
    rows = int(np.min(counts))
    notes = []
    if empty:
        notes.append(f"{len(empty)} of {counts.size} without data, rounded to nearest")
    if int(np.min(counts, where=counts > 0, initial=K)) < K:
        seen = int(np.min(counts, where=counts > 0, initial=K))
        notes.append(f"H has rank at most {seen} of {K}: use more calibration tokens")
    if float(np.max(np.asarray(d.damping) / np.asarray(damping))) > 1.01:
        notes.append("damping raised until H factored")
    rtn_held_out = final_held_out = None
    if held_out is not None:
        diagonal = jnp.diagonal(h, axis1=-2, axis2=-1)
        rtn = _round_to_nearest(canonical, fmt, plain, importance=diagonal)
        judge = functools.partial(relative_error, canonical, h=held_out.hessian)
        shift = held_out.shift if not lead else None
        rtn_held_out = float(jnp.mean(judge(rtn, shift=shift)))
        final_held_out = float(jnp.mean(judge(qt, shift=shift)))
    mean = lambda a: float(np.mean(np.asarray(a)))
    qt = dataclasses.replace(qt, layout=layout, dtype=jnp.dtype(w.dtype).name)
    qt = dataclasses.replace(qt, pre_scale=pre_scale, act_scale=act_scale)
    solved = Solved(
        name, mean(d.rtn), mean(d.gptq), mean(d.final), rtn_held_out, final_held_out,
        float(np.max(np.asarray(d.damping))), strength, rows, int(np.sum(np.asarray(d.dead))),
        time.perf_counter() - start, "; ".join(notes),
    )  # fmt: skip
    return qt, solved


def round_weight(
    name: str,
    w: Array,
    fmt: Format,
    layout: Layout,
    h: Float[Array, "*lead K K"] | None,
    *,
    method: str = "nearest",
    clip: bool = False,
    pre_scale: Float[Array, "*lead K"] | None = None,
    act_scale: Float[Array, "*lead"] | None = None,
) -> tuple[QTensor, Solved]:
    """Rounds one weight without solving; returns the QTensor and what happened.

    Args:
      name, fmt, layout, pre_scale, act_scale: as for `solve_weight`.
      w: the weight in its own layout.
      h: second moments of its input before `pre_scale`, or None: then errors are those of the
        weight alone.
      method: "nearest" or "hqq".
      clip: whether groups are clipped where that lowers the output error; needs `h`.
    """
    start = time.perf_counter()
    canonical = _canonical(w, layout)
    if pre_scale is not None:
        canonical = canonical / pre_scale[..., :, None]
        if h is not None:
            h = h * (pre_scale[..., :, None] * pre_scale[..., None, :])
    K = canonical.shape[-2]
    fmt = fmt.fit(K)
    plain = Layout.parse("kn", canonical.shape)
    importance = None if h is None else jnp.diagonal(h, axis1=-2, axis2=-1)
    rtn = _round_to_nearest(canonical, fmt, plain, importance=importance)
    if method == "hqq":
        from qjax.ptq import hqq

        qt = hqq.solve(canonical, fmt, plain)
    elif clip:
        assert h is not None
        qt, _ = awq.solve(canonical, h, fmt, plain)
    else:
        qt = rtn
    judge = h if h is not None else jnp.broadcast_to(jnp.eye(K), (*canonical.shape[:-2], K, K))
    before, after = (float(jnp.mean(relative_error(canonical, q, judge))) for q in (rtn, qt))
    qt = dataclasses.replace(
        qt, layout=layout, dtype=jnp.dtype(w.dtype).name, pre_scale=pre_scale, act_scale=act_scale
    )
    note = "" if h is not None else "error of the weight alone"
    seconds = time.perf_counter() - start
    return qt, Solved(name, before, before, after, None, None, 0.0, 0.0, 0, 0, seconds, note)
