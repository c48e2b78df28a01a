"""Running ranges: the recurrence, and that they give the model that was trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Format, Policy, Rule, qat

STATIC = Format("int8", activation="int8", activation_scale="static")
POLICY = Policy([Rule("*", STATIC)])


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(5), seed), shape)


def mlp(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


def scanned(p, x):
    def layer(x, w):
        return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(jax.checkpoint(layer), x, p)[0]


@pytest.fixture
def params():
    return {"up": normal(32, 16), "down": normal(16, 32, seed=1)}


def test_ranges_are_running_means(params):
    state = qat.init_ranges(params, POLICY)
    want = None
    step = jax.jit(qat.tracked(mlp, POLICY, decay=0.75))
    for i in range(3):
        x = (i + 1) * normal(4, 32, seed=i + 2)
        largest = float(jnp.abs(x).max())
        want = largest if want is None else 0.75 * want + 0.25 * largest
        _, state = step(params, state, x)
    np.testing.assert_allclose(state["up"].largest, want, rtol=1e-6)
    assert int(state["up"].batches) == 3
    assert step._cache_size() == 1


@pytest.mark.parametrize("fn", [mlp, scanned], ids=["plain", "scan and remat"])
def test_the_value_is_that_of_the_packed_model_with_the_ranges_that_come_back(fn, params):
    if fn is scanned:
        params = jax.tree.map(lambda a: jnp.stack([a, 2 * a, a / 2]) / 8, params)
    x, state = normal(4, 32, seed=2), qat.init_ranges(params, POLICY)
    y, state = jax.jit(qat.tracked(fn, POLICY))(params, state, x)
    tree = qat.attach(params, POLICY, state)
    assert tree["up"].act_scale.shape == params["up"].shape[:-2]
    np.testing.assert_array_equal(jax.jit(qjax.fake_quant(fn, POLICY))(tree, x), y)
    np.testing.assert_array_equal(jax.jit(qjax.apply(fn))(qjax.quantize(tree, POLICY), x), y)


def test_ranges_take_no_part_in_derivatives(params):
    x, state = normal(4, 32, seed=2), qat.init_ranges(params, POLICY)
    track = qat.tracked(mlp, POLICY)
    _, state = track(params, state, x)
    loss = lambda p, state: jnp.sum(track(p, state, x)[0] ** 2)
    got = jax.grad(loss)(params, state)
    tree = qat.attach(params, POLICY, state)
    fixed = jax.grad(lambda t: jnp.sum(qjax.fake_quant(mlp, POLICY)(t, x) ** 2))(tree)
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(
        lambda t: t.value, fixed, is_leaf=qat.is_latent))  # fmt: skip
    moved = jax.grad(lambda s: jnp.sum(track(params, s, x)[0] ** 2), allow_int=True)(state)
    assert (moved["up"].largest == 0).all()


def test_frozen_ranges_stay(params):
    state = qat.init_ranges(params, POLICY)
    _, state = qat.tracked(mlp, POLICY)(params, state, normal(4, 32, seed=2))
    phase = qat.Schedule(freeze=10)(10)
    _, after = qat.tracked(mlp, POLICY, phase=phase)(params, state, 100 * normal(4, 32, seed=3))
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_branches_and_convolutions_are_tracked(params):
    kernel = normal(3, 3, 4, 4)
    policy = Policy([Rule("*", STATIC, layout="kkkn")])

    def fn(p, x, on):
        conv = lambda x: jax.lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.lax.cond(on, conv, lambda x: x, x)

    state = qat.init_ranges({"k": kernel}, policy)
    x = normal(2, 5, 5, 4)
    _, seen = jax.jit(qat.tracked(fn, policy))({"k": kernel}, state, x, True)
    np.testing.assert_allclose(seen["k"].largest, jnp.abs(x).max())


def test_a_policy_without_static_steps_is_refused(params):
    with pytest.raises(qjax.QuantizationError, match="no activations with static steps"):
        qat.init_ranges(params, Format("int8", activation="int8"))
    with pytest.raises(ValueError, match="`decay` must be from 0 on and below 1, got 1"):
        qat.tracked(mlp, POLICY, decay=1)
