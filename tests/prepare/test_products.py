"""Products with prepared weights are those with the weights, on a CPU and by the kernels."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import qjax
from qjax.ops.packed_dot import packed_dot
from qjax.prepare import Prepared
from qjax.qtensor import dequantize_rows, quantize_array
from tests.prepare.weights import (
    FORMATS,
    QUANTIZED,
    assert_same,
    by_the_kernel,
    count_kernels,
    for_gpus,
    quantized_weight,
    weight,
)


@pytest.mark.parametrize("name", FORMATS)
def test_products_on_a_cpu_are_those_of_the_canonical_weight(name):
    qt = weight(name)
    prepared = qjax.prepare(qt, "h100")
    K, N = qt.shape
    x = jax.random.normal(jax.random.key(1), (3, K), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(1), (3, N), jnp.bfloat16)
    for run in (
        functools.partial(packed_dot, x, out_dtype=jnp.float32),
        functools.partial(packed_dot, y, out_dtype=jnp.float32, transposed=True),
    ):
        wanted = run(qt)
        atol = 2.0**-20 * float(jnp.linalg.norm(wanted))  # sums in another order
        np.testing.assert_allclose(run(prepared), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("name", QUANTIZED)
def test_rounded_activations_on_a_cpu_are_those_of_the_canonical_weight(name):
    qt = quantized_weight(name)
    prepared = qjax.prepare(qt, "h100")
    assert isinstance(prepared, Prepared)
    assert_same(qjax.restore(prepared), qt)
    x = jax.random.normal(jax.random.key(1), (3, qt.shape[0]), jnp.bfloat16)
    y, wanted = packed_dot(x, prepared), packed_dot(x, qt)
    if name == "nvfp4 x fp8":  # whose scale of all is a factor of sums, and rounds them elsewhere
        np.testing.assert_allclose(*(a.astype("float32") for a in (y, wanted)), rtol=2.0**-7)
    else:
        np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_kernel_multiplies_the_codes_that_xla_does(name):
    qt = quantized_weight(name)
    x = jax.random.normal(jax.random.key(1), (3, qt.shape[0]), jnp.bfloat16)
    prepared = qjax.prepare(qt, "h100")
    wanted = packed_dot(x, qt, out_dtype=jnp.float32)
    y = by_the_kernel(x, prepared)
    # A weight times a scale of a small group is rounded to bfloat16, of 8 places, as levels of nf4
    # are; and so are steps of groups times their codes.
    once = 2.0**-9
    rounded = {"w8a8, groups of 64": once, "nvfp4 x fp8": once, "w4a8, multiples of 16": 2 * once}
    rounded |= dict.fromkeys(("nf4 x fp8", "nf4-dq x fp8"), once)
    assert np.linalg.norm(y - wanted) <= rounded.get(name, 2e-6) * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["w4a8", "w8a8 groups", "w4a8 fp8", "w4a8 1x128"])
def test_many_tokens_are_multiplied_in_16_bits_where_bytes_have_too_much_beside_them(name):
    """Codes are exact. Weights are rounded with their scales, as for activations of 16 bits."""
    qt = quantized_weight(name)
    prepared = qjax.prepare(qt, "h100")
    assert prepared.most_in_bytes == 64
    x = jax.random.normal(jax.random.key(1), (70, qt.shape[0]), jnp.bfloat16)
    product = functools.partial(packed_dot, out_dtype=jnp.float32)

    def operands(x):
        program = for_gpus(product, x, prepared)
        (kernel,) = [line for line in program.splitlines() if "@mosaic_gpu_v2" in line]
        return kernel.split(" : (")[1].split(") -> ")[0]

    assert "72x256xbf16" in operands(x)  # in eights
    assert "64x256xbf16" not in operands(x[:64])
    y, wanted = by_the_kernel(x, prepared), product(x, qt)
    assert np.linalg.norm(y - wanted) <= 2.0**-8 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["w8a8", "w8a8 groups", "fp8", "w4a8", "w4a8 multiples"])
def test_tangents_meet_the_same_weight_on_the_kernel(name):
    """They are not rounded: the weight's bytes lie as for products of bytes, x is in bfloat16."""
    qt = quantized_weight(name)
    x = jax.random.normal(jax.random.key(1), (3, qt.shape[0]), jnp.bfloat16)
    prepared = qjax.prepare(qt, "h100")
    linear = dataclasses.replace(prepared, format=prepared.format.weight_only)
    y = np.asarray(by_the_kernel(x, linear), np.float64)
    wanted = np.asarray(x, np.float64) @ np.asarray(qjax.dequantize(qt), np.float64)
    assert np.linalg.norm(y - wanted) <= 2.0**-8 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_agrees_with_float64(name):
    qt = weight(name)
    K, _ = qt.shape
    x = jax.random.normal(jax.random.key(1), (3, K), jnp.bfloat16)
    prepared = qjax.prepare(qt, "h100")
    y = np.asarray(by_the_kernel(x, prepared), np.float64)
    wanted = np.asarray(x, np.float64) @ np.asarray(qjax.dequantize(qt), np.float64)
    # Levels of nf4 and fp4 are rounded to bfloat16, of 8 places. So are weights times the scales of
    # small groups, and those that are float32.
    once = 2.0**-9
    rounded = {"nf4": once, "nf4-dq": once, "fp4": once, "uint3": once}
    rounded |= {"offset": 2 * once, "uint2": 2 * once}
    budget = rounded.get(name, 2e-6)
    assert np.linalg.norm(y - wanted) <= budget * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    "name",
    [
        "zero point",
        "last group shorter",
        "nf4",
        "nf4-dq",
        "mxfp4",
        "channels",
        "fp8",
        "int2",
        "uint2",
    ],
)
def test_the_transposed_kernel_agrees_with_float64(name):
    qt = weight(name)
    dy = jax.random.normal(jax.random.key(1), (3, qt.shape[1]), jnp.bfloat16)
    dx = np.asarray(by_the_kernel(dy, qjax.prepare(qt, "h100"), transposed=True), np.float64)
    wanted = np.asarray(dy, np.float64) @ np.asarray(qjax.dequantize(qt), np.float64).T
    # A weight is rounded to bfloat16, of 8 places, as a level and with its scale.
    assert np.linalg.norm(dx - wanted) <= 2.0**-8 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["w8a8", "fp8", "w4a8", "llm-int8"])
def test_derivatives_and_stacks_of_rounded_activations_read_codes_in_their_order(name):
    """Those of 8 bits are natural, for the products of bytes; these are with floats."""
    qt, fmt = quantized_weight(name), QUANTIZED[name]
    prepared = qjax.prepare(qt, "h100")
    if fmt.element != "int4":
        assert prepared.data.dtype == qt.data.dtype
        np.testing.assert_array_equal(prepared.data.T, qt.data)
    dy = jax.random.normal(jax.random.key(1), (3, qt.shape[1]), jnp.bfloat16)
    dx = np.asarray(by_the_kernel(dy, prepared, transposed=True), np.float64)
    w = np.asarray(qjax.dequantize(qt), np.float64)
    wanted = np.asarray(dy, np.float64) @ w.T
    assert np.linalg.norm(dx - wanted) <= 2.0**-8 * np.linalg.norm(wanted)
    if fmt.outliers is None:  # of which each has its own
        stack = quantize_array(jax.random.normal(jax.random.key(2), (2, 256, 128)), fmt)
        x = jax.random.normal(jax.random.key(3), (2, 3, 256), jnp.bfloat16)
        y = by_the_kernel(x, qjax.prepare(stack, "h100"))
        wanted = np.asarray(packed_dot(x, stack, out_dtype=jnp.float32))
        assert np.linalg.norm(y - wanted) <= 2.0**-8 * np.linalg.norm(wanted)


def test_a_pre_scale_does_not_keep_a_product_from_the_kernel():
    w = jax.random.normal(jax.random.key(0), (2, 256, 128))
    factor = 1 + jax.random.uniform(jax.random.key(2), (2, 256))
    stack = quantize_array(w, FORMATS["int4"], pre_scale=factor)
    qt, prepared = (jax.tree.map(lambda a: a[0], p) for p in (stack, qjax.prepare(stack, "h100")))
    x = jax.random.normal(jax.random.key(1), (3, 256), jnp.bfloat16)
    y = np.asarray(by_the_kernel(x, prepared), np.float64)
    wanted = np.asarray(x, np.float64) @ np.asarray(qjax.dequantize(qt), np.float64)
    # Which takes x * pre_scale in bfloat16, of 8 places.
    assert np.linalg.norm(y - wanted) <= 2.0**-9 * np.linalg.norm(wanted)
    np.testing.assert_allclose(packed_dot(x, prepared, out_dtype="float32"), y, rtol=0, atol=1e-3)
    product = lambda x, w: x @ w.astype(x.dtype)
    experts = lambda x, w: lax.ragged_dot(x, w.astype(x.dtype), jnp.array([2, 1]))
    for f, w in ((product, prepared), (experts, qjax.prepare(stack, "h100"))):
        loss = lambda x, w, f=f: jnp.sum(qjax.apply(f)(x, w).astype(jnp.float32) ** 2)
        assert count_kernels(jax.grad(loss), x, w) == 2


def _layers(x, params):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]


@pytest.mark.parametrize("name", ["int4", "zero point"])
def test_runs_under_scan_grad_and_vmap(name):
    stack = quantize_array(
        jax.random.normal(jax.random.key(0), (2, 128, 128), jnp.bfloat16) / 11, FORMATS[name]
    )
    prepared = qjax.prepare(stack, "h100")
    x = jax.random.normal(jax.random.key(1), (3, 128), jnp.bfloat16)
    f = qjax.apply(_layers)
    loss = lambda x, w: jnp.sum(f(x, w).astype(jnp.float32) ** 2)
    for run in (f, jax.grad(loss), jax.vmap(f, in_axes=(0, None))):
        got, wanted = (jax.jit(run)(x, w).astype(jnp.float32) for w in (prepared, stack))
        np.testing.assert_allclose(got, wanted, atol=2.0**-8 * float(abs(wanted).max()))


@pytest.mark.parametrize(
    "scale",
    [
        qjax.Format("int8_max15", group_size=2),
        qjax.Format("int8_max15", group_columns=None),
        qjax.Format("int8_max15", zero_point=True),
        qjax.Format("int8"),
    ],
    ids=str,
)
def test_other_nested_scales_of_w4a8_are_decoded_in_front_of_the_kernel(scale):
    w = jax.random.normal(jax.random.key(0), (256, 128))
    qt = quantize_array(w, qjax.Format("int4", 128, scale=scale, activation="int8"))
    prepared = qjax.prepare(qt, "h100")
    assert prepared.multiples() is None
    x = jax.random.normal(jax.random.key(1), (3, 256), jnp.bfloat16)
    wanted = packed_dot(x, qt, out_dtype=jnp.float32)
    assert np.linalg.norm(by_the_kernel(x, prepared) - wanted) <= 2e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["w4a8 multiples", "fp4 x fp8"])
def test_a_tangent_meets_multiples_as_the_scales_that_they_are(name):
    qt = quantize_array(jax.random.normal(jax.random.key(0), (256, 128)), QUANTIZED[name])
    x, t = jax.random.normal(jax.random.key(1), (2, 3, 256), jnp.bfloat16)
    prepared = qjax.prepare(qt, "h100")
    run = lambda t, w: jax.jvp(lambda x: packed_dot(x, w), (x,), (t,))[1]
    for_gpus(run, t, prepared)
    np.testing.assert_array_equal(run(t, prepared), run(t, qt))


@pytest.mark.parametrize(
    "name", ["int4", "nvfp4, one scale", "w8a8", "w4a8 multiples", "fp4 x fp8"]
)
def test_derivatives_of_float32_results_run_on_the_kernel(name):
    """As of logits, or of a weight with a factor of its own."""
    fmt = FORMATS[name] if name in FORMATS else QUANTIZED[name]
    qt = quantize_array(jax.random.normal(jax.random.key(0), (256, 128)), fmt)
    x = jax.random.normal(jax.random.key(1), (16, 256), jnp.bfloat16)
    u = jax.random.normal(jax.random.key(2), (16, 128))
    f = lambda x, qt: jnp.vdot(packed_dot(x, qt, out_dtype=jnp.float32), u)
    grad, prepared = jax.jit(jax.grad(f)), qjax.prepare(qt, "h100")
    text = grad.trace(x, prepared).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1  # the forward product is not needed
    dx, wanted = grad(x, prepared).astype(jnp.float32), grad(x, qt).astype(jnp.float32)
    error = jnp.linalg.norm(dx - wanted) / jnp.linalg.norm(wanted)
    assert error < 2.0**-8  # two roundings to bfloat16 instead of one


@pytest.mark.parametrize("name", ["int4", "int3", "w8a8 groups", "w4a8 multiples"])
def test_nothing_broadcasts_ranks_in_silence(name):
    """Users may set `jax_numpy_rank_promotion="raise"`. Few tokens have sums of parts of K."""
    with jax.numpy_rank_promotion("raise"):
        fmt = FORMATS[name] if name in FORMATS else QUANTIZED[name]
        qt = quantize_array(jnp.ones((1024, 256)), fmt)
        prepared = qjax.prepare(qt, "h100")
        restored = qjax.restore(prepared)
        x = jnp.ones((3, 1024), jnp.bfloat16)
        jax.block_until_ready(packed_dot(x, restored, implementation="xla"))
        jax.block_until_ready(dequantize_rows(prepared, jnp.arange(3)))
        for transposed in (False, True):
            dot = jax.jit(functools.partial(packed_dot, transposed=transposed))
            rows = x[:, :256] if transposed else x
            dot.trace(rows, prepared).lower(lowering_platforms=("cpu", "cuda"))


def test_one_exported_program_has_the_kernel_and_runs_on_a_cpu():
    qt = weight("int4")
    prepared = qjax.prepare(qt, "h100")
    x = jax.random.normal(jax.random.key(1), (3, 256), jnp.bfloat16)
    # The weight's arrays are what an exported program takes.
    leaves, tree = jax.tree.flatten(prepared)
    f = jax.jit(lambda x, *leaves: packed_dot(x, jax.tree.unflatten(tree, leaves)))
    both = export.export(
        f,
        platforms=("cpu", "cuda"),
        disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(x, *leaves)
    assert "mosaic_gpu_v2" in both.mlir_module()
    np.testing.assert_array_equal(jax.jit(both.call)(x, *leaves), f(x, *leaves))
