"""optax glue: labels, masks, LSQ's gradient scale; MultiSteps, TrainState, nnx.Optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
from qjax import Format, Policy, Rule, qat

FORMAT = Format("int4", 16)
POLICY = Policy([Rule("*w", FORMAT)])


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(5), seed), shape)


def fn(p, x):
    return x @ p["w"] + p["bias"]


@pytest.fixture
def params():
    return qat.init({"w": normal(32, 8), "bias": jnp.zeros(8)}, POLICY)


def test_weights_decay_and_steps_do_not(params):
    assert qat.labels(params)["bias"] == "other"
    assert qat.labels(params)["w"].value == "weight"
    assert qat.labels(params)["w"].scale == "step"
    tx = optax.adamw(0.1, weight_decay=0.5, mask=qat.decay_mask)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    assert (updates["w"].value != 0).all()
    assert (updates["w"].scale == 0).all()
    assert (updates["bias"] == 0).all()


def test_the_gradient_scale_is_lsqs(params):
    """g = 1 / sqrt(N q_max): 16 weights share a step, q_max is 7."""
    ones = jax.tree.map(jnp.ones_like, params)
    tx = qat.scale_by_lsq(params, POLICY)
    scaled, _ = tx.update(ones, tx.init(params))
    np.testing.assert_allclose(scaled["w"].scale, 1 / np.sqrt(16 * 7), rtol=1e-6)
    assert (scaled["w"].value == 1).all()
    assert (scaled["bias"] == 1).all()


def test_only_what_is_asked_for_trains(params):
    tx = qat.train_only(optax.sgd(1.0), qat.step_mask)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    assert (updates["w"].scale == -1).all()
    assert (updates["w"].value == 0).all()
    assert (updates["bias"] == 0).all()


def test_frozen_steps_stay_although_momentum_goes_on(params):
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), qat.freeze_steps(1))
    state, tree, ones = tx.init(params), params, jax.tree.map(jnp.ones_like, params)
    seen = []
    for _ in range(3):
        updates, state = tx.update(ones, state, tree)
        tree = optax.apply_updates(tree, updates)
        seen.append(tree)
    assert (seen[0]["w"].scale != params["w"].scale).all()
    np.testing.assert_array_equal(seen[2]["w"].scale, seen[0]["w"].scale)
    assert (seen[2]["w"].value != seen[0]["w"].value).all()


def loss(p, x):
    return jnp.mean((qjax.fake_quant(fn, POLICY)(p, x) - 1) ** 2)


def test_multi_steps_is_the_step_on_the_whole_batch(params):
    x = normal(8, 32, seed=3)
    once, parts = optax.sgd(0.1), optax.MultiSteps(optax.sgd(0.1), 2)
    updates, _ = once.update(jax.grad(loss)(params, x), once.init(params))
    want = optax.apply_updates(params, updates)
    state, tree = parts.init(params), params
    for half in (x[:4], x[4:]):
        updates, state = parts.update(jax.grad(loss)(tree, half), state, tree)
        tree = optax.apply_updates(tree, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), tree, want)


def test_train_state(params):
    tx = optax.chain(qat.scale_by_lsq(params, POLICY), optax.adamw(1e-2, mask=qat.decay_mask))
    state = TrainState.create(apply_fn=qjax.fake_quant(fn, POLICY), params=params, tx=tx)
    x = normal(8, 32, seed=3)

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn(p, x) - 1) ** 2))(
            state.params
        )
        return state.apply_gradients(grads=grads), value

    values = []
    for _ in range(20):
        state, value = step(state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    assert step._cache_size() <= 2  # the first state has a Python step count


def test_nnx_optimizer():
    module = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)
    policy, x = Policy([Rule("*kernel", FORMAT)]), normal(8, 32, seed=3)

    @nnx.jit
    def step(module, optimizer):
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        run = qjax.fake_quant(lambda p, x: nnx.merge(graph, p, rest)(x), policy)
        value, grads = jax.value_and_grad(lambda p: jnp.mean((run(p, x) - 1) ** 2))(params)
        optimizer.update(module, grads)
        return value

    values = [float(step(module, optimizer)) for _ in range(20)]
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("split", [None, "d"], ids=["data", "fsdp"])
def test_steps_of_training_on_one_and_eight_devices_agree(split):
    """Weights, learned steps and optimizer state; the batch and, for fsdp, N lie on 8 devices."""
    tree = qat.init({"w": normal(32, 16), "bias": jnp.zeros(16)}, POLICY)
    tx = optax.chain(qat.scale_by_lsq(tree, POLICY), optax.adamw(1e-2, mask=qat.decay_mask))

    @jax.jit
    def step(tree, opt, x):
        value, grads = jax.value_and_grad(loss)(tree, x)
        updates, opt = tx.update(grads, opt, tree)
        return optax.apply_updates(tree, updates), opt, value

    def run(tree, x):
        opt, values = tx.init(tree), []
        for _ in range(3):
            tree, opt, value = step(tree, opt, x)
            values.append(value)
        return tree, values

    x = normal(16, 32, seed=3)
    mesh = Mesh(np.array(jax.devices()), ("d",))
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    spread = jax.tree.map(lambda a: place(a, *[None] * (a.ndim - 1), split), tree)
    got, want = run(spread, place(x, "d")), run(tree, x)
    assert len(got[0]["w"].scale.sharding.device_set) == 8
    # Adam divides by the root of tiny squares: rounding shows more than in the gradients.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_a_non_finite_value_names_its_leaf(params):
    qat.check_finite(3, loss=jnp.float32(1), params=params)
    bad = {**params, "w": qat.Latent(params["w"].value, params["w"].scale.at[0, 0].set(jnp.inf))}
    with pytest.raises(qat.NonFiniteError, match=r"at step 3 in params/w/scale\."):
        qat.check_finite(3, loss=jnp.float32(1), params=bad)
    with pytest.raises(FloatingPointError, match=r"NaN or Inf in loss\."):
        qat.check_finite(loss=jnp.nan)
