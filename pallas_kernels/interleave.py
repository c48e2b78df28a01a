"""The order in which Hopper's weight-only kernel reads codes of 4 bits.

A lane reads 8 codes of a row at once, a word. A wgmma takes from lane t of 4 the inputs 2t and
2t + 1 of every 8. So 32 codes of a row are stored, in bytes of two, as the transpose of 4 x 4: word
t holds the t-th byte of each 8 codes. Nothing then moves between lanes.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def interleaved(codes: Array) -> Array:
    """Returns bytes of two codes, uint8 [.., K / 2], in the order above; its own inverse.

    Example:
      >>> interleaved(jnp.arange(16, dtype=jnp.uint8)).tolist()
      [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
    """
    *lead, n = codes.shape
    return codes.reshape(*lead, n // 16, 4, 4).swapaxes(-1, -2).reshape(codes.shape)


def of_int4(w: Array) -> Array:
    """Returns int4 weights [N, K] as the kernel takes them."""
    codes = lax.bitcast_convert_type(w.astype(jnp.int8), jnp.uint8) & jnp.uint8(15)
    codes = interleaved(codes[:, ::2] | (codes[:, 1::2] << 4))
    return lax.bitcast_convert_type(codes, jnp.int4).reshape(w.shape)


def place(byte: Array) -> Array:
    """Returns where the given bytes of a row are."""
    return byte // 16 * 16 + byte % 4 * 4 + byte % 16 // 4
