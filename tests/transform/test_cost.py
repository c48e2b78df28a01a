"""What the transform costs: time to trace, and memory to run."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import qjax
from qjax import Format, Policy, Rule


def float_arrays(jaxpr, found=None):
    """Returns the shapes of all float values of a jaxpr and of the jaxprs in it."""
    found = set() if found is None else found
    for eqn in jaxpr.eqns:
        for v in eqn.outvars:
            if jnp.issubdtype(v.aval.dtype, jnp.floating):
                found.add(v.aval.shape)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                float_arrays(inner, found)
    return found


def shapes(K, N, fmt, lead=()):
    w = jax.ShapeDtypeStruct((*lead, K, N), jnp.float32)
    return jax.eval_shape(lambda w: qjax.quantize({"w": w}, fmt)["w"], w)


def temporaries(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


COMMON = [
    Format("int4", 128),
    Format("int8"),
    Format("nf4", 64),
    Format("int4", 128, zero_point=True),
]


@pytest.mark.parametrize("M", [1, 8, 64])
@pytest.mark.parametrize("fmt", COMMON, ids=str)
def test_no_float_array_of_the_weight_s_size(M, fmt):
    K = N = 2048
    w, x = shapes(K, N, fmt), jax.ShapeDtypeStruct((M, K), jnp.float32)
    fn = qjax.apply(lambda w, x: x @ w)
    backward = lambda w, x: jax.grad(lambda x: jnp.sin(fn(w, x)).sum())(x)
    for run in (fn, backward):
        assert temporaries(run, w, x) < 4 * K * N / 2
        jaxpr = jax.make_jaxpr(run)(w, x)
        assert not any(len(s) >= 2 and s[-2:] == (K, N) for s in float_arrays(jaxpr.jaxpr))


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_keeps_no_float_layer_for_the_backward_pass(remat):
    L, K = 4, 1024
    w, x = shapes(K, K, Format("int4", 128), (L,)), jax.ShapeDtypeStruct((8, K), jnp.float32)
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    layer = jax.checkpoint(layer) if remat else layer
    fn = lambda w, x: lax.scan(layer, x, w)[0].sum()
    backward = jax.grad(lambda x, w: qjax.apply(fn)(w, x))
    jaxpr = jax.make_jaxpr(backward)(x, w)
    assert not any(s[-2:] == (K, K) for s in float_arrays(jaxpr.jaxpr))
    # Less than two float layers of four; the plain program holds none of them as a temporary
    # either, but its arguments are the floats.
    assert temporaries(backward, x, w) < 2 * 4 * K * K


def test_ragged_dot_dequantizes_a_block_at_a_time():
    E, K, N = 4, 1024, 512
    w, x = shapes(K, N, Format("int4", 128), (E,)), jax.ShapeDtypeStruct((32, K), jnp.float32)
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    fn = qjax.apply(lambda w, x, sizes: lax.ragged_dot(x, w, sizes))
    jaxpr = jax.make_jaxpr(fn)(w, x, sizes)
    assert not any(s[-2:] == (K, N) for s in float_arrays(jaxpr.jaxpr))


# ---- time to trace ------------------------------------------------------------------------------

WIDTH, HEADS, VOCABULARY, LAYERS = 64, 4, 100, 12


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(HEADS)(h, h, mask=mask)
        h = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(h), None


class Transformer(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH)
        x = embed(tokens)
        if self.scan:
            block = nn.remat(Block, prevent_cse=False)
            x, _ = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
            )()(x, None)
        else:
            for _ in range(LAYERS):
                x, _ = Block()(x)
        return embed.attend(nn.LayerNorm()(x))


@pytest.mark.parametrize("scan", [False, True])
def test_tracing_a_transformer_costs_at_most_about_twice(scan):
    """Measured 1.1 (unrolled) and 1.4 (scan); the bound leaves room for a busy machine."""
    fmt = Format("int4", 16)
    policy = Policy(
        (
            Rule("*embedding", fmt, layout="nk"),
            Rule("*out/kernel", fmt, layout="kkn"),
            Rule("*Attention*/kernel", fmt, layout="knn"),
            Rule("*Dense*/kernel", fmt),
        )
    )
    module, tokens = Transformer(scan), jnp.zeros((2, 16), jnp.int32)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens))
    params = variables["params"]
    qparams = {"params": jax.eval_shape(lambda p: qjax.quantize(p, policy), params)}
    assert not qjax.explain(module.apply)(qparams, tokens).dequantized

    def seconds(fn, *args):
        start = time.process_time()
        jax.jit(lambda *args: fn(*args)).trace(*args)  # a new function: no cached trace
        return time.process_time() - start

    plain, packed = [], []
    for _ in range(4):
        plain.append(seconds(module.apply, variables, tokens))
        packed.append(seconds(qjax.apply(module.apply), qparams, tokens))
    assert min(packed) <= 3 * min(plain)
