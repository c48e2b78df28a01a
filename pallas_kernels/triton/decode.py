"""How bytes of codes become values in registers: in Triton, and in PTX that is far shorter.

Both compute the same; the PTX is not for the interpreter. It has one word of four bytes as $4 and,
as $0 to $3, four 16-bit values from the lower halves of the bytes, then four from the upper; or $2
with $0 and $1 for bytes that are one code each.
"""

# `triton` is optional, and the type checker takes it for this folder.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

import struct
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

# Or-ed onto a code, the bits of a float that is the code plus its power of two: 128 in bfloat16,
# whose last place is then 1, and 1024 in float16.
_MAGIC = {"bfloat16": 0x43, "float16": 0x64}
_ADDED = {"bfloat16": 128.0, "float16": 1024.0}


def bias(kind: str, dtype: str) -> float:
    """Returns what decoded values are too large by: the kernel subtracts it with the zero point."""
    if kind == "uint4":
        return _ADDED[dtype]
    return 1152.0 if (kind, dtype) == ("int8", "float16") else 0.0


def assembly(kind: str, dtype: str, levels: Sequence[float] = ()) -> str:
    """Returns the PTX that decodes four bytes.

    Args:
      kind: "uint4", "table" or "int8".
      dtype: of the values, "bfloat16" or "float16".
      levels: of a table, the 16 values of the codes.
    """
    magic = _MAGIC[dtype]
    if kind == "uint4":
        # Bytes to every other byte, half bytes into the last bits of the magic number.
        lines = [
            ".reg .b32 a, b;",
            "prmt.b32 a, $4, 0, 0x4140;",
            "prmt.b32 b, $4, 0, 0x4342;",
            f"lop3.b32 $0, a, 0x000f000f, 0x{magic:02x}00{magic:02x}00, 0xea;",
            f"lop3.b32 $1, b, 0x000f000f, 0x{magic:02x}00{magic:02x}00, 0xea;",
            "shr.b32 a, a, 4;",
            "shr.b32 b, b, 4;",
            f"lop3.b32 $2, a, 0x000f000f, 0x{magic:02x}00{magic:02x}00, 0xea;",
            f"lop3.b32 $3, b, 0x000f000f, 0x{magic:02x}00{magic:02x}00, 0xea;",
        ]
    elif kind == "table":
        lines = _table(np.asarray(levels, np.float32).astype(jnp.dtype(dtype)).view(np.uint16))
    elif dtype == "float16":
        # Two's complement plus 128 is the byte with its highest bit flipped.
        lines = [
            ".reg .b32 a;",
            "xor.b32 a, $2, 0x80808080;",
            "prmt.b32 $0, a, 0x64646464, 0x4140;",
            "prmt.b32 $1, a, 0x64646464, 0x4342;",
        ]
    else:
        # bfloat16 has 8 bits, too few for the trick. 2^23 + u in float32, of which 2^23 + 128 goes.
        lines = [
            ".reg .b32 a, b, c, d;",
            "xor.b32 a, $2, 0x80808080;",
            "prmt.b32 b, a, 0x4b000000, 0x7441;",
            "prmt.b32 c, a, 0x4b000000, 0x7442;",
            "prmt.b32 d, a, 0x4b000000, 0x7443;",
            "prmt.b32 a, a, 0x4b000000, 0x7440;",
            *(f"sub.f32 {r}, {r}, 0f4B000080;" for r in "abcd"),
            "cvt.rn.bf16x2.f32 $0, b, a;",
            "cvt.rn.bf16x2.f32 $1, d, c;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


def _table(bits: np.ndarray) -> list[str]:
    """PTX that looks up 16 values, the lower and upper bytes of them as two tables of 16 bytes.

    A prmt looks up four bytes among eight by the last three bits of four half bytes. Two of them,
    and a choice by the fourth bit, make a table of 16.
    """

    def words(plane: np.ndarray) -> list[str]:
        return [f"0x{w:08x}" for w in struct.unpack("<4I", plane.astype(np.uint8).tobytes())]

    low, high = words(bits & 0xFF), words(bits >> 8)
    lines = [
        ".reg .b32 s, m, a, b, c, d, k;",
        "and.b32 s, $4, 0x77777777;",
        "shr.b32 m, $4, 3;",
        "and.b32 m, m, 0x11111111;",
    ]
    for half in range(2):
        lines += [
            *([] if half == 0 else ["shr.b32 s, s, 16;", "shr.b32 m, m, 16;"]),
            f"prmt.b32 a, {low[0]}, {low[1]}, s;",
            f"prmt.b32 b, {low[2]}, {low[3]}, s;",
            f"prmt.b32 c, {high[0]}, {high[1]}, s;",
            f"prmt.b32 d, {high[2]}, {high[3]}, s;",
            "prmt.b32 k, 0x0000ff00, 0, m;",  # 255 where the fourth bit is set
            "lop3.b32 a, a, b, k, 0xd8;",  # k ? b : a
            "lop3.b32 c, c, d, k, 0xd8;",
            f"prmt.b32 ${half}, a, c, 0x6240;",
            f"prmt.b32 ${2 + half}, a, c, 0x7351;",
        ]
    return lines


@triton.jit
def halves(
    b,
    dtype: tl.constexpr,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
    BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Values of the codes in the lower and in the upper halves of bytes."""
    if ASSEMBLY is not None:
        low, high = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=r,=r,=r,=r,r",
            [b],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
        return low.to(dtype, bitcast=True), high.to(dtype, bitcast=True)
    u = b.to(tl.uint8, bitcast=True)
    return _plain(u & 15, dtype, KIND, LEVELS, BIAS), _plain(u >> 4, dtype, KIND, LEVELS, BIAS)


@triton.jit
def _plain(u, dtype: tl.constexpr, KIND: tl.constexpr, LEVELS: tl.constexpr, BIAS: tl.constexpr):
    if KIND == "table":
        value = tl.full(u.shape, LEVELS[0], tl.float32)
        for i in tl.static_range(1, 16):
            value = tl.where(u == i, LEVELS[i], value)
        return value.to(dtype)
    return (u.to(tl.float32) + BIAS).to(dtype)


@triton.jit
def whole(b, dtype: tl.constexpr, BIAS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Values of bytes in two's complement."""
    if ASSEMBLY is not None:
        value = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,r", [b], dtype=tl.int16, is_pure=True, pack=4
        )
        return value.to(dtype, bitcast=True)
    return (b.to(tl.float32) + BIAS).to(dtype)
