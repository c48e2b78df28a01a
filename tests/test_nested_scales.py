"""Scales that are quantized again are chosen for the weight, with the scales of their own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import Format, nested_scales, numerics, qtensor, scales
from qjax.numerics import ELEMENTS

FORMATS = {
    "int8_max15": Format("int4", 32, scale=Format("int8_max15"), rule="mse"),
    "e4m3_for_e2m1": Format("e2m1", 32, scale=Format("e4m3_for_e2m1"), rule="mse"),
    "e4m3": Format("int4", 16, scale=Format("e4m3", scale="bfloat16"), rule="mse"),
    "int6 in blocks": Format("int3", 16, scale=Format("int6", 8, scale="float16"), rule="mse"),
    "uint6, shorter": Format(
        "uint4", 48, offset=None, scale=Format("uint6", 2), rule="mse", remainder="ragged"
    ),
}


def weight(shape=(256, 24), seed=0):
    """Groups of weights that differ in size, of which some are heavy-tailed."""
    keys = jax.random.split(jax.random.key(seed), 2)
    w = jax.random.t(keys[0], 5.0, shape)
    return w * jnp.exp(0.5 * jax.random.normal(keys[1], (*shape[:-2], 1, *shape[-1:])))


def error(w, qt, importance=None):
    squares = jnp.square(w - qtensor.dequantize_array(qt))
    return jnp.sum(squares if importance is None else squares * importance[..., None], axis=-2)


@pytest.mark.parametrize("name", FORMATS)
def test_no_column_is_worse_than_with_every_scale_rounded(name):
    fmt, w = FORMATS[name], weight()
    if fmt.element.startswith("u"):
        w = abs(w)
    importance = jax.random.uniform(jax.random.key(1), w.shape[:1], minval=0.1)
    free, _ = scales.choose(w, fmt.fit(w.shape[0]), importance)
    rounded = qtensor.quantize_array(w, fmt, scale=free)
    found = qtensor.quantize_array(w, fmt, importance=importance)
    errors = [np.asarray(error(w, qt, importance)) for qt in (found, rounded)]
    assert (errors[0] <= errors[1] * (1 + 2.0**-20)).all()
    assert errors[0].sum() < (0.999 if "6" in name else 0.99) * errors[1].sum()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_found_is_stored_as_it_is(name):
    fmt, w = FORMATS[name].fit(256), weight()
    free, _ = scales.choose(w, fmt)
    scale, step = nested_scales.search(w, free, fmt)
    stored = qtensor.store_scales(scale, fmt.scale, step)
    np.testing.assert_array_equal(qtensor.restore_scales(stored, fmt.scale), scale)


def test_a_stack_is_its_weights_side_by_side():
    fmt, w = FORMATS["e4m3_for_e2m1"], weight((3, 256, 8))
    stack = qtensor.dequantize_array(qtensor.quantize_array(w, fmt))
    for one, own in zip(w, stack, strict=True):
        alone = qtensor.dequantize_array(qtensor.quantize_array(one, fmt))
        np.testing.assert_allclose(alone, own, rtol=2e-6)  # least squares in another order


@pytest.mark.parametrize("name", ["int8_max15", "e4m3_for_e2m1"])
def test_a_column_of_zeros_stays_and_one_with_a_nan_becomes_nan(name):
    w = weight().at[:, 1].set(0).at[40:90, 3].set(0).at[5, 2].set(jnp.nan)
    out = np.asarray(qtensor.dequantize_array(qtensor.quantize_array(w, FORMATS[name])))
    assert (out[:, 1] == 0).all()
    assert (out[64:90, 3] == 0).all()
    assert np.isnan(out[:32, 2]).all()
    assert np.isfinite(np.delete(out, 2, axis=1)).all()


def test_others_are_not_searched():
    nested = FORMATS["int8_max15"]
    for fmt in (
        dataclasses.replace(nested, rule="absmax"),
        dataclasses.replace(nested, scale="bfloat16"),
        dataclasses.replace(nested, zero_point=True),
        dataclasses.replace(nested, scale=Format("e4m3", group_columns=None)),
        dataclasses.replace(nested, scale=Format("uint8", offset="float32")),
    ):
        assert not nested_scales.are_searched(fmt)


@pytest.mark.parametrize("name", ["int4", "uint4", "ternary", "e2m1", "e4m3", "e4m3_for_e2m1"])
def test_positive_levels_are_all_that_there_are(name):
    element = ELEMENTS[name]
    levels = numerics.positive_levels(name)
    assert (np.diff(levels) > 0).all()
    assert levels[-1] == element.qmax
    np.testing.assert_array_equal(numerics.round_to_level(jnp.asarray(levels), element), levels)
    fine = np.linspace(0, element.qmax, 100_000, dtype=np.float32)
    reached = np.unique(numerics.round_to_level(jnp.asarray(fine), element))
    assert set(reached[reached > 0]) <= set(levels)
    assert name == "e4m3" or set(levels) <= set(reached)
