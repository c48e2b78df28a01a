"""Master weights lose no small step; an offloaded state is the same state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qjax import lora
from qjax.lora import optimizer

PARAMS = {"w": jnp.linspace(-0.2, 0.2, 64, dtype=jnp.bfloat16).reshape(8, 8), "b": jnp.ones(8)}


def run(tx, steps=30, params=PARAMS):
    state, traces = tx.init(params), []

    @jax.jit
    def step(params, state, i):
        traces.append(i)
        slope = lambda p, like: jnp.cos(i + jnp.arange(p.size)).reshape(p.shape).astype(like.dtype)
        grads = jax.tree.map(slope, params, PARAMS)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, i)
    assert len(traces) == 1
    return params, state


def test_parameters_are_the_rounded_float32_run():
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
    want, _ = run(optax.adam(1e-4), params=wide)
    got, state = run(lora.master_weights(optax.adam(1e-4)))
    for name, p in got.items():
        assert p.dtype == PARAMS[name].dtype
        assert np.array_equal(p, want[name].astype(p.dtype))
        assert np.array_equal(state.params[name], want[name])
    plain, _ = run(optax.adam(1e-4))  # steps below half a neighbour's distance are lost
    assert not np.array_equal(plain["w"], got["w"])


def test_master_weights_ask_for_the_parameters():
    tx = lora.master_weights(optax.sgd(1.0))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_an_offloaded_state_lies_on_the_host_and_steps_are_the_same():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    want, state = run(tx)
    got, offloaded = run(lora.offload(tx))
    for a, b in zip(jax.tree.leaves((got, offloaded)), jax.tree.leaves((want, state)), strict=True):
        assert np.array_equal(a, b)
    kinds = {(x.ndim > 0, x.sharding.memory_kind) for x in jax.tree.leaves(offloaded)}
    assert kinds == {(True, "pinned_host"), (False, "device")}


def test_offload_says_when_there_is_no_such_memory(monkeypatch):
    monkeypatch.setattr(optimizer, "HOST", "punched_cards")
    with pytest.raises(NotImplementedError, match=r"'punched_cards'.*only.*device"):
        lora.offload(optax.adam(1e-3)).init(PARAMS)
