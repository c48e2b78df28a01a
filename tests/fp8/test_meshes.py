"""FP8 training on 8 devices: the same step as on one, however the arrays are split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import Format, fp8

RECIPES = {
    "current": fp8.Fp8Recipe(),
    "delayed": fp8.Fp8Recipe(scaling="delayed", history=2),
    "block": fp8.Fp8Recipe(Format("e4m3", group_size=8, group_columns=8)),
}
SLOW = pytest.mark.slow
# What compiles for 8 devices takes its time: one recipe always, the others when asked for.
NAMES = pytest.mark.parametrize(
    "name", ["delayed", pytest.param("current", marks=SLOW), pytest.param("block", marks=SLOW)]
)


def normal(*shape, seed):
    return jax.random.normal(jax.random.fold_in(jax.random.key(5), seed), shape)


PARAMS = {"up": normal(3, 16, 32, seed=0) / 4, "down": normal(3, 32, 16, seed=1) / 6}
# Of one sign and another size in every row, so that each device sees magnitudes of its own.
X = normal(16, 4, 16, seed=2) * jnp.exp2(jnp.arange(16.0) - 8)[:, None, None]


def layer(x, w):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def loss_of(params, x):
    x, _ = lax.scan(lambda x, w: (layer(x, w), None), x, params)
    return jnp.mean(x**2)


@functools.cache
def on_one_device(name):
    recipe = RECIPES[name]
    state = jax.jit(fp8.init(loss_of, recipe))(PARAMS, X)
    return state, jax.jit(fp8.value_and_grad(loss_of, recipe))(state, PARAMS, X)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        # Sums in another order; one such difference may move a later value to another code.
        assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(b)


SPLITS = {
    "data": ({"up": P(), "down": P()}, P("x")),
    "fsdp": ({"up": P(None, "x"), "down": P(None, "x")}, P("x")),
    "tensor": ({"up": P(None, None, "y"), "down": P(None, "y")}, P("x")),
}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("delayed", "data"),
        ("block", "data"),
        ("delayed", "tensor"),
        pytest.param("current", "data", marks=SLOW),
        pytest.param("delayed", "fsdp", marks=SLOW),
        pytest.param("block", "fsdp", marks=SLOW),
        pytest.param("block", "tensor", marks=SLOW),
    ],
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(name, split):
    specs, of_x = SPLITS[split]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    state, want = on_one_device(name)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    params = jax.tree.map(put, PARAMS, specs, is_leaf=lambda a: isinstance(a, P))
    with jax.set_mesh(mesh):
        run = jax.jit(fp8.value_and_grad(loss_of, RECIPES[name]))
        assert_same(run(put(state, P()), params, put(X, of_x)), want)


@NAMES
def test_meshes_with_explicit_axes(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    state, want = on_one_device(name)
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        run = jax.jit(fp8.value_and_grad(loss_of, RECIPES[name]))
        assert_same(run(put(state, P()), put(PARAMS, P()), put(X, P("x"))), want)


@NAMES
def test_shard_map_inside_the_function(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def sharded(params, x):
        def body(params, x):
            x, _ = lax.scan(lambda x, w: (layer(x, w), None), x, params)
            return lax.pmean(jnp.mean(x**2), "x")

        return jax.shard_map(body, mesh=mesh, in_specs=(P(), P("x")), out_specs=P())(params, x)

    state, want = on_one_device(name)
    assert_same(jax.jit(fp8.value_and_grad(sharded, RECIPES[name]))(state, PARAMS, X), want)


@pytest.mark.parametrize("name", ["delayed", pytest.param("current", marks=SLOW)])
def test_experts_split_over_a_shard_map_keep_scales_of_their_own(name):
    mesh = jax.make_mesh((8,), ("e",), axis_types=(AxisType.Auto,))
    params = {"w": normal(8, 16, 16, seed=3) * jnp.exp2(jnp.arange(8.0))[:, None, None]}
    x = normal(8, 4, 16, seed=4)
    each = lambda params, x: jnp.mean(jnp.einsum("emk,ekn->emn", x, params["w"]) ** 2)

    def sharded(params, x):
        body = lambda w, x: lax.pmean(each({"w": w}, x), "e")
        split = jax.shard_map(body, mesh=mesh, in_specs=(P("e"), P("e")), out_specs=P())
        return split(params["w"], x)

    recipe = RECIPES[name]
    assert qjax.usage(sharded)(params, x).layout("w") == qjax.usage(each)(params, x).layout("w")
    state = jax.jit(fp8.init(each, recipe))(params, x)
    want = jax.jit(fp8.value_and_grad(each, recipe))(state, params, x)
    assert_same(jax.jit(fp8.value_and_grad(sharded, recipe))(state, params, x), want)


def test_delayed_scaling_refuses_a_shard_map_that_does_not_track_what_varies():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def sharded(params, x):
        body = lambda w, x: lax.pmean(jnp.mean(x @ w), "x")
        split = jax.shard_map(
            body, mesh=mesh, in_specs=(P(), P("x")), out_specs=P(), check_vma=False
        )
        return split(params["up"][0], x)

    with pytest.raises(NotImplementedError, match="up: delayed scaling inside a shard_map"):
        jax.eval_shape(fp8.init(sharded, "delayed"), PARAMS, X)
