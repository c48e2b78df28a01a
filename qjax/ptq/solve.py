"""From the moments of an activation to the QTensors of its weights, and lines of the report."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.format import Format
from qjax.layout import Layout
from qjax.ptq import awq, columns, gptq, hqq, tiles
from qjax.ptq.grid import is_by_column, probe_format
from qjax.ptq.moments import Moments
from qjax.qtensor import QTensor, dequantize_canonical, quantize_array
from qjax.scale_range import check_range
from qjax.transform.calibrate import CalibrationError

# Candidates for λ. How much of H to believe depends on how many independent rows it
# was made of, which no formula knows: text is correlated. So it is measured on held-out rows.
_DAMPINGS = (0.03, 0.1, 0.3)
# Without data to choose by.
_DAMPING = 0.03
# Candidates for α, the part of the error made before a weight that it makes up for.
_STRENGTHS = (0.0, 0.5, 0.75, 1.0)
# Output columns on which the candidates are compared; they are exchangeable.
_PROBE_COLUMNS = 96
# GPTQ alone ranks them as what follows it would, in a fraction of the time.
_TRIAL = gptq.Options(sweeps=0, refit=False)
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
      rtn, final: on the calibration data, after rounding to nearest and at the end. Sequentially,
        less the error that the inputs alone make: negative if the weight makes up for them.
      gptq: after GPTQ alone, against what it solved for, of all weights solved with this one.
      held_out_rtn, held_out: the first and the last on held-out data; None without.
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

    def move(w: Array) -> Array:
        return jax.scipy.linalg.cho_solve(factor, jnp.dot(shift, w, precision=_HIGHEST))

    return w + strength * tiles.each(move, w)


class Item(NamedTuple):
    """A weight to solve.

    Attributes:
      name: for the report.
      w: the weight, in its own layout.
      format, layout: of the result.
      act_scale: static step of the activation's codes, or None.
    """

    name: str
    w: Array
    format: Format
    layout: Layout
    act_scale: Float[Array, "*lead"] | None = None


def solve_weights(
    items: Sequence[Item],
    train: Moments,
    held_out: Moments | None,
    options: SolverOptions,
    *,
    pre_scale: Float[Array, "*lead K"] | None = None,
) -> list[tuple[QTensor, Solved]]:
    """Quantizes weights that read one activation; returns QTensors and what happened.

    Weights of one format whose columns know nothing of each other are solved as one; where those
    lie on several devices, each device solves its own.

    Args:
      items: the weights.
      train, held_out: moments of disjoint data, of the input before `pre_scale`.
      options: see `SolverOptions`.
      pre_scale: smoothing of the input that stays at the weights.
    """
    counts = columns.fetch(train.rows)
    empty = [items[0].name + "".join(f"[{i}]" for i in at) for at in np.argwhere(counts == 0)]
    if empty and options.unseen == "error":
        raise CalibrationError(
            f"{empty[0]}: no calibration token reached it ({len(empty)} such in this weight). Use"
            ' more data, skip it, or round it to nearest with `unseen = "nearest"` in the recipe.'
        )
    if pre_scale is not None:
        train = train.scaled(pre_scale)
        held_out = None if held_out is None else held_out.scaled(pre_scale)
    factors = columns.automatic(pre_scale)
    weights = [_canonical(columns.automatic(i.w), i.layout, factors) for i in items]
    train, held_out = columns.automatic((train, held_out))
    together: dict[Any, list[int]] = {}
    for i, (item, w) in enumerate(zip(items, weights, strict=True)):
        alike = (item.format, columns.split_of(w))
        together.setdefault(alike if is_by_column(item.format) else i, []).append(i)
    out: dict[int, tuple[QTensor, Solved]] = {}
    for members in together.values():
        group, own = [items[i] for i in members], [weights[i] for i in members]
        made = _solve_together(group, own, train, held_out, options, pre_scale)
        out.update(zip(members, made, strict=True))
    return [out[i] for i in range(len(items))]


def _solve_together(
    items: Sequence[Item],
    weights: Sequence[Array],
    train: Moments,
    held_out: Moments | None,
    options: SolverOptions,
    pre_scale: Array | None,
) -> list[tuple[QTensor, Solved]]:
    start = time.perf_counter()
    *lead, K, _ = weights[0].shape
    fmt = items[0].format.fit(K)
    counts = columns.fetch(train.rows)

    h, shift = columns.beside(_means(train), weights[0])
    h_held_out, shift_held_out = None, None
    if held_out is not None:
        h_held_out, shift_held_out = columns.beside(_means(held_out), weights[0])
    if lead:  # which tokens reach an expert differs between the streams
        shift = shift_held_out = None
    probe = columns.sample(weights, _PROBE_COLUMNS)
    damping, strength = options.damping, 0.0
    if damping is None:
        damping = _DAMPING
        if h_held_out is not None:
            candidates = jnp.asarray(_DAMPINGS)
            damping = gptq.choose_damping(probe, h, h_held_out, fmt, candidates, _TRIAL)
    move, moved_by = None, ()
    if options.asymmetric and shift is not None:
        strength = 0.5
        if h_held_out is not None and shift_held_out is not None:
            strength = choose_strength(probe, h, shift, h_held_out, shift_held_out, fmt, damping)
        move, moved_by = target, (shift, strength)
    how = gptq.Options(
        # All sweeps: columns on another device cannot be asked whether they still gain.
        act_order=options.act_order, sweeps=options.sweeps, refit=options.refit, tolerance=0.0
    )  # fmt: skip
    parts, d = columns.solve(weights, h, fmt, how, damping=damping, move=move, extra=moved_by)
    d = jax.tree.map(columns.fetch, d)
    importance = _diagonal(h)
    rounded = [_round_to_nearest(v, fmt, _plain(v), importance=importance) for v in weights]
    notes = []
    if (missing := int(np.sum(counts == 0))) > 0:
        # Its H says nothing, not even which scales are good.
        has = jnp.asarray(counts > 0)
        blind = [_round_to_nearest(v, fmt, _plain(v)) for v in weights]
        parts = [_where(has, q, r) for q, r in zip(parts, blind, strict=True)]
        notes.append(f"{missing} of {counts.size} without data, rounded to nearest")
    fewest = int(np.min(counts, where=counts > 0, initial=K))
    if fewest < K:
        notes.append(f"H has rank at most {fewest} of {K}: use more calibration tokens")
    if float(np.max(d.damping / columns.fetch(damping))) > 1.01:
        notes.append("damping raised until H factored")

    judged = [
        _judge(v, r, q, h, shift, h_held_out, shift_held_out)
        for v, r, q in zip(weights, rounded, parts, strict=True)
    ]
    seconds = (time.perf_counter() - start) / len(items)
    out = []
    for item, w, q, errors in zip(items, weights, parts, jax.device_get(judged), strict=True):
        check_range(item.name, w, q)
        rtn, final, held_rtn, held_final = (None if e is None else float(e) for e in errors)
        assert rtn is not None
        assert final is not None
        q = dataclasses.replace(
            q,
            layout=item.layout,
            dtype=jnp.dtype(item.w.dtype).name,
            pre_scale=pre_scale,
            act_scale=item.act_scale,
        )
        what = Solved(
            item.name, rtn, float(np.mean(d.gptq)), final, held_rtn, held_final,
            float(np.max(d.damping)), strength, int(np.min(counts)), int(np.sum(d.dead)), seconds,
            "; ".join(notes),
        )  # fmt: skip
        out.append((columns.placed(q, item.w), what))
    return out


def choose_strength(
    w: Float[Array, "K N"],
    h: Float[Array, "K K"],
    shift: Float[Array, "K K"],
    h_held_out: Float[Array, "K K"],
    shift_held_out: Float[Array, "K K"],
    fmt: Format,
    damping: Any,
) -> float:
    """Returns the strength α whose solution is nearest to the float outputs on held-out data."""
    errors = _strength_errors(
        w, h, shift, h_held_out, shift_held_out, probe_format(fmt), jnp.asarray(damping)
    )
    return _STRENGTHS[int(np.argmin(columns.fetch(errors)))]


@functools.partial(jax.jit, static_argnames="fmt")
def _strength_errors(probe, h, shift, h_held_out, shift_held_out, fmt: Format, damping: Array):
    # Columns do not know of each other: all candidates are solved as the columns of one weight.
    moved = target(probe, h, shift, 1.0, damping) - probe
    wide = jnp.concatenate([probe + s * moved for s in _STRENGTHS], -1)
    layout = Layout.parse("kn", wide.shape)
    qt, _ = gptq.solve(wide, h, fmt, layout, _TRIAL, damping=damping)
    w = jnp.tile(probe, (1, len(_STRENGTHS)))
    d = w - dequantize_canonical(qt)
    error = jnp.sum(d * jnp.dot(h_held_out, d, precision=_HIGHEST), 0)
    error += 2 * jnp.sum(d * jnp.dot(shift_held_out, w, precision=_HIGHEST), 0)
    return jnp.sum(error.reshape(len(_STRENGTHS), -1), 1)


@jax.jit
def _means(m: Moments) -> tuple[Array, Array | None]:
    return m.hessian, m.shift


@jax.jit
def _judge(w, nearest, qt, h, shift, h_held_out, shift_held_out):
    """Returns the errors of rounding to nearest and of `qt`, on both sets of data."""
    train = [jnp.mean(relative_error(w, q, h, shift)) for q in (nearest, qt)]
    if h_held_out is None:
        return (*train, None, None)
    held_out = [jnp.mean(relative_error(w, q, h_held_out, shift_held_out)) for q in (nearest, qt)]
    return (*train, *held_out)


def _plain(w: Array) -> Layout:
    return Layout.parse("kn", w.shape)


def _where(has: Array, a: QTensor, b: QTensor) -> QTensor:
    """Returns a where `has` [*lead] is true, else b."""
    wide = lambda x: has.reshape(*has.shape, *[1] * (x.ndim - has.ndim))
    return jax.tree.map(lambda x, y: jnp.where(wide(x), x, y), a, b)


def _diagonal(h: Array) -> Array:
    return jnp.diagonal(h, axis1=-2, axis2=-1)


@functools.partial(jax.jit, static_argnums=1)
def _canonical(w: Array, layout: Layout, pre_scale: Array | None) -> Array:
    """Returns the float32 weight as it is to be rounded, [*lead, K, N]."""
    w = layout.to_canonical(w).astype(jnp.float32)
    return w if pre_scale is None else w / pre_scale[..., :, None]


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
      name, fmt, layout, pre_scale, act_scale: as for `solve_weights`.
      w: the weight in its own layout.
      h: second moments of its input before `pre_scale`, or None: then errors are those of the
        weight alone.
      method: "nearest" or "hqq".
      clip: whether groups are clipped where that lowers the output error; needs `h`.
    """
    start = time.perf_counter()
    canonical = _canonical(w, layout, pre_scale)
    if pre_scale is not None and h is not None:
        h = h * (pre_scale[..., :, None] * pre_scale[..., None, :])
    K = canonical.shape[-2]
    fmt = fmt.fit(K)
    plain = Layout.parse("kn", canonical.shape)
    importance = None if h is None else _diagonal(h)
    rtn = _round_to_nearest(canonical, fmt, plain, importance=importance)
    if method == "hqq":
        qt = hqq.solve(canonical, fmt, plain)
    elif clip:
        assert h is not None
        qt, _ = awq.solve(canonical, h, fmt, plain)
    else:
        qt = rtn
    check_range(name, canonical, qt)
    judge = h if h is not None else jnp.broadcast_to(jnp.eye(K), (*canonical.shape[:-2], K, K))
    before, after = (float(jnp.mean(relative_error(canonical, q, judge))) for q in (rtn, qt))
    qt = dataclasses.replace(
        qt, layout=layout, dtype=jnp.dtype(w.dtype).name, pre_scale=pre_scale, act_scale=act_scale
    )
    note = "" if h is not None else "error of the weight alone"
    seconds = time.perf_counter() - start
    return qt, Solved(name, before, before, after, None, None, 0.0, 0.0, 0, 0, seconds, note)
