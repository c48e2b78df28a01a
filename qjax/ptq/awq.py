"""AWQ: scales of input channels, and clipped groups, that minimize a layer's output error.

Lin et al., 2023 (arXiv:2306.00978). Their W is [N, K], ours [K, N] with y = x @ W. A weight is
stored as Q(diag(s) W) and read by x / s, so that its error is (eq. 4)

  D = W - diag(1/s) Q(diag(s) W),   J(s) = tr(Dᵀ H D),   H = XᵀX / n   [K, K]

which is the mean squared output error itself: no forward pass is needed to try an s. Channels with
large inputs get a large s, hence a small error, at the cost of others in their group (section 3.2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from qjax import scales
from qjax.format import Format
from qjax.layout import DEFAULT, Layout
from qjax.qtensor import QTensor, dequantize_canonical, quantize_array
from qjax.transform.fold import tie
from qjax.transform.scaling import Piece

_HIGHEST = lax.Precision.HIGHEST

# A factor beyond these gains nothing and may leave the range of float16 parameters.
_LARGEST = 1e4


class Found(NamedTuple):
    """The result of `search`, as arrays of the group's leading shape.

    Attributes:
      scale: s [*lead, K].
      alpha: its exponent; 0 with `by_weight` False: s = 1.
      by_weight: whether s is also divided by max |w|^(1 - alpha).
      rtn, final: J(1) and J(s), relative to the squared output tr(WᵀHW) of all weights.
    """

    scale: Float[Array, "*lead K"]
    alpha: Float[Array, "*lead"]
    by_weight: Bool[Array, "*lead"]
    rtn: Float[Array, "*lead"]
    final: Float[Array, "*lead"]


class Clipped(NamedTuple):
    """The result of `clip`.

    Attributes:
      weight: canonical [*lead, K, N], every group clamped to its range. Quantizing it with diag(H)
        as `importance` gives the scales that were found.
      fraction: [*lead, G, C], the part of every group's range that is left.
      before, after: [*lead], sum over groups of tr(D_gᵀ H_gg D_g), relative to that of W.
    """

    weight: Float[Array, "*lead K N"]
    fraction: Float[Array, "*lead G C"]
    before: Float[Array, "*lead"]
    after: Float[Array, "*lead"]


class Diagnostics(NamedTuple):
    """J(Q) / J(0) after rounding to nearest, and of what `solve` returns; [*lead]."""

    rtn: Float[Array, "*lead"]
    final: Float[Array, "*lead"]


def moments_after(H: Float[Array, "*lead K K"], s: Float[Array, "*lead K"]) -> Array:
    """Returns the second moments of x / s, given those of x."""
    return H / (s[..., :, None] * s[..., None, :])


def objective(D: Float[Array, "*lead K N"], H: Float[Array, "*lead K K"]) -> Float[Array, "*lead"]:
    """Returns tr(DᵀHD)."""
    return jnp.sum(D * jnp.matmul(H, D, precision=_HIGHEST), (-2, -1))


def _diagonal(H: Array) -> Array:
    return jnp.diagonal(H, axis1=-2, axis2=-1)


def _trial(fmt: Format) -> Format:
    """Returns the format with the rule that its search for scales starts from."""
    return dataclasses.replace(fmt, rule=None) if fmt.rule in ("mse", "ggml") else fmt


def _rounded(w: Array, H: Array, fmt: Format) -> Array:
    """Returns Q(w) in float32, for canonical w whose input has second moments H."""
    return dequantize_canonical(quantize_array(w, fmt, importance=_diagonal(H)))


@functools.partial(jax.jit, static_argnames=("fmt", "grid", "tied"))
def search(
    weights: Sequence[Float[Array, "*lead K N"]],
    H: Float[Array, "*lead K K"],
    mean_abs: Float[Array, "*lead K"],
    fmt: Format | tuple[Format, ...],
    *,
    grid: int = 20,
    tied: tuple[Piece, ...] = (),
) -> Found:
    """Returns the scales of a group's input channels that minimize the sum of J over its weights.

    With a = mean |x| and w = max |W| over all columns of all weights, the candidates are

      s = 1,   s = a^alpha,   s = a^alpha / w^(1 - alpha),   alpha = 0, 1/grid, ..., 1

    each divided by sqrt(max s * min s), as the paper's code does, then tied. As s = 1 is among
    them, the result is never worse than rounding to nearest on this data. Leading indices choose
    for themselves, unless ties span them. Where the rule of a format is itself a search, candidates
    are compared under the rule that it starts from, and only the best is judged by it.

    Args:
      weights: canonical weights of one `fold.Group`, in any float type.
      H: second moments of their common input, sum xᵀx / n.
      mean_abs: mean magnitudes of that input.
      fmt: how they will be stored; a tuple if not all alike. Static.
      grid: steps of alpha. Static.
      tied: `group.tied` of the group. Static.

    Raises:
      ValueError: if there are not as many formats as weights.
    """
    formats = fmt if isinstance(fmt, tuple) else (fmt,) * len(weights)
    if len(formats) != len(weights):
        raise ValueError(
            f"`fmt` must be one Format or one for each weight, got {len(formats)} for"
            f" {len(weights)} weights."
        )
    weights = [w.astype(jnp.float32) for w in weights]
    H, mean_abs = H.astype(jnp.float32), mean_abs.astype(jnp.float32)
    lead, K = mean_abs.shape[:-1], mean_abs.shape[-1]
    spans_lead = any(p.stride >= K for p in tied)
    formats = [f.fit(K) for f in formats]

    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(w), -1) for w in weights])
    alive = mean_abs > 0
    log_a = jnp.log(jnp.where(alive, mean_abs, 1.0))
    floor = 1e-5 * jnp.max(largest, -1, keepdims=True)
    log_w = jnp.log(jnp.maximum(jnp.maximum(largest, floor), jnp.finfo(jnp.float32).tiny))

    def candidate(alpha, by_weight):
        log_s = alpha * log_a - jnp.where(by_weight, 1 - alpha, 0.0) * log_w
        high = jnp.max(jnp.where(alive, log_s, -jnp.inf), -1, keepdims=True)
        low = jnp.min(jnp.where(alive, log_s, jnp.inf), -1, keepdims=True)
        # A channel that was always zero says nothing; it keeps its weights.
        s = jnp.exp(jnp.where(alive, log_s - (high + low) / 2, 0.0))
        return tie(jnp.clip(s, 1 / _LARGEST, _LARGEST), tied)

    def loss(s, formats):
        after = moments_after(H, s)
        total = jnp.zeros(lead, jnp.float32)
        for w, f in zip(weights, formats, strict=True):
            D = w - _rounded(w * s[..., None], after, f) / s[..., None]
            total = total + objective(D, H)
        return jnp.broadcast_to(jnp.sum(total), lead) if spans_lead else total

    def least(new, best):
        better = new[-1] < best[-1]
        return jax.tree.map(
            lambda a, b: jnp.where(better.reshape(*lead, *[1] * (a.ndim - len(lead))), a, b),
            new,
            best,
        )

    trials = [_trial(f) for f in formats]

    def step(best, choice):
        s = candidate(*choice)
        new = (s, *(jnp.broadcast_to(c, lead) for c in choice), loss(s, trials))
        return least(new, best), None

    one = jnp.ones_like(mean_abs)
    start = (one, jnp.zeros(lead), jnp.zeros(lead, bool), loss(one, trials))
    alphas = jnp.linspace(0.0, 1.0, grid + 1)
    choices = (
        jnp.concatenate([alphas[1:], alphas]),
        jnp.arange(2 * grid + 1) >= grid,
    )
    best, _ = lax.scan(step, start, choices)
    if trials != formats:
        start = (*start[:-1], loss(one, formats))
        best = least((*best[:-1], loss(best[0], formats)), start)
    s, alpha, by_weight, final = best
    total = functools.reduce(jnp.add, [objective(w, H) for w in weights])
    if spans_lead:
        total = jnp.broadcast_to(jnp.sum(total), lead)
    relative = functools.partial(scales.safe_divide, scale=total)
    return Found(s, alpha, by_weight, relative(start[-1]), relative(final))


# ---- clipping ------------------------------------------------------------------------------------


def _blocks(H: Array, fmt: Format) -> Float[Array, "*b G g g"]:
    """Returns the diagonal blocks of H, one for each group of rows; padding is zero."""
    K = H.shape[-1]
    G, _ = fmt.groups(K, 1)
    g = fmt.group_size or K
    pad = [(0, 0)] * (H.ndim - 2) + [(0, G * g - K)] * 2
    blocks = jnp.pad(H, pad).reshape(*H.shape[:-2], G, g, G, g)
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)


def _within(D: Array, blocks: Array, fmt: Format) -> Float[Array, "*b G C"]:
    """Returns d_gᵀ H_gg d_g, summed over the columns that share a scale."""
    K, N = D.shape[-2:]
    G, g = blocks.shape[-3], blocks.shape[-1]
    D = jnp.pad(D, [(0, 0)] * (D.ndim - 2) + [(0, G * g - K), (0, 0)])
    D = D.reshape(*D.shape[:-2], G, g, N)
    error = jnp.sum(D * jnp.matmul(blocks, D, precision=_HIGHEST), -2)  # [*b, G, N]
    c = fmt.group_columns or N
    _, C = fmt.groups(K, N)
    error = jnp.pad(error, [(0, 0)] * (error.ndim - 1) + [(0, C * c - N)])
    return jnp.sum(error.reshape(*error.shape[:-1], C, c), -1)


@functools.partial(jax.jit, static_argnames=("fmt", "steps", "least"))
def clip(
    w: Float[Array, "*lead K N"],
    H: Float[Array, "*lead K K"],
    fmt: Format,
    *,
    steps: int = 10,
    least: float = 0.5,
) -> Clipped:
    """Clamps every group to the part of its range with the least error (section 4.1's clipping).

    For each group g and column, with d = w_g - Q(clamp(w_g, f * range)):

      f = argmin over 1, ..., least of  dᵀ H_gg d

    the group's own share of the output error, exactly; f = 1 stays unless another one is better, so
    it never grows. What groups do to each other is left out, as in the paper.

    Args:
      w: canonical weight, already multiplied by s.
      H: second moments of its input, already divided: `moments_after(H, s)`.
      fmt: how it will be stored. Static.
      steps: fractions tried below 1. Static.
      least: the smallest. Static.
    """
    w, H = w.astype(jnp.float32), H.astype(jnp.float32)
    K, N = w.shape[-2:]
    fmt = fmt.fit(K)
    blocks = _blocks(H, fmt)
    groups = scales.split(w, fmt)
    low, high = jnp.min(groups, (-3, -1)), jnp.max(groups, (-3, -1))
    if not fmt.zero_point and fmt.offset is None:
        high = jnp.maximum(high, -low)
        low = -high

    def clamped(fraction):
        # An end on the wrong side of 0 cannot shrink towards it.
        a = jnp.where(low < 0, low * fraction, low)
        b = jnp.where(high > 0, high * fraction, high)
        return jnp.clip(w, scales.spread(a, fmt, K, N), scales.spread(b, fmt, K, N))

    def error(fraction):
        return _within(w - _rounded(clamped(fraction), H, fmt), blocks, fmt)

    def step(best, fraction):
        fraction = jnp.broadcast_to(fraction, low.shape)
        e = error(fraction)
        better = e < best[1]
        return (jnp.where(better, fraction, best[0]), jnp.where(better, e, best[1])), None

    whole = jnp.ones_like(low)
    start = error(whole)
    fractions = jnp.linspace(1.0, least, steps + 1)[1:]
    (fraction, _), _ = lax.scan(step, (whole, start), fractions)
    before, after = jnp.sum(start, (-2, -1)), jnp.sum(error(fraction), (-2, -1))
    # Scales that are quantized again depend on each other: their sum may have grown.
    kept = (after <= before)[..., None, None]
    fraction = jnp.where(kept, fraction, whole)
    after = jnp.minimum(after, before)
    total = jnp.sum(_within(w, blocks, fmt), (-2, -1))
    relative = functools.partial(scales.safe_divide, scale=total)
    return Clipped(clamped(fraction), fraction, relative(before), relative(after))


@functools.partial(jax.jit, static_argnames=("fmt", "layout", "clipped"))
def solve(
    w: Float[Array, "*shape"],
    H: Float[Array, "*b K K"],
    fmt: Format,
    layout: str | Layout = DEFAULT,
    *,
    clipped: bool = True,
) -> tuple[QTensor, Diagnostics]:
    """Quantizes a weight that has been multiplied by its s: rounding to nearest of clipped groups.

    A clip that raises J over all of K, and not only within groups, is not taken.

    Args:
      w: the weight, scaled; any float type.
      H: second moments of its scaled input, in canonical order of K.
      fmt: how it is stored. Static.
      layout: which axes are contracted. Static.
      clipped: whether to search for clips. Static.
    """
    if not isinstance(layout, Layout):
        layout = Layout.parse(layout, w.shape)
    canonical = layout.to_canonical(w).astype(jnp.float32)
    H = H.astype(jnp.float32)
    importance = _diagonal(H)

    def error(v):
        return objective(canonical - _rounded(v, H, fmt), H)

    rtn = final = error(canonical)
    best = canonical
    if clipped:
        shrunk = clip(canonical, H, fmt).weight
        after = error(shrunk)
        best = jnp.where((after < rtn)[..., None, None], shrunk, canonical)
        final = jnp.minimum(after, rtn)
    # The clamped weight stays float32: in bfloat16 its groups would have other ranges.
    qt = quantize_array(layout.from_canonical(best), fmt, layout, importance=importance)
    qt = dataclasses.replace(qt, dtype=jnp.dtype(w.dtype).name)
    total = objective(canonical, H)
    relative = functools.partial(scales.safe_divide, scale=total)
    return qt, Diagnostics(relative(rtn), relative(final))
