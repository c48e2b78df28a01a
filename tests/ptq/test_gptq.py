"""Laws of GPTQ and coordinate descent."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import numerics, packing
from qjax.layout import Layout
from qjax.ptq import descent, gptq
from qjax.qtensor import dequantize_array, quantize_array, read_scales, scaled

K, N = 96, 24
KN = Layout.parse("kn", (K, N))
# bitsandbytes: all scales of a weight in one row
FLAT = qjax.Format("dynamic8", 64, flatten=True, remainder="ragged")
FORMATS = [
    qjax.Format("int4", group_size=32, rule="mse"),
    qjax.Format("int3", group_size=32, scale="bfloat16", rule="absmax_full"),
    qjax.Format("int2", group_size=32, zero_point=True),
    qjax.Format("int3", group_size=20, zero_point=True, rule="mse", remainder="ragged"),
    qjax.Format("int8", rule="mse"),
    qjax.Format("uint4", group_size=32, offset="float16", rule="mse"),
    qjax.Format("nf4", group_size=32),
    qjax.Format("nf4", group_size=16, scale=qjax.Format("uint8", group_size=1, group_columns=24)),
    qjax.Format("fp4", group_size=32),
    qjax.Format("ternary", group_size=32),
    qjax.Format("e4m3"),
    qjax.Format("e2m1", group_size=32, scale="e8m0", rule="mse"),
    # NVFP4
    qjax.Format("e2m1", group_size=16, scale=qjax.Format("e4m3", group_columns=None)),
    # groups that are no divisor of K; scales shared by columns
    qjax.Format("int4", group_size=36, group_columns=8, remainder="ragged"),
]
# Others take the same paths through the code.
SLOW = {"int3 g32 bf16", "nf4 g32 f32", "fp4 g32 f32", "e4m3 ch f32"}
EVERY = [
    pytest.param(fmt, id=str(fmt), marks=[pytest.mark.slow] if str(fmt) in SLOW else [])
    for fmt in FORMATS
]


def problem(seed=0, n=256, K=K):
    """A weight and correlated inputs with a few large channels."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((K, N)).astype(np.float32)
    x = rng.standard_normal((n, K)) @ (np.eye(K) + 0.3 * rng.standard_normal((K, K)))
    x[:, rng.choice(K, 3, replace=False)] *= 10
    x = x.astype(np.float32)
    return jnp.asarray(w), jnp.asarray(x), jnp.asarray(x.T @ x / n)


def column_errors(w, qt, h):
    d = np.asarray(w - dequantize_array(qt), np.float64)
    return np.sum(d * (np.asarray(h, np.float64) @ d), 0)


def objective(w, qt, h):
    return float(np.sum(column_errors(w, qt, h)))


def textbook(w, h, scale, group_size, damping):
    """The paper's loop: quantize a row, spread its error through the inverse Hessian (float64)."""
    w, h = np.asarray(w, np.float64).copy(), np.asarray(h, np.float64)
    h = h + damping * np.diag(np.diag(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    out = np.zeros_like(w)
    for k in range(len(w)):
        s = np.asarray(scale, np.float64)[k // group_size]
        out[k] = np.clip(np.round(w[k] / s), -8, 7) * s
        w[k + 1 :] -= np.outer(u[k, k + 1 :], (w[k] - out[k]) / u[k, k])
    return out


@pytest.mark.parametrize("K", [96, 320])  # less than a block of rows, and several
def test_it_is_the_loop_of_the_paper(K):
    w, _, h = problem(K=K, n=1024)
    fmt = qjax.Format("int4", group_size=32)
    options = gptq.Options(act_order=False, sweeps=0)
    qt, _ = gptq.solve(w, h, fmt, KN, options, damping=0.01)
    expected = textbook(w, h, qt.scale, 32, 0.01)
    # A value within float32 rounding of a midpoint may go the other way, and what follows it in its
    # column with it: so columns are counted.
    same = np.isclose(np.asarray(dequantize_array(qt)), expected, atol=1e-5)
    assert same.all(0).mean() > 0.8
    d = np.asarray(w, np.float64) - expected
    assert objective(w, qt, h) == pytest.approx(np.sum(d * (np.asarray(h) @ d)), rel=0.02)


@pytest.mark.parametrize("fmt", EVERY)
def test_every_step_can_only_lower_the_objective(fmt):
    w, _, h = problem()
    rtn = quantize_array(w, fmt, KN, importance=jnp.diagonal(h))
    values = [objective(w, rtn, h)]
    for sweeps in (0, 2):
        # No damping: J is then exactly what is descended on. 1e-4 covers its float32 rounding.
        options = gptq.Options(sweeps=sweeps, tolerance=0.0)
        qt, d = gptq.solve(w, h, fmt, KN, options, damping=1e-6)
        values.append(objective(w, qt, h))
        total = np.sum(np.asarray(w) * (np.asarray(h) @ np.asarray(w)))
        # J is not measured but followed from step to step.
        assert float(d.final) == pytest.approx(values[-1] / total, rel=1e-3)
    assert values[2] <= values[1] * (1 + 1e-4)
    assert values[1] <= values[0] * (1 + 1e-4)
    assert values[2] < 0.9 * values[0]


@pytest.mark.parametrize(
    ("fmt", "refit"),
    [
        (FORMATS[0], True),
        (FORMATS[3], False),
        (FORMATS[7], True),
        pytest.param(FORMATS[0], False, marks=pytest.mark.slow),
        pytest.param(FORMATS[3], True, marks=pytest.mark.slow),
        pytest.param(FORMATS[7], False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_wide_groups_and_blocks_lower_it_too(monkeypatch, fmt, refit):
    """The ways that only large weights take, on a small one."""
    monkeypatch.setattr(descent, "BLOCK", 20)  # no divisor of K
    monkeypatch.setattr(descent, "WIDE", 8)
    w, _, h = problem()
    values = []
    for sweeps in (0, 1, 3):
        options = gptq.Options(sweeps=sweeps, refit=refit, tolerance=0.0)
        # A function of its own is traced with the values above.
        run = functools.partial(gptq.solve.__wrapped__, fmt=fmt, layout=KN, options=options)
        qt, _ = jax.jit(lambda w, h, run=run: run(w, h, damping=1e-6))(w, h)
        values.append(objective(w, qt, h))
    assert values[2] <= values[1] * (1 + 1e-4) <= values[0] * (1 + 2e-4)
    assert values[2] < values[0]


@pytest.mark.parametrize("fmt", EVERY)
def test_no_column_is_above_rounding_to_nearest(fmt):
    w, _, h = problem()
    # Inputs that are almost independent, where GPTQ has little to gain.
    h = jnp.diag(jnp.diagonal(h)) + 1e-3 * h
    options = gptq.Options(sweeps=0, tolerance=0.0)
    qt, _ = gptq.solve(w, h, fmt, KN, options, damping=1e-6)
    codes = numerics.encode(scaled(w, *read_scales(qt), fmt), qt.element)
    if qt.element.is_packed:
        codes = packing.pack(codes, qt.element.bits)
    nearest = dataclasses.replace(qt, data=codes)
    bound = column_errors(w, nearest, h)
    assert (column_errors(w, qt, h) <= bound * (1 + 1e-4)).all()


@pytest.mark.parametrize("fmt", [*FORMATS, qjax.Format("nf4", group_size=32, scale=FLAT)], ids=str)
def test_storage_is_that_of_rounding_to_nearest(fmt):
    w, h = jnp.zeros((3, K, N)), jnp.zeros((3, K, K))  # a stack
    rtn = jax.eval_shape(lambda w: quantize_array(w, fmt, KN), w)
    qt, _ = jax.eval_shape(lambda w, h: gptq.solve(w, h, fmt, KN), w, h)
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


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_stacked_weights_are_solved_as_single_ones(monkeypatch, at_once):
    monkeypatch.setattr(gptq, "_AT_ONCE", at_once)
    fmt = qjax.Format("int4", group_size=32, rule="mse")
    problems = [problem(seed) for seed in range(3)]
    w, h = jnp.stack([p[0] for p in problems]), jnp.stack([p[2] for p in problems])
    dampings = jnp.array([0.01, 0.1, 1.0])
    run = jax.jit(lambda w, h, d: gptq.solve.__wrapped__(w, h, fmt, KN, damping=d))
    stacked, diagnostics = run(w, h, dampings)
    assert diagnostics.final.shape == (3,)
    for i, (wi, _, hi) in enumerate(problems):
        one, d = gptq.solve(wi, hi, fmt, KN, damping=float(dampings[i]))
        # vmapped factorizations may differ in the last bit, and a code with them.
        assert np.mean(np.asarray(stacked.data[i]) == np.asarray(one.data)) > 0.98
        assert float(diagnostics.final[i]) == pytest.approx(float(d.final), rel=0.02)


def test_a_kernel_with_two_contraction_axes_is_solved_as_one():
    w, _, h = problem()
    fmt = qjax.Format("int4", group_size=32)
    heads = Layout.parse("kkn", (8, K // 8, N))
    qt, _ = gptq.solve(w.reshape(8, K // 8, N), h, fmt, heads)
    plain, _ = gptq.solve(w, h, fmt, KN)
    assert qt.shape == (8, K // 8, N)
    np.testing.assert_array_equal(qt.data, plain.data)


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
    qt, d = gptq.solve(w, h, qjax.Format("int4", group_size=32), KN, damping=0.0)
    assert float(d.damping) > 0
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


def test_the_damping_is_chosen_by_the_held_out_error():
    """Few rows: H overfits, and a large damping is better. The same rows: no damping is."""
    w, x, _ = problem(n=1024)
    few, many = x[:64].T @ x[:64] / 64, x[64:].T @ x[64:] / 960
    fmt = qjax.Format("int4", group_size=32, zero_point=True)
    dampings = jnp.array([1e-3, 1e-2, 1e-1, 1.0])
    h, judge = jnp.stack([few, few]), jnp.stack([many, few])
    chosen = gptq.choose_damping(jnp.stack([w, w]), h, judge, fmt, dampings)
    errors = []
    for damping in dampings:
        qt, _ = gptq.solve(w, few, fmt, KN, gptq.Options(sweeps=1), damping=damping)
        errors.append(objective(w, qt, many))
    assert float(chosen[0]) == float(dampings[np.argmin(errors)])
    assert float(chosen[1]) < float(chosen[0])


def test_trying_dampings_compiles_once():
    w, _, h = problem()
    fmt = qjax.Format("int4", group_size=48)
    before = gptq.solve._cache_size()
    for damping in (0.01, 0.1, 1.0):
        gptq.solve(w, h, fmt, KN, damping=damping)
    assert gptq.solve._cache_size() == before + 1
