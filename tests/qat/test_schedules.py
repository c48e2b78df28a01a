"""Schedules: phases by step, one compilation for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Format, Policy, Rule, qat
from qjax.transform.straight_through import finer_weight


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(5), seed), shape)


def mlp(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


PARAMS = {"up": normal(32, 16), "down": normal(16, 32, seed=1)}


def test_a_delayed_start_and_gradual_bits_compile_once():
    fmt, x = Format("int4", 16, activation="int8"), normal(4, 32, seed=2)
    schedule = qat.Schedule(start=2, bits=((2, 8), (3, 6)), full=4)

    def outcome(fn, p):
        y, pull = jax.vjp(lambda p: fn(p, x), p)
        return y, pull(y)

    @jax.jit
    def step(i, p):
        return outcome(qjax.fake_quant(mlp, fmt, phase=schedule(i)), p)

    def assert_close(got, want):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())

    plain = jax.jit(lambda p: outcome(mlp, p))(PARAMS)
    for i in (0, 1):
        assert_close(step(i, PARAMS), plain)
    assert_close(step(4, PARAMS), jax.jit(lambda p: outcome(qjax.fake_quant(mlp, fmt), p))(PARAMS))
    errors = [float(jnp.abs(step(i, PARAMS)[0] - plain[0]).mean()) for i in (2, 3, 4)]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert step._cache_size() == 1


def test_the_finer_weight_covers_the_same_range_with_more_levels():
    w = jnp.linspace(-8, 7.5, 32)[:, None]
    fmt, s = Format("int4"), jnp.ones((1, 1))
    for bits in (4, 6, 8):
        step = 8 / 2 ** (bits - 1)
        assert np.abs(finer_weight(w, jnp.float32(bits), fmt, s) - w).max() <= step / 2
    np.testing.assert_array_equal(finer_weight(w, jnp.float32(32), fmt, s), w)


def test_schedules_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="`bits` and `full` go together"):
        qat.Schedule(bits=((0, 8),))
    with pytest.raises(ValueError, match="steps must rise"):
        qat.Schedule(start=5, bits=((1, 8),), full=9)
    with pytest.raises(ValueError, match="bits must be from 2 to 31"):
        qat.Schedule(bits=((0, 40),), full=9)
    phase = qat.Schedule(bits=((0, 8),), full=9)(0)
    policy = Policy([Rule("up", Format("nf4", 16))])
    with pytest.raises(NotImplementedError, match="up: a gradual bit width needs a symmetric"):
        qjax.fake_quant(mlp, policy, phase=phase)(PARAMS, normal(2, 32))
