"""Packed weights on a mesh of 8 devices: equal results, and only the collectives that must be."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import Format, Policy, Rule
from qjax.sharding import shard_specs, shardings_of

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
BOTH = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def make_mesh(kind, shape=(2, 4), names=("x", "y")):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def collectives(compiled):
    """Returns (kind, dtype, elements) of every collective of a compiled program."""
    found = re.findall(
        r"= (\w+)\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all|"
        r"collective-permute)(?:-start)?\(",
        compiled.as_text(),
    )
    return [(k, t, math.prod(int(d) for d in dims.split(",") if d)) for t, dims, k in found]


def quantize(w, fmt, layout="kn"):
    return qjax.quantize({"w": w}, Policy([Rule("*", fmt, layout=layout)]))["w"]


def place(mesh, x, w, x_spec, w_spec):
    return (
        jax.device_put(x, NamedSharding(mesh, x_spec)),
        jax.device_put(w, shardings_of(w, NamedSharding(mesh, w_spec))),
    )


def run(mesh, fn, x, w, x_spec, w_spec):
    """Runs fn(x, w) on the mesh, checks it against one device, returns its collectives."""
    want = jax.jit(fn)(x, w)
    x, w = place(mesh, x, w, x_spec, w_spec)
    with jax.set_mesh(mesh):
        compiled = jax.jit(fn).lower(x, w).compile()
        got = compiled(x, w)
    assert got.shape == want.shape
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    # Sums of 256 terms in another order; see conftest.py. Sines amplify by their argument's error.
    assert np.abs(got - want).max() <= 4 * 256**1.5 * 2**-23 * np.abs(want).max()
    return collectives(compiled)


dot = qjax.apply(lambda x, w: x @ w)
dot_t = qjax.apply(lambda x, w: x @ w.T)

FORMATS = {
    "group": Format("int4", 16),
    "channel": Format("int8"),
    "zero-point": Format("int4", 16, zero_point=True),
    "offset": Format("uint4", 16, offset="float16"),
    "nested": Format("nf4", 16, scale=Format("int8", 4)),
    "tensor": Format("int8", group_columns=None),
    "block": Format("e4m3", 32, 32),
    "3-bit": Format("int3", 32),
    "w8a8": Format("int8", activation="int8"),
}


@BOTH
@pytest.mark.parametrize("name", FORMATS)
def test_column_parallel_needs_no_collective(normal, name, kind):
    mesh, w = make_mesh(kind), quantize(normal(256, 512), FORMATS[name])
    assert run(mesh, dot, normal(16, 256), w, P("x"), P(None, "y")) == []


@pytest.mark.parametrize("name", FORMATS)
def test_row_parallel_needs_one_all_reduce(normal, name):
    w = quantize(normal(256, 512), FORMATS[name])
    found = run(make_mesh(AUTO), dot, normal(16, 256), w, P(None, "y"), P("y"))
    if name == "w8a8":  # the largest of each token's row, then the integer product
        assert sorted(found) == [("all-reduce", "f32", 16), ("all-reduce", "s32", 16 * 512)]
    else:
        assert found == [("all-reduce", "f32", 16 * 512)]


def test_w8a8_is_bit_for_bit_the_same_on_a_mesh(normal):
    mesh, x = make_mesh(AUTO), normal(16, 256)
    w = quantize(normal(256, 512), FORMATS["w8a8"])
    want = jax.jit(dot)(x, w)
    for x_spec, w_spec in [(P("x"), P(None, "y")), (P(None, "y"), P("y"))]:
        xs, ws = place(mesh, x, w, x_spec, w_spec)
        assert np.array_equal(jax.jit(dot)(xs, ws), want)


@BOTH
def test_row_parallel_of_a_replicated_activation(normal, kind):
    w = quantize(normal(256, 512), FORMATS["group"])
    found = run(make_mesh(kind), dot, normal(16, 256), w, P(), P("y"))
    assert found == [("all-reduce", "f32", 16 * 512)]


def test_a_replicated_weight_follows_the_activation(normal):
    w = quantize(normal(256, 512), FORMATS["group"])
    found = run(make_mesh(AUTO), dot, normal(16, 256), w, P(None, "y"), P())
    assert found == [("all-reduce", "f32", 16 * 512)]


@BOTH
def test_products_with_the_transposed_weight(normal, kind):
    mesh, w = make_mesh(kind), quantize(normal(256, 512), FORMATS["group"])
    x = normal(16, 512)
    assert run(mesh, dot_t, x, w, P("x"), P("y")) == []
    assert run(mesh, dot_t, x, w, P(), P(None, "y")) == [("all-reduce", "f32", 16 * 256)]
    table = quantize(normal(512, 256), FORMATS["group"], "nk")
    assert run(mesh, dot_t, normal(16, 256), table, P("x"), P("y")) == []


@BOTH
def test_backward_of_column_and_row_parallel(normal, kind):
    mesh, w = make_mesh(kind), quantize(normal(256, 512) / 16, FORMATS["group"])
    backward = lambda x, w: jax.grad(lambda x: jnp.sin(dot(x, w)).sum())(x)
    found = run(mesh, backward, normal(16, 256), w, P("x"), P(None, "y"))
    assert found == [("all-reduce", "f32", 8 * 256)]
    found = run(mesh, backward, normal(16, 256), w, P("x"), P("y"))
    # Forward one sum; in explicit mode the gradient goes back to the type of x, which is whole.
    gathers = [] if kind is AUTO else [("all-gather", "f32", 8 * 256)]
    assert sorted(found) == sorted([("all-reduce", "f32", 8 * 512), *gathers])


def test_a_tensor_parallel_mlp_needs_one_all_reduce(normal):
    mesh = make_mesh(AUTO)
    up = quantize(normal(256, 512) / 16, FORMATS["group"])
    down = quantize(normal(512, 256, seed=1) / 16, FORMATS["group"])
    mlp = qjax.apply(lambda up, down, x: x + jnp.tanh(x @ up) @ down)
    x = normal(16, 256)
    want = mlp(up, down, x)
    xs, up = place(mesh, x, up, P("x"), P(None, "y"))
    _, down = place(mesh, x, down, P("x"), P("y"))
    compiled = jax.jit(mlp).lower(up, down, xs).compile()
    assert collectives(compiled) == [("all-reduce", "f32", 8 * 256)]
    assert np.abs(compiled(up, down, xs) - want).max() <= 1e-4 * np.abs(want).max()
    # Backward: one more, for the gradient of the shared input.
    loss = lambda x, up, down: jnp.sin(mlp(up, down, x)).sum()
    compiled = jax.jit(jax.grad(loss)).lower(xs, up, down).compile()
    assert collectives(compiled) == [("all-reduce", "f32", 8 * 256)] * 2


@pytest.mark.parametrize("w_spec", [P("x"), P(None, "x"), P("x", "y")], ids=str)
def test_fsdp_moves_packed_codes_or_few_activations(normal, w_spec):
    mesh, w = make_mesh(AUTO), quantize(normal(256, 512), FORMATS["group"])
    for tokens in (16, 4096):
        found = run(mesh, dot, normal(tokens, 256), w, P("x"), w_spec)
        moved = sum(n * {"u8": 1, "f32": 4}[t] for _, t, n in found)
        activations = tokens * (256 + 512) * 4
        assert moved <= min(w.nbytes, activations)
        if tokens > 1000:  # the weight is the smaller: its codes are gathered, and its scales
            assert {k for k, _, _ in found} == {"all-gather"}
            assert ("all-gather", "u8") in {(k, t) for k, t, _ in found}
            assert max(n for _, t, n in found if t == "f32") <= 16 * 512


@BOTH
def test_experts_stay_where_they_are(normal, kind):
    mesh, w = make_mesh(kind), quantize(normal(8, 64, 128), FORMATS["group"])
    fn = qjax.apply(lambda x, w: jnp.einsum("ebk,ekn->ebn", x, w))
    x = normal(8, 16, 64)
    assert run(mesh, fn, x, w, P("y"), P("y")) == []
    assert run(mesh, fn, x, w, P("x"), P("x", None, "y")) == []


@BOTH
def test_heads(normal, kind):
    mesh, x = make_mesh(kind), normal(16, 256)
    into = quantize(normal(256, 8, 64), FORMATS["group"], "knn")
    fn = qjax.apply(lambda x, w: jnp.einsum("bk,khd->bhd", x, w))
    assert run(mesh, fn, x, into, P("x"), P(None, "y")) == []
    out = quantize(normal(8, 64, 256), FORMATS["group"], "kkn")
    fn = qjax.apply(lambda x, w: jnp.einsum("bhd,hdn->bn", x, w))
    found = run(mesh, fn, normal(16, 8, 64), out, P("x"), P("y"))
    assert found == [("all-reduce", "f32", 8 * 256)]


def test_lookups_in_a_sharded_vocabulary(normal):
    table = quantize(normal(512, 64), FORMATS["group"], "nk")
    fn = qjax.apply(lambda i, w: w[i])
    found = run(make_mesh(AUTO), fn, jnp.arange(16) * 31, table, P("x"), P("y"))
    # Packed rows and their scales are picked from the shard that has them.
    assert all(n * {"u8": 1, "f32": 4, "bf16": 2}[t] <= 8 * 64 for _, t, n in found)


def test_lookups_with_explicit_axes_name_their_result(normal):
    table = quantize(normal(512, 64), FORMATS["group"], "nk")
    fn = qjax.apply(lambda i, w: w.at[i].get(out_sharding=P("x")))
    mesh = make_mesh(EXPLICIT)
    with jax.set_mesh(mesh):
        i, w = place(mesh, jnp.arange(16) * 31, table, P("x"), P("y"))
        got = jax.jit(fn)(i, w)
        assert got.sharding.spec[0] == "x"
    assert np.array_equal(got, qjax.dequantize(table)[jnp.arange(16) * 31])


@BOTH
def test_scan_over_sharded_layers(normal, kind):
    mesh, w = make_mesh(kind), quantize(normal(3, 256, 256) / 16, FORMATS["group"])

    def layers(x, w):
        def layer(c, w):
            c = jnp.tanh(c @ w)
            if jax.sharding.get_abstract_mesh().empty:
                return c, None
            put = lax.with_sharding_constraint if kind is AUTO else jax.sharding.reshard
            return put(c, P("x")), None

        return lax.scan(layer, x, w)[0]

    found = run(mesh, qjax.apply(layers), normal(16, 256), w, P("x"), P(None, None, "y"))
    assert found == [("all-gather", "f32", 8 * 256)]  # activations, once in the loop


@BOTH
def test_what_does_not_divide_is_replicated(normal, kind):
    ragged = quantize(normal(256, 512), Format("int4", 48, remainder="ragged"))
    found = run(make_mesh(kind), dot, normal(16, 256), ragged, P("x"), P("y"))
    assert [(k, t) for k, t, _ in found] == [("all-gather", "u8")]
    narrow = quantize(normal(256, 30), FORMATS["group"])
    assert run(make_mesh(kind), dot, normal(3, 256), narrow, P(), P()) == []


@BOTH
def test_a_weight_that_must_be_float_keeps_its_sharding(normal, kind):
    w = quantize(normal(256, 512), FORMATS["group"])
    fn = qjax.apply(lambda x, w: x @ (w * 2))
    assert run(make_mesh(kind), fn, normal(16, 256), w, P("x"), P(None, "y")) == []


def test_derivatives_vmap_and_remat_with_explicit_axes(normal):
    mesh, w = make_mesh(EXPLICIT), quantize(normal(3, 256, 256) / 16, FORMATS["group"])
    layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))

    def loss(x, w):
        each = jax.vmap(layer, (None, 0))(x, w)
        return each.sum() + lax.scan(lambda c, w: (layer(c, w), None), x, w)[0].sum()

    fn = lambda x, w: jax.grad(lambda x: qjax.apply(loss)(x, w))(x)
    run(mesh, fn, normal(16, 256), w, P("x"), P(None, "y"))


SPOKEN = {  # functions that say in explicit mode where their results are
    "out-sharding": (P(None, "y"), P("y"), lambda x, w: jnp.matmul(x, w, out_sharding=P("y"))),
    "reshard": (P("x"), P(None, "y"), lambda x, w: x @ jax.sharding.reshard(w, P())),
    "reshard-to-k": (P("x"), P(None, "y"), lambda x, w: x @ jax.sharding.reshard(w, P("y"))),
    "auto-axes": (
        P("x"),
        P(None, "y"),
        lambda x, w: jax.sharding.auto_axes(jnp.matmul, out_sharding=P("x", "y"))(x, w),
    ),
    "cond": (
        P("x"),
        P(None, "y"),
        lambda x, w: lax.cond(x.sum() < 1e9, lambda: x @ w, lambda: -(x @ w)),
    ),
}


@pytest.mark.parametrize("name", SPOKEN)
def test_functions_that_name_shardings(normal, name):
    x_spec, w_spec, fn = SPOKEN[name]
    mesh, x, w = make_mesh(EXPLICIT), normal(16, 256), quantize(normal(256, 512), FORMATS["group"])
    want = dot(x, w)
    with jax.set_mesh(mesh):
        xs, ws = place(mesh, x, w, x_spec, w_spec)
        floats = jax.device_put(qjax.dequantize(w), NamedSharding(mesh, w_spec))
        got, plain = jax.jit(qjax.apply(fn))(xs, ws), jax.jit(fn)(xs, floats)
        assert got.sharding == plain.sharding
        assert not qjax.explain(fn)(xs, ws).dequantized
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


# ---- shard_map ----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("check_vma", [True, False])
def test_apply_inside_a_shard_map_body(normal, kind, check_vma):
    mesh, x = make_mesh(kind), normal(16, 256)
    w = quantize(normal(256, 512) / 16, FORMATS["group"])
    want = dot(x, w)
    xs, ws = place(mesh, x, w, P("x", "y"), P("y"))

    def body(x, w):
        def layer(c, _):  # the carry has to vary over the same axes
            return c + lax.psum(dot(x, w), "y"), None

        start = jnp.zeros((x.shape[0], 512))
        start = lax.pcast(start, "x", to="varying") if check_vma else start
        return lax.scan(layer, start, None, length=2)[0]

    specs = shard_specs(w, [], ("y",), (), mesh)
    fn = jax.shard_map(
        body, mesh=mesh, in_specs=(P("x", "y"), specs), out_specs=P("x"), check_vma=check_vma
    )
    assert np.abs(jax.jit(fn)(xs, ws) - 2 * want).max() <= 1e-5 * np.abs(want).max()
    grad = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(fn(x, ws)))))(xs)
    want = jax.grad(lambda x: jnp.sum(jnp.sin(2 * dot(x, w))))(x)
    assert np.abs(grad - want).max() <= 1e-4 * np.abs(want).max()


@BOTH
def test_shard_map_inside_fn(normal, kind):
    mesh = make_mesh(kind)
    w = quantize(normal(256, 512) / 16, FORMATS["group"])

    def row(x, w):
        body = lambda x, w: lax.psum(x @ w, "y")
        specs = (P("x", "y"), P("y"))
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("x"))(x, w)

    def column(x, w):
        specs = (P("x"), P(None, "y"))
        out = P("x", "y")
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=specs, out_specs=out)(x, w)

    for fn, x_spec, w_spec in [(row, P("x", "y"), P("y")), (column, P("x"), P(None, "y"))]:
        x = normal(16, 256)
        xs, ws = place(mesh, x, w, x_spec, w_spec)
        with jax.set_mesh(mesh):
            compiled = jax.jit(qjax.apply(fn)).lower(xs, ws).compile()
            got = compiled(xs, ws)
            assert not qjax.explain(fn)(xs, ws).dequantized
        assert np.abs(got - dot(x, w)).max() <= 1e-5 * np.abs(got).max()
        wanted = [] if fn is column else [("all-reduce", "f32", 8 * 512)]
        assert collectives(compiled) == wanted
        grad = jax.jit(jax.grad(lambda x, fn=fn, ws=ws: jnp.sin(qjax.apply(fn)(x, ws)).sum()))(xs)
        want = jax.grad(lambda x: jnp.sin(dot(x, w)).sum())(x)
        assert np.abs(grad - want).max() <= 1e-4 * np.abs(want).max()


def test_shard_map_that_cuts_a_group_says_so(normal):
    mesh = make_mesh(AUTO)
    w = quantize(normal(64, 32), FORMATS["group"])

    def fn(x, w):
        body = lambda x, w: lax.psum(x @ w, ("x", "y"))
        specs = (P(None, ("x", "y")), P(("x", "y")))
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P())(x, w)

    x = normal(4, 64)
    (use,) = qjax.explain(fn)(x, w)
    assert use.how == "dequantized: its storage cannot be split as P(('x', 'y'),)"
    assert np.abs(qjax.apply(fn)(x, w) - dot(x, w)).max() <= 1e-4


def test_a_mesh_in_the_context_and_nothing_sharded(normal):
    w, x = quantize(normal(64, 32), FORMATS["group"]), normal(4, 64)
    for kind in (AUTO, EXPLICIT):
        with jax.set_mesh(make_mesh(kind)):
            assert np.abs(jax.jit(dot)(x, w) - x @ qjax.dequantize(w)).max() <= 1e-4
            assert np.abs(dot(x, w) - x @ qjax.dequantize(w)).max() <= 1e-4
