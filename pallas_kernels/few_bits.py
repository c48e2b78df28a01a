"""How a kernel makes 16-bit floats of weights of 2 and 3 bits, in the order of `planes`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import planes
from pallas_kernels.planes import CHUNK

AND_OR = 0xEA  # lop3: a & b | c


def load(ref: Any, bits: int, dtype: Any, zero: int | None = None, half: Any = None) -> Array:
    """Returns code - zero for codes in shared memory, in a kernel, in the layout of wgmma.

    Args:
      ref: uint8 [R, K * bits / 8], in the order of `planes`.
      dtype: of the values: bfloat16 or float16.
      zero: default: the middle, 2 or 4.
      half: None: all K. Or 0 or 1, which 64 of K = 128 inputs.
    """
    less = 2 ** (bits - 1) if zero is None else zero
    dtype = jnp.dtype(dtype)
    read = plgpu.Layout.WGMMA_UPCAST_2X
    if half is None:
        arrays = [plgpu.load(ref, layout=read)]
        shape = (ref.shape[0], ref.shape[1] * 8 // bits)
    else:
        arrays = [plgpu.load(ref.at[:, pl.ds(half * CHUNK, CHUNK)], layout=read)]
        shape = (ref.shape[0], 64)
        if bits == 3:  # the highest bits of both halves
            arrays.append(plgpu.load(ref.at[:, pl.ds(2 * CHUNK, CHUNK)], layout=read))
            halves = lax.broadcast_in_dim(half.astype(jnp.int32), arrays[0].shape, ())
            arrays.append(plgpu.layout_cast(halves, read))

    def values(_, data, *rest):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        layout = plgpu.Layout.WGMMA.to_mgpu()
        out = np.empty(layout.registers_shape(shape), object)
        words = _words(data, 1 if rest else planes.chunks(bits))  # unit, chunk, rows i and i + 8
        if rest:  # those of the second half are brought to where the first's are
            high, halves = rest
            first = arith.constant(i32, 0)
            shift = llvm.extractelement(halves.registers.flat[0], first)
            highest = _words(high, 1)
            for at, word in np.ndenumerate(highest):
                highest[at] = arith.shrui(word, shift)
            words = np.concatenate([words, words, highest], axis=1)
        pairs = out.reshape(len(words), -1, 8, 2)  # unit, 64 of its inputs, 8 of them, row
        for (unit, which, b, row), _ in np.ndenumerate(pairs):
            own = [words[unit, which, row]] + ([words[unit, 2, row]] if bits == 3 else [])
            text = assembly(bits, b, which, less, dtype)
            value = llvm.inline_asm(i32, own, text, ",".join(["=r"] + ["r"] * len(own)))
            pairs[unit, which, b, row] = mgpu.utils.bitcast(value, pair)
        return mgpu.FragmentedArray(
            _registers=pairs.reshape(out.shape), _layout=layout, _is_signed=None
        )

    def reference(data, *rest):  # read by the interpreter
        codes = planes.codes(data, 2 if rest else bits)
        if rest:
            high, halves = rest
            codes |= (planes.codes(high >> halves.astype(jnp.uint8), 2) & 1) << 2
        return (codes.astype(jnp.int32) - less).astype(dtype)

    values.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(read,) * len(arrays),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, plgpu.Layout.WGMMA),
    )(values)(*arrays)


def _words(array: Any, chunks: int) -> np.ndarray:
    """Returns the registers of bytes as words, [units, chunks, rows i and i + 8]."""
    i32 = ir.IntegerType.get_signless(32)
    words = [mgpu.utils.bitcast(register, i32) for register in array.registers.flat]
    out = np.empty(len(words), object)
    out[:] = words
    return out.reshape(-1, chunks, 2)


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
