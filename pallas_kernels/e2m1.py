"""How a kernel makes e4m3 of codes of e2m1 and of a scale of their group: their exact products.

With that no sum leaves the tensor core for its group's sake, as with integers of 4 bits and their
integer scales (`four_bits.times_assembly`). All eight products with a scale are two words, of which
`prmt` reads a byte by the lower three bits of each code, which say where its product is. The fourth
is the sign, which has a place of its own: `interleave.signs_apart`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = (*_MAGNITUDES, *(-v for v in _MAGNITUDES))  # by code
# PTX that makes of the bits of a scale, $1, four bytes, $0: its products with .5, 1, 2 and 4; and
# with 0, 1.5, 3 and 6. It is 1, 1.25 or 1.5 times a power of two from 2^-5 to 64: an e4m3 whose
# fraction is 0, 2 or 4 eighths. In its bits, twice as much is 8 more; one and a half times is 4
# more, or 5 if the fraction is not 0. There `bits_of` sets the lowest bit, so that it is 4 for all;
# for the others that bit is cleared.
PRODUCTS = (
    """{
.reg .b32 scale;
and.b32 scale, $1, 0xFE;
mad.lo.u32 $0, scale, 0x01010101, 0x1007FFF8;
}""",
    "mad.lo.u32 $0, $1, 0x01010100, 0x140C0400;",
)
# PTX that makes four e4m3, $0, of the first codes of a word $1 and of the others, by both words of
# products, $2 and $3. The signs lie apart, as bytes have them, those of the others four bits below.
HALVES = (
    """{
.reg .b32 codes;
and.b32 codes, $1, 0x77777777;
prmt.b32 codes, $2, $3, codes;
lop3.b32 $0, codes, $1, 0x80808080, 0xf8;
}""",
    """{
.reg .b32 codes, signs;
and.b32 codes, $1, 0x77777777;
shr.b32 codes, codes, 16;
prmt.b32 codes, $2, $3, codes;
shl.b32 signs, $1, 4;
lop3.b32 $0, codes, signs, 0x80808080, 0xf8;
}""",
)


def times(word: Any, *products: Any) -> tuple[Any, Any]:
    """Returns e4m3 of the first four codes of a word, and of the others, times their scale.

    Args:
      products: two words, of `PRODUCTS`.
    """
    i32 = ir.IntegerType.get_signless(32)
    first, second = (llvm.inline_asm(i32, [word, *products], t, "=r,r,r,r") for t in HALVES)
    return first, second


def scales(bits: Array) -> Array:
    """Returns the scales, float32, that bytes stand for: e4m3 if their lowest bits were 0."""
    bits = lax.bitcast_convert_type(bits, jnp.uint8) & jnp.uint8(0xFE)
    return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)


def bits_of(scales: Array) -> Array:
    """Returns the bytes, uint8, that stand for scales: the inverse of `scales`."""
    bits = lax.bitcast_convert_type(scales.astype(jnp.float8_e4m3fn), jnp.uint8)
    return bits | (bits & 7 != 0).astype(jnp.uint8)


def reference(codes: Array, bits: Array) -> Array:
    """Returns e4m3 of codes, uint8 [R, C], times what bytes [R, C] stand for."""
    return (jnp.asarray(LEVELS)[codes] * scales(bits)).astype(jnp.float8_e4m3fn)
