"""int8 weights are converted exactly, down to lanes, registers and PTX."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import signed_bytes
from tests.pallas_kernels import ptx
from tests.pallas_kernels.test_four_bits import of_threads


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_assembly_converts_every_byte_in_every_place(dtype, which):
    words = np.random.default_rng(0).integers(0, 2**32, (2, 256), np.uint32)
    for half in (0, 1):
        place = 8 * which + 16 * half
        words[half] = (words[half] & ~np.uint32(0xFF << place)) | (
            np.arange(256, dtype=np.uint32) << place
        )
        out = ptx.run(signed_bytes.assembly(which, dtype, 128), "$1", words[half])["$0"]
        pairs = np.ascontiguousarray(out).view(jnp.dtype(dtype)).reshape(-1, 2)
        bytes = np.ascontiguousarray(words[half]).view(np.int8).reshape(-1, 4)
        np.testing.assert_array_equal(pairs.astype(np.int64), bytes[:, which::2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_assembly_subtracts_every_zero_point_from_every_byte(dtype):
    zero = np.repeat(np.arange(256, dtype=np.uint32)[:, None], 256, axis=1)
    signed = np.arange(-128, 128) + 0 * zero.astype(np.int64)  # codes less their middle
    words = (signed.astype(np.uint8).astype(np.uint32) << 16) | np.uint32(0x9600)
    less = ptx.run(signed_bytes.zero_assembly(dtype), "$1", zero)["$0"]
    out = ptx.run(signed_bytes.assembly(0, dtype, None), "$1", words, **{"$2": less})["$0"]
    wanted = signed + 128 - zero
    upper = lambda out: (out >> np.uint32(16)).astype(np.uint16).view(jnp.dtype(dtype))
    np.testing.assert_array_equal(upper(out).astype(np.int64), wanted)
    for z in (0, 1, 127, 128, 129, 255):  # the same, known when it is compiled
        out = ptx.run(signed_bytes.assembly(0, dtype, z), "$1", words[z])["$0"]
        np.testing.assert_array_equal(upper(out).astype(np.int64), wanted[z])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lanes_pass_on_the_registers_of_their_wgmma(dtype):
    q = np.random.default_rng(0).integers(-128, 128, (64, 128)).astype(np.int8)
    read = of_threads(q, plgpu.Layout.WGMMA_UPCAST_2X.to_mgpu())  # [4, 32, 2 blocks, 4]
    own = np.ascontiguousarray(read).view(np.uint32)[..., 0]
    neighbour = own[:, np.arange(32) ^ 1]
    selector = np.asarray(signed_bytes.SELECTORS, np.uint32)[np.arange(32) % 2][:, None]
    selector = np.broadcast_to(selector, own.shape)
    text = "prmt.b32 $0, $1, $2, $3;"
    words = ptx.run(text, "$1", own, **{"$2": neighbour, "$3": selector})["$0"]
    words = words.reshape(4, 32, -1, 2)  # 16 columns, row
    taken = of_threads(q, plgpu.Layout.WGMMA.to_mgpu()).reshape(4, 32, -1, 2, 2, 2)
    for which in (0, 1):
        out = ptx.run(signed_bytes.assembly(which, dtype, 128), "$1", words)["$0"]
        pairs = np.ascontiguousarray(out).view(jnp.dtype(dtype)).reshape(*words.shape, 2)
        np.testing.assert_array_equal(pairs.astype(np.int64), taken[:, :, :, which])
