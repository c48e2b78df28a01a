"""The packed matmul in integers: a float activation as int8 digits, times the codes of the weight.

A CPU with int8 dot instructions multiplies bytes several times as fast as floats, and codes need
only be moved to bytes, not dequantized. So x is written, for every token and group of rows, as

  x[m, k] = s[m] * (d_0 + 256 d_1 + 256^2 d_2 + 256^3 d_3)[m, k],    d_i in int8,

a number of 30 bits below the largest magnitude of the group, s a power of two; and

  y[m, n] = s[m] * sum_i 256^i (sum_k d_i[m, k] q[k, n])

where the inner sum is exact in int32. What of a float32 lies within 2^-6 of the group's largest is
exact; smaller ones are off by at most 2^-30 of it. That is below what float32 sums lose, unless the
largest meets a weight of 0.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from qjax.numerics import Element
from qjax.ops import cpu
from qjax.packing import unit

_DIGITS = 4
# Rows of W that one dot may sum over in int32: 128 * 255 * K < 2^31.
_MAX_ROWS = 1 << 16
# Tokens up to which bytes are the faster way. Groups make many short dots, which gain less.
_MAX_TOKENS, _MAX_TOKENS_GROUPED = 128, 16
_FEWEST_TOKENS_MATRIX = 64
# Shorter groups make shorter dots than that is worth.
_SHORTEST_GROUP = 64


def is_faster(M: int, K: int, g: int, element: Element) -> bool:
    """Returns whether `matmul` takes the shape, and beats blocks of floats on this machine.

    Measured on an Intel Xeon with and without its matrix unit, 4096 x 4096, against blocks of
    floats: int8 1.4 to 2.5 times as fast from 4 tokens on, int4 in groups of 128 1.2 to 1.7 times
    from 4 to 16.
    """
    if element.kind != "int" or g > _MAX_ROWS or not cpu.has_int8_dot():
        return False
    return M <= _MAX_TOKENS if g == K else M <= _MAX_TOKENS_GROUPED and g >= _SHORTEST_GROUP


def beats_native(K: int, g: int, element: Element) -> range:
    """Returns the numbers of tokens for which it also beats the native kernel (`qjax.ops.native`).

    That takes a matrix unit. Measured on a busy Intel Xeon with AMX, int8 per channel: by time of
    both cores, 4096 x 4096, from 16 tokens on (8: 2.9 ms native and 3.1, 16: 4.8 and 4.0, 128: 30
    and 18); by the clock, 4096 x 11008, 16 tokens in bytes took 30 ms, of int4 in the native
    kernel 19; 128 tokens 72 and 121. Hence from somewhere between.
    """
    is_plain = g >= K and not element.is_packed and "amx_int8" in cpu.features()
    if not is_plain or not is_faster(_FEWEST_TOKENS_MATRIX, K, K, element):
        return range(0)
    return range(_FEWEST_TOKENS_MATRIX, _MAX_TOKENS + 1)


def split(x: Float[Array, "*m K"]) -> tuple[Int8[Array, "4 *m K"], Float[Array, "*m 1"]]:
    """Returns the digits of x, the least significant first, and the value of one unit.

    A row with a NaN or Inf gets the unit NaN.

    Args:
      x: each row, the last axis, has a unit of its own.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # 2^(e - 1) has absmax's exponent field. Units below the smallest normal number are not needed:
    # XLA takes a smaller x for 0.
    field = lax.bitcast_convert_type(absmax, jnp.int32) >> 23
    exponent = jnp.clip(field - 126 - (8 * _DIGITS - 2), -126, 126)
    step = lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
    inverse = lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)
    q = jnp.round(x * inverse).astype(jnp.int32)
    out = []
    for _ in range(_DIGITS):
        digit = ((q + 128) & 255) - 128
        q = (q - digit) >> 8
        out.append(digit.astype(jnp.int8))
    poison = jnp.sum(x * 0.0, axis=-1, keepdims=True)
    return jnp.stack(out), step + poison


def matmul(
    x: Float[Array, "M K"],
    data: Array,
    scale: Float[Array, "G N"],
    *,
    element: Element,
    g: int,
) -> Float[Array, "M N"]:
    """Returns sum_k x[m, k] u[k, n] scale[k // g, n], u the stored code (without `qmin`).

    Args:
      x: float32, bfloat16 or float16.
      data: packed codes [B, N], or the native type [K, N].
      scale: G = K / g.
      element: an integer type.
      g: rows of a group, a multiple of the packing unit and at most 2^16.
    """
    (M, K), N = x.shape, data.shape[1]
    G, D, n = K // g, _DIGITS, _unit(element)
    digits, step = split(x.reshape(M, G, g))  # [D, M, G, g], [M, G, 1]
    # Rows in the order in which `_codes` gives them: field by field.
    digits = digits.reshape(D, M, G, g // n, n).transpose(2, 0, 1, 4, 3).reshape(G, D * M, g)
    step = step.transpose(1, 0, 2)  # [G, M, 1]

    def group(digits, step, data, scale):
        y = jnp.dot(digits, _codes(data, element), preferred_element_type=jnp.int32)
        if element.dtype == "uint8" and not element.is_packed:
            y = y + 128 * jnp.sum(digits, axis=1, keepdims=True, dtype=jnp.int32)
        y = y.reshape(D, M, N).astype(jnp.float32)
        # A polynomial in 256 from its lowest term on: scaling by a power of two rounds nothing.
        total = functools.reduce(lambda low, y: low * 2.0**-8 + y, y)
        return total * (step * 256.0 ** (D - 1)) * scale

    if G == 1:
        return group(digits[0], step[0], data, scale)

    def add(total, inputs):
        return total + group(*inputs), None

    groups = (digits, step, data.reshape(G, -1, N), scale[:, None])
    return lax.scan(add, jnp.zeros((M, N), jnp.float32), groups)[0]


def _codes(data: Array, element: Element) -> Int8[Array, "K N"]:
    """Returns the codes of packed rows, one field of the packing unit after the other.

    Unsigned bytes have 128 less.
    """
    if not element.is_packed:
        return data if element.qmin < 0 else lax.bitcast_convert_type(data ^ 0x80, jnp.int8)
    n = _unit(element)
    units = data.reshape(-1, element.bits * n // 8, data.shape[1])
    mask = jnp.uint8(2**element.bits - 1)
    fields = []
    for i in range(n):
        j, shift = divmod(i * element.bits, 8)
        code = units[:, j] >> shift
        if shift + element.bits > 8:  # the code straddles two bytes
            code |= units[:, j + 1] << (8 - shift)
        fields.append(code & mask)
    return lax.bitcast_convert_type(jnp.concatenate(fields), jnp.int8)


def _unit(element: Element) -> int:
    return unit(element.bits) if element.is_packed else 1
