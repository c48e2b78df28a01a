"""How a kernel subtracts zero points from codes: in the floats that they become, for nothing.

A code u is put below the bits of a power of two, 2^7 (bfloat16) or 2^10 (float16), whose last place
is 1; then 2^7 or 2^10 is subtracted, and the zero point z with it, as 2^7 + z. So u - z is exact,
and takes as many instructions as u. z, a byte for every row and group, becomes both halves of a
register by one multiply-add.
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
POWERS = {"bfloat16": 0x43, "float16": 0x64}  # upper bytes of 2^7 and 2^10


def load(ref: Any) -> Array:
    """Returns zero points in shared memory, uint8 [R], one for each row of weights, in a kernel."""
    return plgpu.load(ref, layout=ROWS)


def words(zeros: Sequence[Any], text: str) -> np.ndarray:
    """Returns registers of pairs, [64 rows, group, rows i and i + 8], in inlined GPU code.

    Args:
      zeros: fragmented arrays [R], one for each group of columns.
      text: PTX that makes a word, $0, of a zero point, $1, as `assembly`.
    """
    i32 = ir.IntegerType.get_signless(32)
    tiles = zeros[0].registers.size // 2
    out = np.empty((tiles, len(zeros), 2), object)
    for (tile, group, row), _ in np.ndenumerate(out):
        byte = zeros[group].registers.reshape(tiles, 2)[tile, row]
        byte = arith.extui(i32, mgpu.utils.bitcast(byte, ir.IntegerType.get_signless(8)))
        out[tile, group, row] = llvm.inline_asm(i32, [byte], text, "=r,r")
    return out


def assembly(upper: int) -> str:
    """Returns PTX that makes a word, $0, of twice the byte $1, below `upper`, of `POWERS`."""
    return f"mad.lo.u32 $0, $1, 0x10001, {upper << 8 | upper << 24:#x};"


def spread(zeros: Sequence[Array], shape: tuple[int, int]) -> Array:
    """Returns int32 [R, C]: for every code of a block the zero point of its row and group."""
    return jnp.repeat(jnp.stack(zeros, axis=1).astype(jnp.int32), shape[1] // len(zeros), axis=1)
