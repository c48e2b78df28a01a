"""How a kernel makes 16-bit floats or bytes of weights of 4 bits, in the order of `interleave`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from pallas_kernels import e2m1, zero_points
from pallas_kernels.interleave import (
    bytes_of_int4,
    codes_of_bytes,
    interleaved,
    natural_nibbles,
    signs_together,
)

BANKS = 32  # of shared memory, 4 bytes wide; lane i of a warp reads its own, the i-th
TABLE_BYTES = 256 * BANKS * 4
SCALES = (1.0, 1 / 16)  # of the fields of a half of a word that `assembly` converts
UPPER, LOWER = 0xF0F0F0F0, 0x0F0F0F0F  # halves of the bytes of a word
SIGNS = 0x88888888  # of the codes of a word
READ = plgpu.Layout.WGMMA_UPCAST_4X  # in which a lane has codes: words of 8


def table(levels: Sequence[float], dtype: Any) -> Array:
    """Returns uint32 [256, 32]: in row b, for every bank, the values of a byte of two codes.

    The value of the lower half is in the lower half of the word. A table for each bank, so that no
    two lanes wait for the same one (FLUTE has fewer: Guo et al., 2024, section 3.2).

    Args:
      levels: 16 values by code, rounded to `dtype`.
      dtype: bfloat16 or float16.
    """
    values = np.asarray(levels, np.float32).astype(jnp.dtype(dtype)).view(np.uint16)
    byte = np.arange(256)
    words = values[byte & 15].astype(np.uint32) | (values[byte >> 4].astype(np.uint32) << 16)
    return jnp.asarray(np.repeat(words[:, None], BANKS, axis=1))


def load(ref: Any, dtype: Any, words: Any = None, zero: int | Sequence[Array] = 8) -> Array:
    """Returns `floats` of codes in shared memory, int4 [R, C], inside a kernel."""
    return floats(plgpu.load(ref, layout=READ), dtype, words, zero)


def floats(q: Array, dtype: Any, words: Any = None, zero: int | Sequence[Array] = 8) -> Array:
    """Returns the values of codes, inside a kernel, in the layout of wgmma.

    Integers are times `zero_points.unit`.

    Args:
      q: int4 [R, C], in the order of `interleave`, in the layout `READ`.
      dtype: of the values: bfloat16 or float16.
      words: None, for integers; or `table` in shared memory.
      zero: what integers are less, as q + 8 is unsigned: of all; or `zero_points.load` of each of
        the groups that lie side by side in C.
    """
    dtype = jnp.dtype(dtype)
    zeros = () if isinstance(zero, int) else tuple(zero)
    operands = zeros if words is None else (words,)
    types = [zero_points.ROWS] * len(zeros) if words is None else [plgpu.RefType()]

    def values(_, q, *operands):
        i32 = ir.IntegerType.get_signless(32)
        constant = lambda n: arith.constant(i32, n)
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        layout = plgpu.Layout.WGMMA.to_mgpu()
        out = np.empty(layout.registers_shape(q.shape), object)
        rows, columns = q.shape
        by_block = out.reshape(rows // 64, -1, 4, 2)  # 32 columns, 8 of them, rows i and i + 8
        thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
        lane = arith.shli(arith.andi(thread, constant(BANKS - 1)), constant(2))
        fields = len(SCALES)
        less: list[Any] = [zero] * fields
        if zeros:
            less = zero_points.offsets(operands, SCALES, dtype)
        for (tile, block, row), eight in np.ndenumerate(q.registers.reshape(rows // 64, -1, 2)):
            word = mgpu.utils.bitcast(eight, i32)
            upper = arith.shrui(word, constant(8))
            for b in range(4):
                if words is not None:
                    value = _looked_up(word, b, lane, *operands)
                else:
                    own, field = (word, upper)[b // fields], b % fields
                    minus = less[field]
                    if zeros:
                        group = (32 * block + 8 * b) * len(zeros) // columns
                        minus = minus[tile, group, row]
                    value = _converted(own, field, dtype, minus)
                by_block[tile, block, b, row] = mgpu.utils.bitcast(value, pair)
        return mgpu.FragmentedArray(
            _registers=by_block.reshape(out.shape), _layout=layout, _is_signed=None
        )

    def reference(q, *operands):  # read by the interpreter
        bytes = bytes_of_int4(q)
        if words is not None:
            bytes = interleaved(bytes)
            return lax.bitcast_convert_type(operands[0][bytes, 0], dtype).reshape(q.shape)
        codes = codes_of_bytes(natural_nibbles(bytes)) ^ jnp.uint8(8)
        less = zero if isinstance(zero, int) else zero_points.spread(operands, q.shape)
        unit = zero_points.unit(jnp.int4, dtype)
        return ((codes.astype(jnp.int32) - less) * unit).astype(dtype)

    values.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(READ, *types),
        return_type=plgpu.ShapeDtypeStruct(q.shape, dtype, plgpu.Layout.WGMMA),
    )(values)(q, *operands)


def load_bytes(ref: Any, dtype: Any, multiples: Sequence[Array] = ()) -> Array:
    """Returns the values of codes in shared memory, of 8 bits, inside a kernel.

    In the layout of wgmma for bytes. Integers as int8 are in the order of inputs of
    `interleave.for_int8`, and 16 times as large unless there are multiples; as e4m3, which has them
    all, in that of `interleave.for_e4m3`. Codes of e2m1 times multiples are e4m3, as they were.

    Args:
      ref: int4 [R, C], interleaved: integers; or if values are e4m3 and there are multiples, codes
        of e2m1, `signs_apart`.
      dtype: of the values: int8 or float8_e4m3fn.
      multiples: what they are multiplied by, `zero_points.load` of -15 .. 16, or of the bits of
        e4m3 as in `e2m1`, for each of the groups that lie side by side in C.
    """
    dtype = jnp.dtype(dtype)
    is_int = dtype == jnp.int8
    q = plgpu.load(ref, layout=READ)
    if multiples:
        texts, decode = (PRODUCT, _multiplied) if is_int else (e2m1.PRODUCTS, e2m1.times)
    else:
        texts, decode = (), _sixteenfold if is_int else _looked_up_e4m3

    def values(_, q, *multiples):
        i32 = ir.IntegerType.get_signless(32)
        four = ir.VectorType.get((4,), mgpu.utils.dtype_to_ir_type(dtype))
        layout = plgpu.Layout.WGMMA_8BIT.to_mgpu()
        out = np.empty(layout.registers_shape(q.shape), object)
        rows, columns = q.shape
        by_block = out.reshape(rows // 64, -1, 2, 2)  # 32 columns, 16 of them, rows i and i + 8
        operands = [zero_points.words(multiples, text) for text in texts]
        for (tile, block, row), eight in np.ndenumerate(q.registers.reshape(rows // 64, -1, 2)):
            at = tile, 32 * block * len(multiples) // columns, row
            own = (words[at] for words in operands)
            for half, bytes in enumerate(decode(mgpu.utils.bitcast(eight, i32), *own)):
                by_block[tile, block, half, row] = mgpu.utils.bitcast(bytes, four)
        return mgpu.FragmentedArray(
            _registers=by_block.reshape(out.shape),
            _layout=layout,
            _is_signed=True if is_int else None,
        )

    def reference(q, *multiples):  # read by the interpreter
        factors = jnp.int8(16 if is_int else 1)
        if multiples:
            each = q.shape[1] // len(multiples)
            factors = jnp.repeat(jnp.stack(multiples, axis=1), each, axis=1)
            if not is_int:
                codes = codes_of_bytes(signs_together(bytes_of_int4(q)))
                return e2m1.reference(codes, factors)
        q = q.astype(jnp.int8) * factors
        words = q.reshape(q.shape[0], -1, 4, 4, 2)  # word, byte, half
        if is_int:
            return jnp.moveaxis(words, -1, 2).reshape(q.shape)
        pairs = words.reshape(q.shape[0], -1, 4, 2, 4)  # word, pair of bytes, code
        return pairs.swapaxes(2, 3).reshape(q.shape).astype(dtype)

    values.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(READ, *[zero_points.ROWS] * len(multiples)),
        return_type=plgpu.ShapeDtypeStruct(q.shape, dtype, plgpu.Layout.WGMMA_8BIT),
    )(values)(q, *multiples)


# PTX that makes of a byte s, $1, what `times_assembly` multiplies by, $0, and what it adds, in each
# of four bytes: 128 - 8 s.
FACTOR = "cvt.s32.s8 $0, $1;"
MIDDLE_OF_BYTES = """{
.reg .b32 factor;
cvt.s32.s8 factor, $1;
mad.lo.u32 $0, factor, 0xF7F7F7F8, 0x80808080;
}"""
PRODUCT = (FACTOR, MIDDLE_OF_BYTES)


def _multiplied(word: Any, factor: Any, middle: Any) -> tuple[Any, Any]:
    """Returns the codes in the lower halves of a word's bytes, and in the upper, times a factor."""
    i32 = ir.IntegerType.get_signless(32)
    text = times_assembly()

    def times(word):
        return llvm.inline_asm(i32, [word, factor, middle], text, "=r,r,r,r")

    return times(word), times(arith.shrui(word, arith.constant(i32, 4)))


def times_assembly() -> str:
    """Returns PTX that makes int8, $0, of the codes in the lower halves of a word's bytes, $1.

    Four at once (Lin et al., 2024, QServe, section 5.2.3): with their signs flipped they are q + 8,
    and (q + 8) s + 128 - 8 s is in 0 .. 255 for s, $2, of -15 .. 16. So no byte carries to the
    next, of whatever sign s is. $3 is what is added. A flipped highest bit takes the 128 away.
    """
    return f"""{{
.reg .b32 codes;
lop3.b32 codes, $1, {LOWER:#x}, {SIGNS & LOWER:#x}, 0x6a;
mad.lo.u32 codes, codes, $2, $3;
xor.b32 $0, codes, 0x80808080;
}}"""


def _sixteenfold(word: Any) -> tuple[Any, Any]:
    """Returns 16 times the codes in the lower halves of a word's bytes, and those in the upper.

    A code in the upper half of a byte is 16 times its value, sign and all; so three instructions
    are enough for eight codes.
    """
    i32 = ir.IntegerType.get_signless(32)
    upper = arith.constant(i32, UPPER - 2**32)
    shifted = arith.shli(word, arith.constant(i32, 4))
    return arith.andi(shifted, upper), arith.andi(word, upper)


def _looked_up_e4m3(word: Any) -> tuple[Any, Any]:
    """Returns the codes in the lower half of a word as e4m3, and those in the upper half."""
    i32 = ir.IntegerType.get_signless(32)
    firsts = [llvm.inline_asm(i32, [], hidden(n), "=r") for n in e4m3_tables()[::2]]
    flipped = arith.xori(word, arith.constant(i32, SIGNS - 2**32))

    def values(*codes):
        return llvm.inline_asm(i32, [*codes, *firsts], e4m3_assembly(), "=r,r,r,r,r")

    sixteen = arith.constant(i32, 16)
    return values(word, flipped), values(*(arith.shrui(w, sixteen) for w in (word, flipped)))


def e4m3_tables() -> list[int]:
    """Returns the e4m3 bytes of codes 0 .. 7 in two words, then half those bytes of -8 .. -1."""
    levels = (np.arange(16) ^ 8) - 8  # by code
    bytes = levels.astype(jnp.float8_e4m3fn).view(np.uint8)
    return np.where(np.arange(16) < 8, bytes, bytes // 2).astype(np.uint8).view("<u4").tolist()


def e4m3_assembly() -> str:
    """Returns PTX that makes e4m3, $0, of the four codes in the lower half of a word $1.

    `prmt` reads a byte of 8 by the lower 3 bits of each code. Where the fourth is set, it repeats
    the highest bit of that byte instead, here a 0: so all 16 are in two tables, of which one is
    read by codes with their fourth bits flipped, $2. It has halves of bytes, all even, to keep that
    bit free. $3 and $4 are the first words of the tables.
    """
    _, positive, _, negative = e4m3_tables()
    return f"""{{
.reg .b32 positive, negative;
prmt.b32 positive, $3, {positive:#x}, $1;
prmt.b32 negative, $4, {negative:#x}, $2;
mad.lo.u32 $0, negative, 2, positive;
}}"""


def hidden(n: int) -> str:
    """Returns PTX that puts a constant in $0, which the assembler does not see is one.

    It would keep what it knows to be the same for all threads in a uniform register, and copy that
    in front of every `prmt`, which cannot read it. Bit 1 of a square is 0.
    """
    return f"""{{
.reg .b32 square;
mov.u32 square, %tid.x;
mul.lo.u32 square, square, square;
and.b32 square, square, 2;
or.b32 $0, square, {n:#x};
}}"""


def _looked_up(word: Any, byte: int, lane: Any, table: Any) -> Any:
    """Returns the word of the table for a byte of `word`."""
    by = 8 * byte - 7
    shift = arith.shrui if by >= 0 else arith.shli
    return looked_up(shift(word, arith.constant(word.type, abs(by))), lane, table)


def looked_up(word: Any, lane: Any, table: Any) -> Any:
    """Returns the word of the table for the byte that is 7 bits to the left in `word`.

    Rows of the table have 128 bytes; `lane` is 4 times that of a thread.
    """
    i8, i32 = (ir.IntegerType.get_signless(n) for n in (8, 32))
    row = arith.andi(word, arith.constant(i32, 0xFF << 7))
    first = mgpu.utils.memref_ptr(table)
    place = llvm.getelementptr(
        first.type, first, [arith.ori(row, lane)], [-(2**31)], i8, llvm.GEPNoWrapFlags.inbounds
    )
    return llvm.load(i32, place)


def _converted(word: Any, field: int, dtype: Any, zero: Any) -> Any:
    """Returns two integers as floats, less `zero`: an int, or a word of `zero_points.offsets`."""
    i32 = ir.IntegerType.get_signless(32)
    known = zero if isinstance(zero, int) else None
    operands = [word] + ([zero] if known is None else [])
    constraints = ",".join(["=r"] + ["r"] * len(operands))
    return llvm.inline_asm(i32, operands, assembly(field, dtype, known), constraints)


def assembly(field: int, dtype: Any, zero: int | None) -> str:
    """Returns PTX that makes two floats, $0, of two integers of 4 bits in the halves of a word $1.

    Those of field 0 are a half's lowest bits, those of field 1 are above them: 16 times as much.
    One instruction takes them to bfloat16 that are subnormal, or to the fraction of 2^10 (float16),
    with their signs flipped, as q + 8. Another one subtracts the zero point as well:
    `zero_points.less_assembly`.

    Args:
      zero: None, if $2 is twice what is added.
    """
    halves = lambda bits: f"{bits << 16 | bits:#x}"
    mask, signs = 15 << 4 * field, 8 << 4 * field
    return f"""{{
.reg .b32 codes;
lop3.b32 codes, $1, {halves(mask)}, {halves(zero_points.magic(dtype) | signs)}, 0x6a;
{zero_points.less_assembly(SCALES[field], zero, "$2", dtype)}
}}"""
