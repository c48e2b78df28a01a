"""How a kernel makes 16-bit floats of int8 weights."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

# Which bytes of a lane's own word (0 .. 3) and of its neighbour's (4 .. 7) make the word that it
# converts: one byte of its first pair, one of its second, then the others. Even and odd lanes.
SELECTORS = (0x5140, 0x3726)


def load(ref: Any, dtype: Any) -> Array:
    """Returns int8 [R, C] in shared memory as 16-bit floats, in a kernel, in the layout of wgmma.

    A lane reads 4 neighbours of a row, a word, where a wgmma takes two of every 8 inputs. So a lane
    and its neighbour exchange words.

    Args:
      dtype: of the values: bfloat16 or float16.
    """
    dtype = jnp.dtype(dtype)
    q = plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)

    def values(_, q):
        i32 = ir.IntegerType.get_signless(32)
        constant = lambda n: arith.constant(i32, n)
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        layout = plgpu.Layout.WGMMA.to_mgpu()
        out = np.empty(layout.registers_shape(q.shape), object)
        by_block = out.reshape(-1, 2, 2)  # 16 columns, 8 of them, rows i and i + 8
        thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
        is_even = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(thread, constant(1)), constant(0))
        selector = arith.select(is_even, *map(constant, SELECTORS))
        for (block, row), four in np.ndenumerate(q.registers.reshape(-1, 2)):
            own = mgpu.utils.bitcast(four, i32)
            words = [own, mgpu.utils.shfl_bfly(own, 1), selector]
            word = llvm.inline_asm(i32, words, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
            for which in range(2):
                value = llvm.inline_asm(i32, [word], assembly(which, dtype), "=r,r")
                by_block[block, which, row] = mgpu.utils.bitcast(value, pair)
        return mgpu.FragmentedArray(
            _registers=by_block.reshape(out.shape), _layout=layout, _is_signed=None
        )

    values.reference = lambda q: q.astype(dtype)  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_UPCAST_2X,),
        return_type=plgpu.ShapeDtypeStruct(q.shape, dtype, plgpu.Layout.WGMMA),
    )(values)(q)


def assembly(which: int, dtype: Any) -> str:
    """Returns PTX that makes two floats, $0, of bytes 0 and 2 of a word $1, or of 1 and 3.

    In bfloat16 the lower 7 bits of a byte fill the fraction of 2^7, and its highest, the sign,
    falls on the last bit of the exponent: 2^7 or 2^8, which is subtracted. In float16 all 8, the
    sign flipped, fit into the fraction of 2^10.
    """
    lines = ["{", ".reg .b32 bytes, all, sign;", f"shr.b32 bytes, $1, {8 * which};"]
    if jnp.dtype(dtype) == jnp.bfloat16:
        lines += [
            "lop3.b32 all, bytes, 0x007F007F, 0x43004300, 0xea;",  # a & b | c
            "lop3.b32 sign, bytes, 0x00800080, 0x43004300, 0xea;",
            "sub.bf16x2 $0, all, sign;",
        ]
    else:
        lines += [
            "lop3.b32 all, bytes, 0x00FF00FF, 0x64806480, 0x6a;",  # a & b ^ c
            "mov.b32 sign, 0x64806480;",
            "sub.f16x2 $0, all, sign;",
        ]
    return "\n".join([*lines, "}"])
