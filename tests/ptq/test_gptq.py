"""Laws of GPTQ and coordinate descent."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.layout import Layout
from qjax.ptq import gptq
from qjax.qtensor import dequantize_array, quantize_array

K, N = 96, 24
KN = Layout.parse("kn", (K, N))
FORMATS = [
    qjax.Format("int4", group_size=32, rule="mse"),
    qjax.Format("int3", group_size=32, scale="bfloat16", rule="absmax_full"),
    qjax.Format("int2", group_size=32, zero_point=True),
    qjax.Format("uint4", group_size=32, offset="float16"),
    qjax.Format("nf4", group_size=32),
    qjax.Format("nf4", group_size=16, scale=qjax.Format("uint8", group_size=1, group_columns=24)),
    qjax.Format("e4m3"),
    qjax.Format("e2m1", group_size=32, scale="e8m0"),
    qjax.Format("int4", group_size=36, group_columns=8, remainder="ragged"),
]


def problem(seed=0, n=256):
    """A weight and correlated inputs with a few large channels."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((K, N)).astype(np.float32)
    x = rng.standard_normal((n, K)) @ (np.eye(K) + 0.3 * rng.standard_normal((K, K)))
    x[:, rng.choice(K, 3, replace=False)] *= 10
    x = x.astype(np.float32)
    return jnp.asarray(w), jnp.asarray(x), jnp.asarray(x.T @ x / n)


def objective(w, qt, h):
    d = np.asarray(w - dequantize_array(qt), np.float64)
    return float(np.sum(d * (np.asarray(h, np.float64) @ d)))


def textbook(w, h, scale, group_size, damping):
    """The paper's loop: quantize a row, spread its error through the inverse Hessian (float64)."""
    w, h = np.asarray(w, np.float64).copy(), np.asarray(h, np.float64)
    h = h + damping * np.diag(np.diag(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    out = np.zeros_like(w)
    for k in range(K):
        s = np.asarray(scale, np.float64)[k // group_size]
        out[k] = np.clip(np.round(w[k] / s), -8, 7) * s
        w[k + 1 :] -= np.outer(u[k, k + 1 :], (w[k] - out[k]) / u[k, k])
    return out


def test_it_is_the_loop_of_the_paper():
    w, _, h = problem()
    fmt = qjax.Format("int4", group_size=32)
    options = gptq.Options(damping=0.01, act_order=False, sweeps=0)
    qt, _ = gptq.solve(w, h, fmt, KN, options)
    expected = textbook(w, h, qt.scale, 32, 0.01)
    # A value within float32 rounding of a midpoint may go the other way, and what follows it in its
    # column with it: so columns are counted.
    same = np.isclose(np.asarray(dequantize_array(qt)), expected, atol=1e-5)
    assert same.all(0).mean() > 0.8
    d = np.asarray(w, np.float64) - expected
    assert objective(w, qt, h) == pytest.approx(np.sum(d * (np.asarray(h) @ d)), rel=0.02)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_step_can_only_lower_the_objective(fmt):
    w, _, h = problem()
    rtn = quantize_array(w, fmt, KN, importance=jnp.diagonal(h))
    values = [objective(w, rtn, h)]
    for sweeps in (0, 1, 2, 4):
        # No damping: J is then exactly what is descended on. 1e-4 covers its float32 rounding.
        qt, _ = gptq.solve(w, h, fmt, KN, gptq.Options(damping=1e-6, sweeps=sweeps))
        values.append(objective(w, qt, h))
    for before, after in itertools.pairwise(values):
        assert after <= before * (1 + 1e-4)
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_storage_is_that_of_rounding_to_nearest(fmt):
    w, _, h = problem()
    rtn = quantize_array(w, fmt, KN)
    qt, _ = gptq.solve(w, h, fmt, KN)
    assert jax.tree.structure(qt) == jax.tree.structure(rtn)
    for ours, plain in zip(jax.tree.leaves(qt), jax.tree.leaves(rtn), strict=True):
        assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)


def test_an_identity_hessian_is_rounding_to_nearest():
    w, _, _ = problem()
    fmt = qjax.Format("int4", group_size=32)
    qt, _ = gptq.solve(w, jnp.eye(K), fmt, KN, gptq.Options(refit=False))
    np.testing.assert_array_equal(
        dequantize_array(qt), dequantize_array(quantize_array(w, fmt, KN))
    )


def test_stacked_weights_are_solved_as_single_ones():
    fmt = qjax.Format("int4", group_size=32, rule="mse")
    problems = [problem(seed) for seed in range(3)]
    w, h = jnp.stack([p[0] for p in problems]), jnp.stack([p[2] for p in problems])
    stacked, diagnostics = gptq.solve(w, h, fmt, KN)
    assert diagnostics.final.shape == (3,)
    for i, (wi, _, hi) in enumerate(problems):
        one, d = gptq.solve(wi, hi, fmt, KN)
        # vmapped factorizations may differ in the last bit, and a code with them.
        assert np.mean(np.asarray(stacked.data[i]) == np.asarray(one.data)) > 0.98
        assert float(diagnostics.final[i]) == pytest.approx(float(d.final), rel=0.02)


def test_diagnostics_are_the_errors_on_the_calibration_data():
    w, x, h = problem()
    fmt = qjax.Format("int4", group_size=32)
    qt, d = gptq.solve(w, h, fmt, KN)
    error = jnp.sum((x @ (w - dequantize_array(qt))) ** 2) / jnp.sum((x @ w) ** 2)
    assert float(d.final) == pytest.approx(float(error), rel=1e-3)
    assert float(d.final) <= float(d.gptq) <= float(d.rtn)


def test_a_dead_input_keeps_its_rounded_weights():
    w, x, _ = problem()
    x = x.at[:, 5].set(0.0)
    fmt = qjax.Format("int4", group_size=32)
    qt, d = gptq.solve(w, x.T @ x / x.shape[0], fmt, KN, gptq.Options(refit=False))
    assert int(d.dead) == 1
    rtn = dequantize_array(quantize_array(w, fmt, KN))
    np.testing.assert_allclose(dequantize_array(qt)[5], rtn[5], atol=1e-6)


def test_a_singular_hessian_is_damped_until_it_factors():
    w, x, _ = problem(n=8)  # rank 8 of 96
    h = x.T @ x / 8
    qt, d = gptq.solve(w, h, qjax.Format("int4", group_size=32), KN, gptq.Options(damping=0.0))
    assert float(d.damping) >= 0
    assert np.isfinite(np.asarray(dequantize_array(qt))).all()
    assert float(d.final) <= float(d.rtn)


def test_held_out_error_falls_on_correlated_inputs():
    w, x, _ = problem(n=1024)
    train, held_out = x[:512], x[512:]
    fmt = qjax.Format("int3", group_size=32, rule="mse")
    rtn = quantize_array(w, fmt, KN)
    qt, _ = gptq.solve(w, train.T @ train / 512, fmt, KN)

    def error(q):
        return float(jnp.sum((held_out @ (w - dequantize_array(q))) ** 2))

    assert error(qt) < 0.7 * error(rtn)
