"""Products of prepared weights by the kernels in Triton: from a format to the kernels' operands."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from qjax import ampere, numerics
from qjax.format import Format
from qjax.ops import blocked
from qjax.prepare import short_scale


def weight_only(
    x: Array,
    data: Array,
    scale: Array,
    zero: Array | None,
    *,
    format: Format,
    extra: tuple[int, int],
    capability: int,
    out_dtype: Any,
) -> Array:
    """Returns x @ W. Offsets o of q * scale + o are a product with the sums of x over groups.

    sum_k x[m, k] * ((q[k, n] - z) * scale[g, n] + o[g, n]) = kernel + sum_g xs[m, g] * o[g, n]

    Args:
      x: [M, K] bfloat16 or float16.
      data: of a `PreparedTriton`.
      scale, zero: [G, C] float32; zero points, or offsets where the format has them.
    """
    from pallas_kernels.triton import weight_only as kernel  # needs Triton, which few programs do

    element = numerics.get_element(format.element)
    M, K = x.shape
    N_, K_ = data.shape[0], data.shape[1] * 8 // element.bits
    G, N = scale.shape[0], N_ - extra[1]
    g = K_ if G == 1 else format.group_size
    assert g is not None
    is_offset = format.offset is not None
    wide = lambda a: blocked.per_column(a, N, format.group_columns or N)
    padded = lambda a: jnp.pad(a, ((0, K_ // g - G), (0, N_ - N)))
    x = jnp.pad(x, ((0, 0), (0, K_ - K)))
    shift: Array | float = float(ampere.ZERO.get(format.element, 0))
    if zero is not None and not is_offset:
        shift = padded(wide(zero) + shift).astype(x.dtype)
    codes = element.levels if element.kind == "table" else {4: "uint4", 8: "int8"}[element.bits]
    y = kernel.matmul(
        x,
        lax.bitcast_convert_type(data, jnp.int8),
        padded(wide(scale)).astype(short_scale(format) or "float32"),
        shift,
        codes=codes,
        out_dtype=jnp.float32 if is_offset else out_dtype,
        capability=capability,
    )[:, :N]
    if is_offset:
        assert zero is not None
        sums = jnp.sum(x.reshape(M, K_ // g, g).astype(jnp.float32), axis=-1)[:, :G]
        y = y + jnp.dot(sums, wide(zero), precision=lax.Precision.HIGHEST)
    return y.astype(out_dtype)


def int8(
    xq: Array,
    step: Array,
    data: Array,
    scale: Array,
    *,
    format: Format,
    extra: tuple[int, int],
    capability: int,
    out_dtype: Any,
) -> Array:
    """Returns step * (xq @ W), summed exactly in int32.

    Args:
      xq: [M, K] int8.
      step: [M, 1], or anything that broadcasts to it.
      data: of a `PreparedTriton`.
      scale: [1, C] float32.
    """
    from pallas_kernels.triton import eight_bit as kernel

    (M, K), (N_, K_) = xq.shape, data.shape
    N = N_ - extra[1]
    wide = blocked.per_column(scale, N, format.group_columns or N)
    y = kernel.matmul(
        jnp.pad(xq, ((0, 0), (0, K_ - K))),
        lax.bitcast_convert_type(data, jnp.int8),
        jnp.broadcast_to(step, (M, 1))[:, 0],
        jnp.pad(wide, ((0, 0), (0, N_ - N)))[0],
        out_dtype=out_dtype,
        capability=capability,
    )
    return y[:, :N]
