"""What the kernels in Triton are made of when compiled for real GPUs. No GPU; nothing is run."""

from __future__ import annotations

import pytest

from qjax import numerics

pytest.importorskip("triton", reason="needs the wheels of `--extra h100`")
pytest.importorskip("jax_triton", reason="needs the wheels of `--extra h100`")

import jax
import jax.numpy as jnp

from pallas_kernels.triton import cubin, eight_bit, tuning, versions, weight_only

pytestmark = pytest.mark.h100

K = N = 4096
NF4 = numerics.get_element("nf4").levels
CAPABILITIES = (80, 89, 90)  # A100, RTX 4090, H100
# codes, groups, zero, type of x; instructions of the loop for each weight at M = 16 on sm_80, 89.
# With 2.0 TB/s, 108 SMs and 1.41 GHz an A100 brings 26 4-bit weights a clock and SM, which issues
# 128 instructions: 4.9 a weight, 9.8 for 8 bits. A 4090 (1.0 TB/s, 128, 2.5 GHz) brings 6.3.
WEIGHT_ONLY = {
    "int4 g128": ("uint4", 32, 8.0, "bfloat16", 3.2),
    "int4 g64": ("uint4", 64, 8.0, "float16", 3.4),
    "int4 g32": ("uint4", 128, 8.0, "bfloat16", 3.6),
    "int4 g128, zero points": ("uint4", 32, None, "bfloat16", 3.2),
    "int8 channels": ("int8", 1, 0.0, "bfloat16", 4.5),
    "int8 channels, float16": ("int8", 1, 0.0, "float16", 2.9),
    "NF4 g64": (NF4, 64, 0.0, "bfloat16", 6.0),
}


def check(kernel, capability):
    assert kernel.stack == kernel.code["LDL"] == kernel.code["STL"] == 0
    assert kernel.smem <= tuning.SMEM_BYTES[capability]
    assert kernel.loop["LDGSTS"] > 0  # cp.async
    assert kernel.loop["I2F"] == kernel.loop["F2F"] == 0
    assert not any(op.startswith("LDG.U8") for op in kernel.loop)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("M", [1, 64, 1024])
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only(name, M, capability):
    codes, groups, zero, x, budget = WEIGHT_ONLY[name]
    t = tuning.weight_only(codes, M, K, N, capability)
    arrays = {"x": x, "w": "int8", "scale": x, "zero": x}
    arrays["out"] = x if t.split_k == 1 else "float32"
    constants = weight_only.constants(K, groups, x, codes, zero, t)
    kernel = cubin.compile(weight_only.kernel, arrays, constants, t, capability)
    check(kernel, capability)
    assert kernel.loop["HGMMA" if capability == 90 else "HMMA"] > 0
    if M == 1 and capability < 90:
        assert kernel.per_weight(t.tile_n * tuning.TILE_K) <= budget


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("M", [1, 64, 1024])
def test_eight_bit(M, capability):
    t = tuning.for_shape(tuning.EIGHT_BIT, M, K, N, capability)
    arrays = {"x": "int8", "w": "int8", "x_scale": "float32", "w_scale": "float32"}
    arrays["out"] = "bfloat16" if t.split_k == 1 else "int32"
    kernel = cubin.compile(eight_bit.kernel, arrays, eight_bit.constants(t), t, capability)
    check(kernel, capability)
    assert kernel.loop["IGMMA" if capability == 90 else "IMMA"] > 0
    assert kernel.per_weight(t.tile_n * tuning.TILE_K) <= 7


LLAMA = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096),
         (8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)]  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("M", [1, 16, 64])
def test_every_decode_shape_fills_the_gpu(M, capability):
    for inputs, outputs in LLAMA:
        t = tuning.for_shape(tuning.WEIGHT_ONLY, M, inputs, outputs, capability)
        assert outputs // t.tile_n * t.split_k >= tuning.SMS[capability]


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_programs_with_a_kernel_lower_under_jit(capability, M):
    def f(x, w, scale):
        return jnp.tanh(weight_only.matmul(x, w, scale, 8.0, codes="uint4", capability=capability))

    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    traced = jax.jit(f).trace(
        array("bfloat16", M, 512), array("int8", 256, 256), array("bfloat16", 4, 256)
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 1


def test_a_product_that_nobody_reads_is_dropped():
    def f(x, w, scale):
        weight_only.matmul(x, w, scale, 8.0, codes="uint4", capability=80)
        return x

    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    args = array("bfloat16", 3, 512), array("int8", 256, 256), array("bfloat16", 4, 256)
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" not in text


def test_versions_here_are_tested_ones():
    assert versions.missing() is None
