"""How a kernel subtracts zero points from codes: in the floats that they become, for nothing.

In float16 a code u is put below the bits of 2^10, whose last place is 1; then 2^10 is subtracted,
and the zero point z with it, as 2^10 + z. So u - z is exact, and takes as many instructions as u.
z, a byte for every row and group, becomes both halves of a register by one multiply-add.

A byte is too long for the fraction of a bfloat16. But it is a bfloat16: u times 2^-133, subnormal,
and the same where its highest bit is the exponent's last, as that of 1 has the same last place. A
multiply-add by 2^127 brings it to `UNIT`, where sums stay until they are done, and subtracts z.

Of shorter codes a half has several where they lie, times 2^i. The multiply-add takes that away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

ROWS = plgpu.Layout.WGMMA.reduce(1)  # of zero points in registers: two in each, of rows i and i + 8
POWER = 0x64  # upper byte of 2^10 in float16
MINUS = 0xE4  # of -2^10
UNIT = 2.0**-6  # 2^-133 times the largest power of two
LARGEST = 2.0**127  # that power


def unit(weight: Any, dtype: Any) -> float:
    """Returns what a weight of 1 is in the type that a kernel multiplies it in: `UNIT`, or 1.

    Args:
      weight: type of the codes; uint4 for those of a table.
    """
    is_whole = jnp.dtype(weight) in (jnp.int8, jnp.uint8, jnp.int4)
    return UNIT if is_whole and jnp.dtype(dtype) == jnp.bfloat16 else 1.0


def in_ones(total: Array, weight: Any, dtype: Any) -> Array:
    """Returns sums of products with such weights, or their scales, as of weights that are not."""
    own = unit(weight, dtype)
    return total if own == 1 else total * (1 / own)


def load(ref: Any) -> Array:
    """Returns zero points in shared memory, uint8 [R], one for each row of weights, in a kernel."""
    return plgpu.load(ref, layout=ROWS)


def words(zeros: Sequence[Any], text: str) -> np.ndarray:
    """Returns registers of pairs, [64 rows, group, rows i and i + 8], in inlined GPU code.

    Args:
      zeros: fragmented arrays [R], one for each group of columns.
      text: PTX that makes a word, $0, of a zero point, $1: `assembly`, `unit_assembly`.
    """
    i32 = ir.IntegerType.get_signless(32)
    tiles = zeros[0].registers.size // 2
    out = np.empty((tiles, len(zeros), 2), object)
    for (tile, group, row), _ in np.ndenumerate(out):
        byte = zeros[group].registers.reshape(tiles, 2)[tile, row]
        byte = arith.extui(i32, mgpu.utils.bitcast(byte, ir.IntegerType.get_signless(8)))
        out[tile, group, row] = llvm.inline_asm(i32, [byte], text, "=r,r")
    return out


def assembly() -> str:
    """Returns PTX that makes twice -(2^10 + z), $0, of a byte z, $1, in float16."""
    return f"mad.lo.u32 $0, $1, 0x10001, {MINUS << 8 | MINUS << 24:#x};"


def unit_assembly(bytes: tuple[int, int]) -> str:
    """Returns PTX that makes two bfloat16, $0, of -z times `UNIT`, of two bytes z of a word $1."""
    low, high = bytes
    return f"""{{
.reg .b32 codes, largest, none;
prmt.b32 codes, $1, 0, 0x4{high}4{low};
mov.b32 largest, {twice(-LARGEST, jnp.bfloat16):#x};
mov.b32 none, 0;
fma.rn.bf16x2 $0, codes, largest, none;
}}"""


def offset_assembly(scale: float) -> str:
    """Returns PTX that makes twice -(2^10 * scale + z), $0, of that for a scale of 1, $1.

    In float16, of codes in the fraction of 2^10 that are multiplied by `scale`.
    """
    return f"""{{
.reg .b32 more;
mov.b32 more, {twice(2.0**10 * (1 - scale), jnp.float16):#x};
add.f16x2 $0, $1, more;
}}"""


def offsets(zeros: Sequence[Any], scales: Sequence[float], dtype: Any) -> list[np.ndarray]:
    """Returns what `less_assembly` adds for each scale, the first of them 1, as `words` does."""
    if dtype == jnp.bfloat16:
        return [words(zeros, unit_assembly((0, 0)))] * len(scales)
    out, i32 = [words(zeros, assembly())], ir.IntegerType.get_signless(32)
    for scale in scales[1:]:
        text = offset_assembly(scale)
        out.append(np.empty_like(out[0]))
        for at, word in np.ndenumerate(out[0]):
            out[-1][at] = llvm.inline_asm(i32, [word], text, "=r,r")
    return out


def magic(dtype: Any) -> int:
    """Returns the bits of a half of a word in which codes are put to be floats."""
    return 0 if jnp.dtype(dtype) == jnp.bfloat16 else POWER << 8


def less_assembly(scale: float, zero: int | None, operand: str, dtype: Any) -> str:
    """Returns lines of PTX that make two floats, $0, of a register `codes`, exactly.

    It has codes u / scale in `magic`. They become u - zero, times `UNIT` in bfloat16:

      u / scale * 2^-133 * 2^127 * scale - zero * 2^-6
      (2^10 + u / scale) * scale - (2^10 * scale + zero)

    Args:
      scale: a power of two.
      zero: None, if `operand` is twice what is added, `offsets`.
    """
    is_bfloat16 = jnp.dtype(dtype) == jnp.bfloat16
    factor = twice(scale * LARGEST if is_bfloat16 else scale, dtype)
    lines = [".reg .b32 scale, offset;", f"mov.b32 scale, {factor:#x};"]
    if zero is not None:
        known = -zero * UNIT if is_bfloat16 else -(2.0**10 * scale + zero)
        lines.append(f"mov.b32 offset, {twice(known, dtype):#x};")
        operand = "offset"
    suffix = "bf16x2" if is_bfloat16 else "f16x2"
    return "\n".join([*lines, f"fma.rn.{suffix} $0, codes, scale, {operand};"])


def twice(value: float, dtype: Any) -> int:
    """Returns a word of twice a float."""
    return int(np.array(value, dtype).view(np.uint16)) * 0x10001


def spread(zeros: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """Returns int32 [R, C]: for every code of a block the zero point of its row and group."""
    return jnp.repeat(jnp.stack(zeros, axis=1).astype(jnp.int32), shape[1] // len(zeros), axis=1)
