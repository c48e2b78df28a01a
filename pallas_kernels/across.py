"""How a kernel reads weights across their rows: the left operand of x Wᵀ, from registers.

A wgmma takes in a register of a lane two neighbours along what is contracted, here two rows of W.
`ldmatrix` transposes 8 x 8 units of 16 bits: lane 4u + t of 32 gets the u-th unit of rows 2t and
2t + 1, in the halves of a word. A unit has 2 codes of 8 bits, 4 of 4 or 8 of 2, of one row. Of
these a warp decodes two, in both halves at once: rows u and u + 8 of the 16 that it has in a wgmma.

So a wgmma has the features in the order in which they lie in units. Nothing is moved for that: the
sums are stored from registers whose layout says which features they are of, `in_order`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Replicated, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

from pallas_kernels import few_bits, four_bits, hopper, planes, whole_bytes, zero_points
from pallas_kernels.interleave import (
    codes_of_bytes,
    interleaved,
    interleaved_pairs,
    natural_nibbles,
)

HALVES = (0x5410, 0x7632)  # prmt of two words: their lower halves, their upper halves
ROTATED = "shf.r.wrap.b32 $0, $1, $1, $2;"  # $1 by $2 bits to the right
SHIFTED = "shr.b32 $0, $1, $2;"
EXPONENTS = """{
.reg .b32 bits, least, zero;
prmt.b32 bits, $1, 0, 0x4140;
shl.b32 bits, bits, 7;
mov.b32 least, 0x00400040;
max.u16x2 bits, bits, least;
mov.b32 zero, 0;
fma.rn.bf16x2 $0, bits, zero, bits;
}"""  # of two e8m0 in $1 to bfloat16: 2^-127 is subnormal; infinity times 0 is NaN


@dataclasses.dataclass(frozen=True)
class Order:
    """Where the 64 features of a warpgroup are.

    Attributes:
      bits: of a code in a unit.
      sums: layout [64, M] of sums in registers: which feature and token each of them is of.
      is_exchanged: whether lanes exchange sums first, of two codes of two neighbouring units: so a
        register has two neighbours.
    """

    bits: int
    sums: Any
    is_exchanged: bool = False

    @property
    def units(self) -> int:
        """Units in which 64 codes of a row lie."""
        return hopper.ROWS * self.bits // 16

    @property
    def layout(self) -> Any:
        """Layout [units, rows of W] of what lanes read; warps share units with codes of several."""
        blocks = self.units // 8
        if blocks == 1:
            return plgpu.Layout.TILED(Tiling(((8, 8), (2,))), (Replicated(4),), (-3, -2), -1)
        warps = (-5,) if blocks == 4 else (-5, Replicated(4 // blocks))
        return plgpu.Layout.TILED(Tiling(((self.units, 8), (8, 8), (2,))), warps, (-3, -2), -1)


# A feature is a number of 6 bits, which tiles cut from the most significant one on. Tokens are cut
# last, as in every accumulator of wgmma: of each 8, one of 4 lanes has 2.
NATURAL = Order(8, plgpu.Layout.TILED(  # warp, unit, code
    Tiling(((64, 8), (16, 8), (2, 2), (2, 1))), (-8,), (-6, -5), -2,
))  # fmt: skip
# In the order of `interleave`: warp, the bits of the unit in reverse, code.
PAIRS = Order(8, plgpu.Layout.TILED(
    Tiling(((64, 8), (16, 8), (8, 8), (4, 8), (2, 2), (2, 1))), (-12,), (-6, -8, -10, -5), -2,
))  # fmt: skip
# In that of 4 bits: the warp, code, the first bits of the unit, its last; the last and the code are
# exchanged.
NIBBLES = Order(4, plgpu.Layout.TILED(
    Tiling(((64, 8), (32, 8), (16, 8), (8, 8), (2, 2), (2, 1))), (-12, -10), (-6, -8, -5), -2,
), is_exchanged=True)  # fmt: skip
# If they are looked up: first bit of the warp, last of the unit, last of the warp (byte of a unit),
# the other bits of the unit, code (half of a byte).
BYTES = Order(4, plgpu.Layout.TILED(
    Tiling(((64, 8), (32, 8), (16, 8), (8, 8), (2, 2), (2, 1))), (-12, -8), (-6, -10, -5), -2,
))  # fmt: skip
# In that of `planes`: first bit of the warp, code, last of the warp, and of the unit the second
# bit, the first, the last, which is exchanged with the code. That a warp's codes are two apart
# leaves room for a third bit.
PLANES = Order(2, plgpu.Layout.TILED(
    Tiling(((64, 8), (32, 8), (16, 8), (8, 8), (4, 8), (2, 2), (2, 1))),
    (-14, -10), (-6, -8, -12, -5), -2,
), is_exchanged=True)  # fmt: skip


def order_of(weight: Any, *, natural: bool = False) -> Order:
    """Returns how weights lie: int8 or float8_e4m3fn; int4; uint4; or uint8.

    Codes of a table are uint4, those of 2 or 3 bits uint8.

    Args:
      natural: whether those of 8 bits are as they were, and not interleaved.
    """
    of_bytes = NATURAL if natural else PAIRS
    orders = {"int4": NIBBLES, "uint4": BYTES, "uint8": PLANES}
    return orders.get(jnp.dtype(weight).name, of_bytes)


def units(w: Array) -> Array:
    """Returns packed weights [.., N, columns] as units, int16: the same bytes."""
    n = 16 // hopper.bits(w.dtype)
    return lax.bitcast_convert_type(w.reshape(*w.shape[:-1], -1, n), jnp.int16)


def columns(groups: int, *, dealt: bool = False) -> Any:
    """Returns a layout of values [groups, rows of W], of 1 or 2 groups of a warpgroup's features.

    Each warp has those of its features, neighbours in a register. Each lane has those that it
    multiplies its weights by; or, `dealt`, some of its warp's, so that one lane converts each.
    """
    lanes, width = ((-2,), 64) if dealt else ((Replicated(8), -2), 8)
    tile = (width,) if groups == 1 else (groups, width)
    warps = (Replicated(4),) if groups == 1 else (-3, Replicated(2))
    return plgpu.Layout.TILED(Tiling((tile, (2,))), warps, lanes, -1)


def spread(values: Array, *, dealt: bool) -> Array:
    """Returns [64, rows of W], for all features of a warpgroup, of 16-bit values in `columns`."""
    groups, rows = values.shape
    shape = (hopper.ROWS, rows)

    def repeated(_, values):
        layout = plgpu.Layout.WGMMA.to_mgpu()
        registers = values.registers.flatten()
        if dealt:
            words, pair = _words(values), ir.VectorType.get((2,), values.mlir_dtype)
            registers = np.empty(rows // 8, object)
            for i in range(len(registers)):
                word = _asm(exchange(8 * i % 64 // 2), words[8 * i // 64])
                registers[i] = mgpu.utils.bitcast(word, pair)
        both = np.repeat(registers[:, None], 2, axis=1)  # rows u and u + 8
        return mgpu.FragmentedArray(
            _registers=both.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
        )

    return _inline(
        repeated,
        lambda values: jnp.repeat(values, hopper.ROWS // groups, axis=0),
        (columns(groups, dealt=dealt),),
        plgpu.ShapeDtypeStruct(shape, values.dtype, plgpu.Layout.WGMMA),
    )(values)


def exchange(first: int) -> str:
    """Returns PTX that gives lane 4u + t the word $1 of lane first + t; `first` is 0, 4, .. 28."""
    own = 3 << 8  # these bits of a lane's number are kept
    return f"shfl.sync.idx.b32 $0, $1, {first}, {own | 31:#x}, 0xffffffff;"


def exponents(scale: Array) -> Array:
    """Returns scales of e8m0, uint8 in `columns`, dealt, as bfloat16."""

    def reference(scale):
        exponent = lax.bitcast_convert_type(scale, jnp.float8_e8m0fnu)
        return exponent.astype(jnp.bfloat16)

    return _of_bytes(scale, jnp.bfloat16, EXPONENTS, reference)


def less_of(zero: Array, weight: Any, dtype: Any) -> Array:
    """Returns what `load` adds to codes: floats of zero points, uint8 as `exponents`.

    They are `_offset`: the power of two that it puts codes below is in them, and what one is.
    """
    power, factor = _offset(weight, dtype)
    reference = lambda zero: ((zero.astype(jnp.int32) + power) * factor).astype(dtype)
    return _of_bytes(zero, dtype, less_assembly(weight, dtype), reference)


def load(
    ref: Any,
    wg: Any,
    weight: Any,
    dtype: Any,
    *,
    natural: bool = False,
    bits: int | None = None,
    zero: int | Array | None = None,
    table: Any = None,
) -> Array:
    """Returns weights in shared memory as 16-bit floats [64, rows], in a kernel, in an `Order`.

    They are times `zero_points.unit`.

    Args:
      ref: `units` [rows, columns] of all features of a tile.
      wg: whose of them are loaded, 0 or 1.
      weight: what they are units of, as for `order_of`.
      dtype: of the values: bfloat16 or float16.
      natural: as for `order_of`.
      bits: of codes in uint8: 2 or 3.
      zero: what unsigned codes are less, as in `weight_only.matmul`: of all; or `less_of` [64,
        rows]. Default: the middle.
      table: of the values of uint4, as `four_bits.table`; or None.
    """
    weight, dtype, order = jnp.dtype(weight), jnp.dtype(dtype), order_of(weight, natural=natural)
    rows = ref.shape[0]
    known = zero if isinstance(zero, int) else _middle(weight, bits)
    first = pl.ds(wg * order.units, order.units)
    operands = [plgpu.load(ref.at[:, first].T, layout=order.layout)]
    types = [order.layout]
    if bits == 3:  # the highest bits of both warpgroups' features, and which of them it is
        high = ref.at[:, pl.ds(2 * order.units, order.units)].T
        operands += [plgpu.load(high, layout=order.layout), wg.astype(jnp.int32)]
        types += [order.layout, plgpu.Layout.WG_SPLAT(())]
    has_zeros = False
    if zero is not None and not isinstance(zero, int):
        has_zeros = True
        operands.append(zero)
        types.append(plgpu.Layout.WGMMA)
    if table is not None:
        operands.append(table)
        types.append(plgpu.RefType())

    def values(_, own, *rest):
        rest, words = list(rest), [_words(own)]
        half = None
        if bits == 3:
            words.append(_words(rest.pop(0)))
            half = rest.pop(0).registers.item()
        if has_zeros:
            words.append(_words(rest.pop(0))[::2])  # u and u + 8 have the same
        decode = _decoder(weight, dtype, bits, None if has_zeros else known, half, *rest)
        layout = plgpu.Layout.WGMMA.to_mgpu()
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        out = np.empty((len(words[0]), 2), object)  # 8 rows of W, u and u + 8
        for i, of_rows in enumerate(zip(*words, strict=True)):
            out[i] = [mgpu.utils.bitcast(value, pair) for value in decode(*of_rows)]
        return mgpu.FragmentedArray(
            _registers=out.reshape(layout.registers_shape((hopper.ROWS, rows))),
            _layout=layout,
            _is_signed=None,
        )

    def reference(units, *rest):
        rest, bytes = list(rest), _bytes(units)
        if order is PAIRS:
            bytes = interleaved_pairs(bytes)
        if weight == jnp.float8_e4m3fn:
            return lax.bitcast_convert_type(bytes, weight).astype(dtype).T
        if weight == jnp.int8:
            codes = bytes ^ jnp.uint8(128)
        elif order is BYTES:
            pairs = lax.bitcast_convert_type(rest[-1][interleaved(bytes), 0], dtype)
            return pairs.reshape(rows, -1).T
        elif order is NIBBLES:
            codes = codes_of_bytes(natural_nibbles(bytes)) ^ jnp.uint8(8)
        else:
            codes = planes.codes(bytes, 2)
            if bits == 3:
                highest = _bytes(rest.pop(0)) >> rest.pop(0).astype(jnp.uint8)
                codes |= (planes.codes(highest, 2) & 1) << 2
        zero = known
        if has_zeros:
            power, factor = _offset(weight, dtype)
            zero = rest[0].astype(jnp.float32) / factor - power
        return ((codes.T.astype(jnp.int32) - zero) * zero_points.unit(weight, dtype)).astype(dtype)

    kind = plgpu.ShapeDtypeStruct((hopper.ROWS, rows), dtype, plgpu.Layout.WGMMA)
    return _inline(values, reference, types, kind)(*operands)


def in_order(sums: Array, order: Order) -> Array:
    """Returns sums [64, M] of a wgmma with the features that they are of."""

    def values(_, sums):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        layout = order.sums.to_mgpu()
        registers = np.empty(layout.registers_shape(sums.shape), object)
        places = registers.reshape(-1, 2)  # 8 tokens, 2 of them
        rows = sums.registers.reshape(-1, 2)  # 8 tokens, u and u + 8
        is_odd = arith.trunci(ir.IntegerType.get_signless(1), _bits_of_thread(2, 1))  # of its unit
        for (i, token), _ in np.ndenumerate(places):
            first, second = (llvm.extractelement(row, _constant(token)) for row in rows[i])
            if order.is_exchanged:
                other = mgpu.utils.bitcast(arith.select(is_odd, first, second), i32)
                other = mgpu.utils.bitcast(mgpu.utils.shfl_bfly(other, 4), f32)
                first, second = (
                    arith.select(is_odd, other, first), arith.select(is_odd, second, other),
                )  # fmt: skip
            both = ir.VectorType.get((2,), f32)
            places[i, token] = vector.from_elements(both, [first, second])
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    kind = plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, order.sums)
    return _inline(values, lambda sums: sums, (plgpu.Layout.WGMMA,), kind)(sums)


def _inline(
    code: Callable[..., Any], reference: Callable[..., Any], arg_types: Sequence[Any], kind: Any
) -> Callable[..., Array]:
    """Returns inlined GPU code, with the function that the interpreter evaluates instead."""
    code.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(arg_types=tuple(arg_types), return_type=kind)(code)


def _of_bytes(array: Array, dtype: Any, text: str, reference: Callable[..., Any]) -> Array:
    """Returns 16-bit floats of bytes in `columns`, dealt, by PTX of two in $1 -> a word $0."""
    dtype, layout = jnp.dtype(dtype), columns(array.shape[0], dealt=True)

    def values(_, array):
        i16, i32 = (ir.IntegerType.get_signless(n) for n in (16, 32))
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
        out = np.empty_like(array.registers)
        for at, two in np.ndenumerate(array.registers):
            word = _asm(text, arith.extui(i32, mgpu.utils.bitcast(two, i16)))
            out[at] = mgpu.utils.bitcast(word, pair)
        return mgpu.FragmentedArray(_registers=out, _layout=array.layout, _is_signed=None)

    kind = plgpu.ShapeDtypeStruct(array.shape, dtype, layout)
    return _inline(values, reference, (layout,), kind)(array)


def _bytes(units: Array) -> Array:
    """Returns the bytes [rows, columns] of units [columns, rows]."""
    return lax.bitcast_convert_type(units.T, jnp.uint8).reshape(units.shape[1], -1)


def _constant(n: int) -> Any:
    return arith.constant(ir.IntegerType.get_signless(32), n)


def _bits_of_thread(first: int, count: int) -> Any:
    """Returns some bits of a thread's number: 5 of its lane, then 2 of its warp."""
    thread = arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x))
    return arith.andi(arith.shrui(thread, _constant(first)), _constant(2**count - 1))


def _words(array: Any) -> list[Any]:
    return [mgpu.utils.bitcast(r, ir.IntegerType.get_signless(32)) for r in array.registers.flat]


def _asm(text: str, *operands: Any) -> Any:
    constraints = ",".join(["=r"] + ["r"] * len(operands))
    return llvm.inline_asm(ir.IntegerType.get_signless(32), list(operands), text, constraints)


def _middle(weight: Any, bits: int | None) -> int:
    return 2 ** ((bits or hopper.bits(weight)) - 1)


def _offset(weight: Any, dtype: Any) -> tuple[int, float]:
    """Returns (power, factor): (zero point + power) * factor is added to a code."""
    unit = zero_points.unit(weight, dtype)
    return (0, -unit) if unit != 1 else (2**10, -1.0)


def less_assembly(weight: Any, dtype: Any) -> str:
    """Returns PTX that makes what is added to two codes, $0, of their zero points in $1."""
    if zero_points.unit(weight, dtype) != 1:
        return zero_points.unit_assembly((0, 1))
    return f"prmt.b32 $0, $1, {zero_points.MINUS:#x}, 0x4140;"


def _decoder(
    weight: Any, dtype: Any, bits: int | None, zero: int | None, half: Any, table: Any = None
) -> Callable[..., Sequence[Any]]:
    """Returns a function of words -> the registers of rows u and u + 8, of 16-bit floats.

    Args:
      zero: None, if the last of the words is of `less_of`.
      half: of 3 bits, which half of the features are this warpgroup's.
    """
    if weight == jnp.int8:
        texts = [whole_bytes.assembly((code, 2 + code), dtype, zero) for code in (0, 1)]

        def of_int8(word, *less):
            unsigned = arith.xori(word, _constant(whole_bytes.SIGNS - 2**32))
            return [_asm(text, unsigned, *less) for text in texts]

        return of_int8
    if weight == jnp.float8_e4m3fn:
        texts = [f"prmt.b32 $0, $1, $2, {half:#x};" for half in HALVES]
        if dtype == jnp.bfloat16:
            texts = [whole_bytes.bfloat16_assembly((code, code)) for code in (0, 1)]

        def of_e4m3(word):
            rows = [_asm(whole_bytes.e4m3_assembly(row), word) for row in (0, 1)]
            return [_asm(text, *rows) for text in texts]

        return of_e4m3
    byte = arith.shli(_bits_of_thread(5, 1), _constant(3))
    if weight == jnp.int4:
        texts = [four_bits.assembly(field, dtype, zero) for field in (0, 1)]
        return lambda word, *less: _both(texts, _asm(SHIFTED, word, byte), less, dtype)
    if weight == jnp.uint4:
        # To the place of a row's number in an address: 7 bits to the left.
        places = [arith.addi(byte, _constant(16 * row - 7)) for row in (0, 1)]
        lane = arith.shli(_bits_of_thread(0, 5), _constant(2))

        def looked_up(word):
            pairs = [
                four_bits.looked_up(_asm(ROTATED, word, place), lane, table) for place in places
            ]
            return [_asm(f"prmt.b32 $0, $1, $2, {half:#x};", *pairs) for half in HALVES]

        return looked_up
    # Two fields of 2 bits, one between them: each warp's begin at 0, 2, 8 or 10.
    first, last = _bits_of_thread(6, 1), _bits_of_thread(5, 1)
    fields = arith.addi(arith.shli(first, _constant(3)), arith.shli(last, _constant(1)))
    places = [fields]
    if half is not None:  # of the highest bits, two apart, to the one above both others
        places.append(arith.addi(fields, arith.addi(half, _constant(-2))))
    assert bits is not None
    texts = [few_bits.assembly(bits, b, None, zero, dtype) for b in (0, 2)]

    def of_planes(*words):
        own = [_asm(ROTATED, *both) for both in zip(words, places, strict=False)]
        own = _asm(few_bits.MERGED, *own) if half is not None else own[0]
        return _both(texts, own, words[-1:] if zero is None else (), dtype)

    return of_planes


def _both(texts: Sequence[str], word: Any, less: Sequence[Any], dtype: Any) -> list[Any]:
    """Returns floats of both fields of a word, of which the second is 4 bits above the first.

    Args:
      less: none; or a word of `less_of`, for the first field.
    """
    second = less
    if less and dtype == jnp.float16:
        second = [_asm(zero_points.offset_assembly(1 / 16), *less)]
    return [_asm(text, word, *own) for text, own in zip(texts, (less, second), strict=True)]
