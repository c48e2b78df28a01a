"""Kernels in Triton agree with float64 in its interpreter, and mutants of them do not."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from qjax import numerics

pytest.importorskip("triton", reason="needs the wheels of `--extra h100`")

from pallas_kernels.triton import interpreter
from pallas_kernels.triton.packing import pack, unpack, unpack_columns
from pallas_kernels.triton.tuning import Tuning

NF4 = numerics.get_element("nf4").levels
TILE = Tuning(16, 64, 4, 2)
ON_WEIGHT = dataclasses.replace(TILE, scale_on="weight")
SPLIT = dataclasses.replace(TILE, split_k=2)
# codes, group size, zero: None for an array of them
WEIGHT_ONLY = {
    "int4 groups of 128": ("uint4", 128, 8.0),
    "int4 groups of 64": ("uint4", 64, 8.0),
    "int4 groups of 32": ("uint4", 32, 8.0),
    "int4 groups of 256": ("uint4", 256, 8.0),
    "int4 channels": ("uint4", 512, 8.0),
    "zero points, groups of 128": ("uint4", 128, None),
    "zero points, groups of 32": ("uint4", 32, None),
    "zero points, channels": ("uint4", 512, None),
    "int8 channels": ("int8", 512, 0.0),
    "int8 groups of 128": ("int8", 128, 0.0),
    "int8 zero points": ("int8", 512, None),
    "NF4 groups of 64": (NF4, 64, 0.0),
}
K, N = 512, 128


@functools.cache
def module(name):
    return interpreter.interpreted(name)


def arrays(codes, group, zero, M, seed=0):
    rng = np.random.default_rng(seed)
    low, high = (-128, 128) if codes == "int8" else (0, 16)
    q = rng.integers(low, high, (N, K))
    x = rng.standard_normal((M, K)).astype(np.float16)
    scale = rng.uniform(0.5, 1.5, (K // group, N)).astype(np.float16)
    zeros = rng.integers(0, 16, scale.shape).astype(np.float16) if zero is None else scale
    w = q.astype(np.int8) if codes == "int8" else np.asarray(pack(jnp.asarray(q, jnp.uint8)))
    return x, q, w, scale, zeros


def weight_only(codes, group, zero, tile, M=3, mutate=None, seed=0):
    """Returns the kernel's result and that in float64."""
    x, q, w, scale, zeros = arrays(codes, group, zero, M, seed)
    kernel = module("weight_only")
    constants = kernel.constants(K, K // group, "float16", codes, zero, tile, assembly=False)
    constants |= mutate or {}
    split = tile.split_k
    parts = interpreter.run(
        kernel.kernel, x, w.view(np.int8), scale, zeros, M, N, K, K // 128 // split,
        out=((split, M, N), np.float32), grid=(N // tile.tile_n, -(-M // tile.tile_m), split),
        **constants,
    )  # fmt: skip
    wide = lambda a: np.repeat(np.asarray(a, np.float64), group, axis=0)
    # The kernel has levels in the type of x.
    value = q if isinstance(codes, str) else np.asarray(codes).astype(np.float16)[q]
    offset = wide(zeros) if zero is None else zero
    wanted = x.astype(np.float64) @ ((value.T.astype(np.float64) - offset) * wide(scale))
    return parts.sum(0, dtype=np.float64), wanted


def error(got, wanted):
    assert got.shape == wanted.shape
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_agrees_with_float64(name):
    assert error(*weight_only(*WEIGHT_ONLY[name], TILE)) <= 1e-6


@pytest.mark.parametrize("name", ["zero points, groups of 128", "int8 groups of 128"])
def test_parts_of_the_contraction_add_up(name):
    assert error(*weight_only(*WEIGHT_ONLY[name], SPLIT)) <= 1e-6


@pytest.mark.parametrize("M", [1, 16, 17])
def test_any_number_of_tokens(M):
    assert error(*weight_only("uint4", 128, None, TILE, M)) <= 1e-6


@pytest.mark.parametrize("name", ["zero points, groups of 32", "NF4 groups of 64"])
def test_scales_on_the_weight_cost_one_rounding(name):
    # Half a unit in the last of float16's 11 places.
    assert error(*weight_only(*WEIGHT_ONLY[name], ON_WEIGHT)) <= 2.0**-11


MUTANTS = {
    "a row of scales for two": {"STEPS_PER_ROW": 2},
    "half of every group": {"GROUP": 64},
    "zero points left out": {"HAS_ZERO": False},
    "scales of the first group": {"STEPS_PER_ROW": 0},
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_mutants_are_caught(name):
    got, wanted = weight_only("uint4", 128, None, TILE, mutate=MUTANTS[name])
    assert not error(got, wanted) <= 1e-2


def test_the_reference_agrees():
    got, wanted = weight_only("int8", 128, 0.0, TILE)
    x, q, _, scale, _ = arrays("int8", 128, 0.0, 3)
    y = reference.weight_only(jnp.asarray(x), jnp.asarray(q), jnp.asarray(scale))
    assert error(np.asarray(y, np.float64), wanted) <= 1e-6
    assert error(got, np.asarray(y, np.float64)) <= 2e-6


@pytest.mark.parametrize("split", [1, 2])
def test_int8_products_are_exact(split):
    rng = np.random.default_rng(0)
    M, kernel, tile = 3, module("eight_bit"), dataclasses.replace(TILE, split_k=split)
    x, w = (rng.integers(-128, 128, (rows, K), np.int8) for rows in (M, N))
    x_scale = rng.uniform(0.5, 1.5, M).astype(np.float32)
    w_scale = rng.uniform(0.5, 1.5, N).astype(np.float32)
    parts = interpreter.run(
        kernel.kernel, x, w, x_scale, w_scale, M, N, K, K // 128 // split,
        out=((split, M, N), np.float32 if split == 1 else np.int32),
        grid=(N // tile.tile_n, 1, split), **kernel.constants(tile),
    )  # fmt: skip
    sums = x.astype(np.int64) @ w.T.astype(np.int64)
    if split == 1:
        np.testing.assert_allclose(parts[0], sums * x_scale[:, None] * w_scale, rtol=2.0**-22)
    else:
        np.testing.assert_array_equal(parts.sum(0), sums)


def test_codes_are_packed_as_the_kernel_reads_them():
    codes = np.random.default_rng(0).integers(0, 16, (2, 5, 64), np.uint8)
    packed = np.asarray(pack(jnp.asarray(codes)))
    for byte in range(32):
        first = byte // 16 * 32 + byte % 16
        np.testing.assert_array_equal(packed[..., byte] & 15, codes[..., first])
        np.testing.assert_array_equal(packed[..., byte] >> 4, codes[..., first + 16])
    np.testing.assert_array_equal(unpack(jnp.asarray(packed)), codes)
    some = jnp.array([0, 15, 16, 31, 32, 63])
    np.testing.assert_array_equal(unpack_columns(jnp.asarray(packed), some), codes[..., some])
