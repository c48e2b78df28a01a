"""How a kernel makes 16-bit floats of weights of 8 bits, in the order of `interleave`."""

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

from pallas_kernels import zero_points
from pallas_kernels.interleave import interleaved_pairs

MIDDLE = 128  # of unsigned codes
SIGNS = 0x80808080  # of the bytes of a word: flipped, q becomes q + 128
READ = plgpu.Layout.WGMMA_UPCAST_2X  # in which a lane has codes: words of 4
PAIRS = ((0, 1), (2, 3))  # bytes of a word: inputs 2t and 2t + 1 of one 8, and of the next


def load(ref: Any, dtype: Any, zero: int | Sequence[Array] = MIDDLE) -> Array:
    """Returns `floats` of weights in shared memory, [R, C], in a kernel."""
    return floats(plgpu.load(ref, layout=READ), dtype, zero)


def floats(q: Array, dtype: Any, zero: int | Sequence[Array] = MIDDLE) -> Array:
    """Returns weights as 16-bit floats, in a kernel, in the layout of wgmma.

    Args:
      q: int8 or float8_e4m3fn [R, C], interleaved, in the layout `READ`.
      dtype: of the values: bfloat16 or float16. int8 are times `zero_points.unit`.
      zero: what int8 are less, as q + 128 is unsigned: of all; or `zero_points.load` of each of the
        groups that lie side by side in C.
    """
    weight, dtype = jnp.dtype(q.dtype), jnp.dtype(dtype)
    zeros = () if isinstance(zero, int) else tuple(zero)
    known = zero if isinstance(zero, int) else None

    def values(_, q, *zeros):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        layout = plgpu.Layout.WGMMA.to_mgpu()
        out = np.empty(layout.registers_shape(q.shape), object)
        rows, columns = q.shape
        by_block = out.reshape(rows // 64, -1, 2, 2)  # 16 columns, 8 of them, rows i and i + 8
        less = zero_points.offsets(zeros, (1.0,), dtype)[0] if zeros else None

        def converted(word, which, *zeros):
            if weight == jnp.int8:
                return _asm(assembly(PAIRS[which], dtype, known), word, *zeros)
            value = _asm(e4m3_assembly(which), word)
            return value if dtype == jnp.float16 else _asm(bfloat16_assembly((0, 1)), value, value)

        for (tile, block, row), four in np.ndenumerate(q.registers.reshape(rows // 64, -1, 2)):
            word = mgpu.utils.bitcast(four, i32)
            if weight == jnp.int8:
                word = arith.xori(word, arith.constant(i32, SIGNS - 2**32))
            for which in range(2):
                group = (16 * block + 8 * which) * len(zeros) // columns
                own = [] if less is None else [less[tile, group, row]]
                value = converted(word, which, *own)
                by_block[tile, block, which, row] = mgpu.utils.bitcast(value, pair)
        return mgpu.FragmentedArray(
            _registers=by_block.reshape(out.shape), _layout=layout, _is_signed=None
        )

    def reference(q, *zeros):  # read by the interpreter
        q = interleaved_pairs(q)
        if weight != jnp.int8:
            return q.astype(dtype)
        less = zero if isinstance(zero, int) else zero_points.spread(zeros, q.shape)
        integers = q.astype(jnp.int32) + MIDDLE - less
        return (integers * zero_points.unit(weight, dtype)).astype(dtype)

    values.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(READ, *[zero_points.ROWS] * len(zeros)),
        return_type=plgpu.ShapeDtypeStruct(q.shape, dtype, plgpu.Layout.WGMMA),
    )(values)(q, *zeros)


def assembly(bytes: tuple[int, int], dtype: Any, zero: int | None) -> str:
    """Returns PTX that makes two floats, $0, of the unsigned codes in two bytes of a word $1.

    Args:
      zero: None, if $2 is twice what is added, as in `zero_points.less_assembly`.
    """
    low, high = bytes
    upper = zero_points.magic(dtype) >> 8
    return f"""{{
.reg .b32 codes;
prmt.b32 codes, $1, {upper:#x}, 0x4{high}4{low};
{zero_points.less_assembly(1.0, zero, "$2", dtype)}
}}"""


def e4m3_assembly(half: int) -> str:
    """Returns PTX that makes two float16, $0, of the two e4m3 in a half of a word $1."""
    first, second = ("own", "other") if half == 0 else ("other", "own")
    return f"""{{
.reg .b16 own, other;
mov.b32 {{{first}, {second}}}, $1;
cvt.rn.f16x2.e4m3x2 $0, own;
}}"""


def bfloat16_assembly(halves: tuple[int, int]) -> str:
    """Returns PTX that makes two bfloat16, $0, of float16, of one half of a word $1 and of $2 each.

    Hopper knows no other way than by float32.
    """
    pair = lambda name, half: f"{{{name}, other}}" if half == 0 else f"{{other, {name}}}"
    return f"""{{
.reg .b16 low, high, other;
.reg .b32 first, second;
mov.b32 {pair("low", halves[0])}, $1;
mov.b32 {pair("high", halves[1])}, $2;
cvt.f32.f16 first, low;
cvt.f32.f16 second, high;
cvt.rn.bf16x2.f32 $0, second, first;
}}"""


def _asm(text: str, *operands: Any) -> Any:
    constraints = ",".join(["=r"] + ["r"] * len(operands))
    return llvm.inline_asm(ir.IntegerType.get_signless(32), list(operands), text, constraints)
