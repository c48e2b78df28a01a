"""Codes of e2m1 times their scales are the exact products, down to lanes, registers and PTX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e2m1
from pallas_kernels.interleave import (
    magnitude_at,
    of_int4,
    places_apart,
    signs_apart,
    signs_together,
)
from qjax.numerics import ELEMENTS
from tests.pallas_kernels import ptx
from tests.pallas_kernels.test_four_bits import of_threads

LEVELS = np.array(ELEMENTS["e2m1"].levels)
SCALES = np.array(ELEMENTS["e4m3_for_e2m1"]._sorted)
BITS = np.array(ELEMENTS["e4m3_for_e2m1"]._codes, np.uint8)


def made(words, bits):
    """What the PTX makes of words of 8 codes and bits of scales: [.., half, code]."""
    bits = bits.astype(np.uint32) + 0 * words
    first, second = (ptx.run(text, "$1", bits)["$0"] for text in e2m1.PRODUCTS)
    halves = [
        ptx.run(text, "$1", words, **{"$2": first, "$3": second})["$0"] for text in e2m1.HALVES
    ]
    return np.stack(halves, axis=-1)[..., None].view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def test_every_code_in_every_place_times_every_scale_is_exact():
    codes = np.random.default_rng(0).permuted(np.tile(np.arange(16), (8, 16)), axis=1).T
    inputs = codes.reshape(-1, 4, 2, 4).swapaxes(1, 2).reshape(-1, 32)  # of four words
    bytes = signs_apart(jnp.asarray(inputs[:, ::2] | inputs[:, 1::2] << 4, jnp.uint8))
    words = np.ascontiguousarray(bytes).view(np.uint32).ravel()
    products = made(words + 0 * BITS[:, None], BITS[:, None])
    wanted = LEVELS[codes] * SCALES[:, None, None]
    np.testing.assert_array_equal(products.reshape(wanted.shape), wanted)


def test_the_levels_are_those_of_the_element():
    assert ELEMENTS["e2m1"].levels == e2m1.LEVELS
    np.testing.assert_array_equal(e2m1.bits_of(jnp.asarray(SCALES)), BITS)
    np.testing.assert_array_equal(e2m1.scales(jnp.asarray(BITS)), SCALES)
    products = e2m1.reference(jnp.arange(16), jnp.asarray(BITS.view(np.int8))[:, None])
    np.testing.assert_array_equal(np.asarray(products, np.float64), LEVELS * SCALES[:, None])


def test_every_lane_makes_the_bytes_that_its_wgmma_takes():
    R, C = 64, 128
    codes = np.random.default_rng(0).integers(0, 16, (R, C))
    stored = of_int4(jnp.asarray(codes, jnp.uint4).astype(jnp.int4), apart=True)
    stored = np.asarray(stored).astype(np.uint32) & 15
    read = of_threads(stored, plgpu.Layout.WGMMA_UPCAST_4X.to_mgpu())
    read = read.reshape(4, 32, C // 32, 2, 8)  # block, row, code
    words = np.sum(read << (4 * np.arange(8, dtype=np.uint32)), axis=-1, dtype=np.uint32)
    taken = of_threads(LEVELS[codes], plgpu.Layout.WGMMA_8BIT.to_mgpu())
    one = np.array(0x38)  # its bits
    halves = made(words, one).swapaxes(3, 4)  # thread, block, half, row, byte
    np.testing.assert_array_equal(halves.reshape(taken.shape), taken)


def test_signs_apart_have_an_inverse_and_places():
    codes = np.random.default_rng(0).integers(0, 16, (3, 64)).astype(np.uint8)
    bytes = jnp.asarray(codes[:, ::2] | codes[:, 1::2] << 4)
    apart = np.asarray(signs_apart(bytes))
    np.testing.assert_array_equal(signs_together(jnp.asarray(apart)), bytes)
    (byte, bit), (of_sign, last) = jax.tree.map(np.asarray, places_apart(jnp.arange(64)))
    np.testing.assert_array_equal(magnitude_at(apart[:, byte] >> bit & 7), codes & 7)
    np.testing.assert_array_equal(apart[:, of_sign] >> last & 1, codes >> 3)
