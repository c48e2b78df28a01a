"""Codes of 4 bits are decoded as the reference says, down to lanes, registers and PTX."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import four_bits, zero_points
from pallas_kernels.four_bits import SIGNS, UPPER
from pallas_kernels.interleave import (
    for_e4m3,
    for_int8,
    interleaved,
    interleaved_nibbles,
    natural_nibbles,
    of_int4,
    place,
)
from tests.pallas_kernels import ptx

BYTES = np.arange(256, dtype=np.uint32)
SIGNED = lambda codes: (codes.astype(np.int64) ^ 8) - 8


@pytest.mark.parametrize("field", range(len(four_bits.SCALES)))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_assembly_subtracts_every_zero_point_from_every_pair(dtype, field):
    codes = np.stack([BYTES & 15, BYTES >> 4], axis=-1)
    own = codes[:, 0] << 4 * field | codes[:, 1] << (16 + 4 * field)
    words = np.repeat((own | ~np.uint32(0xF000F << 4 * field))[:, None], 16, axis=1)
    zero = np.arange(16, dtype=np.uint32) + 0 * words
    wanted = (codes[:, None] ^ np.uint32(8)).astype(np.int64) - zero[..., None]
    if dtype == "bfloat16":
        offset = ptx.run(zero_points.unit_assembly((0, 0)), "$1", zero)["$0"]
    else:
        offset = ptx.run(zero_points.assembly(), "$1", zero)["$0"]
        if field:
            offset = ptx.run(zero_points.offset_assembly(1 / 16), "$1", offset)["$0"]

    def pairs(zero, words, **more):
        out = ptx.run(four_bits.assembly(field, dtype, zero), "$1", words, **more)["$0"]
        out = np.ascontiguousarray(out)[..., None].view(jnp.dtype(dtype)).astype(np.float64)
        return out / zero_points.unit("int4", dtype)

    np.testing.assert_array_equal(pairs(None, words, **{"$2": offset}), wanted)
    for z in range(16):  # the same, known when it is compiled
        np.testing.assert_array_equal(pairs(z, words[:, z]), wanted[:, z])


def _as_e4m3(words):
    """What `load_bytes` makes of the codes in the lower halves of words, a byte of each."""
    first, _, second, _ = np.array(four_bits.e4m3_tables(), np.uint32)[:, None] + 0 * words
    more = {"$2": words ^ np.uint32(SIGNS), "$3": first, "$4": second}
    return ptx.run(four_bits.e4m3_assembly(), "$1", words, **more)["$0"].view(jnp.float8_e4m3fn)


def test_the_assembly_looks_up_every_four_codes_as_e4m3():
    words = np.arange(2**16, dtype=np.uint32) | np.uint32(0x5A3C0000)
    codes = (words[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    np.testing.assert_array_equal(_as_e4m3(words).astype(np.int64).reshape(-1, 4), SIGNED(codes))


def test_the_assembly_multiplies_every_code_in_every_place_by_every_factor():
    factors = np.arange(-15, 17)
    bytes = (factors & 0xFF).astype(np.uint32)
    factor = ptx.run(four_bits.FACTOR, "$1", bytes)["$0"]
    middle = ptx.run(four_bits.MIDDLE_OF_BYTES, "$1", bytes)["$0"]
    np.testing.assert_array_equal(factor.view(np.int32), factors)
    codes = np.random.default_rng(0).permuted(np.tile(np.arange(16), (4, 16)), axis=1)
    codes = np.concatenate([codes, codes[::-1]], axis=1).T.astype(np.uint32)  # of four bytes
    above = np.uint32(0x5A3C96E1 & 0xF0F0F0F0)  # the other halves of bytes
    words = np.sum(codes << np.arange(0, 32, 8, dtype=np.uint32), axis=-1, dtype=np.uint32) | above
    wide = lambda a: a[:, None] + 0 * words
    more = {"$2": wide(factor), "$3": wide(middle)}
    out = ptx.run(four_bits.times_assembly(), "$1", words + 0 * more["$2"], **more)["$0"]
    made = np.ascontiguousarray(out)[..., None].view(np.int8)
    np.testing.assert_array_equal(made, SIGNED(codes) * factors[:, None, None])


def test_a_hidden_constant_is_one_in_every_thread():
    threads = np.arange(1024, dtype=np.uint32)
    for n in four_bits.e4m3_tables():
        assert (ptx.run(four_bits.hidden(n), "%tid.x", threads)["$0"] == n).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_row_of_the_table_is_the_pair_of_a_byte_in_every_bank(dtype):
    levels = np.random.default_rng(0).standard_normal(16)
    words = np.asarray(four_bits.table(levels, dtype))
    assert words.nbytes == four_bits.TABLE_BYTES
    rounded = levels.astype(np.float32).astype(jnp.dtype(dtype))
    pairs = np.ascontiguousarray(words.T).view(jnp.dtype(dtype)).reshape(four_bits.BANKS, 256, 2)
    np.testing.assert_array_equal(pairs[..., 0], np.tile(rounded[BYTES & 15], (32, 1)))
    np.testing.assert_array_equal(pairs[..., 1], np.tile(rounded[BYTES >> 4], (32, 1)))


def of_threads(a, layout):
    """Returns [warps, lanes, registers, values of a register] of a fragmented array."""
    for tile in layout.tiling.tiles:
        head = a.ndim - len(tile)
        split = [n for d, t in zip(a.shape[head:], tile, strict=True) for n in (d // t, t)]
        a = a.reshape(*a.shape[:head], *split)
        inner = range(head + 1, a.ndim, 2)
        a = a.transpose(*range(head), *range(head, a.ndim, 2), *inner)
    axis = lambda d: d % a.ndim
    warps, lanes = [[axis(d) for d in dims] for dims in (layout.warp_dims, layout.lane_dims)]
    vector = [axis(layout.vector_dim)]
    others = [d for d in range(a.ndim) if d not in (*warps, *lanes, *vector)]
    return a.transpose(*warps, *lanes, *others, *vector).reshape(4, 32, -1, a.shape[vector[0]])


@pytest.mark.parametrize("looked_up", [False, True])
def test_every_lane_reads_the_codes_that_its_wgmma_takes(looked_up):
    """What `load` does with registers: byte, or half and field, b become [4 block + b, row]."""
    R, C = 64, 128
    inputs = np.arange(R * C).reshape(R, C)  # which weight a code is of
    stored = np.empty_like(inputs)
    byte, bit = (np.asarray(a) for a in place(jnp.arange(C), looked_up=looked_up))
    stored[:, 2 * byte + bit // 4] = inputs
    read = of_threads(stored, plgpu.Layout.WGMMA_UPCAST_4X.to_mgpu())  # [4, 32, 2 blocks, 8]
    taken = of_threads(inputs, plgpu.Layout.WGMMA.to_mgpu())  # [4, 32, registers, 2]
    words = read.reshape(4, 32, C // 32, 2, 8)  # block, row, code
    if looked_up:
        words = words.reshape(4, 32, C // 32, 2, 4, 2)  # byte, half
    else:
        words = words.reshape(4, 32, C // 32, 2, 2, 4).swapaxes(-1, -2)  # field, half
    registers = taken.reshape(4, 32, C // 32, 4, 2, 2)  # block, b, row, input
    np.testing.assert_array_equal(words.swapaxes(3, 4), registers)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_every_lane_makes_the_bytes_that_its_wgmma_takes(dtype):
    """What `load_bytes` does with registers; as int8 codes are 16 times too large."""
    R, C = 64, 128
    codes = np.random.default_rng(0).integers(-8, 8, (R, C))
    stored = np.asarray(of_int4(jnp.asarray(codes, jnp.int4))).astype(np.uint32) & 15
    read = of_threads(stored, plgpu.Layout.WGMMA_UPCAST_4X.to_mgpu())
    read = read.reshape(4, 32, C // 32, 2, 8)  # block, row, code
    word = np.sum(read << (4 * np.arange(8, dtype=np.uint32)), axis=-1, dtype=np.uint32)
    if dtype == "int8":
        halves = [(word << 4) & UPPER, word & UPPER]
        wanted = for_int8(jnp.asarray(16 * codes, jnp.int8))
    else:
        halves = [_as_e4m3(word.ravel()), _as_e4m3(word.ravel() >> np.uint32(16))]
        halves = [half.view(np.uint32).reshape(word.shape) for half in halves]
        wanted = for_e4m3(jnp.asarray(codes, dtype))
    made = np.stack(halves, axis=3).astype(np.uint32)[..., None].view(wanted.dtype)
    made, wanted = made.astype(np.int64), np.asarray(wanted).astype(np.int64)
    taken = of_threads(wanted, plgpu.Layout.WGMMA_8BIT.to_mgpu())
    # Of `made` the axes are thread, block, half, row, byte.
    np.testing.assert_array_equal(made.reshape(taken.shape), taken)


@pytest.mark.parametrize("looked_up", [False, True])
def test_orders_have_inverses_and_places(looked_up):
    codes = np.random.default_rng(0).integers(0, 16, (3, 64)).astype(np.uint8)
    bytes = jnp.asarray(codes[:, ::2] | codes[:, 1::2] << 4)
    to, back = (interleaved,) * 2 if looked_up else (interleaved_nibbles, natural_nibbles)
    np.testing.assert_array_equal(back(to(bytes)), bytes)
    byte, bit = (np.asarray(a) for a in place(jnp.arange(64), looked_up=looked_up))
    np.testing.assert_array_equal(np.asarray(to(bytes))[:, byte] >> bit & 15, codes)
    w = of_int4(jnp.asarray(codes, jnp.uint4), looked_up=looked_up)
    np.testing.assert_array_equal(np.asarray(w, np.int64)[:, 2 * byte + bit // 4] & 15, codes)
