"""Where codes of 4 bits lie in the bytes that the kernels in Triton read, written once."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

RUN = 16  # inputs whose codes lie in the same halves of consecutive bytes


def pack(codes: Array) -> Array:
    """Returns uint8 codes [*lead, K] as bytes [*lead, K / 2]; K is a multiple of 32.

    Byte 16 i + j of a row holds the code of input 32 i + j and, in its upper half, that of input
    32 i + 16 + j.

    Example:
      >>> pack(jnp.arange(32, dtype=jnp.uint8) % 16)[:3]
      Array([ 0, 17, 34], dtype=uint8)
    """
    *lead, K = codes.shape
    runs = codes.reshape(*lead, K // (2 * RUN), 2, RUN)
    return (runs[..., 0, :] | runs[..., 1, :] << 4).reshape(*lead, K // 2)


def unpack(data: Array) -> Array:
    """Inverse of `pack`."""
    *lead, columns = data.shape
    runs = data.reshape(*lead, columns // RUN, RUN)
    runs = jnp.stack([runs & jnp.uint8(15), runs >> 4], axis=-2)
    return runs.reshape(*lead, 2 * columns)


def unpack_columns(data: Array, k: Array) -> Array:
    """Returns the codes [*lead, i] of the inputs `k`, reading only the bytes that hold them."""
    block, place = k // (2 * RUN), k % (2 * RUN)
    codes = data[..., block * RUN + place % RUN]
    return (codes >> (4 * (place // RUN)).astype(jnp.uint8)) & jnp.uint8(15)
