"""Tests of qjax/numerics.py: every element type's levels, rounding and codes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import numerics
from qjax.numerics import ELEMENTS, decode, encode, half_step, read_scale, round_scale

NAMES = sorted(ELEMENTS)
WIDTH = 64  # floats per hypothesis example, so that every example shares one compilation


@pytest.fixture(scope="module")
def fp8(request):
    return np.load(request.path.parent / "golden" / "fp8_fp4.npz")


def codes_of(element):
    """All codes that `encode` can return."""
    if element.kind == "int":
        if element.is_packed:
            return np.arange(element.qmax - element.qmin + 1).astype(np.uint8)
        return np.arange(element.qmin, element.qmax + 1).astype(element.dtype)
    if element.name == "e4m3_for_e2m1":
        codes = np.arange(256, dtype=np.uint8)
        codes = codes[fits_e2m1(codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))]
        return codes | (codes % 8 != 0)
    if element.kind == "table":
        return np.arange(2**element.bits).astype(np.uint8)
    codes = np.arange(256, dtype=np.uint8).view(jnp.dtype(element.dtype))
    return codes[np.isfinite(codes.astype(np.float32))]


def fits_e2m1(values):
    """Returns which positive e4m3, times any e2m1, are normal e4m3 or 0."""
    with np.errstate(invalid="ignore"):
        products = values[:, None] * levels_of(ELEMENTS["e2m1"])
        stored = products.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        is_normal = (products == 0) | (np.abs(products) >= 2.0**-6)
        return (values > 0) & ((products == stored) & is_normal).all(axis=1)


def levels_of(element):
    return np.unique(np.asarray(decode(jnp.asarray(codes_of(element)), element), np.float32))


def bits_of(x):
    return np.asarray(x, np.float32).view(np.uint32)


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_fixed_points(name):
    element = ELEMENTS[name]
    levels = jnp.asarray(levels_of(element))
    np.testing.assert_array_equal(decode(encode(levels, element), element), levels)
    np.testing.assert_array_equal(numerics.round_to_level(levels, element), levels)


@pytest.mark.parametrize("name", NAMES)
def test_the_range_is_that_of_the_levels(name):
    element = ELEMENTS[name]
    levels = levels_of(element)
    assert (levels.min(), levels.max()) == (element.qmin, element.qmax)
    assert len(levels) <= 2**element.bits
    # ggml's has 1 instead; and scales are not 0.
    assert name in ("iq4_nl", "e4m3_for_e2m1") or 0 in levels


@pytest.mark.parametrize("name", NAMES)
def test_half_step_is_half_the_widest_gap(name):
    assert half_step(name) == np.diff(levels_of(ELEMENTS[name])).max() / 2


def _both(x, name):
    element = ELEMENTS[name]
    return numerics.round_to_level(x, element), decode(encode(x, element), element)


both = jax.jit(_both, static_argnums=1)


def boundaries(element):
    """Levels, the midpoints between them, and the floats next to those."""
    levels = levels_of(element)
    middle = ((levels[1:].astype(np.float64) + levels[:-1]) / 2).astype(np.float32)
    x = np.concatenate([levels, middle, [0.0, -0.0, 3e38, -3e38, 1e-45, -1e-45, 1e-38, -1e-38]])
    x = x.astype(np.float32)
    return np.concatenate([x, np.nextafter(x, np.float32(9)), np.nextafter(x, np.float32(-9))])


@pytest.mark.parametrize("name", NAMES)
def test_round_to_level_is_decode_of_encode_at_every_boundary(name):
    rounded, decoded = both(boundaries(ELEMENTS[name]), name)
    np.testing.assert_array_equal(bits_of(rounded), bits_of(decoded))


floats = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-10, 10, width=32),
    st.integers(-40, 40).map(lambda i: i / 4),
)


@settings(max_examples=60)
@given(st.sampled_from(NAMES), st.lists(floats, min_size=WIDTH, max_size=WIDTH))
def test_rounding_is_to_the_nearest_level_in_range(name, values):
    x = np.asarray(values, np.float32)
    rounded, decoded = map(np.asarray, both(x, name))
    np.testing.assert_array_equal(bits_of(rounded), bits_of(decoded))
    levels = levels_of(ELEMENTS[name]).astype(np.float64)
    nearest = np.abs(x[:, None].astype(np.float64) - levels).min(axis=1)
    error = np.abs(x.astype(np.float64) - rounded)
    # Boundaries are midpoints rounded to float32: off by at most half an ulp of the level range.
    slack = 2.0**-24 * np.minimum(np.abs(x), levels.max())
    assert (error <= nearest + slack).all()
    inside = (x >= levels[0]) & (x <= levels[-1])
    assert (error <= half_step(name) + slack)[inside].all()


@pytest.mark.parametrize("name", ["int4", "uint4", "int8", "ternary"])
def test_integers_round_half_to_even(name):
    element = ELEMENTS[name]
    ties = np.arange(element.qmin, element.qmax) + 0.5
    np.testing.assert_array_equal(both(ties.astype(np.float32), name)[0], np.round(ties))


def test_e2m1_ties_go_to_the_even_code():
    ties = jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    want = np.array([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    np.testing.assert_array_equal(both(ties, "e2m1")[0], want)
    np.testing.assert_array_equal(both(-ties, "e2m1")[0], -want)
    np.testing.assert_array_equal(both(jnp.array([7.0, -1e9]), "e2m1")[0], [6.0, -6.0])


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes_ties_go_down(name):
    levels = levels_of(ELEMENTS[name])
    middle = (levels[1:] + levels[:-1]) / 2
    exact = middle.astype(np.float64) * 2 == levels[1:].astype(np.float64) + levels[:-1]
    assert exact.any()
    np.testing.assert_array_equal(both(middle[exact], name)[0], levels[:-1][exact])


def test_values_beyond_the_range_saturate():
    for name in NAMES:
        element = ELEMENTS[name]
        out = both(jnp.array([3e38, -3e38, jnp.inf, -jnp.inf]), name)[1]
        np.testing.assert_array_equal(out, [element.qmax, element.qmin] * 2)


@pytest.mark.parametrize(("name", "table"), [("e4m3", "e4m3fn_values"), ("e5m2", "e5m2_values")])
def test_float8_values(fp8, name, table):
    element = ELEMENTS[name]
    codes = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), jnp.dtype(element.dtype))
    np.testing.assert_array_equal(decode(codes, element), fp8[table])


@pytest.mark.parametrize(("name", "table"), [("e4m3", "cast_e4m3fn"), ("e5m2", "cast_e5m2")])
def test_float8_casts(fp8, name, table):
    x = fp8["cast_in"]
    known = np.abs(x) <= 57344  # beyond, IEEE casts to E5M2 overflow; ours saturate
    codes = np.asarray(encode(jnp.asarray(x), ELEMENTS[name])).view(np.uint8)
    np.testing.assert_array_equal(codes[known], fp8[table][known])


def test_e8m0_values(fp8):
    got = np.asarray(read_scale(jnp.arange(256, dtype=jnp.uint8), "e8m0"))
    np.testing.assert_array_equal(bits_of(got[:255]), bits_of(fp8["e8m0_values"][:255]))
    assert np.isnan(got[255])


def test_e8m0_scales_are_their_own_rounding():
    codes = jnp.arange(1, 255, dtype=jnp.uint8)
    np.testing.assert_array_equal(round_scale(read_scale(codes, "e8m0"), "e8m0"), codes)


def test_e8m0_rounds_up_from_seven_quarters():
    x = jnp.array([1.0, 1.5, np.nextafter(np.float32(1.75), np.float32(0)), 1.75, 1.9, 2.0])
    got = read_scale(round_scale(x, "e8m0"), "e8m0")
    np.testing.assert_array_equal(got, [1, 1, 1, 2, 2, 2])


def test_e8m0_keeps_nan_and_saturates():
    every_nan = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32)
    assert (np.asarray(round_scale(jnp.asarray(every_nan.view(np.float32)), "e8m0")) == 255).all()
    assert read_scale(round_scale(jnp.float32(3.4e38), "e8m0"), "e8m0") == 2.0**127


@pytest.mark.parametrize("dtype", numerics.SCALE_DTYPES)
def test_stored_scales_are_finite_and_within_half_a_step(dtype):
    x = jnp.asarray(2.0 ** np.linspace(-4, 8, 1000), jnp.float32)
    got = read_scale(round_scale(x, dtype), dtype)
    mantissa = {"float32": 24, "bfloat16": 8, "float16": 11, "e4m3": 4}
    relative = jnp.abs(got / x - 1)
    bound = 2.0 ** -mantissa[dtype] if dtype in mantissa else 0.75 / 1.75
    assert (relative <= bound).all()
    huge = read_scale(round_scale(jnp.float32(3e38), dtype), dtype)
    assert jnp.isfinite(huge)


def test_power_of_two_above():
    x = jnp.array([0.0, 1.0, 1.0000001, 3.0, 4.0, 0.3, 2.0**-126])
    got = numerics.power_of_two_above(x)
    np.testing.assert_array_equal(got, [0.0, 1.0, 2.0, 4.0, 4.0, 0.5, 2.0**-126])


def test_gpt_oss_blocks_decode(fp8):
    blocks, scales = fp8["gptoss_blocks"], fp8["gptoss_scales"]  # [E, rows, G, 16], [E, rows, G]
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    value = decode(jnp.asarray(codes), ELEMENTS["e2m1"])
    w = value * read_scale(jnp.asarray(scales), "e8m0")[..., None]
    want = fp8["gptoss_decoded_ERK"]
    np.testing.assert_array_equal(w.reshape(want.shape), want)


def test_e2m1_is_ml_dtypes_float4():
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    x = np.concatenate([x, [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]]).astype(np.float32)
    want = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(both(x, "e2m1")[0], want)


def test_unknown_element_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown element type 'int9'\. Known: .*int4.*nf4"):
        numerics.get_element("int9")


def test_the_dynamic_type_is_that_of_bitsandbytes(request):
    golden = np.load(request.path.parent / "golden" / "bitsandbytes.npz")
    np.testing.assert_array_equal(np.float32(ELEMENTS["dynamic8"].levels), golden["dynamic_map"])


@pytest.mark.parametrize("name", ["e2m1", "dynamic8", "e4m3_for_e2m1"])
def test_tables_are_read_where_codes_lie(name):
    """On a mesh with explicit axes, which arrays have in their types."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    x, element = jnp.linspace(-2, 9, 64).reshape(16, 4), ELEMENTS[name]
    codes = jax.jit(lambda x: encode(x, element))(jax.device_put(x, place))
    levels = jax.jit(lambda codes: decode(codes, element))(codes)
    assert codes.sharding.spec[0] == levels.sharding.spec[0] == "x"
    np.testing.assert_array_equal(levels, decode(encode(x, element), element))
