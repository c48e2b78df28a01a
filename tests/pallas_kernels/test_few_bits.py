"""Codes of 2 and 3 bits are decoded as their order says, down to lanes, registers and PTX."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import few_bits, planes, zero_points
from tests.pallas_kernels import ptx
from tests.pallas_kernels.test_four_bits import of_threads

BITS = (2, 3)


def _codes(bits, *shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 2**bits, shape), jnp.uint8)


@pytest.mark.parametrize("bits", BITS)
def test_packed_and_codes_are_one_another_s_inverse(bits):
    codes = _codes(bits, 2, 3, 256)
    data = planes.packed(codes, bits)
    assert data.shape == (2, 3, 256 * bits // 8)
    np.testing.assert_array_equal(planes.codes(data, bits), codes)
    np.testing.assert_array_equal(planes.codes_at(data, bits, jnp.arange(256)), codes)
    bytes = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 96)), jnp.uint8)
    np.testing.assert_array_equal(planes.packed(planes.codes(bytes, bits), bits), bytes)


@pytest.mark.parametrize("bits", BITS)
def test_units_of_a_row_are_cut_as_its_inputs_are(bits):
    codes = _codes(bits, 3, 4 * planes.unit(bits))
    parts = [planes.packed(part, bits) for part in jnp.split(codes, 4, axis=-1)]
    np.testing.assert_array_equal(planes.packed(codes, bits), jnp.concatenate(parts, axis=-1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_assembly_decodes_what_a_lane_reads_to_the_registers_of_its_wgmma(dtype, bits):
    """What `load` does: from the bytes that lanes read, by PTX, to the values that they pass on."""
    R, C, zero = 64, 256, 1
    codes = _codes(bits, R, C)
    read = of_threads(
        np.asarray(planes.packed(codes, bits)), plgpu.Layout.WGMMA_UPCAST_2X.to_mgpu()
    )  # [4 warps, 32 lanes, chunks x 2 rows, 4 bytes]
    words = np.ascontiguousarray(read).view(np.uint32)
    words = words.reshape(4, 32, -1, planes.chunks(bits), 2)  # unit, chunk, row
    taken = of_threads(np.asarray(codes), plgpu.Layout.WGMMA.to_mgpu()).astype(np.int64) - zero
    registers = taken.reshape(4, 32, words.shape[2], -1, 8, 2, 2)  # unit, half, b, row, e
    for half, b, row in itertools.product(range(registers.shape[3]), range(8), range(2)):
        text = few_bits.assembly(bits, b, half, zero, dtype)
        high = {"$2": words[:, :, :, 2, row]} if bits == 3 else {}
        out = ptx.run(text, "$1", words[:, :, :, half, row], **high)["$0"]
        values = np.ascontiguousarray(out).view(jnp.dtype(dtype)).reshape(4, 32, -1, 2)
        values = values.astype(float) / zero_points.unit("uint8", dtype)
        np.testing.assert_array_equal(values.astype(np.int64), registers[:, :, :, half, b, row])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_code_is_exact_whatever_lies_beside_it(dtype, bits):
    low, high = np.arange(2**16, dtype=np.uint32)[None] | np.array([[0], [0xA5C3 << 16]]), 0x96F1
    low = low.astype(np.uint32)
    for zero, half, b in itertools.product(range(2**bits), range(bits - 1), range(8)):
        text = few_bits.assembly(bits, b, half, zero, dtype)
        more = {"$2": np.full_like(low, high)} if bits == 3 else {}
        out = ptx.run(text, "$1", low, **more)["$0"]
        value = (out & 0xFFFF).astype(np.uint16).view(jnp.dtype(dtype)).astype(float)
        value /= zero_points.unit("uint8", dtype)
        code = (low >> 2 * b & 3) | (4 * (high >> 2 * b + half & 1) if bits == 3 else 0)
        np.testing.assert_array_equal(value, code.astype(np.int64) - zero)
        text = zero_points.assembly()
        if dtype == "bfloat16":
            text = zero_points.unit_assembly((0, 0))
        offset = ptx.run(text, "$1", 0 * low + zero)
        if dtype == "float16" and (j := b % few_bits.fields(bits, dtype)):
            offset = ptx.run(zero_points.offset_assembly(4.0**-j), "$1", offset["$0"])
        text = few_bits.assembly(bits, b, half, None, dtype)
        more[f"${bits}"] = offset["$0"]
        np.testing.assert_array_equal(ptx.run(text, "$1", low, **more)["$0"], out)
