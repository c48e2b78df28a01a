"""How a kernel makes 16-bit floats of weights of 2 and 3 bits, in the order of `planes`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels import planes

AND_OR = 0xEA  # lop3: a & b | c


def load(ref: Any, bits: int, dtype: Any, zero: int | None = None) -> Array:
    """Returns code - zero for codes in shared memory, in a kernel, in the layout of wgmma.

    Args:
      ref: uint8 [R, K * bits / 8], in the order of `planes`.
      dtype: of the values: bfloat16 or float16.
      zero: default: the middle, 2 or 4.
    """
    less = 2 ** (bits - 1) if zero is None else zero
    dtype = jnp.dtype(dtype)
    data = plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    shape = (data.shape[0], data.shape[1] * 8 // bits)

    def values(_, data):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        layout = plgpu.Layout.WGMMA.to_mgpu()
        out = np.empty(layout.registers_shape(shape), object)
        words = data.registers.reshape(-1, planes.chunks(bits), 2)  # unit, chunk, rows i and i + 8
        pairs = out.reshape(len(words), -1, 8, 2)  # unit, its 64 inputs, 8 of them, row
        for (unit, half, b, row), _ in np.ndenumerate(pairs):
            own = [words[unit, half, row]] + ([words[unit, 2, row]] if bits == 3 else [])
            own = [mgpu.utils.bitcast(word, i32) for word in own]
            text = assembly(bits, b, half, less, dtype)
            value = llvm.inline_asm(i32, own, text, ",".join(["=r"] + ["r"] * len(own)))
            pairs[unit, half, b, row] = mgpu.utils.bitcast(value, pair)
        return mgpu.FragmentedArray(
            _registers=pairs.reshape(out.shape), _layout=layout, _is_signed=None
        )

    def reference(data):  # read by the interpreter
        return (planes.codes(data, bits).astype(jnp.int32) - less).astype(dtype)

    values.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_UPCAST_2X,),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, plgpu.Layout.WGMMA),
    )(values)(data)


def assembly(bits: int, b: int, half: int, zero: int, dtype: Any) -> str:
    """Returns PTX that makes two floats, $0, of the b-th pair of codes of a word.

    The fields of both codes are put, by one mask, into the fraction of 2^7 (bfloat16) or 2^10
    (float16), where j fields fit above one another. The j-th is a code times 4^j, so that

      value * 4^-j - (2^7 * 4^-j + zero)

    is code - zero, exactly and by one instruction.

    Args:
      b: of the 8 pairs of a word $1 of the lower 2 bits.
      half: with 3 bits, which of two such words it is; their highest bits are in $2.
    """
    name = jnp.dtype(dtype).name
    magic, suffix, fields = {
        "bfloat16": (0x4300, "bf16x2", 3), "float16": (0x6400, "f16x2", 4)
    }[name]  # fmt: skip
    twice = lambda field: field << 16 | field
    j = b % fields
    by = 2 * (b - j)  # bits that the word is shifted by
    lines = [
        f"shr.b32 low, $1, {by};",
        f"lop3.b32 codes, low, {twice(3 << 2 * j):#x}, {twice(magic):#x}, {AND_OR:#x};",
    ]
    if bits == 3:
        by += half - 2  # from the highest bit's place to the one above the other two
        lines += [
            f"{'shr' if by >= 0 else 'shl'}.b32 high, $2, {abs(by)};",
            f"lop3.b32 codes, high, {twice(4 << 2 * j):#x}, codes, {AND_OR:#x};",
        ]
    implied = np.array(magic, np.uint16).view(dtype).astype(np.float64) * 4.0**-j + zero
    constants = [
        twice(int(np.array(value, dtype).view(np.uint16))) for value in (4.0**-j, -implied)
    ]
    return "\n".join([
        "{", ".reg .b32 low, high, codes, scale, offset;", *lines,
        f"mov.b32 scale, {constants[0]:#x};", f"mov.b32 offset, {constants[1]:#x};",
        f"fma.rn.{suffix} $0, codes, scale, offset;", "}",
    ])  # fmt: skip
