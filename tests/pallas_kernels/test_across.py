"""Weights read across their rows become the operand, and the sums, of x Wᵀ.

The code that a kernel inlines is run here for all threads of a warpgroup, on words: registers come
from layouts, and what assembly does with them from `ptx`.
"""

from __future__ import annotations

import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu.fragmented_array import Replicated
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels import across, four_bits, hopper, planes, zero_points
from pallas_kernels.interleave import interleaved_pairs, of_int4
from tests.pallas_kernels import ptx

ROWS = 128  # of W, in a step
WEIGHTS = {  # type, bits
    "int8": ("int8", None),
    "e4m3": ("float8_e4m3fn", None),
    "int4": ("int4", None),
    "int2": ("uint8", 2),
    "int3": ("uint8", 3),
}


def registers(a, layout):
    """Returns [4 warps, 32 lanes, registers, values of one] of an array in a layout."""
    for tile in layout.tiling.tiles:
        head = a.ndim - len(tile)
        split = [n for d, t in zip(a.shape[head:], tile, strict=True) for n in (d // t, t)]
        a = a.reshape(*a.shape[:head], *split)
        a = a.transpose(*range(head), *range(head, a.ndim, 2), *range(head + 1, a.ndim, 2))
    rank, order = a.ndim, []
    for d in (*layout.warp_dims, *layout.lane_dims):
        if isinstance(d, Replicated):
            a = np.repeat(a[..., None], d.times, axis=-1)
            order.append(a.ndim - 1)
        else:
            order.append(d % rank)
    vector = layout.vector_dim % rank
    others = [d for d in range(rank) if d not in (*order, vector)]
    return a.transpose(*order, *others, vector).reshape(4, 32, -1, a.shape[vector])


def array(regs, layout, shape):
    """Returns the array of registers; all that have a value have the same."""
    places = registers(np.arange(np.prod(shape)).reshape(shape), layout)
    out = np.empty(np.prod(shape), regs.dtype)
    out[places.reshape(-1)] = regs.reshape(-1)
    bits = f"u{regs.itemsize}"  # so that NaN is itself
    np.testing.assert_array_equal(out[places].view(bits), np.ascontiguousarray(regs).view(bits))
    return out.reshape(shape)


def simulated(code, reference, arg_types, kind):
    """Runs inlined code as the 128 threads of a warpgroup; a value is that of every thread."""
    del reference

    def run(*arrays):
        operands = [
            np.asarray(a) if isinstance(at, plgpu.RefType) else fragmented(a, at.to_mgpu())
            for a, at in zip(map(np.asarray, arrays), arg_types, strict=True)
        ]
        with ir.Context(), ir.Location.unknown():
            out = code(None, *operands)._registers
        out = np.stack([r.reshape(4, 32, -1) for r in out.flat], axis=2)
        return array(out.view(jnp.dtype(kind.dtype)), kind.layout.to_mgpu(), kind.shape)

    return run


def fragmented(a, layout):
    own = registers(a, layout) if a.ndim else a.reshape(1, 1, 1, 1).astype(np.uint32)
    cells = np.empty(own.shape[2], object)
    for i in range(len(cells)):
        cells[i] = np.ascontiguousarray(own[:, :, i])
    if a.ndim:
        cells = cells.reshape(layout.registers_shape(a.shape))
    return types.SimpleNamespace(registers=cells, layout=layout, shape=a.shape, mlir_dtype=None)


def assembled(text, *operands):
    operands = [np.ascontiguousarray(a) for a in np.broadcast_arrays(*operands)]
    names = {f"${i}": operand for i, operand in enumerate(operands, 1)}
    return ptx.run(text, "$1", names.pop("$1"), **names)["$0"]


def bits_of_thread(first, count):
    thread = np.arange(128, dtype=np.uint32).reshape(4, 32, 1)
    return thread >> np.uint32(first) & np.uint32(2**count - 1)


def looked_up(word, lane, table):
    return table.reshape(-1)[(word & np.uint32(0xFF << 7) | lane) // 4]


def viewed(dtype):
    return lambda a: np.ascontiguousarray(a).view(dtype).astype(np.uint32)


class Threads:
    """`across` in numpy."""

    def __init__(self):
        self.patches = [
            mock.patch.multiple(
                across,
                _inline=simulated,
                _asm=assembled,
                _constant=lambda n: np.full((1, 1, 1), n % 2**32, np.uint32),
                _bits_of_thread=bits_of_thread,
                _words=lambda a: [viewed(np.uint32)(r) for r in a.registers.flat],
                arith=types.SimpleNamespace(
                    addi=lambda a, b: a + b,
                    shli=lambda a, b: a << b,
                    extui=lambda _, a: viewed(np.uint16)(a),
                    xori=lambda a, b: a ^ b,
                    trunci=lambda _, a: a.astype(bool),
                    select=np.where,
                ),
                llvm=types.SimpleNamespace(
                    extractelement=lambda a, i: a[..., i.item() : i.item() + 1]
                ),
                vector=types.SimpleNamespace(
                    from_elements=lambda _, values: np.concatenate(values, axis=-1)
                ),
                mgpu=types.SimpleNamespace(
                    utils=types.SimpleNamespace(
                        bitcast=lambda a, _: a,  # views are taken where they matter
                        dtype_to_ir_type=lambda _: ir.F32Type.get(),
                        shfl_bfly=lambda a, by: np.take(a, np.arange(32) ^ by, axis=1),
                    ),
                    FragmentedArray=lambda _registers, **_: types.SimpleNamespace(
                        _registers=_registers
                    ),
                ),
            ),
            mock.patch.object(ir.VectorType, "get"),
            mock.patch.object(four_bits, "looked_up", looked_up),
            mock.patch.object(plgpu, "load", lambda a, layout: a),
            mock.patch.object(across.pl, "ds", lambda at, n: slice(int(at), int(at) + n)),
        ]

    def __enter__(self):
        for patch in self.patches:
            patch.start()

    def __exit__(self, *_):
        mock.patch.stopall()


def by_reference(code, reference, arg_types, kind):
    del code, arg_types, kind
    return lambda *arrays: reference(*map(jnp.asarray, arrays))


def both(function, *args, **kwargs):
    """Returns what the threads of a warpgroup make, and what the interpreter has instead."""
    with Threads():
        made = function(*args, **kwargs)
        with mock.patch.object(across, "_inline", by_reference):
            return made, np.asarray(function(*args, **kwargs))


class Ref:
    """An array in shared memory."""

    def __init__(self, a):
        self.at, self.shape, self.T, self.a = self, a.shape, a.T, a

    def __getitem__(self, index):
        return Ref(self.a[index])


def tile_of(weight, bits):
    """Returns a tile of weights [rows, 128 features] as they are stored, and as they are."""
    rng, shape = np.random.default_rng(0), (ROWS, 2 * hopper.ROWS)
    if weight == "int8":
        w = rng.integers(-128, 128, shape)
        return interleaved_pairs(jnp.asarray(w, jnp.int8)), w
    if weight == "float8_e4m3fn":
        bytes = jnp.asarray(rng.integers(0, 256, shape), jnp.uint8)
        w = jax.lax.bitcast_convert_type(bytes, jnp.float8_e4m3fn)
        return interleaved_pairs(w), np.asarray(w, np.float32)
    if weight == "int4":
        w = rng.integers(-8, 8, shape)
        return of_int4(jnp.asarray(w, jnp.int4)), w
    if weight == "uint4":  # codes of a table
        w = rng.integers(0, 16, shape)
        return of_int4(jnp.asarray(w, jnp.uint4), looked_up=True), w
    codes = rng.integers(0, 2**bits, shape)
    return planes.packed(jnp.asarray(codes, jnp.uint8), bits), codes - 2 ** (bits - 1)


def check(wg, weight, dtype, w, stored, natural=False, **kwargs):
    """A wgmma with the identity sums what was read: those sums are w in the order of features."""
    ref = Ref(np.asarray(across.units(stored)))
    read, expected = both(across.load, ref, np.uint32(wg), weight, dtype, natural=natural, **kwargs)
    with Threads():
        sums = across.in_order(read.astype(np.float32), across.order_of(weight, natural=natural))
    np.testing.assert_array_equal(sums, np.asarray(expected, np.float32))
    own = w[:, wg * hopper.ROWS : (wg + 1) * hopper.ROWS].T
    unit = zero_points.unit(weight, dtype)
    np.testing.assert_array_equal(sums / unit, own.astype(np.float32))


wgs = pytest.mark.parametrize("wg", [0, 1])
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@wgs
@dtypes
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_become_the_sums_of_their_features(name, dtype, wg):
    weight, bits = WEIGHTS[name]
    stored, w = tile_of(weight, bits)
    check(wg, weight, dtype, w, stored, bits=bits)


@wgs
@dtypes
@pytest.mark.parametrize("name", ["int8", "e4m3"])
def test_so_do_weights_in_their_natural_order(name, dtype, wg):
    weight, _ = WEIGHTS[name]
    stored, w = tile_of(weight, None)
    check(wg, weight, dtype, w, interleaved_pairs(stored), natural=True)
    with pytest.raises(AssertionError):
        check(wg, weight, dtype, w, stored, natural=True)


@wgs
@dtypes
def test_codes_are_looked_up_in_the_bank_of_their_lane(dtype, wg):
    levels = np.random.default_rng(1).standard_normal(16)
    stored, w = tile_of("uint4", None)
    table = np.array(four_bits.table(levels.tolist(), dtype))
    values = levels.astype(np.float32).astype(jnp.dtype(dtype))[w]
    check(wg, "uint4", dtype, values, stored, table=table)
    for lane in range(1, 32):  # a lane reads no bank but its own
        table[:, lane] = np.roll(table[:, lane], lane)
    with pytest.raises(AssertionError):
        check(wg, "uint4", dtype, values, stored, table=table)


@wgs
@dtypes
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["int8", "int4", "int2", "int3"])
def test_codes_are_less_the_zero_points_of_their_groups(name, groups, dtype, wg):
    weight, bits = WEIGHTS[name]
    stored, w = tile_of(weight, bits)
    middle = across._middle(jnp.dtype(weight), bits)
    zero = np.random.default_rng(2).integers(0, 2 * middle, (groups, ROWS)).astype(np.uint8)
    less, expected = both(across.less_of, zero, weight, dtype)
    np.testing.assert_array_equal(less, expected)
    less, expected = both(across.spread, less, dealt=True)
    np.testing.assert_array_equal(less, expected)
    of_features = np.repeat(zero, hopper.ROWS // groups, axis=0).astype(np.int64)
    w = w + middle - np.tile(of_features, (2, 1)).T
    check(wg, weight, dtype, w.astype(jnp.dtype(dtype)), stored, bits=bits, zero=less)


@pytest.mark.parametrize("dealt", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_feature_has_the_scales_of_its_group(groups, dealt):
    scale = np.random.default_rng(0).standard_normal((groups, ROWS)).astype(jnp.bfloat16)
    made, expected = both(across.spread, scale, dealt=dealt)
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(made, np.repeat(scale, hopper.ROWS // groups, axis=0))


def test_every_exponent_is_converted():
    scale = np.arange(256, dtype=np.uint8).reshape(2, 128)
    made, expected = both(across.exponents, scale)
    np.testing.assert_array_equal(made.astype(np.float32), expected.astype(np.float32))
    powers = np.append(2.0 ** np.arange(-127.0, 128), np.nan).reshape(2, 128)
    np.testing.assert_array_equal(made.astype(np.float64), powers)
