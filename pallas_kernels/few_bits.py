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
READ = plgpu.Layout.WGMMA_UPCAST_2X  # in which a lane has codes, as bytes: words
ROOM = {"bfloat16": 8, "float16": 9}  # bits of a half in which codes may lie, two apart
# Of codes that are two apart, the lower bits of $1 and the highest of $2, which are right above.
MERGED = "lop3.b32 $0, $1, $2, 0x00330033, 0xe4;"  # a & c | b & ~c


def load(ref: Any, bits: int, dtype: Any, zero: int | Sequence[Array] | None = None) -> Array:
    """Returns `floats` of codes in shared memory, uint8 [R, K * bits / 8], in a kernel."""
    return floats(plgpu.load(ref, layout=READ), bits, dtype, zero)


def floats(data: Array, bits: int, dtype: Any, zero: int | Sequence[Array] | None = None) -> Array:
    """Returns code - zero for codes, in a kernel, in the layout of wgmma.

    It is times `zero_points.unit`.

    Args:
      data: uint8 [R, K * bits / 8], in the order of `planes`, in the layout `READ`.
      dtype: of the values: bfloat16 or float16.
      zero: of all; or `zero_points.load` of each of the groups that lie side by side in what is
        returned. Default: the middle, 2 or 4.
    """
    known = 2 ** (bits - 1) if zero is None else zero if isinstance(zero, int) else None
    zeros = () if zero is None or isinstance(zero, int) else tuple(zero)
    dtype = jnp.dtype(dtype)
    shape = (data.shape[0], data.shape[1] * 8 // bits)

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
        scales = [4.0**-j for j in range(fields(bits, dtype))]
        offsets = zero_points.offsets(zeros, scales, dtype) if zeros else None
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
        integers = planes.codes(data, bits).astype(jnp.int32) - minus
        return (integers * zero_points.unit(jnp.uint8, dtype)).astype(dtype)

    values.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(READ,) + (zero_points.ROWS,) * len(zeros),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, plgpu.Layout.WGMMA),
    )(values)(data, *zeros)


def _words(array: Any, chunks: int) -> np.ndarray:
    """Returns the registers of bytes as words, [units, chunks, rows i and i + 8]."""
    i32 = ir.IntegerType.get_signless(32)
    words = [mgpu.utils.bitcast(register, i32) for register in array.registers.flat]
    out = np.empty(len(words), object)
    out[:] = words
    return out.reshape(-1, chunks, 2)


def fields(bits: int, dtype: Any) -> int:
    """Returns how many codes of a half `assembly` converts where they lie."""
    return (ROOM[jnp.dtype(dtype).name] - bits) // 2 + 1


def assembly(bits: int, b: int, half: int | None, zero: int | None, dtype: Any) -> str:
    """Returns PTX that makes two floats, $0, of the b-th pair of codes of a word.

    The fields of both codes are put, by one mask, into bfloat16 that are subnormal, or into the
    fraction of 2^10 (float16). The j-th of those that fit above one another is a code times 4^j, so
    that one instruction subtracts the zero point as well: `zero_points.less_assembly`.

    Args:
      b: of the 8 pairs of a word $1 of the lower 2 bits.
      half: with 3 bits, which of two such words it is; their highest bits are in $2. None: the
        word has all bits of the codes that are two apart, 0 and 2 or 1 and 3: see `MERGED`.
      zero: None, if the last operand is twice what is added.
    """
    twice = lambda field: field << 16 | field
    j = b % fields(bits, dtype)
    by = 2 * (b - j)  # bits that the word is shifted by
    has_high = bits == 3 and half is not None
    field = 3 if has_high else 2**bits - 1
    magic = twice(zero_points.magic(dtype))
    lines = [
        f"shr.b32 low, $1, {by};",
        f"lop3.b32 codes, low, {twice(field << 2 * j):#x}, {magic:#x}, {AND_OR:#x};",
    ]
    if bits == 3 and half is not None:
        by += half - 2  # from the highest bit's place to the one above the other two
        lines += [
            f"{'shr' if by >= 0 else 'shl'}.b32 high, $2, {abs(by)};",
            f"lop3.b32 codes, high, {twice(4 << 2 * j):#x}, codes, {AND_OR:#x};",
        ]
    lines.append(zero_points.less_assembly(4.0**-j, zero, f"${2 + has_high}", dtype))
    return "\n".join(["{", ".reg .b32 low, high, codes;", *lines, "}"])
