"""Flax NNX modules run unmodified on packed weights, through nnx.split and nnx.merge."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import qjax


@pytest.fixture
def check(quantize, assert_agrees):
    """The bridge for modules without other state: merge the packed parameters inside `fn`."""

    def run(module, x, layouts=None, call=lambda m, x: m(x), **how):
        graph, params = nnx.split(module, nnx.Param)
        qparams = quantize(params, layouts)
        return assert_agrees(lambda p, x: call(nnx.merge(graph, p), x), qparams, x, **how)

    return run


def rngs():
    return nnx.Rngs(0)


@pytest.mark.parametrize(
    ("make", "shape", "layouts"),
    [
        (lambda: nnx.Linear(64, 32, rngs=rngs()), (4, 64), {}),
        (lambda: nnx.LinearGeneral(64, (4, 16), rngs=rngs()), (4, 64), {"*kernel*": "knn"}),
        (
            lambda: nnx.LinearGeneral((4, 16), 32, axis=(-2, -1), rngs=rngs()),
            (5, 4, 16),
            {"*kernel*": "kkn"},
        ),
        (
            lambda: nnx.Einsum("bd,dhk->bhk", (64, 4, 16), rngs=rngs()),
            (4, 64),
            {"*kernel*": "knn"},
        ),
        (
            lambda: nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs()),
            (2, 8, 64),
            {"out/kernel*": "kkn", "*kernel*": "knn"},
        ),
    ],
    ids=["linear", "out2", "in2", "einsum", "attention"],
)
def test_projections_are_packed(check, normal, make, shape, layouts):
    explanation = check(make(), normal(*shape), layouts, depth=3)
    assert {use.op for use in explanation} == {"dot_general"}


def test_tied_embedding(check):
    embed = nnx.Embed(50, 32, rngs=rngs())
    call = lambda m, tokens: m.attend(m(tokens))
    explanation = check(embed, jnp.arange(6), {"*embedding*": "nk"}, call)
    assert {use.how for use in explanation} == {"rows looked up", "x @ W"}


def test_convolution(check, normal):
    conv = nnx.Conv(16, 16, (3, 3), rngs=rngs())
    (use,) = check(conv, normal(2, 6, 6, 16), {"*kernel*": "kkkn"}, k=144)
    assert use.implementation == "kernel dequantized in the op"


def make_stack(n):
    @nnx.split_rngs(splits=n)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Linear(32, 32, rngs=rngs)

    return make(rngs())


def scanned(module, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def layers(x, layer):
        return nnx.relu(layer(x))

    return layers(x, module)


def mapped(module, x):
    return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(module, x)


@pytest.mark.parametrize("call", [scanned, mapped])
def test_stacks_are_packed(check, normal, call):
    (use,) = check(make_stack(3), normal(4, 32), {"*kernel*": "kn"}, call, depth=3)
    assert (use.op, use.count) == ("dot_general", 1)


class Regularized(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def test_mutable_state_goes_in_and_comes_out(quantize, assert_close, normal):
    """The bridge for modules with state: what is no Param is one more argument and result."""
    module, x = Regularized(rngs()), normal(4, 64)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def call(params, rest, x):
        m = nnx.merge(graph, params, rest, copy=True)  # leave the caller's Variables alone
        y = m(x)
        return y, nnx.state(m, nnx.Not(nnx.Param))

    qparams = quantize(params, {"*kernel*": "kn"})
    want, want_rest = call(qjax.dequantize(qparams), rest, x)
    got, got_rest = jax.jit(qjax.apply(call))(qparams, rest, x)
    assert_close(got, want)
    assert got_rest["dropout"]["rngs"]["count"][...] == rest["dropout"]["rngs"]["count"][...] + 1
    moved = got_rest["norm"]["mean"][...]
    assert (moved != rest["norm"]["mean"][...]).any()
    assert_close(moved, want_rest["norm"]["mean"][...])
    # The state that came out goes in again.
    again, _ = jax.jit(qjax.apply(call))(qparams, got_rest, x)
    assert (again != got).any()
