"""Tests of qjax/paths.py: one name for a parameter, whatever holds it."""

import collections

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

from qjax.format import Format
from qjax.paths import path_str
from qjax.qtensor import is_qtensor
from qjax.quantize import QuantizationError, dequantize, quantize
from qjax.transform.fake_quant import fake_quant
from qjax.transform.usage import usage


def paths(tree):
    return [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_qtensor)]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 4, rngs=rngs, use_bias=False) for _ in range(2)])


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(4, kernel_init=init, use_bias=False)(x)


class Pair(collections.namedtuple("Pair", ["value", "scale"])):
    pass


NAMES = ["layers/0/kernel", "layers/1/kernel"]


def test_containers_agree_on_the_name():
    w = jnp.ones((8, 4))
    state = nnx.split(Block(nnx.Rngs(0)))[1]
    layers = [{"kernel": w}, {"kernel": w}]
    for tree in (
        {"layers": layers},
        {"layers": tuple(layers)},
        {"layers": {0: layers[0], 1: layers[1]}},
        FrozenDict({"layers": {"0": layers[0], "1": layers[1]}}),
        state,
        nnx.to_pure_dict(state),
        Block(nnx.Rngs(0)),
    ):
        assert paths(tree) == NAMES
        assert paths(quantize(tree, Format("int4"))) == NAMES


def test_a_linen_box_adds_no_step():
    variables = jax.eval_shape(Partitioned().init, jax.random.key(0), jnp.ones((1, 8)))
    assert paths(variables) == ["params/Dense_0/kernel"]


def test_a_key_called_value_stays():
    assert paths({"value": 1, "a": {"value": 2}}) == ["a/value", "value"]
    assert paths(Pair(1, 2)) == ["value", "scale"]
    assert paths(jnp.ones(2)) == ["."]


def test_nnx_state_is_quantized_in_place_and_merges_back():
    graph, state = nnx.split(Block(nnx.Rngs(0)))
    qstate = quantize(state, Format("int8"))
    model = nnx.merge(graph, qstate)
    assert is_qtensor(model.layers[0].kernel.get_value())
    back = nnx.merge(graph, dequantize(qstate))
    x = jnp.ones((1, 8))
    want = nnx.merge(graph, state).layers[0](x)
    # Half a step of 1/127 of the largest weight of a column, for each of 8 inputs.
    assert jnp.abs(back.layers[0](x) - want).max() < 8 * 0.5 / 127


def test_errors_name_the_path_of_nnx_state():
    state = nnx.split(Block(nnx.Rngs(0)))[1]
    with pytest.raises(QuantizationError, match=r"^layers/0/kernel: group_size=3 does not divide"):
        quantize(state, Format("int4", 3))


def test_two_parameters_of_one_name_are_refused_before_one_is_taken_for_the_other():
    params = {"a/b": jnp.ones((8, 4)), "a": {"b": jnp.ones((8, 4)), "c": jnp.ones((8, 4))}}
    fn = lambda p, x: x @ p["a/b"] + x @ p["a"]["b"]
    for look in (
        usage(fn),
        fake_quant(fn, Format("int8")),
        lambda p, x: quantize(p, Format("int8")),
    ):
        with pytest.raises(ValueError, match=r"^a/b: is the path of 2 parameters"):
            look(params, jnp.ones((1, 8)))
