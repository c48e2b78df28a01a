"""A function with adapters is the function of the merged weights, in value and in gradient."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import Format, Policy, Rule, lora
from qjax.models import Decoder, ModelConfig

NF4 = Format("nf4", 16, scale=Format("uint8", group_size=1, group_columns=16))
FLOAT_AND_PACKED = pytest.mark.parametrize("fmt", [None, NF4], ids=["float", "nf4-dq"])


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(jax.random.key(3), seed), shape, dtype)


def trained(adapters, seed=0, dtype=jnp.float32):
    """Returns adapters with values as training may leave them: B is not 0."""
    leaves, tree = jax.tree.flatten(adapters)
    draws = [0.3 * normal(*x.shape, seed=seed + i) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, [x.astype(dtype) for x in draws])


def dense(base, adapters):
    """Returns the float weights with their updates, the plain way."""

    def one(path, leaf):
        adapter = adapters.get("/".join(str(k.key) for k in path))
        w = qjax.dequantize(leaf)
        if adapter is None:
            return w
        update = (
            adapter.alpha / adapter.rank * jnp.einsum("...kr,...rn->...kn", adapter.a, adapter.b)
        )
        return w + adapter.layout.from_canonical(update)

    return jax.tree_util.tree_map_with_path(one, base, is_leaf=qjax.is_qtensor)


def assert_close(got, want, k=64, depth=1):
    """Compares trees up to the order of sums of k terms, `depth` products deep (float32)."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        bound = 4 * depth * k**1.5 * np.finfo(np.float32).eps * max(np.abs(b).max(), 1e-6)
        assert np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max() <= bound


def check(fn, params, layouts, *args, fmt=NF4, depth=2, traced=True):
    """Asserts values and gradients of adapters against the merged float weights."""
    used = qjax.usage(fn)(params, *args) if traced else None
    base = params
    if fmt is not None:
        base = qjax.quantize(params, fmt, usage=used)
    adapters = trained(lora.init(jax.random.key(0), base, "*", rank=3, alpha=6, usage=used))
    assert {path: ad.layout.letters for path, ad in adapters.items()} == layouts

    def value(run):
        loss = lambda adapters: jnp.sum(jnp.sin(run(adapters)))
        return jax.jit(jax.value_and_grad(loss))(adapters)

    got = value(lambda ad: lora.apply(fn)(base, ad, *args))
    want = value(lambda ad: fn(dense(base, ad), *args))
    assert_close(got, want, depth=depth)
    return lora.explain(fn)(base, adapters, *args)


@pytest.mark.parametrize(
    ("equation", "x", "w", "letters", "fmt"),
    [
        ("mk,kn->mn", (5, 64), (64, 32), "kn", None),
        ("mk,kn->mn", (5, 64), (64, 32), "kn", NF4),
        ("mk,nk->nm", (5, 64), (32, 64), "nk", NF4),
        ("btd,dhk->bthk", (2, 5, 64), (64, 4, 16), "knn", NF4),
        ("bthk,hkd->btd", (2, 5, 4, 16), (4, 16, 64), "kkn", NF4),
        ("emk,ekn->men", (3, 5, 32), (3, 32, 16), "kn", None),
        ("emk,ekn->men", (3, 5, 32), (3, 32, 16), "kn", NF4),
        ("mek,ekn->mn", (5, 3, 32), (3, 32, 16), "kkn", None),
    ],
)
def test_a_product_gets_the_adapters_part(equation, x, w, letters, fmt):
    fn = lambda p, x: jnp.einsum(equation, x, p["w"])
    check(fn, {"w": normal(*w)}, {"w": letters}, normal(*x, seed=1), fmt=fmt)


@pytest.mark.parametrize("element", ["int8", "uint4"])
def test_any_format_may_be_the_base(element):
    fmt = Format(element, 16, offset="bfloat16" if element == "uint4" else None)
    check(_fn, {"w": normal(64, 32)}, {"w": "kn"}, normal(5, 64, seed=1), fmt=fmt)


def test_the_transposed_product_and_the_product_share_an_adapter():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
    check(fn, {"w": normal(64, 32)}, {"w": "kn"}, normal(5, 64, seed=1))


@FLOAT_AND_PACKED
def test_adapters_follow_the_weight_through_control_flow(fmt):
    def fn(p, x):
        layer = lambda x, w: (x + jnp.tanh(x @ w), None)
        x, _ = lax.scan(jax.checkpoint(layer), x, p["stack"])  # stacked
        x = lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: x @ (2 * jnp.eye(32)), x)
        q, k = jnp.split(x @ p["qk"], 2, axis=1)  # the product is cut
        q2 = x @ p["qk"][:, :32]  # the weight is cut
        x, _ = lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, length=2)  # constant
        return x + q + q2 + k + p["stack"][1] @ jnp.ones(32) + jnp.einsum("mk,kn", x, p["stack"][0])

    params = {"stack": normal(3, 32, 32), "w": normal(32, 32, seed=1), "qk": normal(32, 64, seed=2)}
    fmt = fmt and dataclasses.replace(fmt, scale="float32")  # so that columns can be cut
    layouts = {"stack": "kn", "w": "kn", "qk": "kn"}
    check(fn, params, layouts, normal(5, 32, seed=3), fmt=fmt, depth=12)


@FLOAT_AND_PACKED
def test_experts_have_adapters(fmt):
    sizes = jnp.array([2, 0, 5])
    fn = lambda p, x: lax.ragged_dot(x, p["w"], sizes)
    explained = check(fn, {"w": normal(3, 32, 16)}, {"w": "kn"}, normal(7, 32, seed=1), fmt=fmt)
    assert [use.op for use in explained] == ["ragged_dot"]


def test_experts_picked_by_index_have_adapters():
    fn = lambda p, x: jnp.einsum("mk,mkn->mn", x, p["w"][jnp.array([2, 0, 2, 1])])
    fmt = dataclasses.replace(NF4, scale="float32")  # an index out of range makes its scale NaN
    check(fn, {"w": normal(3, 32, 16)}, {"w": "kn"}, normal(4, 32, seed=1), fmt=fmt, traced=False)


def test_a_custom_derivative_of_the_weight_is_refused_by_path():
    product = jax.custom_vjp(lambda x, w: x @ w)
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, ct: (ct @ kept[1].T, 0 * kept[1]))
    fn = lambda p, x: product(x, p["w"])
    base, x = qjax.quantize({"w": normal(64, 32)}, NF4), normal(5, 64, seed=1)
    adapters = trained(lora.init(jax.random.key(0), base, "w", rank=2, alpha=2))
    assert_close(lora.apply(fn)(base, adapters, x), x @ dense(base, adapters)["w"])
    with pytest.raises(NotImplementedError, match=r"w: has an adapter.*custom derivative"):
        jax.grad(lambda ad: jnp.sum(lora.apply(fn)(base, ad, x)))(adapters)


def test_nothing_changes_at_first_and_by_paths_without_an_adapter():
    fn = lambda p, x: x @ p["a"] @ p["b"]
    base = qjax.quantize({"a": normal(64, 32), "b": normal(32, 64, seed=1)}, NF4)
    x = normal(5, 64, seed=2)
    adapters = lora.init(jax.random.key(0), base, "a", rank=4)
    assert list(adapters) == ["a"]
    assert adapters["a"].a.dtype == adapters["a"].b.dtype == jnp.bfloat16
    assert jnp.array_equal(lora.apply(fn)(base, adapters, x), qjax.apply(fn)(base, x))
    assert jnp.array_equal(lora.apply(fn)(base, {}, x), qjax.apply(fn)(base, x))


def test_the_draw_of_an_adapter_depends_on_its_path_alone():
    base = {"a": normal(64, 32), "b": normal(64, 32)}
    both = lora.init(jax.random.key(0), base, "*", rank=4)
    alone = lora.init(jax.random.key(0), base, "b", rank=4)
    assert jnp.array_equal(both["b"].a, alone["b"].a)
    assert not jnp.array_equal(both["a"].a, both["b"].a)
    bound = 1 / 8  # 1 / sqrt(K)
    assert bound * 0.9 < jnp.abs(both["a"].a).max() <= bound


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_scale_is_alpha_over_rank_or_its_root(stabilized, scale):
    base, x = {"w": jnp.zeros((16, 16))}, normal(2, 16)
    adapters = lora.init(jax.random.key(0), base, "w", rank=4, alpha=8, rank_stabilized=stabilized)
    adapters = trained(adapters)
    got = lora.apply(lambda p, x: x @ p["w"])(base, adapters, x)
    assert_close(got, scale * (x @ adapters["w"].a) @ adapters["w"].b)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 32)
        block = nn.remat(Block, prevent_cse=False)
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return embed.attend(scan()(embed(tokens), None)[0])


def test_linen_scan_and_remat_with_a_tied_embedding():
    module, tokens = Stack(), jnp.arange(8).reshape(2, 4)
    variables = module.init(jax.random.key(0), tokens)
    used = qjax.usage(module.apply)(variables, tokens)
    base = qjax.quantize(variables, Policy([Rule("*bias"), Rule("*", NF4)]), usage=used)
    adapters = trained(lora.init(jax.random.key(0), base, "*/kernel", rank=3, alpha=6))
    assert len(adapters) == 2
    loss = lambda run: lambda ad: jnp.sum(jnp.sin(run(ad)))
    got = jax.grad(loss(lambda ad: lora.apply(module.apply)(base, ad, tokens)))(adapters)
    want = jax.grad(loss(lambda ad: module.apply(dense(base, ad), tokens)))(adapters)
    assert_close(got, want, depth=16)
    uses = lora.explain(module.apply)(base, adapters, tokens)
    assert not uses.dequantized
    of = {use.path.split("/")[-2]: use.implementation for use in uses if use.op == "dot_general"}
    assert {name for name, how in of.items() if "adapter of rank 3" in how} == {"up", "down"}
    embedded = lora.init(jax.random.key(0), base, "*embedding", rank=3)
    with pytest.raises(NotImplementedError, match=r"embedding.*gather"):
        lora.apply(module.apply)(base, embedded, tokens)


def test_nnx_through_split_and_merge():
    model = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    fn = lambda params, x: nnx.merge(graph, params)(x)
    base, x = qjax.quantize(params, Policy([Rule("*kernel", NF4)])), normal(5, 32)
    adapters = trained(lora.init(jax.random.key(0), base, "kernel", rank=2, alpha=4))
    want = (
        fn(params, x)
        - x @ params["kernel"][...]
        + x
        @ dense({"kernel": jax.tree.leaves(base, is_leaf=qjax.is_qtensor)[-1]}, adapters)["kernel"]
    )
    assert_close(lora.apply(fn)(base, adapters, x), want)


# ---- dropout ------------------------------------------------------------------------------------


def test_dropout_drops_the_adapters_input_alone_and_by_its_key():
    base, x, fn = {"w": normal(64, 16)}, normal(1000, 64, seed=1), lambda p, x: x @ p["w"]
    adapters = trained(lora.init(jax.random.key(0), base, "w", rank=4, alpha=4))
    run = lambda key: lora.apply(fn, dropout=0.25, key=key)(base, adapters, x)
    y = run(jax.random.key(1))
    assert jnp.array_equal(y, run(jax.random.key(1)))
    assert not jnp.array_equal(y, run(jax.random.key(2)))
    # What is left of x is in the span of A @ B; with A of full row rank it can be read off.
    square = {"w": dataclasses.replace(adapters["w"], a=jnp.eye(64), b=normal(64, 16), alpha=64.0)}
    square = {"w": dataclasses.replace(square["w"], b=jnp.eye(64, 16))}
    y = lora.apply(fn, dropout=0.25, key=jax.random.key(1))(base, square, x) - x @ base["w"]
    kept = jnp.abs(y) > 1e-3
    share = float(kept.mean())
    assert (
        abs(share - 0.75) < 5 * (0.25 * 0.75 / kept.size) ** 0.5 + 2e-3
    )  # |x| < 1e-3 looks dropped
    np.testing.assert_allclose(y[kept], x[:, :16][kept] / 0.75, rtol=1e-3, atol=1e-3)


def test_stacked_layers_and_uses_drop_independently():
    base = {"w": jnp.zeros((3, 16, 16))}
    adapters = lora.init(jax.random.key(0), base, "w", rank=16, alpha=16, dtype=jnp.float32)
    eye = jnp.broadcast_to(jnp.eye(16), (3, 16, 16))
    adapters = {"w": dataclasses.replace(adapters["w"], a=eye, b=eye)}

    def fn(p, x):
        return lax.scan(lambda c, w: (c, (x @ w, x @ w)), 0, p["w"])[1]

    run = lora.apply(fn, dropout=0.5, key=jax.random.key(1))
    masks = jnp.stack(run(base, adapters, jnp.ones((8, 16)))).reshape(6, -1)  # use, layer
    for i in range(6):
        for j in range(i):
            assert 0.3 < float((masks[i] == masks[j]).mean()) < 0.7
    # Recomputed backwards, the mask is the same: the loss is linear in b, so <b, db> is its value.
    loss = lambda ad: jnp.sum(jax.checkpoint(lambda ad: run(base, ad, jnp.ones((8, 16)))[0])(ad))
    value, grad = jax.value_and_grad(loss)(adapters)
    assert jnp.allclose(jnp.vdot(grad["w"].b, adapters["w"].b), value, rtol=1e-5)


def test_dropout_says_what_it_needs():
    with pytest.raises(ValueError, match="needs a `key`"):
        lora.apply(lambda p: p, dropout=0.1)
    with pytest.raises(ValueError, match=r"below 1, got 1\.0"):
        lora.apply(lambda p: p, dropout=1.0, key=jax.random.key(0))


# ---- batching and meshes ------------------------------------------------------------------------


def test_every_row_may_have_an_adapter_of_its_own():
    base, x, fn = qjax.quantize({"w": normal(64, 16)}, NF4), normal(4, 64, seed=1), _fn
    made = [trained(lora.init(jax.random.key(0), base, "w", rank=3), seed=9 * i) for i in range(2)]
    rows = jnp.array([0, 1, 1, 0])
    each = lora.select(lora.stack(made), rows)
    got = jax.vmap(lambda ad, x: lora.apply(fn)(base, ad, x))(each, x)
    want = jnp.stack([lora.apply(fn)(base, made[i], x) for i, x in zip(rows, x, strict=True)])
    assert_close(got, want)
    # One packed product for all rows.
    jaxpr = jax.make_jaxpr(jax.vmap(lambda ad, x: lora.apply(fn)(base, ad, x)))(each, x)
    (eqn,) = _products(jaxpr.jaxpr)
    assert eqn.invars[0].aval.shape == (4, 64)


def _products(jaxpr):
    """Returns the packed products of a jaxpr and of those in it, as what derivatives redo is."""
    inner = [e.params["jaxpr"] for e in jaxpr.eqns if "jaxpr" in e.params]
    own = [e for e in jaxpr.eqns if e.primitive.name == "packed_dot"]
    return own + [e for j in inner for e in _products(getattr(j, "jaxpr", j))]


def _fn(p, x):
    return x @ p["w"]


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("packed", "spec"),
    [
        (False, P("data", "model")),
        (True, P(None, "model")),
        (True, P("model")),
        (True, P("data", "model")),
    ],
    ids=str,
)
def test_a_step_on_eight_devices_is_the_step_on_one(mesh, packed, spec):
    w, x = normal(64, 64), normal(8, 64, seed=1)
    fmt = dataclasses.replace(NF4, scale="float32")
    base = qjax.quantize({"w": w}, fmt) if packed else {"w": w}
    sharded = jax.device_put({"w": w}, NamedSharding(mesh, spec))
    sharded = qjax.quantize(sharded, fmt) if packed else sharded
    adapters = lora.init(jax.random.key(0), base, "w", rank=4, dtype=jnp.float32)
    placed = lora.init(jax.random.key(0), sharded, "w", rank=4, dtype=jnp.float32)
    split = (*spec, None, None)[:2]
    assert placed["w"].a.sharding.is_equivalent_to(NamedSharding(mesh, P(split[0])), 2)
    assert placed["w"].b.sharding.is_equivalent_to(NamedSharding(mesh, P(None, split[1])), 2)

    @jax.jit
    def step(base, adapters, x, key):
        run = lora.apply(_fn, dropout=0.1, key=key)
        loss = lambda ad: jnp.mean(jnp.tanh(run(base, ad, x)) ** 2)
        return jax.value_and_grad(loss)(trained(adapters))

    want = step(base, adapters, x, jax.random.key(2))
    got = step(
        sharded, placed, jax.device_put(x, NamedSharding(mesh, P("data"))), jax.random.key(2)
    )
    assert_close(got, want, depth=4)


@pytest.mark.slow
def test_a_step_of_the_scanned_decoder_on_eight_devices_is_the_step_on_one(mesh):
    config = ModelConfig(
        "llama", vocab_size=32, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
        num_kv_heads=4, head_dim=16, tie_embeddings=True,
    )  # fmt: skip
    model = Decoder(config, scan_layers=True, remat=True)
    tokens = jnp.arange(32).reshape(8, 4)
    params = model.init(jax.random.key(0), tokens)["params"]
    fmt = dataclasses.replace(NF4, scale="float32")
    policy = Policy([Rule("*_proj/kernel", fmt)])

    def split(path, leaf):  # Megatron's way: q, k, v, up, gate by columns, o and down by rows
        name = "/".join(k.key for k in path)
        if not name.endswith("_proj/kernel"):
            return jax.device_put(leaf, NamedSharding(mesh, P()))
        spec = P(None, "model") if "/o_" in name or "down" in name else P(None, None, "model")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    base = qjax.quantize(params, policy)
    sharded = qjax.quantize(jax.tree_util.tree_map_with_path(split, params), policy)
    fn = lambda params, tokens: model.apply({"params": params}, tokens)

    @jax.jit
    def step(base, adapters, tokens):
        run = lora.apply(fn, dropout=0.1, key=jax.random.key(2))
        loss = lambda ad: jnp.mean(jnp.tanh(run(base, ad, tokens)) ** 2)
        return jax.value_and_grad(loss)(trained(adapters))

    of = lambda base: lora.init(jax.random.key(0), base, "*_proj/kernel", rank=4, dtype=jnp.float32)
    want = step(base, of(base), tokens)
    got = step(sharded, of(sharded), jax.device_put(tokens, NamedSharding(mesh, P("data"))))
    assert_close(got, want, depth=16)
    kernel = sharded["layers"]["mlp"]["up_proj"]["kernel"].data
    assert kernel.sharding.spec == P(None, None, "model")  # it stays where it is


def test_shardings_may_be_part_of_the_types():
    mesh = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    with jax.set_mesh(mesh):
        w = jax.device_put(normal(64, 32), P(None, "model"))
        x = jax.device_put(normal(8, 64, seed=1), P("data"))
        base = qjax.quantize({"w": w}, dataclasses.replace(NF4, scale="float32"))
        adapters = lora.init(jax.random.key(0), base, "w", rank=4, dtype=jnp.float32)
        eye = jnp.eye(4, 32)
        adapters = {
            "w": dataclasses.replace(adapters["w"], b=jax.device_put(eye, P(None, "model")))
        }
        y = jax.jit(lora.apply(_fn))(base, adapters, x)
    assert jax.typeof(y).sharding.spec == P("data", "model")
    local = jax.tree.map(np.asarray, (base, adapters, x))
    assert_close(np.asarray(y), lora.apply(_fn)(*jax.tree.map(jnp.asarray, local)))


def test_init_is_pure():
    base = qjax.quantize({"w": normal(64, 32)}, NF4)
    init = lambda base: lora.init(jax.random.key(0), base, "w", rank=4)
    eager, jitted, planned = init(base), jax.jit(init)(base), jax.eval_shape(init, base)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted) == jax.tree.structure(planned)
    assert jnp.array_equal(eager["w"].a, jitted["w"].a)


@pytest.mark.parametrize("packed", [False, True], ids=["float", "nf4-dq"])
def test_adapters_inside_of_shard_map(mesh, packed):
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data", "model"), P("model")), out_specs=P("data")
    )
    def rows(x, w):
        return lax.psum(x @ w, "model")

    fn = lambda p, x: rows(x, p["w"])
    w, x = normal(64, 32), normal(8, 64, seed=1)
    base = (
        qjax.quantize({"w": w}, dataclasses.replace(NF4, scale="float32")) if packed else {"w": w}
    )
    adapters = trained(lora.init(jax.random.key(0), base, "w", rank=4, alpha=4))
    loss = lambda run: jax.grad(lambda ad: jnp.sum(jnp.sin(run(ad))))(adapters)
    got = loss(lambda ad: lora.apply(fn)(base, ad, x))
    want = loss(lambda ad: x @ dense(base, ad)["w"])
    assert_close(got, want, depth=2)
    with pytest.raises(NotImplementedError, match="same mask on every shard"):
        lora.apply(fn, dropout=0.1, key=jax.random.key(0))(base, adapters, x)


# ---- errors -------------------------------------------------------------------------------------


def test_errors_name_the_path_and_the_remedy():
    base = {"a": normal(64, 32), "table": jnp.ones((9, 4)), "ids": jnp.ones((3, 3), int)}
    base["norm"] = jnp.ones(4)
    init = functools.partial(lora.init, jax.random.key(0), base)
    with pytest.raises(ValueError, match=r"'\*proj' matches no weight of the base.*'a'"):
        init(["a", "*proj"], rank=2)
    with pytest.raises(ValueError, match=r"'norm' matches no weight.* 'norm' has fewer than two"):
        init("norm", rank=2)
    with pytest.raises(ValueError, match=r"a: `rank` must be from 1 to 32.*got 33"):
        init("a", rank=33)
    with pytest.raises(ValueError, match=r"ids: .*int32, not float"):
        init("ids", rank=2)
    used = qjax.usage(lambda p: p["table"] + 1)(base)
    with pytest.raises(ValueError, match=r"table: .*no weight of a product: used by add"):
        init("table", rank=2, usage=used)
    adapters = init("a", rank=2)
    run = lora.apply(lambda p, x: x @ p["a"])
    with pytest.raises(ValueError, match=r"a: an adapter with A \[64, 2\].*\[32, 64\]"):
        run({"a": base["a"].T}, adapters, jnp.ones(32))
    with pytest.raises(
        ValueError, match=r"a: has an adapter, but the base has no such weight.*'b'"
    ):
        run({"b": base["a"]}, adapters, jnp.ones(64))
    with pytest.raises(TypeError, match="dict from paths to Adapters"):
        run(base, {"a": 1}, jnp.ones(64))
    with pytest.raises(NotImplementedError, match=r"a: has an adapter.*`add`"):
        lora.apply(lambda p: p["a"] + 1)(base, adapters)
    other = lora.init(
        jax.random.key(0),
        base,
        "a",
        rank=2,
        usage=qjax.usage(lambda p, x: p["a"] @ x)(base, jnp.ones(32)),
    )
    with pytest.raises(ValueError, match="a: the adapter was made for a weight of layout 'nk'"):
        run(qjax.quantize({"a": base["a"]}, Format("int8")), other, jnp.ones(64))
