"""Scales of e4m3 are converted exactly, those of two rows at once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3
from tests.pallas_kernels import ptx


def test_one_conversion_gives_the_values_of_two_bytes():
    first, second = np.arange(256, dtype=np.uint32), np.arange(256, dtype=np.uint32)[:, None]
    out = ptx.run(e4m3.CONVERT, "$1", (first | second << np.uint32(8)))["$0"]
    halves = np.ascontiguousarray(out).view(np.float16).reshape(256, 256, 2)
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    np.testing.assert_array_equal(halves[..., 0], np.broadcast_to(values, (256, 256)))
    np.testing.assert_array_equal(halves[..., 1], np.broadcast_to(values[:, None], (256, 256)))
    assert np.isnan(values).sum() == 2


def test_a_lane_has_the_scales_of_two_rows():
    layout = plgpu.Layout.WGMMA.reduce(1).to_mgpu()
    assert np.prod(layout.registers_shape((64,))) == 2
