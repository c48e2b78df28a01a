"""Tests of qjax/scales.py: what the rules reach on Gaussian weights, and what a search promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import scales
from qjax.format import Format
from qjax.qtensor import dequantize_array, quantize_array


@functools.cache
def gaussian():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2048, 512)).astype(np.float32))


@functools.cache
def roundtrip(fmt):
    return jax.jit(lambda w: dequantize_array(quantize_array(w, fmt)))


def squared_errors(fmt, w):
    return np.square(np.asarray(roundtrip(fmt)(w) - w, np.float64))


@pytest.mark.parametrize(
    ("fmt", "relative"),
    [
        (Format("int4", 128), 0.1173),
        (Format("int4", 128, rule="absmax_full"), 0.1108),
        (Format("int4", 128, rule="signed_absmax"), 0.1032),
        (Format("int4", 128, zero_point=True), 0.1005),
        (Format("int4", 32), 0.0970),
        (Format("int4", 32, rule="absmax_full"), 0.0948),
        (Format("int4", 32, rule="signed_absmax"), 0.0859),
        (Format("int4", 32, zero_point=True), 0.0808),
        (Format("nf4", 64), 0.008514**0.5),
        (Format("nf4", 64, scale=Format("uint8", 1, 256)), 0.008515**0.5),
    ],
    ids=str,
)
def test_relative_error_on_gaussian_weights(fmt, relative):
    w = gaussian()
    errors = squared_errors(fmt, w)
    power = float(jnp.mean(w * w))
    measured = (errors.mean() / power) ** 0.5
    # d sqrt(m) = dm / 2 sqrt(m), with m the mean over n weights. Errors in one group share a scale:
    # count groups of 128, not weights. The reference is rounded to its fourth digit.
    per_group = errors.reshape(-1, 128, 512).mean(axis=1)
    sigma = per_group.std() / per_group.size**0.5 / (2 * errors.mean() ** 0.5)
    assert abs(measured - relative) < 4 * sigma + 1e-4


def test_double_quantization_costs_nothing_to_speak_of():
    w = gaussian()
    plain = squared_errors(Format("nf4", 64), w).mean()
    double = squared_errors(Format("nf4", 64, scale=Format("uint8", 1, 256)), w).mean()
    assert double < plain * 1.001


BASES = [
    Format("int4", 128, scale="bfloat16"),
    Format("int4", 128, rule="signed_absmax", scale="bfloat16"),
    Format("int2", 32),
    Format("int4", 100, scale="e8m0", remainder="ragged"),
    Format("nf4", 64, 5, remainder="ragged"),
    Format("e2m1", 32, scale="e8m0"),
    Format("int3", 32, zero_point=True, scale="float16"),
    Format("int4", 32, zero_point=True, scale="e8m0"),
    Format("uint2", 32, offset="float16"),
]


def mse(fmt):
    return Format(**{**vars(fmt), "rule": "mse"})


def group_errors(fmt, w, h=None):
    deq = roundtrip(fmt)(w) if h is None else weighted(fmt)(w, h)
    squares = scales.split((deq - w) ** 2, fmt, "constant")
    if h is not None:
        squares = squares * scales.split(jnp.broadcast_to(h[:, None], w.shape), fmt, "constant")
    return squares.sum((-3, -1))


@functools.cache
def weighted(fmt):
    return jax.jit(lambda w, h: dequantize_array(quantize_array(w, fmt, importance=h)))


@pytest.mark.parametrize("fmt", BASES[:7], ids=lambda f: f"{f} {f.scale_rule}")
def test_a_search_is_never_worse_than_its_start_in_any_group(fmt):
    w = gaussian()[:256, :64]
    start, found = group_errors(fmt, w), group_errors(mse(fmt), w)
    if fmt.scale_rule != "signed_absmax":  # a candidate only up to the search's grid
        assert (found <= start * (1 + 1e-5)).all()
    assert found.sum() < start.sum()


@pytest.mark.parametrize("fmt", BASES[::3], ids=lambda f: f"{f} {f.scale_rule}")
def test_importance_lowers_the_weighted_error(fmt):
    w = gaussian()[:256, :64]
    h = jnp.asarray(np.random.default_rng(1).lognormal(sigma=2, size=256).astype(np.float32))
    weighted_search = group_errors(mse(fmt), w, h).sum()
    deq = roundtrip(mse(fmt))(w)
    plain_search = (h[:, None] * (deq - w) ** 2).sum()
    assert weighted_search < plain_search
    np.testing.assert_array_equal(  # only ratios of importances matter
        weighted(mse(fmt))(w, h), weighted(mse(fmt))(w, 4 * h)
    )


def test_a_row_of_no_importance_has_no_influence_on_a_search_over_levels():
    # Row 0 is an outlier: ignoring it, the others fit their levels exactly.
    w = jnp.concatenate([jnp.full((1, 3), 7.9), jnp.tile(jnp.arange(-7.0, 8.0)[:, None], (1, 3))])
    h = jnp.ones(16).at[0].set(0)
    deq = weighted(mse(Format("int4")))(w, h)
    np.testing.assert_allclose(deq[1:], w[1:], rtol=1e-5)


@pytest.mark.parametrize("nested", [Format("uint8", 1, 16), Format("uint6", 2)], ids=str)
def test_a_search_never_chooses_a_sign_that_the_scale_cannot_hold(nested):
    w = gaussian()[:256, :64]
    plain = squared_errors(Format("int4", 32), w).mean()
    found = squared_errors(Format("int4", 32, rule="mse", scale=nested), w).mean()
    # Six bits of scale cost up to 1/126 of the largest scale; a lost sign costs whole groups.
    assert found < 1.1 * plain


@pytest.mark.parametrize(
    "fmt",
    [
        Format("int4", 32, scale="e8m0", zero_point=True),
        Format("int4", 32, scale="e8m0", rule="absmax_full"),
        Format("uint4", 32, scale="e8m0", offset="float32"),
    ],
    ids=str,
)
def test_a_power_of_two_scale_clips_nothing(fmt):
    w = gaussian()[:256, :64]
    qt = quantize_array(w, fmt)
    step = scales.spread(jnp.exp2(qt.scale.astype(jnp.float32) - 127), fmt, *w.shape)
    assert (jnp.abs(dequantize_array(qt) - w) <= 0.5 * step * (1 + 1e-5)).all()


def test_the_largest_magnitude_gets_the_level_that_only_one_side_has():
    w = jnp.array([[3.0, -3.0, 3.0], [-1.0, 2.0, -3.0]])
    qt = quantize_array(w, Format("int4", rule="signed_absmax"))
    np.testing.assert_array_equal(qt.scale, [[-3 / 8, 3 / 8, 3 / 8]])
    deq = dequantize_array(qt)
    np.testing.assert_array_equal(deq[0, :2], w[0, :2])
    assert deq[1, 2] == -3.0


def test_absmean_is_bitnets():
    w = gaussian()[:64, :8]
    qt = quantize_array(w, Format("ternary"))
    gamma = jnp.abs(w).mean(0, keepdims=True)
    np.testing.assert_allclose(qt.scale, gamma, rtol=1e-6)
    np.testing.assert_allclose(dequantize_array(qt), gamma * jnp.clip(jnp.round(w / gamma), -1, 1))


@pytest.mark.parametrize(
    ("shape", "fmt"),
    [((12, 6), Format("int4", 4, 2)), ((2, 13, 7), Format("int4", 5, 3)), ((3, 2), Format("int4"))],
    ids=str,
)
def test_split_and_join_are_inverse(shape, fmt):
    w = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    groups = scales.split(w, fmt)
    assert groups.ndim == w.ndim + 2
    np.testing.assert_array_equal(scales.join(groups, *shape[-2:]), w)
    G, C = fmt.groups(*shape[-2:])
    ids = jnp.broadcast_to(jnp.arange(G * C, dtype=jnp.float32).reshape(G, C), (*shape[:-2], G, C))
    wide = jnp.broadcast_to(scales.spread(ids, fmt, *shape[-2:]), shape)
    by_group = scales.split(wide, fmt)
    assert (by_group == ids[..., :, None, :, None]).all()
