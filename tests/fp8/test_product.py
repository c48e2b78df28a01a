"""One product: its value and both gradients are those of the rounded operands, to the last sum."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.fp8 import scaling
from qjax.fp8.product import Spec, product

QMAX = {"e4m3": 448.0, "e5m2": 57344.0}
DTYPE = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


# ---- the definition, in numpy and float64 --------------------------------------------------------


def scale_of(amax, element, margin, power_of_two):
    s = np.float32(amax) * np.float32(2.0**margin / QMAX[element])
    if power_of_two:
        s = 2.0 ** np.ceil(np.log2(s.astype(np.float64)))
    return np.where(amax == 0, 1.0, s).astype(np.float32)


def rounded(x, element, spec, axes, scale=None):
    """Returns s * round(x / s) in float64, with one scale for what `axes` reduce."""
    x = np.asarray(x, np.float32)
    if scale is None:
        amax = np.max(np.abs(x), axes, keepdims=True)
        scale = scale_of(amax, element, spec.margin, spec.power_of_two)
    codes = np.clip(x / scale, -QMAX[element], QMAX[element]).astype(DTYPE[element])
    return codes.astype(np.float64) * scale


def in_blocks(x, size, axes):
    """Returns x zero-padded and split, and a function that undoes it; each of `axes` in blocks."""
    shape = x.shape
    pad = [(0, -n % size if i in axes else 0) for i, n in enumerate(shape)]
    padded = np.pad(np.asarray(x, np.float32), pad)
    split, reduce = [], []
    for i, n in enumerate(padded.shape):
        if i in axes:
            reduce.append(len(split) + 1)
            split += [n // size, size]
        else:
            split.append(n)
    undo = lambda a: a.reshape(padded.shape)[tuple(slice(n) for n in shape)]
    return padded.reshape(split), tuple(reduce), undo


def rounded_blocks(x, element, spec, axes):
    blocks, reduce, undo = in_blocks(x, spec.block, axes)
    return undo(rounded(blocks, element, spec, reduce))


def reference(x, w, g, spec, scales=(None, None, None)):
    """Returns Y, dX and dW of x [M, K], w [K, N] and g [M, N]: pairs of value and sum |terms|."""
    w_t = w.T if spec.transposed else w
    if spec.block is None:
        x_r = x_c = rounded(x, "e4m3", spec, (0, 1), scales[0])
        w_r = rounded(w_t, "e4m3", spec, (0, 1), scales[1])
        g_r = g_c = rounded(g, spec.gradient, spec, (0, 1), scales[2])
    else:
        x_r = rounded_blocks(x, "e4m3", spec, (1,))  # along K, for Y
        x_c = rounded_blocks(x, "e4m3", spec, (0,))  # along the tokens, for dW
        w_r = rounded_blocks(w_t, "e4m3", spec, (0, 1))
        g_r = rounded_blocks(g, spec.gradient, spec, (1,))
        g_c = rounded_blocks(g, spec.gradient, spec, (0,))
    dot = lambda a, b: (a @ b, np.abs(a) @ np.abs(b))
    dw = dot(x_c.T, g_c)
    return dot(x_r, w_r), dot(g_r, w_r.T), tuple(a.T for a in dw) if spec.transposed else dw


def assert_sum(got, want, terms, *, dtype=jnp.float32):
    """Asserts that `got` is a sum of `terms` products, in whatever order, rounded to `dtype`."""
    value, magnitude = want
    # An order of n float32 additions is off by at most n eps sum |a b|; a scale that is no power of
    # two adds two roundings, and the result one of its own.
    bound = (terms + 3) * 2.0**-24 * magnitude * 2 + float(jnp.finfo(dtype).eps) * np.abs(value)
    assert (np.abs(np.asarray(got, np.float64) - value) <= bound).all()


def make_spec(block=None, transposed=False, dtype="float32", **kw):
    return Spec(block, transposed, dtype, dtype, "float32", **kw)


def operands(M, K, N, spec, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    n_in, n_out = (N, K) if spec.transposed else (K, N)
    x = jax.random.normal(keys[0], (M, n_in)) * 3.0
    w = jax.random.normal(keys[1], (K, N)) * 0.02
    g = jax.random.normal(keys[2], (M, n_out)) * 1e-4  # as small as gradients are
    return x.astype(spec.x_dtype), w, g.astype(spec.x_dtype)


@functools.partial(jax.jit, static_argnums=3)
def run(x, w, g, spec, scales=None):
    y, pull = jax.vjp(lambda x, w: product(x, w, spec, scales), x, w)
    return y, *pull(g)


# ---- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize(
    ("transposed", "options"),
    [
        (False, {}),
        (True, {}),
        (False, {"power_of_two": False}),
        (False, {"margin": 2}),
        (True, {"gradient": "e4m3"}),
    ],
    ids=["x @ W", "x @ W.T", "float scales", "margin", "e4m3 gradients"],
)
def test_value_and_gradients_are_products_of_rounded_operands(block, transposed, options):
    spec = make_spec(block, transposed, **options)
    M, K, N = 24, 40, 56  # none a multiple of the block
    x, w, g = operands(M, K, N, spec)
    got = run(x, w, g, spec)
    want = reference(x, w, g, spec)
    for a, b, terms in zip(got, want, (K, N, M) if not transposed else (N, K, M), strict=True):
        assert a.dtype == jnp.float32
        assert_sum(a, b, terms)


@pytest.mark.parametrize("block", [None, 16])
def test_results_are_rounded_once_to_bfloat16_and_weight_gradients_not_at_all(block):
    spec = make_spec(block, dtype="bfloat16")
    x, w, g = operands(24, 40, 56, spec)
    y, dx, dw = run(x, w, g, spec)
    want = reference(x, w, g, spec)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert_sum(y, want[0], 40, dtype=jnp.bfloat16)
    assert_sum(dx, want[1], 56, dtype=jnp.bfloat16)
    assert_sum(dw, want[2], 24)


def test_given_scales_are_used_and_what_exceeds_them_saturates():
    spec = make_spec()
    x, w, g = operands(8, 16, 16, spec)
    scales = jnp.array([2.0**-8, 2.0**-14, 2.0**-40])  # max |x| is about 10, 448 / 2^8 is 1.75
    got = run(x, w, g, spec, scales)
    assert float(jnp.max(jnp.abs(x))) > 448 * scales[0]
    want = reference(x, w, g, spec, [np.float32(s) for s in scales])
    for a, b in zip(got, want, strict=True):
        assert_sum(a, b, 16)


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("tokens", [(), (2, 3)])
def test_each_leading_entry_is_a_product_of_its_own(block, tokens):
    spec = make_spec(block)
    w = (
        jax.random.normal(jax.random.key(0), (3, 8, 12))
        * jnp.array([1.0, 30.0, 1e-3])[:, None, None]
    )
    x = jax.random.normal(jax.random.key(1), (3, *tokens, 8))
    g = jax.random.normal(jax.random.key(2), (3, *tokens, 12))
    stacked = run(x, w, g, spec)
    for i in range(3):
        for a, b in zip(stacked, run(x[i], w[i], g[i], spec), strict=True):
            assert np.array_equal(a[i], b)


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("scales", [None, jnp.ones(3)], ids=["current", "given"])
def test_nan_and_infinity_come_out_as_nan(block, bad, scales):
    spec = make_spec(block)
    x, w, g = operands(8, 8, 8, spec)
    y, *_ = run(x.at[2, 3].set(bad), w, g, spec, scales)
    assert np.isnan(y[2]).all()
    y, *_ = run(x, w.at[2, 3].set(bad), g, spec, scales)
    assert np.isnan(y[:, 3]).all()
    _, dx, dw = run(x, w, g.at[2, 3].set(bad), spec, scales)
    assert np.isnan(dx[2]).all()
    assert np.isnan(dw[:, 3]).all()


@pytest.mark.parametrize("block", [None, 4])
def test_zeros_and_no_tokens_give_zeros(block):
    spec = make_spec(block)
    for got in run(jnp.zeros((4, 8)), jnp.zeros((8, 4)), jnp.zeros((4, 4)), spec):
        assert (got == 0).all()
    y, dx, dw = run(jnp.zeros((0, 8)), jnp.ones((8, 4)), jnp.zeros((0, 4)), spec)
    assert (y.shape, dx.shape) == ((0, 4), (0, 8))
    assert (dw == 0).all()


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_a_current_scale_holds_the_largest_magnitude_and_wastes_at_most_one_bit(
    element, power_of_two
):
    amax = jnp.exp2(jnp.linspace(-40.0, 60.0, 1001))
    s = scaling.scale_of(amax, element, margin=0, power_of_two=power_of_two)
    steps = np.asarray(amax / s)
    assert (steps <= QMAX[element] * (1 + 2.0**-22)).all()
    least = QMAX[element] / 2 if power_of_two else QMAX[element] * (1 - 2.0**-22)
    assert (steps > least).all()


def test_scales_do_not_matter_to_values_within_range():
    # Rounding a float commutes with powers of two, so a margin changes nothing in the middle.
    x, w, g = operands(8, 16, 16, make_spec())
    x, w, g = (jnp.where(jnp.abs(a) < jnp.abs(a).max() / 8, 0.0, a) for a in (x, w, g))
    a, b = (run(x, w, g, make_spec(margin=m)) for m in (0, 3))
    for left, right in zip(a, b, strict=True):
        assert np.array_equal(left, right)


def test_a_tiny_gradient_survives():
    spec = make_spec()
    x, w, g = operands(8, 16, 16, spec)
    tiny = run(x, w, g * 2.0**-30, spec)
    plain = run(x, w, g, spec)
    for a, b in itertools.islice(zip(tiny, plain, strict=True), 1, 3):
        assert np.array_equal(np.asarray(a) * 2.0**30, b)
