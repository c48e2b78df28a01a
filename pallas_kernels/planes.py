"""The order in which Hopper's weight-only kernel reads codes of 2 and 3 bits.

A lane of a wgmma takes from every 8 inputs of a row two neighbours, e = 0 and 1, in the halves of
one register: lane t of 4 those at 2t + e. So a word that a lane reads holds 16 codes of 2 bits,
those of 64 inputs that are its own. The b-th pair, of the inputs 8b + 2t + e, has bits 2b and
2b + 1 of half e: one mask takes both codes to their halves. The words of four lanes, 16 bytes, are
stored in the order 0, 2, 1, 3, as the layout of 8-bit weights has them.

3 bits are a plane of the lower 2 and one of the highest. 128 inputs of a row are 48 bytes: twice 64
inputs in the first plane, then all in the second, whose bit 2b of half e belongs to the b-th pair
of the first 64 inputs and bit 2b + 1 to that of the others.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

CHUNK = 16  # bytes of a row that four lanes read at once


def unit(bits: int) -> int:
    """Returns how many inputs of a row lie together."""
    return {2: 64, 3: 128}[bits]


def chunks(bits: int) -> int:
    """Returns in how many chunks they lie."""
    return unit(bits) * bits // 8 // CHUNK


def packed(codes: Array, bits: int) -> Array:
    """Returns uint8 [.., K * bits / 8] of codes [.., K], K a multiple of `unit`.

    Example:
      >>> packed(jnp.arange(64, dtype=jnp.uint8) % 4, 2)[:8].tolist()
      [0, 0, 85, 85, 0, 0, 85, 85]
      >>> packed(jnp.full(128, 5, jnp.uint8), 3).shape
      (48,)
    """
    *lead, K = codes.shape
    units = K // unit(bits)
    codes = codes.astype(jnp.uint8).reshape(*lead, units, -1, 2, 4, 2, 2, 2)
    # [.., unit, its 64 inputs, b // 4, b % 4, t // 2, t % 2, e]
    words = jnp.moveaxis(codes, (-2, -3, -1, -5, -4), (-5, -4, -3, -2, -1))
    shifts = _along(2 * jnp.arange(4, dtype=jnp.uint8), -1, words.ndim)
    low = _sum((words & 3) << shifts).reshape(*lead, units, -1, CHUNK)
    if bits == 2:
        return low.reshape(*lead, -1)
    high = _sum((words >> 2) << shifts)  # [.., unit, first or second 64, t % 2, t // 2, e, b // 4]
    high = high[..., 0, :, :, :, :] | (high[..., 1, :, :, :, :] << 1)
    high = high.reshape(*lead, units, 1, CHUNK)
    return jnp.concatenate([low, high], axis=-2).reshape(*lead, -1)


def _sum(fields: Array) -> Array:
    return jnp.sum(fields, axis=-1, dtype=jnp.uint8)


def _along(values: Array, axis: int, ndim: int) -> Array:
    """Returns values [n] along an axis of an array; of its rank, as JAX may demand."""
    shape = [1] * ndim
    shape[axis] = values.size
    return values.reshape(shape)


def codes(data: Array, bits: int) -> Array:
    """Returns the codes [.., K]; the inverse of `packed`."""
    *lead, n = data.shape
    units = n // CHUNK // chunks(bits)
    # [.., unit, chunk, t % 2, t // 2, e, b // 4, 1]
    words = data.reshape(*lead, units, -1, 2, 2, 2, 2, 1)
    shifts = _along(2 * jnp.arange(4, dtype=jnp.uint8), -1, words.ndim)
    if bits == 2:
        fields = (words >> shifts) & 3
    else:
        second = words[..., 2:, :, :, :, :, :]
        second = second >> _along(jnp.arange(2, dtype=jnp.uint8), -6, words.ndim)
        high = (second >> shifts) & 1
        fields = ((words[..., :2, :, :, :, :, :] >> shifts) & 3) | (high << 2)
    fields = jnp.moveaxis(fields, (-5, -4, -3, -2, -1), (-2, -3, -1, -5, -4))
    return fields.reshape(*lead, units * unit(bits))


def codes_at(data: Array, bits: int, inputs: Array) -> Array:
    """Returns the codes [.., i] of the given inputs of rows [.., K * bits / 8]."""
    at, k = inputs // unit(bits) * chunks(bits), inputs % unit(bits)
    half, b, t, e = k // 64, k % 64 // 8, k % 8 // 2, k % 2
    byte = (t % 2) * 8 + t // 2 * 4 + e * 2 + b // 4
    shift = _along((2 * (b % 4)).astype(jnp.uint8), -1, data.ndim)
    code = (data[..., (at + half) * CHUNK + byte] >> shift) & jnp.uint8(3)
    if bits == 2:
        return code
    high = data[..., (at + 2) * CHUNK + byte] >> (
        shift + _along(half.astype(jnp.uint8), -1, data.ndim)
    )
    return code | ((high & jnp.uint8(1)) << 2)
