"""A decode step of Llama-3 70B on int4 weights fits one H100, by its compiler's count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import qjax
from pallas_kernels import h100

pytestmark = pytest.mark.h100

D, HEADS, KV_HEADS, DH, FFN, LAYERS, VOCAB = 8192, 64, 8, 128, 28672, 80, 128256
LENGTH = 1024  # of the KV cache
W4 = qjax.Format("int4", group_size=128, scale="bfloat16")


def _norm(x, scale):
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * scale


def _attend(q, keys, values, position):
    # The caches lie as batched products read them, else XLA copies both into another layout.
    q = q.reshape(-1, KV_HEADS, HEADS // KV_HEADS, DH)
    scores = jnp.einsum("bkhd,bkds->bkhs", q, keys, preferred_element_type=jnp.float32) / DH**0.5
    scores = jnp.where(jnp.arange(LENGTH) <= position, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkhs,bksd->bkhd", weights, values).reshape(-1, HEADS * DH)


def step(params, cache, tokens, position):
    """One token of every sequence; layers under a scan, the cache written in place."""
    x = params["embed"][tokens]

    def layer(carry, inputs):
        x, keys, values = carry
        p, i = inputs
        qkv = _norm(x, p["norm1"]) @ p["qkv"]
        q, k, v = jnp.split(qkv, [D, D + KV_HEADS * DH], axis=-1)
        k, v = k.reshape(1, -1, KV_HEADS, DH, 1), v.reshape(1, -1, KV_HEADS, 1, DH)
        keys = lax.dynamic_update_slice(keys, k, (i, 0, 0, 0, position))
        values = lax.dynamic_update_slice(values, v, (i, 0, 0, position, 0))
        x = x + _attend(q, keys[i], values[i], position) @ p["o"]
        gate, up = jnp.split(_norm(x, p["norm2"]) @ p["gate_up"], 2, axis=-1)
        return (x + (jax.nn.silu(gate) * up) @ p["down"], keys, values), None

    carry = (x, *cache)
    (x, *cache), _ = lax.scan(layer, carry, (params["layers"], jnp.arange(LAYERS)))
    return _norm(x, params["norm"]) @ params["head"], tuple(cache)


def shapes(batch):
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    layers = {
        "norm1": array(LAYERS, D),
        "qkv": array(LAYERS, D, D + 2 * KV_HEADS * DH),
        "o": array(LAYERS, D, D),
        "norm2": array(LAYERS, D),
        "gate_up": array(LAYERS, D, 2 * FFN),
        "down": array(LAYERS, FFN, D),
    }
    params = {"embed": array(VOCAB, D), "layers": layers, "norm": array(D), "head": array(D, VOCAB)}
    policy = qjax.Policy([qjax.Rule("embed"), qjax.Rule("*norm*"), qjax.Rule("*", W4)])
    make = lambda p: qjax.prepare(qjax.quantize(p, policy), "h100")
    keys = array(LAYERS, batch, KV_HEADS, DH, LENGTH)
    cache = keys, array(LAYERS, batch, KV_HEADS, LENGTH, DH)
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jax.eval_shape(make, params), cache, tokens, jax.ShapeDtypeStruct((), jnp.int32)


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_temporaries_are_under_two_percent_of_the_arguments(batch):
    args = shapes(batch)
    uses = qjax.explain(step)(*args)
    assert all(use.implementation.startswith("mosaic") for use in uses)
    program = h100.compile(jax.jit(qjax.apply(step), donate_argnums=1), *args)
    print(f"\nbatch {batch}: arguments {program.arguments:,}, temporaries {program.temporaries:,}")
    assert program.arguments >= 35e9
    assert program.temporaries <= 0.02 * program.arguments
    assert len(program.kernels) == 5  # qkv, o, gate_up, down, head
    assert all(k.spills == k.stack == 0 for k in program.kernels)
