"""What the kernels compute, in a few lines of jnp each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import e2m1
from pallas_kernels.blocks import Blocks
from pallas_kernels.nested import Nested


def weight_only(
    x: Array,
    w: Array,
    scale: Array | Nested | Blocks,
    *,
    codebook: Sequence[float] | None = None,
    zero: int | Array | None = None,
    x_scale: Array | None = None,
    out_dtype: Any = jnp.float32,
) -> Array:
    """Returns y[m, n] = sum_k x[m, k] * w[n, k] * scale[k // g, n], summed in float32.

    Args:
      x: [M, K] activations.
      w: [N, K] stored values of any type.
      scale: [G, N]; a group has g = K / G inputs. uint8 stands for the power 2^(scale - 127); and
        `Nested` and `Blocks` for what they decode to.
      codebook: None; or the values of codes 0 .. 15, the bits of int4, rounded to x's type.
      zero: None; or zero points of unsigned codes, [G, N] or one: u - zero then takes the place of
        w, of int4 u = w + 8, of int8 w + 128.
      x_scale: None; or what rows of y are multiplied by, [M, 1].
    """
    w = weights(w, scale, codebook, zero, x.dtype).T
    y = jnp.dot(x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)
    return (y if x_scale is None else y * x_scale).astype(out_dtype)


def values(w: Array, codebook: Sequence[float] | None, dtype: Any) -> Array:
    """Returns the values in `dtype` of codes 0 .. 15, the bits of int4; or without a codebook w."""
    return w if codebook is None else jnp.asarray(codebook, dtype)[w.astype(jnp.int32) & 15]


def weights(
    w: Array,
    scale: Array | Nested | Blocks,
    codebook: Sequence[float] | None,
    zero: int | Array | None,
    dtype: Any,
) -> Array:
    """Returns the float32 weights [N, K] of `weight_only`, with a codebook rounded to `dtype`."""
    scale, stored, K = float_scale(scale), w.dtype.name, w.shape[1]
    of_inputs = lambda a: jnp.repeat(a.T.astype(jnp.float32), K // len(a), axis=1)  # [N, K]
    w = values(w, codebook, dtype).astype(jnp.float32)
    if zero is not None:
        w += {"int4": 8, "int8": 128}.get(stored, 0)
        w -= zero if isinstance(zero, int) else of_inputs(zero)
    return w * of_inputs(scale)


def rows(
    indices: Array,
    w: Array,
    scale: Array,
    *,
    codebook: Sequence[float] | None = None,
    zero: int | Array | None = None,
    out_dtype: Any = jnp.bfloat16,
) -> Array:
    """Returns y[m, k] = w[indices[m], k] * scale[k // g, indices[m]], a float32 that is rounded.

    Args:
      indices: [M]. Where one is not in 0 .. N - 1 the row is NaN.
      w, scale, zero: as for `weight_only`.
      codebook: as there, but of float32.
    """
    is_inside = (indices >= 0) & (indices < w.shape[0])
    at = jnp.where(is_inside, indices, 0)
    y = weights(w, scale, codebook, zero, jnp.float32)[at]
    return jnp.where(is_inside[:, None], y, jnp.nan).astype(out_dtype)


def float_scale(scale: Array | Nested | Blocks) -> Array:
    """Returns scales [G, N] as floats: what is none, or not for each feature."""
    if isinstance(scale, Nested | Blocks):
        return scale.decoded()
    return jnp.exp2(scale.astype(jnp.float32) - 127) if scale.dtype == jnp.uint8 else scale


def float_multiples(multiples: Array) -> Array:
    """Returns what weights are multiplied by, float32, for int8 or uint8 of `e2m1.scales`."""
    is_int = multiples.dtype == jnp.int8
    return multiples.astype(jnp.float32) if is_int else e2m1.scales(multiples)


def transposed(
    dy: Array,
    w: Array,
    scale: Array,
    *,
    codebook: Sequence[float] | None = None,
    zero: int | Array | None = None,
    out_dtype: Any = jnp.float32,
) -> Array:
    """Returns dx[m, k] = sum_n dy[m, n] * w[n, k] * scale[k // g, n], summed in float32.

    Args:
      dy: [M, N] derivatives.
      w, scale, codebook, zero: as for `weight_only`.
    """
    w = weights(w, scale, codebook, zero, dy.dtype)
    dx = jnp.dot(dy.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)
    return dx.astype(out_dtype)


def eight_bit(
    x: Array,
    w: Array,
    x_scale: Array,
    w_scale: Array | Blocks,
    *,
    multiples: Array | None = None,
    out_dtype: Any = jnp.float32,
) -> Array:
    """Returns y[m, n] = sum_g x_scale[m, g] * w_scale[g, n] * sum_(k in g) x[m, k] * w[n, k].

    Args:
      x: [M, K] int8 or FP8.
      w: [N, K] int8 or FP8, or the values of others.
      x_scale: [M, G], or [M, 1] for all groups.
      w_scale: [G, N], or `Blocks` of them.
      multiples: None; or what stands for [G', N], by which weights are multiplied first: int8, or
        uint8 of `e2m1.scales`.
    """
    w_scale = float_scale(w_scale)
    if multiples is not None:
        wide = jnp.repeat(float_multiples(multiples), x.shape[1] // len(multiples), axis=0)
        w = w.astype(jnp.float32) * wide.T
    g = x.shape[1] // w_scale.shape[0]
    wide = jnp.repeat(w_scale.astype(jnp.float32), g, axis=0)  # [K, N]
    g = x.shape[1] // x_scale.shape[1]
    x = x.astype(jnp.float32) * jnp.repeat(x_scale.astype(jnp.float32), g, axis=1)
    y = jnp.dot(x, w.astype(jnp.float32).T * wide, precision=lax.Precision.HIGHEST)
    return y.astype(out_dtype)


def experts(
    x: Array,
    w: Array,
    scale: Array,
    group_sizes: Array,
    *,
    zero: int | Array | None = None,
    **options: Any,
) -> Array:
    """Returns y[m] = x[m] @ W[expert of m] for tokens sorted by expert; 0 for those without one.

    Args:
      x: [M, K] activations.
      w: [E, N, K], scale: [E, G, N], zero: [E, G, N] or one, and **options: as for `weight_only`.
      group_sizes: [E], how many tokens each expert has.
    """
    own_zero = lambda e: zero if zero is None or isinstance(zero, int) else zero[e]
    y = jnp.stack(
        [weight_only(x, w[e], scale[e], zero=own_zero(e), **options) for e in range(w.shape[0])]
    )
    ends = jnp.cumsum(group_sizes)
    token = jnp.arange(x.shape[0])
    own = jnp.minimum(jnp.searchsorted(ends, token, side="right"), w.shape[0] - 1)
    return jnp.where((token < ends[-1])[:, None], y[own, token], jnp.zeros((), y.dtype))


def by_token(x: Array, dtype: Any) -> tuple[Array, Array]:
    """Returns codes [M, K] and scales [M, 1] of x: s = max |x| / qmax, codes = round(x / s).

    Args:
      x: [M, K]. The scale of a row with a NaN or an infinity is NaN, the codes of zeros are 0.
      dtype: int8 or an FP8 type, whose largest value is qmax.
    """
    x = x.astype(jnp.float32)
    is_int = jnp.issubdtype(dtype, jnp.integer)
    most = float((jnp.iinfo if is_int else jnp.finfo)(dtype).max)
    largest = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf), axis=1, keepdims=True)
    scale = jnp.where(jnp.isinf(largest), jnp.nan, largest / most)
    q = x / jnp.where(scale == 0, 1.0, scale)
    return jnp.clip(jnp.round(q) if is_int else q, -most, most).astype(dtype), scale


def by_block(x: Array, dtype: Any) -> tuple[Array, Array]:
    """Returns codes [M, K] and scales [M, K / 128] of x: `by_token` of every 128 values of a row.

    Args:
      x, dtype: as for `by_token`.
    """
    codes, scale = by_token(x.reshape(-1, 128), dtype)
    return codes.reshape(x.shape), scale.reshape(len(x), -1)
