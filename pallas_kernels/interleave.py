"""The order in which Hopper's weight-only kernels read codes of 4 and 8 bits.

A wgmma takes from lane t of 4 the inputs 2t and 2t + 1 of every 8, and a lane reads a word of a row
at once: 8 codes of 4 bits, or 4 of 8. So 32 codes of 4 bits are stored, in bytes of two, as the
transpose of 4 x 4: word t holds the t-th byte of each 8 codes. Of 16 codes of 8 bits, 8 pairs, a
word holds a lane's pair of the first 8 and that of the second; the words are those of lanes 0, 2, 1
and 3, as the layout of bytes has them. Nothing then moves between lanes.
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


def interleaved_pairs(codes: Array) -> Array:
    """Returns codes of 8 bits [.., K] in the order above; its own inverse.

    The three bits of a pair's place are those of its number in reverse.

    Example:
      >>> interleaved_pairs(jnp.arange(16)).tolist()
      [0, 1, 8, 9, 4, 5, 12, 13, 2, 3, 10, 11, 6, 7, 14, 15]
    """
    *lead, n = codes.shape
    return codes.reshape(*lead, n // 16, 2, 2, 2, 2).swapaxes(-2, -4).reshape(codes.shape)


def for_int8(x: Array) -> Array:
    """Returns inputs [.., K] in the order in which int8 meet them, `four_bits.load_bytes`.

    A wgmma takes from lane t of 4 the bytes 4t to 4t + 3 of every 16 inputs. A word holds 8 codes:
    its lower halves of bytes become those of one 16, its upper halves those of the next.

    Example:
      >>> for_int8(jnp.arange(32)).tolist()[:8]
      [0, 8, 16, 24, 2, 10, 18, 26]
    """
    *lead, K = x.shape
    blocks = x.reshape(*lead, K // 32, 4, 4, 2)  # byte of a word, word, half
    return jnp.moveaxis(blocks, (-1, -2, -3), (-3, -2, -1)).reshape(x.shape)


def for_e4m3(x: Array) -> Array:
    """Returns inputs [.., K] in the order in which e4m3 meet them, `four_bits.load_bytes`.

    As above, but a word's lower bytes become those of one 16, its upper bytes those of the next.

    Example:
      >>> for_e4m3(jnp.arange(32)).tolist()[:8]
      [0, 1, 8, 9, 2, 3, 10, 11]
    """
    *lead, K = x.shape
    return x.reshape(*lead, K // 16, 2, 4, 2).swapaxes(-2, -3).reshape(x.shape)


def bytes_of_int4(w: Array) -> Array:
    """Returns int4 [N, K] as bytes of two, uint8 [N, K / 2], in the order above."""
    codes = lax.bitcast_convert_type(w.astype(jnp.int8), jnp.uint8) & jnp.uint8(15)
    return interleaved(codes[:, ::2] | (codes[:, 1::2] << 4))


def of_int4(w: Array) -> Array:
    """Returns int4 weights [N, K] as the kernel takes them; its own inverse."""
    return lax.bitcast_convert_type(bytes_of_int4(w), jnp.int4).reshape(w.shape)


def place(byte: Array) -> Array:
    """Returns where the given bytes of a row are, of two codes of 4 bits each."""
    return byte // 16 * 16 + byte % 4 * 4 + byte % 16 // 4


def place_in_pairs(code: Array) -> Array:
    """Returns where the given codes of 8 bits of a row are."""
    return code // 16 * 16 + code % 4 // 2 * 8 + code % 8 // 4 * 4 + code % 16 // 8 * 2 + code % 2
