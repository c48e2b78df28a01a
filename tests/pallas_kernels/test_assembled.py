"""What the assembler says of every kernel. The CUDA plugin alone tells it, so that CI can ask."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, experts, h100, lookup, transposed, tuning, weight_only

pytestmark = pytest.mark.h100(code=False)

PRODUCTS = {
    "bfloat16": "f32.bf16.bf16",
    "int8": "s32.s8.s8",
    "float8_e4m3fn": "f32.e4m3.e4m3",
}


def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def of_experts(M, E=8, K=1024, N=256, **options):
    return (
        functools.partial(experts.matmul, **options),
        array("bfloat16", M, N if options else K), array("int4", E, N, K),
        array("bfloat16", E, K // 128, N), array("int32", E),
    )  # fmt: skip


def backward(M, dtype="int4", K=256, N=1024, **options):
    return (
        functools.partial(transposed.matmul, **options),
        array("bfloat16", M, N), array(dtype, N, K), array("bfloat16", K // 128, N),
    )  # fmt: skip


def with_zero_points(M, dtype, K=1024, N=256):
    return (
        lambda *a: weight_only.matmul(*a[:3], zero=a[3]),
        array("bfloat16", M, K), array(dtype, N, K), array("bfloat16", K // 128, N),
        array("uint8", K // 128, N),
    )  # fmt: skip


OTHERS = {
    "zero points, int8": with_zero_points(1024, "int8"),
    "int8 in groups": (
        lambda *a: weight_only.matmul(*a),
        array("bfloat16", 1024, 1024),
        array("int8", 256, 1024),
        array("bfloat16", 8, 256),
    ),
    "experts": of_experts(64),
    "experts, transposed": of_experts(64, transposed=True),
    "transposed": backward(1024),
    "transposed int8": backward(1024, "int8"),
    "transposed fp8": backward(1024, "float8_e4m3fn"),
    "transposed int8, natural": backward(1024, "int8", natural=True),
}


def check(kernel, *products):
    assert kernel.assembler == h100.assembler()
    assert kernel.spills == kernel.stack == 0
    assert kernel.registers <= 168  # 65536 / 384, what nvJitLink has for each of 384 threads
    assert not any("C7512" in w for w in kernel.warnings)  # wgmma serialized
    assert set(kernel.products) == set(products)
    assert kernel.smem <= tuning.SMEM_BYTES


@pytest.mark.parametrize("M", [16, 64, 1024])
@pytest.mark.parametrize("form", bench.FORMS, ids=lambda form: form.name)
def test_no_form_spills_or_serializes(form, M):
    # Not split: of eight steps, which is all that is compiled, each part would have one.
    tile = dataclasses.replace(bench.tuning_of(form, M, 4096, 4096), split_k=1)
    check(bench.compiled(form, tile), PRODUCTS[form.for_tokens(M).x])


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_kernel_spills_or_serializes(name):
    (kernel,) = h100.compile(*OTHERS[name]).kernels
    check(kernel, PRODUCTS["bfloat16"])


@pytest.mark.parametrize(
    "options", [{}, {"codebook": tuple(range(16))}], ids=["int4", "a codebook"]
)
def test_no_lookup_spills(options):
    look_up = functools.partial(lookup.rows, **options)
    operands = array("int32", 64), array("int4", 1024, 256), array("bfloat16", 2, 1024)
    check(*h100.compile(look_up, *operands).kernels)


def test_code_that_nothing_disassembles_is_an_error(monkeypatch):
    monkeypatch.setattr(h100, "_disassembler", lambda: None)
    monkeypatch.setattr(h100, "_assembled", {})
    (kernel,) = h100.compile(*backward(64)).kernels
    assert kernel.products
    with pytest.raises(RuntimeError, match="pip install triton"):
        _ = kernel.loop
