"""Laws of folding: scaled readers and divided targets leave the function as it was."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import qjax
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.transform import fold

D, F = 6, 8


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(3), seed), shape)


def randomized(params):
    """Biases and norm scales that are not 0 and 1: zeros hide what is not divided."""
    leaves, tree = jax.tree.flatten(params)
    new = [a + 0.3 * normal(*a.shape, seed=i) for i, a in enumerate(leaves)]
    return jax.tree.unflatten(tree, new)


def factors(group, seed=5):
    """Positive factors over two decades."""
    return jnp.exp(normal(*group.shape, seed=seed))


def close(got, want):
    scale = np.max(np.abs(np.asarray(want)))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale)


def assert_folds(fn, params, *args):
    """Asserts the law for every foldable group and for all at once; returns groups by reader."""
    groups = fold.find(fn)(params, *args)
    used = qjax.usage(fn)(params, *args)
    readers = [path for g in groups for path in g.readers]
    assert sorted(readers) == sorted(p.path for p in used.parameters.values() if p.is_multiplied)
    run = jax.jit(fn)
    want = run(params, *args)
    everything = params
    for i, g in enumerate(groups):
        if g.targets is None:
            assert g.why
            continue
        s = factors(g, seed=i)
        folded = fold.fold(params, g, s)
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, folded)
        assert sum(jax.tree.leaves(changed)) == len(g.readers) + len(g.targets)
        close(run(folded, *args), want)
        everything = fold.fold(everything, g, s)
    close(run(everything, *args), want)
    return {path: g for g in groups for path in g.readers}


def targets(group):
    assert group.targets is not None, group.why
    return {t.path for t in group.targets}


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_llama_folds_into_norms_up_projections_and_values(scan_layers, remat):
    config = ModelConfig(
        "qwen3", vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=6, qkv_bias=True, o_bias=True, qk_norm=True,
    )  # fmt: skip
    model = Decoder(config, scan_layers=scan_layers, remat=remat)
    tokens = jnp.arange(10).reshape(2, 5)
    params = randomized(model.init(jax.random.key(0), tokens))
    groups = assert_folds(model.apply, params, tokens)
    for layer in ["layers"] if scan_layers else ["layers_0", "layers_1"]:
        root = f"params/{layer}"
        q = groups[f"{root}/attn/q_proj/kernel"]
        assert q.readers == tuple(f"{root}/attn/{n}_proj/kernel" for n in "kqv")
        assert targets(q) == {f"{root}/attn_norm/scale"}
        o = groups[f"{root}/attn/o_proj/kernel"]
        assert targets(o) == {f"{root}/attn/v_proj/kernel", f"{root}/attn/v_proj/bias"}
        # Two query heads of 6 channels share a value head: 12 of 24 channels are free.
        assert (o.tied, o.channels) == (((2, 6),), 12)
        assert targets(groups[f"{root}/mlp/down_proj/kernel"]) == {f"{root}/mlp/up_proj/kernel"}
        assert targets(groups[f"{root}/mlp/gate_proj/kernel"]) == {f"{root}/mlp_norm/scale"}
    assert targets(groups["params/lm_head/kernel"]) == {"params/norm/scale"}


def test_a_tied_embedding_is_neither_scaled_nor_divided():
    config = ModelConfig(
        "llama", vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
        num_kv_heads=2, head_dim=8, tie_embeddings=True,
    )  # fmt: skip
    model, tokens = Decoder(config), jnp.arange(10).reshape(2, 5)
    params = randomized(model.init(jax.random.key(0), tokens))
    groups = assert_folds(model.apply, params, tokens)
    head = groups["params/embed/embedding"]
    assert head.targets is None
    assert head.weights is None
    assert "read more than once" in head.why
    assert groups["params/layers_0/attn/o_proj/kernel"].tied == ()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(h)
        h = nn.LayerNorm(name="norm2")(x)
        h = nn.Dense(F, name="up")(h)
        return x + nn.Dense(D, name="down")(nn.relu(h))


def test_flax_attention_and_layer_norm():
    x = normal(2, 5, D)
    params = randomized(Block().init(jax.random.key(0), x))
    groups = assert_folds(Block().apply, params, x)
    assert targets(groups["params/attn/query/kernel"]) == {
        "params/norm1/scale",
        "params/norm1/bias",
    }
    assert len(groups["params/attn/query/kernel"].readers) == 3
    out = groups["params/attn/out/kernel"]
    assert targets(out) == {"params/attn/value/kernel", "params/attn/value/bias"}
    assert out.channels == D
    assert targets(groups["params/down/kernel"]) == {"params/up/kernel", "params/up/bias"}


def test_an_nnx_model_through_its_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(D, rngs=rngs)
            self.up, self.gate = (nnx.Linear(D, F, rngs=rngs) for _ in range(2))
            self.down = nnx.Linear(F, D, rngs=rngs)

        def __call__(self, x):
            h = self.norm(x)
            return x + self.down(nnx.gelu(self.gate(h)) * self.up(h))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    groups = assert_folds(lambda s, x: nnx.merge(graph, s)(x), randomized(state), normal(3, D))
    assert groups["up/kernel"].readers == ("gate/kernel", "up/kernel")
    assert targets(groups["up/kernel"]) == {"norm/scale", "norm/bias"}
    assert targets(groups["down/kernel"]) == {"up/kernel", "up/bias"}


def test_a_bfloat16_model_casts_on_the_way():
    model = nn.Sequential([nn.LayerNorm(dtype=jnp.bfloat16), nn.Dense(F, dtype=jnp.bfloat16)])
    x = normal(2, D)
    params = model.init(jax.random.key(0), x)
    (group,) = fold.find(model.apply)(params, x)
    # Powers of two are exact in every float type.
    s = 2.0 ** jnp.round(2 * normal(D))
    got = model.apply(fold.fold(params, group, s), x)
    np.testing.assert_array_equal(got, model.apply(params, x))


# ---- plain functions -----------------------------------------------------------------------------

MLP = {"a": normal(D, F, seed=1), "bias": normal(F, seed=2), "b": normal(F, D, seed=3)}


def mlp(activation):
    return lambda p, x: activation(x @ p["a"] + p["bias"]) @ p["b"]


@pytest.mark.parametrize(
    "activation",
    [
        jax.nn.relu,
        jax.nn.leaky_relu,
        lambda x: jnp.where(x > 0, x, 0.0),
        lambda x: jax.nn.relu(x) ** 2,  # s goes through as its root
        lambda x: jnp.square(jax.nn.relu(x)),
        lambda x: jnp.sqrt(jnp.abs(x)),
        lambda x: x / 3.0 - 0.0,
        lambda x: jnp.repeat(x[:, None], 2, axis=1).sum(1),
        lambda x: jax.jit(jax.checkpoint(lambda y: -y.T))(x).T,
        lambda x: lax.optimization_barrier(x).astype(jnp.float32),
        lambda x: checkpoint_name(lax.stop_gradient(x), "x"),
        lambda x: lax.cumsum(jnp.concatenate([x[1:], x[:1]]), axis=0),
    ],
)
def test_what_is_homogeneous_lets_scales_through(activation):
    groups = assert_folds(mlp(activation), MLP, normal(3, D))
    assert targets(groups["b"]) == {"a", "bias"}


@pytest.mark.parametrize(
    ("activation", "why"),
    [
        (jax.nn.gelu, "is also read by"),
        (jax.nn.silu, "`logistic`"),
        (jnp.tanh, "`tanh`"),
        (jax.nn.relu6, "constant"),
        (lambda x: x + 1.0, "constant"),
        (lambda x: jax.nn.softmax(x), "`reduce_max`|`exp`"),
        (lambda x: x[:, ::-1], "mixes"),
        (lambda x: jnp.concatenate([x[:, 1:], x[:, :1]], axis=1), "mixes"),
        (lambda x: jnp.where(x > 0.5, x, 0.0), "`gt`"),
    ],
)
def test_what_is_not_does_not(activation, why):
    group = assert_folds(mlp(activation), MLP, normal(3, D))["b"]
    assert group.targets is None
    assert re.search(why, group.why), group.why
    # The weight can still be scaled, for an input that is divided when it is read.
    s = factors(group)
    x = normal(3, D)
    scaled = fold.scale_readers(MLP, group, s)
    hidden = activation(x @ MLP["a"] + MLP["bias"])
    close((hidden / s) @ scaled["b"], hidden @ MLP["b"])


def test_other_readers_of_a_value_are_noticed():
    p = MLP | {"g": normal(D, seed=4)}
    x = normal(3, D)

    def plain(p, x):
        h = x * p["g"]
        return jax.nn.relu(h @ p["a"]) @ p["b"]

    def residual(p, x):
        h = x * p["g"]
        return h + jax.nn.relu(h @ p["a"]) @ p["b"]

    def returned(p, x):
        h = x * p["g"]
        return jax.nn.relu(h @ p["a"]) @ p["b"] + 0 * x, h

    def shared_parameter(p, x):
        h = x * p["g"]
        return jax.nn.relu(h @ p["a"]) @ p["b"] + p["g"]

    def in_a_branch(p, x):
        h = x * p["g"]
        return lax.cond(x.sum() > 0, lambda: h, lambda: 2 * h) + jax.nn.relu(h @ p["a"]) @ p["b"]

    assert targets(assert_folds(plain, p, x)["a"]) == {"g"}
    for fn, why in [
        (residual, "also read by `add`"),
        (shared_parameter, "parameter g is also read by"),
        (in_a_branch, "also read by `cond`"),
    ]:
        group = assert_folds(fn, p, x)["a"]
        assert group.targets is None
        assert why in group.why
    group = fold.find(returned)(p, x)[0]
    assert group.targets is None
    assert "is returned" in group.why


def test_a_value_read_in_two_ways_is_refused():
    def fn(p, x):
        h = x * p["g"]
        return h @ p["a"] + h[:, ::-1] @ p["b"].T

    groups = assert_folds(fn, MLP | {"g": normal(D)}, normal(3, D))
    assert groups["a"].readers == ("a",)
    assert groups["a"].targets is None
    assert groups["b"].targets is None


def test_a_weight_read_twice_is_in_a_group_of_its_own():
    def fn(p, x):
        h = x * p["g"]
        return h @ p["a"] + (2 * h) @ p["a"]

    group = assert_folds(fn, MLP | {"g": normal(D)}, normal(3, D))["a"]
    assert (group.weights, group.targets) == (None, None)
    with pytest.raises(ValueError, match="a: it cannot be scaled alone: a is read more than once"):
        fold.scale_readers(MLP, group, jnp.ones(D))


@pytest.mark.parametrize("spelling", ["repeat", "einsum", "broadcast"])
def test_shared_value_heads_tie_their_query_heads(spelling):
    H, R, Dh = 2, 3, 4  # value heads, query heads that share one, channels
    p = {"v": normal(D, H, Dh), "bias": normal(H, Dh), "o": normal(H * R, Dh, D)}

    def fn(p, x, probabilities):
        v = jnp.einsum("sd,dhk->shk", x, p["v"]) + p["bias"]
        if spelling == "repeat":
            wide = jnp.repeat(v, R, axis=1)
            out = jnp.einsum("hrts,shk->thk", probabilities.reshape(H * R, 1, 5, 5), wide)
        elif spelling == "einsum":
            out = jnp.einsum("hrts,shk->thrk", probabilities, v).reshape(5, H * R, Dh)
        else:
            wide = jnp.broadcast_to(v[:, :, None], (5, H, R, Dh)).reshape(5, H * R, Dh)
            out = jnp.einsum("hts,shk->thk", probabilities.reshape(H * R, 5, 5), wide)
        return jnp.einsum("thk,hkd->td", out, p["o"])

    args = normal(5, D), jax.nn.softmax(normal(H, R, 5, 5))
    group = assert_folds(fn, p, *args)["o"]
    assert targets(group) == {"v", "bias"}
    assert (group.tied, group.channels) == (((R, Dh),), H * Dh)
    s = factors(group)
    want = jnp.exp(jnp.log(s).reshape(H, R, Dh).mean(1, keepdims=True))
    np.testing.assert_allclose(group.tie(s).reshape(H, R, Dh) / want, 1, rtol=1e-5)


def test_layers_of_a_scan_are_folded_each_by_its_own():
    L = 3
    p = {"g": normal(L, D), "a": normal(L, D, F), "b": normal(L, F, D), "same": normal(D)}

    def fn(p, x, use):
        def body(x, layer):
            h = jnp.tanh(x) * (p["same"] if use == "shared" else layer["g"])
            return x + jax.nn.relu(h @ layer["a"]) @ layer["b"], None

        layers = {k: p[k] for k in "gab"}
        return lax.scan(body, x, layers)[0]

    groups = assert_folds(lambda p, x: fn(p, x, "own"), p, normal(2, D))
    assert groups["a"].shape == (L, D)
    assert targets(groups["a"]) == {"g"}
    assert targets(groups["b"]) == {"a"}
    groups = assert_folds(lambda p, x: fn(p, x, "shared"), p, normal(2, D))
    assert "all steps of a scan share" in groups["a"].why
    assert targets(groups["b"]) == {"a"}


def test_a_layer_repeated_by_a_scan_is_folded_once():
    p = {"g": normal(D), "a": normal(D, D)}

    def fn(p, x):
        return lax.scan(lambda x, _: (jnp.tanh(x) * p["g"] @ p["a"], None), x, None, length=3)[0]

    assert targets(assert_folds(fn, p, normal(2, D))["a"]) == {"g"}


def test_values_carried_by_a_scan_are_out_of_reach():
    p = {"a": normal(3, D, D), "head": normal(D, F)}

    def fn(p, x):
        x, _ = lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, p["a"])
        return x @ p["head"]

    groups = assert_folds(fn, p, normal(2, D))
    assert "carry" in groups["a"].why
    assert "`scan`" in groups["head"].why


def test_experts_have_channels_of_their_own():
    E, C = 3, 4
    p = {"up": normal(E, D, F), "bias": normal(E, F), "down": normal(E, F, D)}

    def fn(p, x):
        h = jnp.einsum("ecd,edf->ecf", x, p["up"]) + p["bias"][:, None]
        return jnp.einsum("ecf,efd->ecd", jax.nn.relu(h), p["down"])

    group = assert_folds(fn, p, normal(E, C, D))["down"]
    assert group.shape == (E, F)
    assert targets(group) == {"up", "bias"}


def test_ragged_experts_share_their_channels():
    p = {"up": normal(3, D, F), "down": normal(3, F, D)}
    sizes = jnp.array([2, 0, 4])

    def fn(p, x):
        return lax.ragged_dot(jax.nn.relu(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)

    group = assert_folds(fn, p, normal(6, D))["down"]
    assert group.shape == (3, F)
    assert (targets(group), group.tied) == ({"up"}, ((3, F),))


def test_a_convolution_ties_its_window():
    model = nn.Sequential([nn.Conv(4, (3,)), nn.relu, nn.Conv(2, (3,))])
    x = normal(2, 7, 5)
    params = randomized(model.init(jax.random.key(0), x))
    group = assert_folds(model.apply, params, x)["params/layers_2/kernel"]
    assert (group.shape, group.tied) == ((12,), ((3, 4),))
    assert targets(group) == {"params/layers_0/kernel", "params/layers_0/bias"}


def test_a_looked_up_table_is_a_target():
    p = {"table": normal(7, D), "w": normal(D, F)}
    groups = assert_folds(lambda p, t: p["table"][t] @ p["w"], p, jnp.array([[1, 2], [3, 3]]))
    assert targets(groups["w"]) == {"table"}


def test_one_factor_for_all_channels_is_no_scaling():
    p = {"gain": normal(), "w": normal(D, F)}
    group = assert_folds(lambda p, x: (jnp.tanh(x) * p["gain"]) @ p["w"], p, normal(2, D))["w"]
    assert "only one factor" in group.why


def test_nothing_is_computed_and_fold_works_under_jit():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), MLP)
    x = normal(3, D)
    group = fold.find(mlp(jax.nn.relu))(shapes, jax.ShapeDtypeStruct(x.shape, x.dtype))[-1]
    s = factors(group)
    got = jax.jit(fold.fold, static_argnums=1)(MLP, group, s)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(fold.fold(MLP, group, s)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_scale_of_the_wrong_shape_is_refused():
    groups = fold.find(mlp(jax.nn.relu))(MLP, normal(3, D))
    with pytest.raises(ValueError, match=r"b: `s` must have the shape \(8,\) .* got \(6,\)"):
        fold.fold(MLP, groups[1], jnp.ones(D))
    with pytest.raises(ValueError, match="cannot be folded: it reaches input 1"):
        fold.fold(MLP, groups[0], jnp.ones(D))


def test_groups_print_as_a_table():
    text = str(fold.find(mlp(jax.nn.relu))(MLP, normal(3, D)))
    assert [line.split() for line in text.splitlines()][::2] == [
        ["weights", "channels", "into"],
        ["b", "8", "a,", "bias"],
    ]


# ---- random programs -----------------------------------------------------------------------------

T, W = 3, 4


def attention(p, q, a, b):
    return jax.nn.softmax(a @ b.T) @ (a @ p) @ q


def residual_layers(g, up, down, a, b):
    def body(c, layer):
        g, up, down = layer
        return c + 0.3 * jax.nn.relu((c * g) @ up) @ down, None

    return lax.scan(jax.checkpoint(body), a, (g, up, down))[0]


# Functions of parameters of the given shapes, and of two earlier values.
STEPS = [
    ([(W,)], lambda p, a, b: a * p),
    ([(W,)], lambda p, a, b: a + p),
    ([(W, W)], lambda p, a, b: a @ p),
    ([(W, W)], lambda p, a, b: jnp.einsum("td,nd->tn", a, p)),
    ([(2, 2, W)], lambda p, a, b: jnp.einsum("thk,hkd->td", a.reshape(T, 2, 2), p)),
    ([(W, 2)], lambda p, a, b: jnp.repeat(a @ p, 2, axis=1)),
    ([(W, W), (W, W)], lambda p, q, a, b: jax.nn.silu(a @ p) * (a @ q)),
    ([(W, W), (W, W)], attention),
    ([(2, W), (2, W, W), (2, W, W)], residual_layers),
    ([], lambda a, b: jax.nn.relu(a)),
    ([], lambda a, b: jax.nn.leaky_relu(a)),
    ([], lambda a, b: jnp.sqrt(jnp.square(a))),
    ([], lambda a, b: a + b),
    ([], lambda a, b: 0.5 * a * b),
    ([], lambda a, b: jnp.maximum(a, b)),
    ([], lambda a, b: jnp.where(a > 0, a, b)),
    ([], lambda a, b: a.reshape(T, 2, 2).swapaxes(1, 2).reshape(T, W)),
    ([], lambda a, b: a - a.mean(0, keepdims=True)),
    ([], lambda a, b: jnp.tanh(a)),
]


def random_program(seed):
    """A function of 4 to 10 random steps, with residuals and now and then a shared parameter."""
    rng = np.random.default_rng(seed)
    params, steps = {}, []
    for n in range(rng.integers(3, 10)):
        shapes, step = STEPS[2 if n == 0 else rng.integers(len(STEPS))]
        names = []
        for shape in shapes:
            shared = [k for k, v in params.items() if v.shape == shape and rng.random() < 0.1]
            names.append(shared[0] if shared else f"p{len(params)}")
            params.setdefault(names[-1], jnp.asarray(0.3 + 0.5 * rng.standard_normal(shape)))
        latest = n if rng.random() < 0.75 else rng.integers(n + 1)
        steps.append((step, names, latest, rng.integers(n + 1)))
    params["head"] = jnp.asarray(rng.standard_normal((W, W)))

    def fn(p, x):
        values = [x]
        for step, names, a, b in steps:
            values.append(step(*(p[k] for k in names), values[a], values[b]))
        return values[-1] @ p["head"]

    return fn, jax.tree.map(lambda a: a.astype(jnp.float32), params)


def test_random_programs_stay_what_they_are():
    folded = 0
    for seed in range(24):
        fn, params = random_program(seed)
        groups = assert_folds(fn, params, normal(T, W, seed=seed))
        folded += sum(g.targets is not None for g in groups.values())
    assert folded > 20
