"""Laws of SmoothQuant: the paper's scales, and an error that is that of the integer product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.ptq import smoothquant
from qjax.qtensor import dequantize_canonical, quantize_array
from qjax.transform import fold
from qjax.transform.calibrate import calibrate

K, N, R = 32, 12, 40
W8 = qjax.Format("int8", activation="int8")


def problem(*lead, seed=0):
    """Weights of one group and inputs with a few outlier channels."""
    rng = np.random.default_rng(seed)
    weights = [jnp.asarray(rng.standard_normal((*lead, K, n)), jnp.float32) for n in (N, N + 3)]
    x = rng.standard_normal((*lead, R, K))
    x[..., [3, 17]] *= 60
    x = jnp.asarray(x, jnp.float32)
    return weights, jnp.max(jnp.abs(x), -2), x


def test_alpha_shares_the_range_between_both():
    x, w = jnp.array([8.0, 2.0, 0.5]), jnp.array([2.0, 2.0, 0.5])
    np.testing.assert_allclose(smoothquant.smoothing(x, w), jnp.sqrt(x / w), rtol=1e-6)
    np.testing.assert_allclose(smoothquant.smoothing(x, w, 1.0), x, rtol=1e-6)
    np.testing.assert_allclose(smoothquant.smoothing(x, w, 0.0), 1 / w, rtol=1e-6)
    s = smoothquant.smoothing(x, w)
    np.testing.assert_allclose(x / s, w * s, rtol=1e-6)  # at one half both ranges are equal


def test_dead_channels_stay_finite():
    x, w = jnp.array([0.0, 4.0, 4.0, 0.0]), jnp.array([1.0, 0.0, 1.0, 0.0])
    for alpha in (0.0, 0.5, 1.0):
        s = smoothquant.smoothing(x, w, alpha)
        assert (jnp.isfinite(s) & (s > 0)).all()
        assert (s[0], s[3]) == (1, 1)
    # A channel without weights must not set the step of all others.
    s = smoothquant.smoothing(x, w)
    assert x[1] / s[1] <= x[2] / s[2]
    nothing = smoothquant.search([jnp.zeros((K, N))], jnp.zeros(K), jnp.zeros((R, K)), W8)
    assert (nothing.before, nothing.after) == (0, 0)
    assert (nothing.scale == 1).all()


@pytest.mark.parametrize("activation_scale", ["token", "group", "tensor", "static"])
def test_the_error_is_that_of_rounded_products(activation_scale):
    weights, absmax, x = problem()
    absmax = 1.5 * absmax  # the sample is not all there was
    fmt = qjax.Format("int8", 8) if activation_scale == "group" else W8
    found = smoothquant.search(weights, absmax, x, fmt, activation_scale=activation_scale)
    for s, error in ((jnp.ones(K), found.before), (found.scale, found.after)):
        scaled = np.asarray(x / s, np.float64)
        step = {
            "token": np.abs(scaled).max(-1, keepdims=True) / 127,
            "group": np.repeat(np.abs(scaled.reshape(R, -1, 8)).max(-1), 8, -1) / 127,
            "tensor": np.abs(scaled).max() / 127,
            "static": float(jnp.max(absmax / s)) / 127,
        }[activation_scale]
        rounded = np.clip(np.round(scaled / step), -128, 127) * step
        num = den = 0.0
        for w in weights:
            q = dequantize_canonical(quantize_array(w * s[:, None], fmt))
            y = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
            num, den = num + np.sum((rounded @ np.asarray(q) - y) ** 2), den + np.sum(y**2)
        np.testing.assert_allclose(error, num / den, rtol=0.02)  # a float32 tie may go elsewhere
    np.testing.assert_allclose(found.act_scale, jnp.max(absmax / found.scale) / 127, rtol=1e-6)
    assert found.alpha == 0.5


def test_outliers_are_smoothed():
    weights, absmax, x = problem()
    found = smoothquant.search(weights, absmax, x, W8)
    assert found.after < 0.3 * found.before


@pytest.mark.parametrize("tie", [None, fold.Piece(2, 8), fold.Piece(2, K)])
def test_a_searched_alpha_is_never_worse_than_none(tie):
    weights, absmax, x = problem(2)
    tied = () if tie is None else (tie,)
    found = smoothquant.search(weights, absmax, x, W8, alpha=None, tied=tied)
    assert (found.after <= found.before).all()
    fixed = smoothquant.search(weights, absmax, x, W8, tied=tied)
    assert (found.after <= fixed.after * (1 + 1e-6)).all()  # one half is on the grid
    if tie is not None:
        digits = found.scale.reshape(-1, tie.size, tie.stride)
        np.testing.assert_allclose(digits[:, 0], digits[:, 1], rtol=1e-6)


def test_where_nothing_helps_nothing_is_done():
    signs = jnp.where(jax.random.bernoulli(jax.random.key(0), shape=(K, N)), 127.0, -127.0)
    x = jnp.where(jax.random.bernoulli(jax.random.key(1), shape=(R, K)), 127.0, -127.0)
    found = smoothquant.search([signs], jnp.full(K, 127.0), x, W8, alpha=None)
    assert found.before == 0
    assert (found.scale == 1).all()
    assert jnp.isnan(found.alpha)


def test_every_index_of_a_stack_chooses_for_itself():
    weights, absmax, x = problem(3)
    stacked = smoothquant.search(weights, absmax, x, W8, alpha=None)
    for i in range(3):
        alone = smoothquant.search([w[i] for w in weights], absmax[i], x[i], W8, alpha=None)
        np.testing.assert_allclose(stacked.scale[i], alone.scale, rtol=1e-5)
        np.testing.assert_allclose(stacked.after[i], alone.after, rtol=1e-3)


def test_folded_into_a_model_activations_keep_their_channels():
    rng = np.random.default_rng(0)
    f = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    p = {"g": jnp.ones(K).at[5].set(80.0), "a": f(K, N), "b": f(K, N)}

    def fn(p, x):
        h = x * p["g"]
        return h @ p["a"] + h @ p["b"]

    x, test = f(256, K), f(64, K)
    seen = calibrate(fn, p, [x], ("absmax", "sample"), report=None)
    (group,) = fold.find(fn)(p, x)
    stats = seen[group.readers[0]].stats
    found = smoothquant.search([p["a"], p["b"]], stats["absmax"], stats["sample"], W8)
    folded = fold.fold(p, group, found.scale)

    def error(params):
        policy = qjax.Policy((qjax.Rule(("a", "b"), W8),))
        got = qjax.apply(fn)(qjax.quantize(params, policy), test)
        want = fn(p, test)
        return float(jnp.sum((got - want) ** 2) / jnp.sum(want**2))

    assert error(folded) < 0.3 * error(p)


def test_mistakes_are_named():
    weights, absmax, x = problem()
    with pytest.raises(ValueError, match="got 'row'"):
        smoothquant.search(weights, absmax, x, W8, activation_scale="row")
    with pytest.raises(ValueError, match=r"got 1\.5"):
        smoothquant.search(weights, absmax, x, W8, alpha=1.5)
