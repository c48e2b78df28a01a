"""How a kernel makes e4m3 of codes of e2m1 and of a scale of their group: their exact products.

With that no sum leaves the tensor core for its group's sake, as with integers of 4 bits and their
integer scales (`four_bits.times_assembly`). All eight products with a scale are two words, of which
`prmt` reads a byte by the lower three bits of each code. The fourth is the sign, which has a place
of its own: `interleave.signs_apart`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = (*_MAGNITUDES, *(-v for v in _MAGNITUDES))  # by code
# PTX that makes of the bits s of a scale, $1, four bytes, $0: its products with the first levels,
# and with the others. It is 1, 1.25 or 1.5 times a power of two from 2^-5 to 64: its fraction is 0,
# 2 or 4 eighths. Twice as much is 8 more. One and a half times is 4 more, or with a fraction 5. So
# bytes are 0, s - 8, s, s + 4 or 5; and s + 8, and so on.
PRODUCTS = tuple(
    f"""{{
.reg .b32 more;
and.b32 more, $1, 7;
min.u32 more, more, 1;
mad.lo.u32 more, more, {of_fraction:#x}, {constant:#x};
mad.lo.u32 $0, $1, {of_scale:#x}, more;
}}"""
    for of_scale, of_fraction, constant in (
        (0x01010100, 0x01000000, 0x04000000 - 0x0800),
        (0x01010101, 0x01000100, 0x14100C08),
    )
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


def reference(codes: Array, scales: Array) -> Array:
    """Returns e4m3 of codes, uint8 [R, C], times the bits of their scales, int8 [R, C]."""
    levels = jnp.asarray(LEVELS)[codes]
    scales = lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
    return (levels * scales.astype(jnp.float32)).astype(jnp.float8_e4m3fn)
