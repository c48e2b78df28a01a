"""Programs with prepared weights, as compiled for an H100: kernels, fusions and memory."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import qjax
from pallas_kernels import h100, hlo
from qjax.ops.packed_dot import packed_dot
from qjax.qtensor import quantize_array
from tests.prepare.weights import FORMATS, QUANTIZED


@pytest.mark.h100(code=False)
@pytest.mark.parametrize("name", [*QUANTIZED, "fp8 blocks bf16"])
def test_programs_for_an_h100_multiply_on_its_kernel_and_form_no_float_weight(name):
    fmt = FORMATS["fp8 blocks"] if name == "fp8 blocks bf16" else QUANTIZED[name]
    x = jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16)

    def prepared(w):
        step = jnp.float32(0.02) if "static" in name else None
        return qjax.prepare(quantize_array(w, fmt, act_scale=step), "h100")

    w = jax.eval_shape(prepared, jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    program = h100.compile(jax.jit(packed_dot), x, w)
    (kernel,) = program.kernels
    assert kernel.products
    # What there is: codes of x and the sums of parts of K; or scales of groups of 16, which are
    # decoded in front of the kernel.
    decoded = 4 * 4096 * 4096 // 16 if name == "w4a8, multiples of 16" else 0
    assert program.temporaries <= 4096 * 4096 // 4 + decoded


@pytest.mark.h100(code=False)
@pytest.mark.parametrize("name", ["w4a8", "fp8 1x128"])
def test_kernels_that_are_asked_for_round_the_activation_too(name):
    x = jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16)
    quantized = lambda w: qjax.prepare(quantize_array(w, QUANTIZED[name]), "h100")
    w = jax.eval_shape(quantized, jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    run = functools.partial(packed_dot, implementation="mosaic")
    rounding, product = sorted(
        h100.compile(jax.jit(run), x, w).kernels, key=lambda kernel: len(kernel.products)
    )
    assert product.products
    assert not rounding.products
    assert product.spills == rounding.spills == 0


@pytest.mark.h100(code=False)
@pytest.mark.parametrize("name", ["nf4-dq", "int3", "int2", "ternary"])
def test_decoding_on_an_h100_reads_what_is_stored(name):
    x = jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16)
    quantized = lambda w: qjax.prepare(quantize_array(w, FORMATS[name]), "h100")
    w = jax.eval_shape(quantized, jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    program = h100.compile(jax.jit(packed_dot), x, w)
    (kernel,) = program.kernels
    assert kernel.products
    assert kernel.spills == 0
    assert "f32[64,4096]" not in program.hlo  # the scales that nf4-dq stands for
    # The sums of 5 parts of K, and scales of ternary codes, which is one for all of them.
    is_one = name == "ternary"
    assert hlo.executed(program.hlo)["fusion"] == 1 + is_one
    assert program.temporaries <= 4 * (5 * 16 * 4096 + is_one * 4096)


@pytest.mark.h100(code=False)
def test_scales_of_blocks_are_read_where_they_lie():
    """Those of x as its rounding writes them, those of the weight as it is stored."""
    x = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16)
    quantized = lambda w: qjax.prepare(quantize_array(w, QUANTIZED["fp8 1x128"]), "h100")
    w = jax.eval_shape(quantized, jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    run = functools.partial(packed_dot, implementation="mosaic")
    program = h100.compile(jax.jit(run), x, w)
    executed = hlo.executed(program.hlo)
    assert executed["mosaic_gpu_v2"] == 2
    assert not executed.keys() & {"fusion", "copy", "transpose", "pad"}
    codes, steps = 1024 * 4096, 4 * 1024 * 32
    assert program.temporaries <= codes + steps + 512


@pytest.mark.h100(code=False)
@pytest.mark.parametrize("name", ["zero point", "uint3", "uint8", "int8, zero point", "unsigned"])
@pytest.mark.parametrize("M", [16, 1024])
def test_a_product_with_zero_points_is_what_it_is_without(name, M):
    """At 1024 tokens one kernel without temporaries; at 16 the sums of its parts follow it."""
    fmt = FORMATS[name]
    unsigned = dataclasses.replace(fmt, zero_point=False)
    symmetric = dataclasses.replace(unsigned, element=f"int{fmt.element[-1]}")
    x = jax.ShapeDtypeStruct((M, 4096), jnp.bfloat16)

    def compiled(fmt):
        quantized = lambda w: qjax.prepare(quantize_array(w, fmt), "h100")
        w = jax.eval_shape(quantized, jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
        program = h100.compile(jax.jit(packed_dot), x, w)
        is_nothing = ("parameter", "bitcast")
        steps = {op: n for op, n in hlo.executed(program.hlo).items() if op not in is_nothing}
        (kernel,) = program.kernels
        assert kernel.spills == 0
        return steps, program.temporaries

    steps, temporaries = compiled(fmt)
    assert (steps, temporaries) == compiled(symmetric)
    if M == 1024:
        assert (steps, temporaries) == ({"mosaic_gpu_v2": 1}, 0)


@pytest.mark.h100(code=False)
@pytest.mark.parametrize("name", ["int4", "zero point", "nf4-dq", "channels", "int3"])
def test_a_lookup_on_an_h100_is_one_kernel_that_holds_nothing(name):
    quantized = lambda w: quantize_array(w, FORMATS[name])
    w = jax.eval_shape(quantized, jax.ShapeDtypeStruct((32768, 4096), jnp.float32))
    rows = jax.ShapeDtypeStruct((16,), jnp.int32)
    look_up = qjax.apply(lambda w, rows: w[rows].astype(jnp.bfloat16))
    program = h100.compile(jax.jit(look_up), w, rows)
    assert hlo.executed(program.hlo)["fusion"] == 1
    assert program.temporaries == 0
    w = jax.eval_shape(lambda w: qjax.prepare(w, "h100"), w)
    program = h100.compile(jax.jit(look_up), w, rows)
    assert hlo.executed(program.hlo)["fusion"] <= 2
    assert program.temporaries <= 16 * 4096 * 4  # of those rows


@pytest.mark.h100(code=False)
def test_the_derivative_on_an_h100_forms_no_float_weight():
    x = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16)
    quantized = lambda w: qjax.prepare(quantize_array(w, FORMATS["nf4"]), "h100")
    w = jax.eval_shape(quantized, jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    step = jax.grad(lambda x, w: jnp.sum(packed_dot(x, w).astype(jnp.float32) ** 2))
    program = h100.compile(jax.jit(step), x, w)
    assert len(program.kernels) == 2
    # y and its derivative, the float32 scales; a float weight would be 33.6 MB.
    assert program.temporaries <= 3 * 2 * 1024 * 4096
