"""HQQ: scales, zero points and offsets fit to the weights alone, with an eye on their outliers.

Badri and Shaji, 2023 (Half-Quadratic Quantization): instead of the squared error, which a few
outliers dominate, minimize in every group

  sum_k |w_k - q_k|^p,   p < 1,

by half-quadratic splitting. With an auxiliary e for the errors, alternate between

  e = shrink(w - q),   shrink(x) = sign(x) max(|x| - |x|^(p-1) / β, 0)   (the proximal step)
  the scale and the zero point (or offset) of least squares for w - e

and let β grow, so that e follows w - q more and more closely. No data is needed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax import numerics, packing, qtensor, scales
from qjax.format import Format
from qjax.layout import DEFAULT, Layout
from qjax.ptq.grid import Grid, Stored, store_shared
from qjax.qtensor import QTensor

# β at the start and its growth per step, for errors in units of the scale, which are below 1/2.
_BETA, _GROWTH = 1.0, 1.3


@functools.partial(jax.jit, static_argnames=("fmt", "layout", "p", "iterations"))
def solve(
    w: Float[Array, "*shape"],
    fmt: Format,
    layout: str | Layout = DEFAULT,
    *,
    p: float = 0.7,
    iterations: int = 12,
) -> QTensor:
    """Quantizes a weight by half-quadratic optimization of its scales, without data.

    Every group starts from the format's own rule and keeps the best of all iterations, so its error
    in the p-norm is never above that of rounding to nearest. Scales that are quantized again are
    taken together, all of a weight or none.

    Args:
      w: the weight; any leading axes.
      fmt: how to store it.
      layout: which axes are contracted.
      p: of the norm; static.
      iterations: static.

    Example:
      >>> solve(jnp.ones((64, 8)), Format("int4", group_size=32))
      QTensor(64x8 float32 as int4 g32 f32, 5.000 bpw)
    """
    if not isinstance(layout, Layout):
        layout = Layout.parse(layout, w.shape)
    dtype = jnp.dtype(w.dtype).name
    W = layout.to_canonical(w).astype(jnp.float32)
    K = W.shape[-2]
    fmt = fmt.fit(K)
    element = numerics.get_element(fmt.element)
    start = qtensor.quantize_array(W, fmt)
    first = Grid(*qtensor.read_scales(start))
    leaves = Stored(start.scale, start.zero)
    grid = _optimize(W, first, fmt, element, p, iterations)

    stored, grid = store_shared(grid, fmt)
    if isinstance(fmt.scale, Format) or isinstance(fmt.offset, Format):
        before, after = (_total_loss(W, g, fmt, element, p) for g in (first, grid))
        better = (after < before).reshape(*W.shape[:-2], 1, 1)
        stored, grid = jax.tree.map(
            functools.partial(jnp.where, better), (stored, grid), (leaves, first)
        )
    codes = numerics.encode(qtensor.scaled(W, grid.scale, grid.zero, fmt), element)
    pad = packing.padding(K, element.bits) if element.is_packed else 0
    data = qtensor.pack_codes(codes, element)
    return QTensor(data, stored.scale, stored.zero, fmt, layout, dtype, pad)


def _wide(a: Array) -> Array:
    return a[..., :, None, :, None]


def _values(
    v: Float[Array, "*b G g C c"], grid: Grid, fmt: Format, element: numerics.Element
) -> tuple[Array, Array]:
    """Returns the values nearest to v in units of the scale, without and with scale and offset."""
    scale = _wide(grid.scale)
    if grid.zero is None:
        u = numerics.round_to_level(scales.safe_divide(v, scale), element)
        return u, u * scale
    zero = _wide(grid.zero)
    if fmt.offset is not None:
        u = numerics.round_to_level(scales.safe_divide(v - zero, scale), element)
        return u, u * scale + zero
    u = jnp.round(scales.safe_divide(v, scale)) + zero
    u = jnp.clip(u, element.qmin, element.qmax) - zero
    return u, u * scale


def _sums(a: Float[Array, "*b G g C c"], real: Array) -> Float[Array, "*b G C"]:
    """Sums every group, without its padding."""
    # Over the rows by a dot: XLA's sum over a middle axis is ten times slower on CPUs.
    ones = jnp.ones(a.shape[-3], a.dtype)
    rows = jnp.einsum("...kCc,k->...Cc", a * real, ones, precision=lax.Precision.HIGHEST)
    return jnp.sum(rows, -1)


def _real(W: Array, fmt: Format) -> Float[Array, "G g C c"]:
    return scales.split(jnp.ones(W.shape[-2:], W.dtype), fmt, "constant")


def _total_loss(
    W: Array, grid: Grid, fmt: Format, element: numerics.Element, p: float
) -> Float[Array, "*b"]:
    v = scales.split(W, fmt)
    error = jnp.abs(v - _values(v, grid, fmt, element)[1])
    return jnp.sum(_sums(error**p, _real(W, fmt)), (-2, -1))


def _optimize(
    W: Float[Array, "*b K N"],
    first: Grid,
    fmt: Format,
    element: numerics.Element,
    p: float,
    iterations: int,
) -> Grid:
    v = scales.split(W, fmt)
    total = functools.partial(_sums, real=_real(W, fmt))
    count = total(jnp.ones_like(v))

    def refit(grid: Grid, u: Array, t: Array) -> Grid:
        """Returns the grid of least squares for values u and targets t."""
        if fmt.offset is not None:
            mean_u, mean_t = total(u) / count, total(t) / count
            u = u - _wide(mean_u)
            scale = scales.safe_divide(total(u * (t - _wide(mean_t))), total(u * u))
            scale = scales.stored(scale, fmt.scale)
            return Grid(scale, scales.stored(mean_t - scale * mean_u, fmt.offset))
        zero = grid.zero
        if zero is not None:
            shift = total(u - scales.safe_divide(t, _wide(grid.scale))) / count
            moved = jnp.clip(jnp.round(zero + shift), element.qmin, element.qmax)
            u, zero = u + _wide(zero - moved), moved
        scale = scales.safe_divide(total(u * t), total(u * u))
        return Grid(scales.stored(scale, fmt.scale), zero)

    def loss(Q: Array) -> Array:
        return total(jnp.abs(v - Q) ** p)

    def step(i, state):
        grid, best, least, u, Q = state
        x = scales.safe_divide(v - Q, _wide(grid.scale))
        size = jnp.abs(x)
        beta = _BETA * _GROWTH ** i.astype(W.dtype)
        # 0 ** (p - 1) is infinite: an error of 0 stays 0.
        e = jnp.sign(x) * jnp.maximum(size - size ** (p - 1) / beta, 0.0)
        grid = refit(grid, u, v - e * _wide(grid.scale))
        u, Q = _values(v, grid, fmt, element)
        now = loss(Q)
        best = jax.tree.map(lambda new, old: jnp.where(now < least, new, old), grid, best)
        # Where comparing with NaN is false the first grid stays: a group with NaN, or no values.
        return grid, best, jnp.fmin(now, least), u, Q

    u, Q = _values(v, first, fmt, element)
    return lax.fori_loop(0, iterations, step, (first, first, loss(Q), u, Q))[1]
