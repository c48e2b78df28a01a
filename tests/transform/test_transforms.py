"""apply inside JAX's own transformations: jit, grad, vmap, scan, export and their compositions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import Format


def mlp(params, x):
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["w"] / 8 + layer["bias"]) * params["scale"]
    return x


@pytest.fixture
def params(quantize, normal):
    layers = [{"w": normal(64, 64, seed=i), "bias": normal(64, seed=i)} for i in range(2)]
    return quantize({"layers": layers, "scale": jnp.float32(1.5)})


@pytest.fixture
def x(normal):
    return normal(5, 64)


packed = qjax.apply(mlp)


def loss(fn, params, x):
    return jnp.sum(fn(params, x) ** 2)


def float_leaves(tree):
    """What trains: the leaves that are no QTensors, and how to put them back."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=qjax.is_qtensor)
    floats = [leaf for leaf in leaves if not qjax.is_qtensor(leaf)]

    def merge(floats):
        rest = iter(floats)
        return treedef.unflatten([v if qjax.is_qtensor(v) else next(rest) for v in leaves])

    return floats, merge


WRT_X = {
    "grad": lambda f: jax.grad(f),
    "value_and_grad": lambda f: jax.value_and_grad(f),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),)),
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](jnp.cos(x)),
    "hvp": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1],
    "reverse-hvp": lambda f: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), jnp.cos(x))),
    "vmap-grad": lambda f: jax.vmap(jax.grad(f)),
    "jacrev": lambda f: lambda x: jax.jacrev(lambda x: jax.vmap(f)(x))(x[:2]),
    "checkpoint-grad": lambda f: jax.grad(jax.checkpoint(f)),
}


@pytest.mark.parametrize("name", WRT_X)
def test_derivatives_wrt_activations(assert_close, params, x, name):
    transform = WRT_X[name]
    got = jax.jit(transform(functools.partial(loss, packed, params)))(x)
    want = jax.jit(transform(functools.partial(loss, mlp, qjax.dequantize(params))))(x)
    assert_close(got, want, depth=8)


def test_derivatives_wrt_float_leaves_of_a_mixed_tree(assert_close, params, x):
    floats, merge = float_leaves(params)
    got = jax.grad(lambda f: loss(packed, merge(f), x))(floats)
    want = jax.grad(lambda f: loss(mlp, qjax.dequantize(merge(f)), x))(floats)
    assert_close(got, want, depth=8)
    # The same with respect to the whole tree: QTensors are constants.
    whole = jax.grad(lambda p: loss(packed, p, x), allow_int=True)(params)
    assert_close(float_leaves(whole)[0], want, depth=8)
    for leaf in jax.tree.leaves(whole["layers"][0]["w"]):
        assert leaf.dtype == jax.dtypes.float0 or not leaf.any()


def test_vmap_over_a_stack_of_quantized_parameters(quantize, assert_close, normal, x):
    w = normal(3, 64, 32)
    one_by_one = [quantize({"w": w[i]})["w"] for i in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *one_by_one)
    fn = lambda w, x: jnp.tanh(x @ w / 8)
    want = jnp.stack([fn(qjax.dequantize(q), x) for q in one_by_one])
    assert_close(jax.vmap(qjax.apply(fn), (0, None))(stack, x), want)
    xs = jnp.stack([x] * 3)
    assert_close(jax.vmap(qjax.apply(fn))(stack, xs), want)
    assert_close(qjax.apply(jax.vmap(fn))(stack, xs), want)
    got = jax.vmap(jax.grad(lambda x, w: qjax.apply(fn)(w, x).sum()), (None, 0))(x, stack)
    want = [jax.grad(lambda x, q=q: fn(qjax.dequantize(q), x).sum())(x) for q in one_by_one]
    assert_close(got, jnp.stack(want), depth=2)
    nested = jax.vmap(jax.vmap(qjax.apply(fn), (None, 0)), (0, None))(stack, xs)
    assert nested.shape == (3, 3, 5, 32)


def test_a_stack_is_scanned_outside_of_apply(quantize, assert_close, normal, x):
    stack = quantize({"w": normal(3, 64, 64)})["w"]

    def run(fn, w, x):
        return lax.scan(lambda c, wi: (jnp.tanh(fn(wi, c) / 8), None), x, w)[0]

    dot = lambda w, x: x @ w
    got = jax.jit(functools.partial(run, qjax.apply(dot)))(stack, x)
    assert_close(got, run(dot, qjax.dequantize(stack), x), depth=3)


def test_inside_control_flow(assert_close, params, x):
    want = mlp(qjax.dequantize(params), x)
    assert_close(lax.cond(x[0, 0] < 9, packed, lambda p, x: x, params, x), want, depth=2)
    assert_close(lax.switch(1, [lambda p, x: x, packed], params, x), want, depth=2)
    assert_close(lax.fori_loop(0, 1, lambda i, x: packed(params, x), x), want, depth=2)
    assert_close(jax.checkpoint(packed)(params, x), want, depth=2)
    assert_close(qjax.apply(packed)(params, x), want, depth=2)
    assert_close(qjax.apply(lambda p, x: packed(p, x))(params, x), want, depth=2)


def test_inside_a_custom_vjp(assert_close, params, x):
    @jax.custom_vjp
    def clipped(params, x):
        return packed(params, x)

    def forward(params, x):
        y, pullback = jax.vjp(lambda x: packed(params, x), x)
        return y, pullback

    clipped.defvjp(forward, lambda pullback, ct: (None, pullback(jnp.clip(ct, -0.1, 0.1))[0]))
    got = jax.grad(lambda x: loss(clipped, params, x))(x)
    _, pullback = jax.vjp(lambda x: mlp(qjax.dequantize(params), x), x)
    ct = jnp.clip(2 * mlp(qjax.dequantize(params), x), -0.1, 0.1)
    assert_close(got, pullback(ct)[0], depth=8)


def test_ahead_of_time(assert_close, params, x):
    shapes = jax.eval_shape(lambda *a: a, params, x)
    compiled = jax.jit(packed).lower(*shapes).compile()
    assert_close(compiled(params, x), mlp(qjax.dequantize(params), x), depth=2)
    assert jax.eval_shape(packed, *shapes).shape == (5, 64)


def test_export(assert_close, params, x):
    exported = jax.export.export(jax.jit(packed))(params, x)
    assert_close(exported.call(params, x), mlp(qjax.dequantize(params), x), depth=2)


@pytest.mark.parametrize("fmt", ["int8", "int4-g32", "nf4", "w8a8"])
def test_export_for_any_number_of_tokens(quantize, normal, fmt):
    """One program for all M; its values are those of the program for the M at hand."""
    params = qjax.quantize({"up": normal(64, 32), "down": normal(32, 64)}, fmt)
    fn = jax.jit(qjax.apply(lambda p, x: (jnp.tanh(x @ p["up"]) @ p["down"]) @ p["up"] @ p["up"].T))
    (tokens,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(fn)(params, jax.ShapeDtypeStruct((tokens, 64), jnp.float32))
    for M in (1, 7):
        x = normal(M, 64)
        np.testing.assert_allclose(exported.call(params, x), fn(params, x), rtol=1e-4, atol=1e-3)


def test_serialized_export(assert_close, params, x):
    pytest.importorskip("flatbuffers")
    leaves, tree = jax.tree.flatten(params)
    fn = jax.jit(lambda leaves, x: packed(jax.tree.unflatten(tree, leaves), x))
    again = jax.export.deserialize(jax.export.export(fn)(leaves, x).serialize())
    assert_close(again.call(leaves, x), mlp(qjax.dequantize(params), x), depth=2)


def test_outside_of_jit(assert_close, params, x):
    assert_close(packed(params, x), mlp(qjax.dequantize(params), x), depth=2)
    assert_close(packed(params, np.asarray(x)), mlp(qjax.dequantize(params), x), depth=2)


@pytest.mark.parametrize(
    ("policy", "recomputed"),
    [
        (jax.checkpoint_policies.nothing_saveable, True),
        (jax.checkpoint_policies.dots_saveable, False),
        (jax.checkpoint_policies.dots_with_no_batch_dims_saveable, False),
    ],
)
def test_checkpoint_policies_see_a_dot(params, x, policy, recomputed):
    fn = jax.checkpoint(lambda p, x: jnp.sin(mlp(p, x)).sum(), policy=policy)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda x: qjax.apply(fn)(params, x)))(x))
    # Two layers forward, two backward; the forward ones again if they were not saved.
    assert jaxpr.count("packed_dot[") == (6 if recomputed else 4)


def test_names_and_lines_of_fn_reach_the_compiled_program(params, x):
    def fn(params, x):
        with jax.named_scope("encoder"):
            x = jnp.sin(x @ params["layers"][0]["w"])
            return jax.jit(lambda w, x: jnp.cos(x @ w))(params["layers"][1]["w"], x)

    text = jax.jit(qjax.apply(fn)).lower(params, x).as_text(debug_info=True)
    assert re.search(r"encoder[^\"]*/(packed_dot|sin)", text)
    assert re.search(r"encoder[^\"]*/cos", text)
    assert "test_transforms.py" in text


# ---- int8 activations ---------------------------------------------------------------------------


def w8a8_reference(x, w):
    """In NumPy: per-token codes, an exact integer product, then both scales."""
    x, w = np.asarray(x, np.float32), np.asarray(w, np.float32)
    sw = np.abs(w).max(0) / np.float32(127)
    qw = np.clip(np.round(w / sw), -127, 127).astype(np.int32)
    sx = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    qx = np.clip(np.round(x / sx), -127, 127).astype(np.int32)
    return sx * ((qx @ qw).astype(np.float32) * sw)


def test_w8a8_equals_its_integer_reference(quantize, normal):
    w, x = normal(64, 32), normal(5, 64)
    q = quantize({"w": w}, fmt=Format("int8", activation="int8"))["w"]
    fn = qjax.apply(lambda w, x: x @ w)
    want = w8a8_reference(x, w)
    ulp = np.spacing(np.abs(want).max())  # XLA may divide by 127 through its reciprocal
    for got in (fn(q, x), jax.jit(fn)(q, x), jax.vmap(fn, (None, 0))(q, x)):
        assert np.abs(np.asarray(got) - want).max() <= 2 * ulp
    (use,) = qjax.explain(lambda w, x: x @ w)(q, x)
    assert "int32 accumulator" in use.implementation


def test_w8a8_derivative_is_straight_through(quantize, assert_close, normal):
    w, x = normal(64, 32), normal(5, 64)
    q = quantize({"w": w}, fmt=Format("int8", activation="int8"))["w"]
    fn = qjax.apply(lambda w, x: x @ w)
    got = jax.grad(lambda x: (fn(q, x) * jnp.cos(jnp.arange(32.0))).sum())(x)
    row = qjax.dequantize(q) @ jnp.cos(jnp.arange(32.0))
    assert_close(got, jnp.broadcast_to(row, x.shape))
