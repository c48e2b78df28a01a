"""How a kernel makes 16-bit floats of int8 weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from pallas_kernels import zero_points

MIDDLE = 128  # of unsigned codes
# Which bytes of a lane's own word (0 .. 3) and of its neighbour's (4 .. 7) make the word that it
# converts: one byte of its first pair, one of its second, then the others. Even and odd lanes.
SELECTORS = (0x5140, 0x3726)


def load(ref: Any, dtype: Any, zero: int | Sequence[Array] = MIDDLE) -> Array:
    """Returns int8 [R, C] in shared memory as 16-bit floats, in a kernel, in the layout of wgmma.

    A lane reads 4 neighbours of a row, a word, where a wgmma takes two of every 8 inputs. So a lane
    and its neighbour exchange words.

    Args:
      dtype: of the values: bfloat16 or float16.
      zero: what they are less, as q + 128 is unsigned: of all; or `zero_points.load` of each of the
        groups that lie side by side in C.
    """
    dtype = jnp.dtype(dtype)
    q = plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    zeros = () if isinstance(zero, int) else tuple(zero)

    def values(_, q, *zeros):
        i32 = ir.IntegerType.get_signless(32)
        constant = lambda n: arith.constant(i32, n)
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        layout = plgpu.Layout.WGMMA.to_mgpu()
        out = np.empty(layout.registers_shape(q.shape), object)
        rows, columns = q.shape
        by_block = out.reshape(rows // 64, -1, 2, 2)  # 16 columns, 8 of them, rows i and i + 8
        thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
        is_even = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(thread, constant(1)), constant(0))
        selector = arith.select(is_even, *map(constant, SELECTORS))
        less = zero_points.words(zeros, zero_assembly(dtype)) if zeros else None
        for (tile, block, row), four in np.ndenumerate(q.registers.reshape(rows // 64, -1, 2)):
            own = mgpu.utils.bitcast(four, i32)
            words = [own, mgpu.utils.shfl_bfly(own, 1), selector]
            word = llvm.inline_asm(i32, words, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
            for which in range(2):
                operands, known = [word], zero if isinstance(zero, int) else None
                if less is not None:
                    group = (16 * block + 8 * which) * len(zeros) // columns
                    operands.append(less[tile, group, row])
                constraints = ",".join(["=r"] + ["r"] * len(operands))
                text = assembly(which, dtype, known)
                value = llvm.inline_asm(i32, operands, text, constraints)
                by_block[tile, block, which, row] = mgpu.utils.bitcast(value, pair)
        return mgpu.FragmentedArray(
            _registers=by_block.reshape(out.shape), _layout=layout, _is_signed=None
        )

    def reference(q, *zeros):  # read by the interpreter
        less = zero_points.spread(zeros, q.shape) if zeros else zero
        return (q.astype(jnp.int32) + MIDDLE - less).astype(dtype)

    values.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_UPCAST_2X, *[zero_points.ROWS] * len(zeros)),
        return_type=plgpu.ShapeDtypeStruct(q.shape, dtype, plgpu.Layout.WGMMA),
    )(values)(q, *zeros)


def assembly(which: int, dtype: Any, zero: int | None) -> str:
    """Returns PTX that makes two floats, $0, of bytes 0 and 2 of a word $1, or of 1 and 3.

    In bfloat16 the lower 7 bits of a byte fill the fraction of 2^7, and its highest, the sign,
    falls on the last bit of the exponent: 2^7 or 2^8, which is subtracted; then, if it is not 0,
    zero - 128. In float16 all 8, the sign flipped, fit into the fraction of 2^10; 2^10 + zero is
    subtracted.

    Args:
      zero: None, if $2 is a word of `zero_assembly`.
    """
    lines = ["{", ".reg .b32 bytes, all, sign, less;", f"shr.b32 bytes, $1, {8 * which};"]
    less = "$2" if zero is None else "less"
    if jnp.dtype(dtype) == jnp.bfloat16:
        lines += [
            "lop3.b32 all, bytes, 0x007F007F, 0x43004300, 0xea;",  # a & b | c
            "lop3.b32 sign, bytes, 0x00800080, 0x43004300, 0xea;",
        ]
        if zero == MIDDLE:
            lines.append("sub.bf16x2 $0, all, sign;")
        else:
            if zero is not None:
                half = int(np.array(zero - MIDDLE, dtype).view(np.uint16))
                lines.append(f"mov.b32 less, {half << 16 | half:#x};")
            lines += ["sub.bf16x2 all, all, sign;", f"sub.bf16x2 $0, all, {less};"]
    else:
        lines.append("lop3.b32 all, bytes, 0x00FF00FF, 0x64806480, 0x6a;")  # a & b ^ c
        if zero is not None:
            half = 0x6400 | zero
            lines.append(f"mov.b32 less, {half << 16 | half:#x};")
        lines.append(f"sub.f16x2 $0, all, {less};")
    return "\n".join([*lines, "}"])


def zero_assembly(dtype: Any) -> str:
    """Returns PTX that makes what `assembly` subtracts of a zero point, the byte $1: twice, in $0.

    In bfloat16 zero - 128, made as other bytes are; its highest bit is that of no sign.
    """
    if jnp.dtype(dtype) == jnp.float16:
        return zero_points.assembly(zero_points.POWERS["float16"])
    return """{
.reg .b32 bytes, all, sign;
mul.lo.u32 bytes, $1, 0x10001;
lop3.b32 all, bytes, 0x007F007F, 0x43004300, 0xea;
lop3.b32 sign, bytes, 0x00800080, 0x43804380, 0x6a;
sub.bf16x2 $0, all, sign;
}"""
