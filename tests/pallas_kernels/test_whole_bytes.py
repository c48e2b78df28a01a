"""Weights of 8 bits are converted exactly, down to lanes, registers and PTX."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import whole_bytes, zero_points
from pallas_kernels.interleave import interleaved_pairs, place_in_pairs
from tests.pallas_kernels import ptx
from tests.pallas_kernels.test_four_bits import of_threads
from tests.pallas_kernels.test_zero_points import threads  # noqa: F401

BYTES = np.arange(256, dtype=np.uint32)
PLACES = [*whole_bytes.PAIRS, (0, 2), (1, 3)]  # the latter two of x @ W^T


def _pairs(out, dtype):
    return np.ascontiguousarray(out).view(jnp.dtype(dtype)).reshape(*out.shape, 2)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_assembly_subtracts_every_zero_point_from_every_byte_in_every_place(dtype, places):
    code, zero = np.broadcast_arrays(BYTES, BYTES[:, None])
    for half, place in enumerate(places):
        words = (np.uint32(0x96C35A3C) & ~np.uint32(0xFF << 8 * place)) | code << 8 * place
        wanted = code.astype(np.int64) - zero
        unit = zero_points.unit("int8", dtype)
        text = zero_points.assembly()
        if dtype == "bfloat16":
            text = zero_points.unit_assembly((0, 0))
        less = ptx.run(text, "$1", np.ascontiguousarray(zero))["$0"]
        out = ptx.run(whole_bytes.assembly(places, dtype, None), "$1", words, **{"$2": less})["$0"]
        np.testing.assert_array_equal(_pairs(out, dtype)[..., half].astype(float) / unit, wanted)
        for z in (0, 1, 127, 128, 129, 255):  # the same, known when it is compiled
            known = ptx.run(whole_bytes.assembly(places, dtype, z), "$1", words[z])["$0"]
            np.testing.assert_array_equal(known, out[z])


@pytest.mark.parametrize("bytes", [(0, 0), (0, 1), (3, 2)])
def test_zero_points_become_small_in_every_place(bytes):
    words = np.random.default_rng(0).integers(0, 2**32, 256, np.uint32)
    own = words.view(np.uint8).reshape(-1, 4)[:, list(bytes)].astype(float)
    out = ptx.run(zero_points.unit_assembly(bytes), "$1", words)["$0"]
    np.testing.assert_array_equal(_pairs(out, "bfloat16").astype(float), -own * zero_points.UNIT)


@pytest.mark.parametrize("half", [0, 1])
def test_every_e4m3_is_converted(half):
    words = BYTES | np.roll(BYTES, 1) << 8 | np.roll(BYTES, 2) << 16 | np.roll(BYTES, 3) << 24
    exact = BYTES.astype(np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    wanted = np.stack([np.roll(exact, 2 * half), np.roll(exact, 2 * half + 1)], axis=-1)
    out = ptx.run(whole_bytes.e4m3_assembly(half), "$1", words)["$0"]
    np.testing.assert_array_equal(_pairs(out, "float16").astype(np.float32), wanted)
    for halves in itertools.product((0, 1), (0, 1)):
        text = whole_bytes.bfloat16_assembly(halves)
        both = ptx.run(text, "$1", out, **{"$2": np.roll(out, 9)})["$0"]
        pairs = _pairs(both, "bfloat16").astype(np.float32)
        np.testing.assert_array_equal(pairs[:, 0], wanted[:, halves[0]])
        np.testing.assert_array_equal(pairs[:, 1], np.roll(wanted[:, halves[1]], 9))


def test_every_lane_reads_the_pairs_that_its_wgmma_takes():
    """What `load` does with registers: a pair of a word becomes register [2 block + pair, row]."""
    inputs = np.arange(64 * 128).reshape(64, 128)
    stored = np.asarray(interleaved_pairs(jnp.asarray(inputs)))
    read = of_threads(stored, plgpu.Layout.WGMMA_UPCAST_2X.to_mgpu())  # [4, 32, registers, 4]
    taken = of_threads(inputs, plgpu.Layout.WGMMA.to_mgpu())  # [4, 32, registers, 2]
    words = read.reshape(4, 32, 8, 2, 2, 2)  # 16 columns, row, pair, code
    np.testing.assert_array_equal(words.swapaxes(3, 4), taken.reshape(4, 32, 8, 2, 2, 2))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_threads_load_e4m3_to_their_places(dtype):
    bytes = np.random.default_rng(0).integers(0, 256, (128, 256)).astype(np.uint8)
    w = jax.lax.bitcast_convert_type(jnp.asarray(bytes), jnp.float8_e4m3fn)
    loaded = whole_bytes.load(np.asarray(interleaved_pairs(w)), dtype)
    np.testing.assert_array_equal(loaded.astype(np.float32), np.asarray(w, np.float32))


def test_the_order_is_its_own_inverse():
    code = jnp.arange(64)
    np.testing.assert_array_equal(interleaved_pairs(interleaved_pairs(code)), code)
    np.testing.assert_array_equal(interleaved_pairs(code)[place_in_pairs(code)], code)
