"""Prepared weights are the same weights, in another order that is taken back without loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.ops.packed_dot import packed_dot
from qjax.prepare import Prepared, reason_against
from qjax.qtensor import dequantize_rows, quantize_array
from tests.prepare.weights import (
    FORMATS,
    assert_same,
    count_kernels,
    for_gpus,
    quantized_weight,
    weight,
)


@pytest.mark.parametrize("name", FORMATS)
def test_restore_is_the_inverse(name):
    for shape in ((256, 128), (2, 256, 128)):
        tree = {"w": weight(name, shape), "b": jnp.ones(3)}
        prepared = qjax.prepare(tree, "h100")
        assert isinstance(prepared["w"], Prepared)
        assert prepared["w"].shape == tree["w"].shape
        assert_same(qjax.restore(prepared), tree)
        np.testing.assert_array_equal(qjax.dequantize(prepared)["w"], qjax.dequantize(tree)["w"])


def test_a_prepared_weight_is_as_large_as_before():
    qt = weight("int4")
    assert qjax.prepare(qt, "h100").nbytes == qt.nbytes


def test_zero_points_are_bytes_up_to_the_kernel():
    """That is half a byte more a group, and one kernel less for every product."""
    qt = weight("zero point")
    prepared = qjax.prepare(qt, "h100")
    assert prepared.zero.dtype == jnp.uint8
    assert prepared.zero.shape == prepared.scale.shape
    assert prepared.bits_per_weight == qt.bits_per_weight + 4 / 64
    x = jnp.ones((3, 256), jnp.bfloat16)
    products = lambda name: for_gpus(packed_dot, x, qjax.prepare(weight(name), "h100"))
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
    qt = weight("nf4-dq", (256, 512))
    assert qjax.prepare(qt, "h100").bits_per_weight == bits + 32 / 64 / 256  # blocks of 128


def test_other_devices_and_formats_are_left_alone():
    tree = {"w": weight("int4")}
    assert qjax.prepare(tree)["w"] is tree["w"]
    int5 = quantize_array(jnp.ones((256, 128)), qjax.Format("int5", group_size=64))
    assert qjax.prepare(int5, "h100") is int5
    assert "int5" in str(reason_against(int5))
    with pytest.raises(ValueError, match="h100"):
        qjax.prepare(tree, "v100")


def test_rows_of_a_prepared_weight_are_its_rows():
    rows = jnp.array([3, 0, 255, 18])
    names = ("int4", "zero point", "channels", "uint8", "fp8 blocks", "int3", "uint2")
    for qt in (*map(weight, names), *map(quantized_weight, ("w8a8", "fp8"))):
        got = dequantize_rows(qjax.prepare(qt, "h100"), rows)
        np.testing.assert_array_equal(got, dequantize_rows(qt, rows))


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
        assert_same(qjax.restore(part), qt.columns(cut))
        np.testing.assert_array_equal(qjax.dequantize(part), cut(qjax.dequantize(qt), 1))
    x = jax.random.normal(jax.random.key(1), (3, 256), jnp.bfloat16)
    halves = qjax.apply(lambda x, w: [x @ half for half in jnp.split(w, [128], axis=1)])
    for y, wanted in zip(halves(x, prepared), halves(x, qt), strict=True):
        np.testing.assert_allclose(*(a.astype("float32") for a in (y, wanted)), rtol=2.0**-7)
    if device == "h100":
        assert count_kernels(halves, x, prepared) == 2


def test_checkpoints_hold_the_canonical_layout(tmp_path):
    tree = {"w": weight("zero point")}
    qjax.save(tmp_path / "ckpt", qjax.prepare(tree, "h100"))
    assert_same(qjax.load(tmp_path / "ckpt"), tree)
