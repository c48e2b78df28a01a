"""Prepared weights are the same weights; programs made with them are right on every platform."""

from __future__ import annotations

import dataclasses
import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
from pallas_kernels import h100, hlo, interpreter
from qjax.ops.dispatch import compute
from qjax.ops.packed_dot import packed_dot, packed_dot_p
from qjax.prepare import Prepared, reason_against
from qjax.qtensor import dequantize_rows, is_qtensor, quantize_array
from qjax.sharding import shard_specs, shardings_of

FORMATS = {
    "int4": qjax.Format("int4", group_size=128, scale="bfloat16"),
    "zero point": qjax.Format("uint4", group_size=64, zero_point=True, scale="bfloat16"),
    "zero point, last group shorter": qjax.Format(
        "int4",
        group_size=32,
        zero_point=True,
        scale=qjax.Format("e4m3", group_columns=None),
        remainder="ragged",
    ),
    "zero point, one": qjax.Format("uint4", group_columns=None, zero_point=True),
    "unsigned": qjax.Format("uint4", group_size=64, scale="bfloat16"),
    "offset": qjax.Format("uint4", group_size=32, offset="float32"),
    "channels": qjax.Format("int8"),
    "uint8": qjax.Format("uint8", group_size=128, zero_point=True),
    "int8, zero point": qjax.Format("int8", zero_point=True, scale="bfloat16"),
    "one scale": qjax.Format("int4", group_columns=None),
    "int3": qjax.Format("int3", group_size=64, scale="bfloat16"),
    "uint3": qjax.Format("uint3", group_size=32, zero_point=True, scale="bfloat16"),
    "int2": qjax.Format("int2", group_size=128),
    "uint2": qjax.Format("uint2", group_size=64, offset="float16"),
    "ternary": qjax.Format("ternary", group_columns=None),
    "last group shorter": qjax.Format("int4", group_size=128, remainder="ragged"),
    "fp8": qjax.Format("e4m3"),
    "fp8 blocks": qjax.Format("e4m3", group_size=128, group_columns=128),
    "nf4": qjax.Format("nf4", group_size=64),
    "nf4-dq": qjax.Format(
        "nf4", group_size=64, scale=qjax.Format("uint8", group_size=1, group_columns=128)
    ),
    "int4, nested with offsets": qjax.Format(
        "int4",
        group_size=64,
        scale=qjax.Format("uint8", group_size=1, group_columns=256, offset="float32"),
    ),
    "fp4": qjax.Format("fp4", group_size=128, scale="bfloat16"),
    "mxfp4": qjax.Format("e2m1", group_size=32, scale="e8m0"),
    "nvfp4": qjax.Format("e2m1", group_size=16, scale=qjax.Format("e4m3", group_columns=None)),
    "nvfp4, one scale": qjax.Format("e2m1", group_columns=None, scale="e4m3"),
}
QUANTIZED = {
    "w8a8": qjax.Format("int8", activation="int8"),
    "w8a8 tensor": qjax.Format("int8", activation="int8", activation_scale="tensor"),
    "w4a8": qjax.Format("int4", group_size=128, scale="bfloat16", activation="int8"),
    "w4a8 channels": qjax.Format("int4", activation="int8"),
    "w4a8 multiples": qjax.Format(
        "int4", group_size=128, scale=qjax.Format("int8_max15"), activation="int8"
    ),
    "w4a8 multiples of 32": qjax.Format(
        "int4",
        group_size=32,
        scale=qjax.Format("int8_max15", scale="bfloat16"),
        remainder="ragged",
        activation="int8",
        activation_scale="tensor",
    ),
    "w4a8 fp8": qjax.Format("int4", group_size=128, scale="bfloat16", activation="e4m3"),
    "fp4 x fp8": qjax.Format(
        "e2m1", group_size=128, scale=qjax.Format("e4m3_for_e2m1"), activation="e4m3"
    ),
    "fp4 x fp8, groups of 32": qjax.Format(
        "e2m1",
        group_size=32,
        scale=qjax.Format("e4m3_for_e2m1", scale="bfloat16"),
        remainder="ragged",
        activation="e4m3",
        activation_scale="tensor",
    ),
    "w4a8 fp8 channels": qjax.Format("int4", activation="e4m3"),
    "w8a8 groups": qjax.Format("int8", group_size=128, activation="int8"),
    "fp8": qjax.Format("e4m3", activation="e4m3"),
    "fp8 static": qjax.Format("e4m3", activation="e4m3", activation_scale="static"),
    "fp8 blocks": qjax.Format("e4m3", group_size=128, group_columns=128, activation="e4m3"),
    "fp8 1x128": qjax.Format("e4m3", 128, 128, activation="e4m3", activation_scale="group"),
    "w4a8 1x128": qjax.Format("int4", 128, activation="int8", activation_scale="group"),
    "fp8 shorter": qjax.Format("e4m3", group_size=128, remainder="ragged", activation="e4m3"),
    "llm-int8": qjax.Format(
        "int8", activation="int8", outliers=2.5, outlier_capacity=16, rule="absmax"
    ),
}
# Those whose codes are multiplied in 16 bits.
IN_SIXTEEN_BITS = {
    "w3a8": qjax.Format("int3", group_size=64, scale="bfloat16", activation="int8"),
    "ternary": qjax.Format("ternary", group_columns=None, activation="int8"),
    "w4a4": qjax.Format("int4", group_size=128, scale="bfloat16", activation="int4"),
    "w4a8, groups of 64": qjax.Format("int4", 64, activation="int8", activation_scale="tensor"),
    "w4a8, multiples of 16": qjax.Format(
        "int4", group_size=16, scale=qjax.Format("int8_max15"), activation="int8"
    ),
    "unsigned activations": qjax.Format("int8", activation="uint8"),
    "w8a8, shorter": qjax.Format("int8", 256, remainder="ragged", activation="int8"),
    "w8a8, groups of 64": qjax.Format("int8", 64, activation="int8", activation_scale="group"),
    "nf4 x fp8": qjax.Format("nf4", group_size=64, activation="e4m3"),
    "nf4-dq x fp8": dataclasses.replace(FORMATS["nf4-dq"], activation="e4m3"),
    "mxfp4 x fp8": dataclasses.replace(FORMATS["mxfp4"], activation="e4m3"),
    "nvfp4 x fp8": dataclasses.replace(
        FORMATS["nvfp4"], activation="e4m3", activation_scale="group"
    ),
    "w8a8, fp8 activations": qjax.Format("int8", activation="e4m3"),
}
QUANTIZED |= IN_SIXTEEN_BITS


def _weight(name, shape=(256, 128)):
    if name.endswith("last group shorter"):
        shape = (*shape[:-2], 200, 100)
    w = jax.random.normal(jax.random.key(0), shape)
    return quantize_array(w, FORMATS[name])


def _same(a, b):
    assert type(a) is type(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", FORMATS)
def test_restore_is_the_inverse(name):
    for shape in ((256, 128), (2, 256, 128)):
        tree = {"w": _weight(name, shape), "b": jnp.ones(3)}
        prepared = qjax.prepare(tree, "h100")
        assert isinstance(prepared["w"], Prepared)
        assert prepared["w"].shape == tree["w"].shape
        _same(qjax.restore(prepared), tree)
        np.testing.assert_array_equal(qjax.dequantize(prepared)["w"], qjax.dequantize(tree)["w"])


def test_a_prepared_weight_is_as_large_as_before():
    qt = _weight("int4")
    assert qjax.prepare(qt, "h100").nbytes == qt.nbytes


def test_zero_points_are_bytes_up_to_the_kernel():
    """That is half a byte more a group, and one kernel less for every product."""
    qt = _weight("zero point")
    prepared = qjax.prepare(qt, "h100")
    assert prepared.zero.dtype == jnp.uint8
    assert prepared.zero.shape == prepared.scale.shape
    assert prepared.bits_per_weight == qt.bits_per_weight + 4 / 64
    x = jnp.ones((3, 256), jnp.bfloat16)
    products = lambda name: _for_gpus(packed_dot, x, qjax.prepare(_weight(name), "h100"))
    assert "dot_general" not in products("zero point")
    assert "dot_general" in products("offset")


def test_nested_scales_stay_codes_up_to_the_kernel():
    w = jnp.ones((256, 512))
    scales = {"uint8": 1, "dynamic8": None}
    for element, group in scales.items():
        inner = qjax.Format(element, group_size=group, group_columns=256)
        qt = quantize_array(w, qjax.Format("nf4", group_size=64, scale=inner))
        nested = qjax.prepare(qt, "h100").nested_scale()
        assert (nested is None) == (element == "dynamic8")  # which is decoded in front of it
    bits = 4 + 8 / 64 + 32 / 64 / 256
    qt = _weight("nf4-dq", (256, 512))
    assert qjax.prepare(qt, "h100").bits_per_weight == bits + 32 / 64 / 256  # blocks of 128


def test_other_devices_and_formats_are_left_alone():
    tree = {"w": _weight("int4")}
    assert qjax.prepare(tree)["w"] is tree["w"]
    int5 = quantize_array(jnp.ones((256, 128)), qjax.Format("int5", group_size=64))
    assert qjax.prepare(int5, "h100") is int5
    assert "int5" in str(reason_against(int5))
    with pytest.raises(ValueError, match="h100"):
        qjax.prepare(tree, "v100")


@pytest.mark.parametrize("name", FORMATS)
def test_products_on_a_cpu_are_those_of_the_canonical_weight(name):
    qt = _weight(name)
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


def _quantized_weight(name):
    shape = (200, 100) if name == "fp8 shorter" else (256, 128)
    step = jnp.float32(0.02) if "static" in name else None
    w = jax.random.normal(jax.random.key(0), shape)
    return quantize_array(w, QUANTIZED[name], act_scale=step)


@pytest.mark.parametrize("name", QUANTIZED)
def test_rounded_activations_on_a_cpu_are_those_of_the_canonical_weight(name):
    qt = _quantized_weight(name)
    prepared = qjax.prepare(qt, "h100")
    assert isinstance(prepared, Prepared)
    _same(qjax.restore(prepared), qt)
    x = jax.random.normal(jax.random.key(1), (3, qt.shape[0]), jnp.bfloat16)
    y, wanted = packed_dot(x, prepared), packed_dot(x, qt)
    if name == "nvfp4 x fp8":  # whose scale of all is a factor of sums, and rounds them elsewhere
        np.testing.assert_allclose(*(a.astype("float32") for a in (y, wanted)), rtol=2.0**-7)
    else:
        np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_kernel_multiplies_the_codes_that_xla_does(name):
    qt = _quantized_weight(name)
    x = jax.random.normal(jax.random.key(1), (3, qt.shape[0]), jnp.bfloat16)
    prepared = qjax.prepare(qt, "h100")
    wanted = packed_dot(x, qt, out_dtype=jnp.float32)
    y = _by_the_kernel(x, prepared)
    # A weight times a scale of a small group is rounded to bfloat16, of 8 places, as levels of nf4
    # are; and so are steps of groups times their codes.
    once = 2.0**-9
    rounded = {"w8a8, groups of 64": once, "nvfp4 x fp8": once, "w4a8, multiples of 16": 2 * once}
    rounded |= dict.fromkeys(("nf4 x fp8", "nf4-dq x fp8"), once)
    assert np.linalg.norm(y - wanted) <= rounded.get(name, 2e-6) * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["w4a8", "w8a8 groups", "w4a8 fp8", "w4a8 1x128"])
def test_many_tokens_are_multiplied_in_16_bits_where_bytes_have_too_much_beside_them(name):
    """Codes are exact. Weights are rounded with their scales, as for activations of 16 bits."""
    qt = _quantized_weight(name)
    prepared = qjax.prepare(qt, "h100")
    assert prepared.most_in_bytes == 64
    x = jax.random.normal(jax.random.key(1), (70, qt.shape[0]), jnp.bfloat16)
    product = functools.partial(packed_dot, out_dtype=jnp.float32)

    def operands(x):
        program = _for_gpus(product, x, prepared)
        (kernel,) = [line for line in program.splitlines() if "@mosaic_gpu_v2" in line]
        return kernel.split(" : (")[1].split(") -> ")[0]

    assert "72x256xbf16" in operands(x)  # in eights
    assert "64x256xbf16" not in operands(x[:64])
    y, wanted = _by_the_kernel(x, prepared), product(x, qt)
    assert np.linalg.norm(y - wanted) <= 2.0**-8 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["w8a8", "w8a8 groups", "fp8", "w4a8", "w4a8 multiples"])
def test_tangents_meet_the_same_weight_on_the_kernel(name):
    """They are not rounded: the weight's bytes lie as for products of bytes, x is in bfloat16."""
    qt = _quantized_weight(name)
    x = jax.random.normal(jax.random.key(1), (3, qt.shape[0]), jnp.bfloat16)
    prepared = qjax.prepare(qt, "h100")
    linear = dataclasses.replace(prepared, format=prepared.format.weight_only)
    y = np.asarray(_by_the_kernel(x, linear), np.float64)
    wanted = np.asarray(x, np.float64) @ np.asarray(qjax.dequantize(qt), np.float64)
    assert np.linalg.norm(y - wanted) <= 2.0**-8 * np.linalg.norm(wanted)


def test_rows_of_a_prepared_weight_are_its_rows():
    rows = jnp.array([3, 0, 255, 18])
    names = ("int4", "zero point", "channels", "uint8", "fp8 blocks", "int3", "uint2")
    for qt in (*map(_weight, names), *map(_quantized_weight, ("w8a8", "fp8"))):
        got = dequantize_rows(qjax.prepare(qt, "h100"), rows)
        np.testing.assert_array_equal(got, dequantize_rows(qt, rows))


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_agrees_with_float64(name):
    qt = _weight(name)
    K, _ = qt.shape
    x = jax.random.normal(jax.random.key(1), (3, K), jnp.bfloat16)
    prepared = qjax.prepare(qt, "h100")
    y = np.asarray(_by_the_kernel(x, prepared), np.float64)
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
    qt = _weight(name)
    dy = jax.random.normal(jax.random.key(1), (3, qt.shape[1]), jnp.bfloat16)
    dx = np.asarray(_by_the_kernel(dy, qjax.prepare(qt, "h100"), transposed=True), np.float64)
    wanted = np.asarray(dy, np.float64) @ np.asarray(qjax.dequantize(qt), np.float64).T
    # A weight is rounded to bfloat16, of 8 places, as a level and with its scale.
    assert np.linalg.norm(dx - wanted) <= 2.0**-8 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["w8a8", "fp8", "w4a8", "llm-int8"])
def test_derivatives_and_stacks_of_rounded_activations_read_codes_in_their_order(name):
    """Those of 8 bits are natural, for the products of bytes; these are with floats."""
    qt, fmt = _quantized_weight(name), QUANTIZED[name]
    prepared = qjax.prepare(qt, "h100")
    if fmt.element != "int4":
        assert prepared.data.dtype == qt.data.dtype
        np.testing.assert_array_equal(prepared.data.T, qt.data)
    dy = jax.random.normal(jax.random.key(1), (3, qt.shape[1]), jnp.bfloat16)
    dx = np.asarray(_by_the_kernel(dy, prepared, transposed=True), np.float64)
    w = np.asarray(qjax.dequantize(qt), np.float64)
    wanted = np.asarray(dy, np.float64) @ w.T
    assert np.linalg.norm(dx - wanted) <= 2.0**-8 * np.linalg.norm(wanted)
    if fmt.outliers is None:  # of which each has its own
        stack = quantize_array(jax.random.normal(jax.random.key(2), (2, 256, 128)), fmt)
        x = jax.random.normal(jax.random.key(3), (2, 3, 256), jnp.bfloat16)
        y = _by_the_kernel(x, qjax.prepare(stack, "h100"))
        wanted = np.asarray(packed_dot(x, stack, out_dtype=jnp.float32))
        assert np.linalg.norm(y - wanted) <= 2.0**-8 * np.linalg.norm(wanted)


def _by_the_kernel(x, prepared, **options):
    """The product as a GPU computes it, interpreted."""

    # Not a lowered program: the interpreter calls back into Python, which that cannot.
    def bind(*args, spec):
        return compute(*args, spec=spec, platform="cuda")

    with (
        mock.patch.object(packed_dot_p, "bind", bind),
        interpreter.interpreting(),
        interpreter.everywhere(),
    ):
        return np.asarray(
            packed_dot(x, prepared, out_dtype=jnp.float32, implementation="mosaic", **options)
        )


def _for_gpus(f, *args):
    """The program for an NVIDIA GPU."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def _kernels(f, *args):
    """How many Hopper kernels it has."""
    return _for_gpus(f, *args).count("@mosaic_gpu_v2")


def test_a_pre_scale_does_not_keep_a_product_from_the_kernel():
    w = jax.random.normal(jax.random.key(0), (2, 256, 128))
    factor = 1 + jax.random.uniform(jax.random.key(2), (2, 256))
    stack = quantize_array(w, FORMATS["int4"], pre_scale=factor)
    qt, prepared = (jax.tree.map(lambda a: a[0], p) for p in (stack, qjax.prepare(stack, "h100")))
    x = jax.random.normal(jax.random.key(1), (3, 256), jnp.bfloat16)
    y = np.asarray(_by_the_kernel(x, prepared), np.float64)
    wanted = np.asarray(x, np.float64) @ np.asarray(qjax.dequantize(qt), np.float64)
    # Which takes x * pre_scale in bfloat16, of 8 places.
    assert np.linalg.norm(y - wanted) <= 2.0**-9 * np.linalg.norm(wanted)
    np.testing.assert_allclose(packed_dot(x, prepared, out_dtype="float32"), y, rtol=0, atol=1e-3)
    product = lambda x, w: x @ w.astype(x.dtype)
    experts = lambda x, w: lax.ragged_dot(x, w.astype(x.dtype), jnp.array([2, 1]))
    for f, w in ((product, prepared), (experts, qjax.prepare(stack, "h100"))):
        loss = lambda x, w, f=f: jnp.sum(qjax.apply(f)(x, w).astype(jnp.float32) ** 2)
        assert _kernels(jax.grad(loss), x, w) == 2


@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize("name", ["int4", "zero point", "channels"])
def test_columns_of_a_prepared_weight_are_prepared(name, device):
    w = jax.random.normal(jax.random.key(0), (256, 300), jnp.bfloat16)
    qt = quantize_array(w, FORMATS[name])
    prepared = qjax.prepare(qt, device)
    cuts = {
        "slice": lambda a, axis: lax.slice_in_dim(a, 10, 150, axis=axis),
        "strided": lambda a, axis: lax.slice_in_dim(a, 1, 300, 7, axis=axis),
        "whole tiles": lambda a, axis: lax.slice_in_dim(a, 0, 128, axis=axis),
        "clamped": lambda a, axis: lax.dynamic_slice_in_dim(a, 299, 140, axis),
    }
    for cut in cuts.values():
        part = prepared.columns(cut)
        assert type(part) is type(prepared)
        _same(qjax.restore(part), qt.columns(cut))
        np.testing.assert_array_equal(qjax.dequantize(part), cut(qjax.dequantize(qt), 1))
    x = jax.random.normal(jax.random.key(1), (3, 256), jnp.bfloat16)
    halves = qjax.apply(lambda x, w: [x @ half for half in jnp.split(w, [128], axis=1)])
    for y, wanted in zip(halves(x, prepared), halves(x, qt), strict=True):
        np.testing.assert_allclose(*(a.astype("float32") for a in (y, wanted)), rtol=2.0**-7)
    if device == "h100":
        assert _kernels(halves, x, prepared) == 2


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


def test_explain_names_the_kernel_and_why_there_is_none():
    qt = _weight("int4")
    f = lambda x, w: x @ w
    x = jnp.ones((3, 256), jnp.bfloat16)
    (use,) = qjax.explain(f)(x, qjax.prepare(qt, "h100"))
    assert use.implementation.startswith("mosaic on CUDA")
    (use,) = qjax.explain(f)(x, qjax.prepare(_quantized_weight("w8a8"), "h100"))
    assert use.implementation.startswith("mosaic on CUDA, else xla, int8 activations per token")
    (use,) = qjax.explain(f)(x, qjax.prepare(_quantized_weight("w4a8 fp8"), "h100"))
    in_bytes = "mosaic on CUDA, codes in bfloat16 for more than 64 tokens, else xla, e4m3"
    assert use.implementation.startswith(in_bytes)
    (use,) = qjax.explain(f, implementation="xla")(x, qjax.prepare(qt, "h100"))
    assert use.implementation.startswith("xla")
    back = lambda x, w: x @ w.T
    apart = qjax.prepare(_quantized_weight("fp4 x fp8"), "h100")
    (use,) = qjax.explain(f)(x, apart)
    assert "in front of it" not in use.implementation
    (use,) = qjax.explain(back)(jnp.ones((3, 128)), apart)
    assert "scales decoded in front of it, codes put in another order" in use.implementation
    (use,) = qjax.explain(back)(jnp.ones((3, 128)), qjax.prepare(qt, "h100"))
    assert use.implementation.startswith("mosaic on CUDA")
    (use,) = qjax.explain(back)(jnp.ones((3, 128)), qjax.prepare(_weight("nvfp4"), "h100"))
    assert "no kernel for x @ Wᵀ in groups of 16" in use.implementation
    for name in ("int2", "int3"):
        (use,) = qjax.explain(f)(x, qjax.prepare(_weight(name), "h100"))
        assert use.implementation.startswith("mosaic on CUDA")
        (use,) = qjax.explain(back)(jnp.ones((3, 128)), qjax.prepare(_weight(name), "h100"))
        assert use.implementation.startswith("mosaic on CUDA")


def test_explain_names_what_is_done_beside_the_kernel_on_every_call():
    def how(fmt, shape=(256, 128), device="h100", **options):
        qt = jax.eval_shape(lambda: qjax.prepare(quantize_array(jnp.ones(shape), fmt), device))
        x = jax.ShapeDtypeStruct((*shape[:-2], 3, shape[-2]), jnp.bfloat16)
        (use,) = qjax.explain(jnp.matmul, **options)(x, qt)
        return use.implementation

    read = "mosaic on CUDA, x in bfloat16 or float16; else xla"
    names = ("int4", "channels", "nf4-dq", "nvfp4", "ternary", "unsigned")
    for name in (*names, "zero point", "uint3", "uint8", "int8, zero point"):
        assert how(FORMATS[name]) == read
    apart = "codes put in another order in front of it"
    assert apart not in how(QUANTIZED["fp4 x fp8"])
    assert apart in how(QUANTIZED["fp4 x fp8"], (2, 256, 128))
    assert apart not in how(QUANTIZED["fp4 x fp8"].weight_only)
    assert how(QUANTIZED["w3a8"]).startswith("mosaic on CUDA, codes in bfloat16, else xla, int8")
    assert "steps times codes rounded to bfloat16 for more than 64" in how(QUANTIZED["w4a8 1x128"])
    flat = qjax.Format("uint8", group_size=256, flatten=True)
    assert "scales decoded in front of it" in how(qjax.Format("nf4", 64, scale=flat))
    assert "scales decoded in front of it" in how(FORMATS["nf4-dq"], (2, 256, 128))
    for blocks in (FORMATS["fp8 blocks"], QUANTIZED["fp8 1x128"]):
        assert "in front of it" not in how(blocks, (512, 128))
        assert "scales padded in front of it" in how(blocks, (256, 128))  # not to 16 bytes
    e8m0 = dataclasses.replace(FORMATS["fp8 blocks"], scale="e8m0")
    assert "scales decoded in front of it" in how(e8m0, (512, 128))
    back = lambda x, w: jnp.matmul(x, w.mT)
    (use,) = qjax.explain(back)(
        jnp.ones((3, 256), jnp.bfloat16), qjax.prepare(_weight("fp8 blocks", (512, 256)), "h100")
    )
    assert "scales repeated in front of it" in use.implementation
    assert "scales padded in front of it" in how(FORMATS["int4"], (256, 130))
    assert "for float16 scales decoded" in how(FORMATS["mxfp4"])
    assert "scales and zero points padded in front" in how(FORMATS["zero point"], (256, 130))
    assert "offsets by a product" in how(FORMATS["offset"])
    nested = dataclasses.replace(FORMATS["nf4-dq"], element="uint4", zero_point=True)
    assert "scales decoded in front of it" in how(nested)
    assert "zero points decoded" in how(FORMATS["zero point"], device="a100")
    one_by_one = "one weight of the stack after another"
    assert "codes as bfloat16 times all of the stack" in how(QUANTIZED["w8a8"], (2, 256, 128))
    outliers = dataclasses.replace(QUANTIZED["w8a8"], outliers=6.0)
    assert f"{one_by_one} (a scan copies them for it): outliers" in how(outliers, (2, 256, 128))
    assert one_by_one in how(FORMATS["int4"], (2, 256, 128), "a100")
    assert how(FORMATS["int4"], (2, 256, 128)) == read
    forced = qjax.explain(lambda x, w: x @ w.T, implementation="mosaic")
    (use,) = forced(jnp.ones((3, 128), jnp.bfloat16), qjax.prepare(_weight("nvfp4"), "h100"))
    assert use.implementation == "mosaic (asked for): no kernel for x @ Wᵀ in groups of 16"


def test_explain_says_why_a_gpu_has_no_kernel_for_what_is_not_prepared(monkeypatch):
    int5 = quantize_array(jnp.ones((2, 256, 128)), qjax.Format("int5", group_size=64))
    uint8 = quantize_array(jnp.ones((256, 128)), qjax.Format("int8", 8, activation="uint8"))
    x, sizes = jnp.ones((3, 256), jnp.bfloat16), jnp.array([2, 1])

    def how(w, **options):
        f = lambda x, w: x @ w if w.ndim == 2 else lax.ragged_dot(x, w, sizes)
        return qjax.explain(f, **options)(x, w)[0].implementation

    def on(capability):
        gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [gpu])

    assert "prepare" not in how(_weight("int4"))
    on("9.0")
    assert how(_weight("int4")) == "xla, blocks of K: it is not prepared, see `qjax.prepare`"
    assert how(_weight("int4"), implementation="xla") == "xla, blocks of K (asked for)"
    assert how(qjax.prepare(_weight("int4"))).startswith("mosaic on CUDA")
    assert how(int5).startswith("xla, blocks of K: int5 codes: kernels read")
    assert "groups of 8: kernels read 16, 32" in how(uint8)
    on("10.0")
    assert "capability 8.0 to 9.0" in how(_weight("int4"))


def test_a_forced_kernel_that_cannot_run_says_why():
    qt = _weight("int4")
    x = jnp.ones((3, 256))
    with pytest.raises(ValueError, match=r"qjax\.prepare"):
        packed_dot(x, qt, implementation="mosaic")
    prepared = qjax.prepare(qt, "h100")
    with pytest.raises(ValueError, match="float32"):
        packed_dot(x, prepared, implementation="mosaic")
    groups_of_16 = qjax.prepare(_weight("nvfp4"), "h100")
    with pytest.raises(NotImplementedError, match="x @ Wᵀ, as in derivatives, in groups of 16"):
        packed_dot(x[:, :128], groups_of_16, transposed=True, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="GPUs only"):
        packed_dot(x.astype(jnp.bfloat16), prepared, implementation="mosaic")


@pytest.mark.parametrize("name", ["int4", "int3", "nf4-dq", "zero point", "uint8", "fp8"])
@pytest.mark.parametrize("spec", [("x", None), (None, "x")], ids=["rows", "columns"])
def test_shards_as_the_float_weight_does(spec, name):
    qt = _weight(name, (512, 256))
    prepared = qjax.prepare(qt, "h100")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    placed = shardings_of(prepared, NamedSharding(mesh, PartitionSpec(*spec)))
    assert placed.data.spec == PartitionSpec(*spec[::-1])
    x = jax.random.normal(jax.random.key(1), (3, 512), jnp.bfloat16)
    y = jax.jit(packed_dot)(x, jax.device_put(prepared, placed))
    wanted = packed_dot(x, qt)
    # Sums of two shards are rounded to bfloat16 before they are added.
    np.testing.assert_allclose(
        y.astype(jnp.float32), wanted.astype(jnp.float32), atol=2.0**-7 * float(abs(wanted).max())
    )


@pytest.mark.parametrize(
    ("name", "transposed"),
    [
        ("int4", False),
        ("zero point", False),
        ("fp8", False),
        ("nvfp4", False),
        ("w4a8 multiples", False),
        ("int3", True),
    ],
)
def test_columns_are_split_where_they_are_no_whole_tiles(name, transposed):
    """As 13,824 over 8 GPUs. Each pads its own, and none gathers those of others."""
    w = jax.random.normal(jax.random.key(0), (256, 1536))
    qt = quantize_array(w, FORMATS[name] if name in FORMATS else QUANTIZED[name])
    prepared = qjax.prepare(qt, "h100")
    mesh = jax.make_mesh((8,), ("x",))
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))
    placed = jax.device_put(prepared, shardings_of(prepared, columns))
    assert placed.data.addressable_shards[0].data.shape[-2] == 192
    x = jax.random.normal(jax.random.key(1), (3, 1536 if transposed else 256), jnp.bfloat16)
    dot = functools.partial(packed_dot, transposed=transposed, out_dtype=jnp.float32)
    program = jax.jit(dot).lower(x, placed).compile()
    gathers = [line for line in (program.as_text() or "").splitlines() if "all-gather(" in line]
    assert all("f32[3,1536]" in line for line in gathers)  # of results, but not of the weight
    wanted = dot(x, qt)
    np.testing.assert_allclose(program(x, placed), wanted, atol=1e-4 * float(abs(wanted).max()))


def test_preparing_what_is_sharded_warns_of_what_it_costs():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    fmt, w = qjax.Format("int4", group_size=128), jnp.ones((1536, 1536))
    by_columns, by_rows = (NamedSharding(mesh, PartitionSpec(*s)) for s in [(None, "x"), ("x",)])
    qt = quantize_array(w, fmt)
    tree = {
        "up": jax.device_put(qt, shardings_of(qt, by_columns)),
        "down": jax.device_put(qt, shardings_of(qt, by_rows)),
    }
    with pytest.warns(UserWarning, match="in every product|every product gathers") as seen:
        prepared = qjax.prepare(tree, "h100")
    padded = "192 columns on each device are padded to 256 in every product"
    gathered = "its 1536 rows do not make 8 parts of whole tiles and groups for as many devices"
    assert f"up: {padded}" in str([w.message for w in seen])
    assert f"down: {gathered} (split them over 4 devices" in str([w.message for w in seen])
    x = jnp.ones((2, 1536), jnp.bfloat16)
    how = str(qjax.explain(lambda p, x: (x @ p["up"]) @ p["down"])(prepared, x))
    assert padded in how
    assert gathered in how


@pytest.mark.h100(code=False)
def test_each_of_8_gpus_pads_its_own_columns():
    w = jax.ShapeDtypeStruct((1024, 13824), jnp.float32)
    fmt = qjax.Format("int4", group_size=128, scale="bfloat16")
    prepared = jax.eval_shape(lambda w: qjax.prepare(quantize_array(w, fmt), "h100"), w)
    mesh = h100.mesh(x=8)
    placed = shardings_of(prepared, NamedSharding(mesh, PartitionSpec(None, "x")))
    struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    x = jax.ShapeDtypeStruct(
        (16, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
    )
    program = h100.compile(jax.jit(packed_dot), x, jax.tree.map(struct, prepared, placed), on=mesh)
    assert len(program.kernels) == 1
    assert "all-gather" not in program.hlo
    assert program.arguments < 1.1 * (1024 * 13824 // 2 + 8 * 13824 * 2) / 8 + 2 * 16 * 1024


def test_zero_points_are_cut_where_groups_are():
    """In bytes also one group for each shard, of which packed codes have no whole byte."""
    qt = quantize_array(
        jax.random.normal(jax.random.key(0), (512, 128)),
        qjax.Format("uint4", group_size=128, zero_point=True, scale="bfloat16"),
    )
    prepared = qjax.prepare(qt, "h100")
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    rows = PartitionSpec("x")
    placed = shardings_of(prepared, NamedSharding(mesh, rows))
    assert placed.zero.spec == placed.scale.spec == PartitionSpec("x", None)
    assert shard_specs(qt, [], ("x",), (), mesh) is None
    specs = shard_specs(prepared, [], ("x",), (), mesh)
    x = jax.random.normal(jax.random.key(1), (3, 512), jnp.bfloat16)
    of_x = PartitionSpec(None, "x")
    part = lambda x, w: lax.psum(packed_dot(x, w, out_dtype=jnp.float32), "x")
    run = jax.shard_map(part, mesh=mesh, in_specs=(of_x, specs), out_specs=PartitionSpec())
    cut = jax.device_put((x, prepared), (NamedSharding(mesh, of_x), placed))
    y, wanted = jax.jit(run)(*cut), packed_dot(x, qt, out_dtype=jnp.float32)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=2.0**-20 * float(jnp.linalg.norm(wanted)))


@pytest.mark.parametrize("name", ["w4a8 multiples", "fp4 x fp8"])
def test_multiples_are_cut_where_groups_are_and_what_they_multiply_is_not(name):
    w = jax.random.normal(jax.random.key(0), (512, 256))
    qt = quantize_array(w, QUANTIZED[name])
    prepared = qjax.prepare(qt, "h100")
    mesh = jax.make_mesh((4, 2), ("k", "n"))
    placed = shardings_of(prepared, NamedSharding(mesh, PartitionSpec("k", "n")))
    assert placed.scale.data.spec == PartitionSpec("k", "n")
    assert placed.scale.scale.spec == PartitionSpec(None, "n")
    x = jax.random.normal(jax.random.key(1), (3, 512), jnp.bfloat16)
    cut = jax.device_put((x, prepared), (NamedSharding(mesh, PartitionSpec(None, "k")), placed))
    dot = functools.partial(packed_dot, out_dtype=jnp.float32)
    program = jax.jit(dot).lower(*cut).compile()
    assert "all-gather" not in (program.as_text() or "")
    wanted = dot(x, qt)
    np.testing.assert_allclose(program(*cut), wanted, atol=2.0**-20 * float(abs(wanted).max()))


@pytest.mark.parametrize(
    "fmt",
    [
        FORMATS["nf4-dq"],
        qjax.Format("int4", 64, scale=qjax.Format("uint8", 1, group_columns=128)),
        FORMATS["fp8 blocks"],
        QUANTIZED["fp8 blocks"],
    ],
    ids=str,
)
def test_what_lies_group_after_group_is_cut_where_groups_and_columns_are(fmt):
    """Factors of nested scales, with their offsets or without, and scales of blocks."""
    qt = quantize_array(jax.random.normal(jax.random.key(0), (512, 1024)), fmt)
    prepared = qjax.prepare(qt, "h100")
    mesh = jax.make_mesh((4, 2), ("k", "n"))
    placed = shardings_of(prepared, NamedSharding(mesh, PartitionSpec("k", "n")))
    of_groups = placed.scale.scale if is_qtensor(placed.scale) else placed.scale
    assert of_groups.spec == PartitionSpec("n", "k")
    specs = shard_specs(prepared, [], ("k",), ("n",), mesh)
    assert jax.tree.leaves(specs) == [s.spec for s in jax.tree.leaves(placed)]
    x = jax.random.normal(jax.random.key(1), (3, 512), jnp.bfloat16)
    of_x = PartitionSpec(None, "k")
    cut = jax.device_put((x, prepared), (NamedSharding(mesh, of_x), placed))
    dot = functools.partial(packed_dot, out_dtype=jnp.float32)
    part = lambda x, w: lax.psum(dot(x, dataclasses.replace(w, format=unrounded)), "k")
    unrounded = fmt.weight_only  # a step of a token is that of all its parts
    run = jax.shard_map(part, mesh=mesh, in_specs=(of_x, specs), out_specs=PartitionSpec(None, "n"))
    program = jax.jit(dot).lower(*cut).compile()
    assert "all-gather" not in (program.as_text() or "")
    wanted = dot(x, qt)
    atol = 2.0**-20 * float(jnp.linalg.norm(wanted))
    np.testing.assert_allclose(program(*cut), wanted, rtol=0, atol=atol)
    wanted = dot(x, dataclasses.replace(qt, format=unrounded))
    np.testing.assert_allclose(jax.jit(run)(*cut), wanted, rtol=0, atol=atol)


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
    assert np.linalg.norm(_by_the_kernel(x, prepared) - wanted) <= 2e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["w4a8 multiples", "fp4 x fp8"])
def test_a_tangent_meets_multiples_as_the_scales_that_they_are(name):
    qt = quantize_array(jax.random.normal(jax.random.key(0), (256, 128)), QUANTIZED[name])
    x, t = jax.random.normal(jax.random.key(1), (2, 3, 256), jnp.bfloat16)
    prepared = qjax.prepare(qt, "h100")
    run = lambda t, w: jax.jvp(lambda x: packed_dot(x, w), (x,), (t,))[1]
    _for_gpus(run, t, prepared)
    np.testing.assert_array_equal(run(t, prepared), run(t, qt))


def test_scales_of_a_weight_that_cannot_be_split_are_whole():
    """Else every product would gather them: 3 tiles for 2 devices."""
    prepared = qjax.prepare(_weight("nvfp4", (384, 384)), "h100")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    with pytest.warns(UserWarning, match="down, prepared: its 384 rows do not make 2 parts"):
        placed = shardings_of(prepared, NamedSharding(mesh, PartitionSpec("x", None)), name="down")
    assert all(s.is_fully_replicated for s in jax.tree.leaves(placed))
    x = jax.random.normal(jax.random.key(1), (3, 384), jnp.bfloat16)
    program = jax.jit(packed_dot).lower(x, jax.device_put(prepared, placed)).compile()
    assert "all-gather" not in (program.as_text() or "")


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


def test_checkpoints_hold_the_canonical_layout(tmp_path):
    tree = {"w": _weight("zero point")}
    qjax.save(tmp_path / "ckpt", qjax.prepare(tree, "h100"))
    _same(qjax.load(tmp_path / "ckpt"), tree)


def test_one_exported_program_has_the_kernel_and_runs_on_a_cpu():
    qt = _weight("int4")
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
