"""How a kernel makes 16-bit floats of weights of 2 and 3 bits, in the order of `planes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels import planes, zero_points

AND_OR = 0xEA  # lop3: a & b | c
FIELDS = {"bfloat16": 3, "float16": 4}  # of 2 bits that fit into the fraction beside a highest bit
SUFFIXES = {"bfloat16": "bf16x2", "float16": "f16x2"}
IN_PLACE = 2  # for `assembly`: the highest bits of 3 lie right above the others


def load(ref: Any, bits: int, dtype: Any, zero: int | Sequence[Array] | None = None) -> Array:
    """Returns code - zero for codes in shared memory, in a kernel, in the layout of wgmma.

    Args:
      ref: uint8 [R, K * bits / 8], in the order of `planes`.
      dtype: of the values: bfloat16 or float16.
      zero: of all; or `zero_points.load` of each of the groups that lie side by side in what is
        returned. Default: the middle, 2 or 4.
    """
    known = 2 ** (bits - 1) if zero is None else zero if isinstance(zero, int) else None
    zeros = () if zero is None or isinstance(zero, int) else tuple(zero)
    dtype = jnp.dtype(dtype)
    shape = (ref.shape[0], ref.shape[1] * 8 // bits)
    read = plgpu.Layout.WGMMA_UPCAST_2X

    def values(_, data, *zeros):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        layout = plgpu.Layout.WGMMA.to_mgpu()
        out = np.empty(layout.registers_shape(shape), object)
        words = _words(data, planes.chunks(bits))  # unit, chunk, rows i and i + 8
        tiles = shape[0] // 64
        # 64 rows, unit, 64 of its inputs, 8 of them, row
        pairs = out.reshape(tiles, len(words) // tiles, -1, 8, 2)
        words = words.reshape(*pairs.shape[:2], -1, 2)
        offsets = _offsets(zeros, dtype) if zeros else None
        for (tile, unit, which, b, row), _ in np.ndenumerate(pairs):
            own = [words[tile, unit, which, row]]
            own += [words[tile, unit, 2, row]] if bits == 3 else []
            if offsets is not None:
                column = 8 * (b + 8 * (which + pairs.shape[2] * unit))
                group = column * len(zeros) // shape[1]
                own.append(offsets[b % len(offsets)][tile, group, row])
            text = assembly(bits, b, which, known, dtype)
            value = llvm.inline_asm(i32, own, text, ",".join(["=r"] + ["r"] * len(own)))
            pairs[tile, unit, which, b, row] = mgpu.utils.bitcast(value, pair)
        return mgpu.FragmentedArray(
            _registers=pairs.reshape(out.shape), _layout=layout, _is_signed=None
        )

    def reference(data, *zeros):  # read by the interpreter
        minus = zero_points.spread(zeros, shape) if known is None else known
        return (planes.codes(data, bits).astype(jnp.int32) - minus).astype(dtype)

    values.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(read,) + (zero_points.ROWS,) * len(zeros),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, plgpu.Layout.WGMMA),
    )(values)(plgpu.load(ref, layout=read), *zeros)


def _words(array: Any, chunks: int) -> np.ndarray:
    """Returns the registers of bytes as words, [units, chunks, rows i and i + 8]."""
    i32 = ir.IntegerType.get_signless(32)
    words = [mgpu.utils.bitcast(register, i32) for register in array.registers.flat]
    out = np.empty(len(words), object)
    out[:] = words
    return out.reshape(-1, chunks, 2)


def _offsets(zeros: Sequence[Any], dtype: Any) -> list[np.ndarray]:
    """Returns what `assembly` adds to fields j = 0, 1, ..., by `zero_points.words`."""
    i32, name = ir.IntegerType.get_signless(32), jnp.dtype(dtype).name
    first = zero_points.words(zeros, zero_points.assembly(zero_points.POWERS[name] | 0x80))
    out = [first]
    for j in range(1, FIELDS[name]):
        out.append(np.empty_like(first))
        for at, word in np.ndenumerate(first):
            out[j][at] = llvm.inline_asm(i32, [word], offset_assembly(j, dtype), "=r,r")
    return out


def offset_assembly(j: int, dtype: Any) -> str:
    """Returns PTX that makes -(2^7 * 4^-j + zero) twice, $0, of that for j = 0, $1; exactly.

    In float16, of 2^10.
    """
    name = jnp.dtype(dtype).name
    more = float(_power(dtype)) * (1 - 4.0**-j)
    return f"""{{
.reg .b32 more;
mov.b32 more, {_twice(more, dtype):#x};
add.{SUFFIXES[name]} $0, $1, more;
}}"""


def _power(dtype: Any) -> np.ndarray:
    """Returns 2^7 or 2^10, whose last place is 1."""
    bits = zero_points.POWERS[jnp.dtype(dtype).name] << 8
    return np.array(bits, np.uint16).view(dtype)


def _twice(value: float, dtype: Any) -> int:
    """Returns a word of twice a float."""
    half = int(np.array(value, dtype).view(np.uint16))
    return half << 16 | half


def assembly(bits: int, b: int, half: int, zero: int | None, dtype: Any) -> str:
    """Returns PTX that makes two floats, $0, of the b-th pair of codes of a word.

    The fields of both codes are put, by one mask, into the fraction of 2^7 (bfloat16) or 2^10
    (float16), where j fields fit above one another. The j-th is a code times 4^j, so that

      value * 4^-j - (2^7 * 4^-j + zero)

    is code - zero, exactly and by one instruction.

    Args:
      b: of the 8 pairs of a word $1 of the lower 2 bits.
      half: with 3 bits, which of two such words it is; their highest bits are in $2. Or `IN_PLACE`.
      zero: None, if the last operand is twice what is added, of `offset_assembly`.
    """
    name = jnp.dtype(dtype).name
    magic, suffix, fields = zero_points.POWERS[name] << 8, SUFFIXES[name], FIELDS[name]
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
    lines.append(f"mov.b32 scale, {_twice(4.0**-j, dtype):#x};")
    offset = f"${bits}"  # after one word of 2 bits, two of 3
    if zero is not None:
        offset, implied = "offset", float(_power(dtype)) * 4.0**-j + zero
        lines.append(f"mov.b32 offset, {_twice(-implied, dtype):#x};")
    return "\n".join([
        "{", ".reg .b32 low, high, codes, scale, offset;", *lines,
        f"fma.rn.{suffix} $0, codes, scale, {offset};", "}",
    ])  # fmt: skip
