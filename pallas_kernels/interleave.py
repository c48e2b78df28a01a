"""The order in which Hopper's kernels read codes of 4 bits, and the weight-only ones those of 8.

A wgmma takes from lane t of 4 the inputs 2t and 2t + 1 of every 8, and a lane reads a word of a row
at once: 8 codes of 4 bits, or 4 of 8. Nothing moves between lanes if that word is of its inputs:

  integers of 4 bits  word t of 32 codes: in half e, from its lowest bits on, those at 2t + e of
                      each 8. So one mask takes a pair of inputs, in the halves of a register
  codes of a table    word t of 32 codes: in each byte a pair, which is looked up by it
  e2m1 as bytes       word t of 32 codes: those at 4t to 4t + 3 of each 16, with their signs apart
  8 bits              word t of 16 codes: a pair of the first 8 and one of the others; the words are
                      those of lanes 0, 2, 1 and 3, as the layout of bytes has them
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def interleaved(codes: Array) -> Array:
    """Returns bytes of two codes of a table, uint8 [.., K / 2], in their order; its own inverse.

    Example:
      >>> interleaved(jnp.arange(16, dtype=jnp.uint8)).tolist()
      [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
    """
    *lead, n = codes.shape
    return codes.reshape(*lead, n // 16, 4, 4).swapaxes(-1, -2).reshape(codes.shape)


def interleaved_nibbles(codes: Array) -> Array:
    """Returns bytes of two integers of 4 bits, uint8 [.., K / 2], in their order.

    Example:
      >>> nibbles = lambda b: jnp.stack([b & 15, b >> 4], axis=-1).ravel().tolist()
      >>> nibbles(interleaved_nibbles(jnp.arange(16, dtype=jnp.uint8)))[::8]
      [0, 1, 2, 3]
    """
    return _packed(jnp.moveaxis(_nibbles(codes, 4, 4, 2), -3, -1))


def natural_nibbles(codes: Array) -> Array:
    """Returns bytes of two codes, the inverse of `interleaved_nibbles`."""
    return _packed(jnp.moveaxis(_nibbles(codes, 4, 2, 4), -1, -3))


# Of 8 codes of a word: whose sign is in the highest bit of each half of a byte. The first four have
# theirs where bytes have it, the others four bits below.
_SIGNS = (4, 0, 5, 1, 6, 2, 7, 3)


def signs_apart(codes: Array) -> Array:
    """Returns bytes of two codes of e2m1 in the order in which they are made bytes.

    Inputs need no other order. The lower bits of a code say where its product with a scale is. The
    highest bit is its sign, which no instruction moves.

    Example:
      >>> codes = jnp.array([0x98, *15 * [0]], jnp.uint8)  # 0 and .5 with their signs set
      >>> [hex(b) for b in signs_apart(codes).tolist()[:4]]
      ['0x84', '0xc4', '0x44', '0x44']
    """
    words = _nibbles(codes, 2, 4, 4).swapaxes(-2, -3)  # word, input // 16, input % 4
    return _packed(_with_signs(place_of_magnitude(words & 7) | words & 8, _SIGNS))


def signs_together(codes: Array) -> Array:
    """Returns bytes of two codes, the inverse of `signs_apart`."""
    slots = tuple(_SIGNS.index(i) for i in range(8))
    words = _with_signs(_nibbles(codes, 4, 2, 4), slots).swapaxes(-2, -3)
    return _packed(magnitude_at(words & 7) | words & 8)


def place_of_magnitude(code: Array) -> Array:
    """Returns where the products of codes of e2m1, 0 to 7, with a scale are: `e2m1.PRODUCTS`.

    They are 0, .5, 1, 1.5, .. 6: powers of two come first, and then 0 and 1.5 times these.

    Example:
      >>> place_of_magnitude(jnp.arange(8)).tolist()
      [4, 0, 1, 5, 2, 6, 3, 7]
    """
    exponent = code >> 1
    return (code & 1 ^ (exponent == 0)) << 2 | exponent


def magnitude_at(place: Array) -> Array:
    """Returns the codes of e2m1 whose products are at such places: `place_of_magnitude`'s inverse.

    Example:
      >>> magnitude_at(place_of_magnitude(jnp.arange(8))).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    exponent = place & 3
    return exponent << 1 | (place >> 2 ^ (exponent == 0))


def _with_signs(words: Array, of: tuple[int, ...]) -> Array:
    """Returns codes [.., 2, 4], of which each has the sign of another one of its 8."""
    codes = words.reshape(*words.shape[:-2], 8)
    return (codes & 7 | codes[..., jnp.array(of)] & 8).reshape(words.shape)


def _nibbles(bytes: Array, *shape: int) -> Array:
    """Returns the codes of bytes [.., K / 2] as [.., K / 32, *shape]."""
    *lead, n = bytes.shape
    return codes_of_bytes(bytes).reshape(*lead, n // 16, *shape)


def _packed(codes: Array) -> Array:
    """Returns codes [.., K / 32, a, b, c] in bytes of two, [.., K / 2]."""
    codes = codes.reshape(*codes.shape[:-4], -1, 2)
    return codes[..., 0] | codes[..., 1] << 4


def interleaved_pairs(codes: Array) -> Array:
    """Returns codes of 8 bits [.., K] in their order; its own inverse.

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
      [0, 16, 1, 17, 2, 18, 3, 19]
    """
    *lead, K = x.shape
    blocks = x.reshape(*lead, K // 32, 2, 2, 4, 2)  # first or second byte, its half, word, half
    return jnp.moveaxis(blocks, -4, -1).reshape(x.shape)


def for_e4m3(x: Array) -> Array:
    """Returns inputs [.., K] in the order in which e4m3 meet them, `four_bits.load_bytes`.

    As above, but a word's lower half becomes those of one 16, its upper half those of the next.

    Example:
      >>> for_e4m3(jnp.arange(32)).tolist()[:8]
      [0, 8, 16, 24, 2, 10, 18, 26]
    """
    *lead, K = x.shape
    blocks = x.reshape(*lead, K // 32, 4, 4, 2)  # code of a half, word, half
    return jnp.moveaxis(blocks, (-1, -2, -3), (-3, -2, -1)).reshape(x.shape)


def bytes_of_int4(w: Array) -> Array:
    """Returns int4 [.., K] as bytes of two, uint8 [.., K / 2]."""
    codes = lax.bitcast_convert_type(w.astype(jnp.int8), jnp.uint8) & jnp.uint8(15)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def codes_of_bytes(bytes: Array) -> Array:
    """Returns the codes [.., K] of bytes of two, uint8 [.., K / 2], the lower half first."""
    return jnp.stack([bytes & 15, bytes >> 4], axis=-1).reshape(*bytes.shape[:-1], -1)


def of_int4(w: Array, *, looked_up: bool = False, apart: bool = False) -> Array:
    """Returns int4 weights [N, K] as kernels take integers, or codes of a table.

    Args:
      looked_up: whether they are codes of a table, each pair of which is looked up.
      apart: whether they are such codes, of e2m1, that are made bytes.
    """
    ordered = signs_apart if apart else interleaved if looked_up else interleaved_nibbles
    return lax.bitcast_convert_type(ordered(bytes_of_int4(w)), jnp.int4).reshape(w.shape)


def place(code: Array, *, looked_up: bool) -> tuple[Array, Array]:
    """Returns in which byte of a row the given codes of 4 bits are, and from which bit on."""
    block, of_8, t, e = code // 32 * 16, code % 32 // 8, code % 8 // 2, code % 2
    if looked_up:
        return block + 4 * t + of_8, 4 * e
    return block + 4 * t + 2 * e + of_8 // 2, of_8 % 2 * 4


def places_apart(code: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Returns byte and first bit of the given codes' places in a row, and of their signs.

    As they are `signs_apart`; `magnitude_at` gives codes.
    """
    first = code // 32 * 16 + code % 16 // 4 * 4  # byte of the word
    own = code % 32 // 16 * 4 + code % 4
    sign = jnp.array([_SIGNS.index(i) for i in range(8)])[own]
    return (first + own // 2, own % 2 * 4), (first + sign // 2, sign % 2 * 4 + 3)


def place_in_pairs(code: Array) -> Array:
    """Returns where the given codes of 8 bits of a row are."""
    return code // 16 * 16 + code % 4 // 2 * 8 + code % 8 // 4 * 4 + code % 16 // 8 * 2 + code % 2
