"""The law of fake quantization: its value is that of the packed model, its derivative straight."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
from qjax import Format, Policy, Rule, numerics, qtensor
from qjax.ops import activation

FORMATS = {
    "int4": Format("int4", 16, scale="bfloat16"),
    "int4 signed": Format("int4", 16, scale="bfloat16", rule="signed_absmax"),
    "int3 mse": Format("int3", 32, scale="float16", rule="mse"),
    "uint4 zero point": Format("uint4", 16, zero_point=True),
    "int2 blocks": Format("int2", 16, 8),
    "nf4 dq": Format("nf4", 8, scale=Format("uint8", group_size=1, group_columns=8)),
    "mxfp4": Format("e2m1", 32, scale="e8m0"),
    "int8": Format("int8"),
    "e4m3": Format("e4m3", activation="e4m3"),
    "w8a8": Format("int8", activation="int8"),
    "w4a4": Format("int4", 16, scale="bfloat16", activation="int4"),
    "w4a8u": Format("int4", 16, activation="uint8", activation_scale="tensor"),
    "w2a8": Format("int2", 16, activation="int8"),
    "w4a8 groups": Format("int4", 16, activation="int8", activation_scale="group"),
    "bitnet": Format("ternary", None, None, activation="int8"),
    "llm.int8": Format("int8", activation="int8", outliers=2.0),
}


# Others take the same paths through the code.
SLOW = {"int3 mse", "int2 blocks", "mxfp4", "e4m3", "w4a8u", "w2a8"}
EVERY = [
    pytest.param(fmt, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, fmt in FORMATS.items()
]


def assert_bitwise(fn, params, *args, fmt=None, policy=None, **how):
    """Asserts that fake-quantized `fn` is the packed one, bit for bit; returns the value."""
    policy = policy or fmt
    qparams = jax.jit(lambda p: qjax.quantize(p, policy, **how))(params)
    want = jax.jit(qjax.apply(fn))(qparams, *args)
    got = jax.jit(qjax.fake_quant(fn, policy, **how))(params, *args)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    return got


def mlp(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


@pytest.fixture
def params(normal):
    return {"up": normal(64, 32), "down": normal(32, 64, seed=1)}


@pytest.mark.parametrize("fmt", EVERY)
def test_value_is_that_of_the_packed_model(fmt, params, normal):
    assert_bitwise(mlp, params, normal(3, 5, 64, seed=2), fmt=fmt)


@pytest.mark.parametrize("fmt", EVERY)
def test_gradients_are_the_straight_through_formulas(fmt, normal):
    """dL/dW = (x̂ᵀ dy) 1[|w| <= clip], dL/dx = dy Ŵᵀ 1[x not clipped], to the last rounding."""
    w, x, dy = normal(64, 32), normal(5, 64, seed=1), normal(5, 32, seed=2)
    w = w.at[0].set(2.5)  # so that clipping rules clip
    _, pull = jax.vjp(qjax.fake_quant(lambda w, x: x @ w, fmt), w, x)
    dw, dx = pull(dy)
    qt = qjax.quantize(w, fmt)
    seen = activation.rounded(x, qt)
    u = np.asarray(qtensor.scaled(w, *qtensor.read_scales(qt), fmt))
    element, slack = numerics.get_element(fmt.element), numerics.half_step(fmt.element)
    if element.kind == "float":
        slack *= 448 / 256
    is_inside = (u >= element.qmin - slack) & (u <= element.qmax + slack)
    if fmt.scale_rule == "absmean":
        is_inside[:] = True
    want_w = np.where(is_inside, np.asarray(seen.value, np.float64).T @ np.asarray(dy), 0)
    want_x = np.asarray(dy, np.float64) @ np.asarray(qjax.dequantize(qt), np.float64).T
    if fmt.activation == "uint8":
        want_x = np.where(x >= 0, want_x, 0)
    np.testing.assert_array_equal(np.asarray(dw) == 0, want_w == 0)
    np.testing.assert_allclose(dw, want_w, atol=1e-5)
    np.testing.assert_allclose(dx, want_x, atol=64 * 1e-6 * np.abs(want_x).max())


def test_clipped_weights_get_no_gradient():
    # 2-bit levels are -2 .. 1 times the scale; rounding to them ends at 1.5 and at -2.5.
    fmt = Format("int2", 4, rule="absmax_full")  # scale = 1.5 / 1.5
    w = jnp.array([[1.5, 1.4, -1.5, 0.0]]).T
    grad = jax.grad(lambda w: qjax.fake_quant(lambda w, x: (x @ w).sum(), fmt)(w, jnp.ones((1, 4))))
    assert grad(w).ravel().tolist() == [1, 1, 1, 1]
    grad_mse = jax.grad(
        lambda w: qjax.fake_quant(lambda w, x: (x @ w).sum(), Format("int2", rule="mse"))(
            w, jnp.ones((1, 9))
        )
    )
    w = jnp.concatenate([jnp.full((8, 1), 0.1), jnp.full((1, 1), 5.0)])
    scale = float(qjax.quantize(w, Format("int2", rule="mse")).scale[0, 0])
    inside = (w / scale >= -2.5) & (w / scale <= 1.5)
    assert (grad_mse(w) == inside).all()


# ---- functions ----------------------------------------------------------------------------------


def scanned(p, x):
    def layer(x, w):
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x, p)[0]


def looped(p, x):
    for i in range(3):
        x = x + jax.nn.gelu(x @ p["up"][i]) @ p["down"][i]
    return x


@pytest.mark.parametrize("name", ["int4", "w4a4", "bitnet"])
def test_scan_and_remat(name, normal):
    fmt = FORMATS[name]
    p = {"up": normal(3, 64, 32) / 8, "down": normal(3, 32, 64, seed=1) / 8}
    x = normal(4, 64, seed=2)
    y = assert_bitwise(scanned, p, x, fmt=fmt)
    np.testing.assert_array_equal(assert_bitwise(jax.checkpoint(scanned), p, x, fmt=fmt), y)
    grads = [
        jax.jit(jax.grad(lambda p, fn=fn: (qjax.fake_quant(fn, fmt)(p, x) ** 2).sum()))(p)
        for fn in (scanned, jax.checkpoint(scanned), looped)
    ]
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads[0], other)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.Conv(32, (1, 1), strides=2)(x)
        x = nn.relu(nn.Conv(32, (3, 3), feature_group_count=4)(x))
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.mark.parametrize("name", ["int4", "w4a4", "w8a8"])
def test_linen_convolutions(name, normal):
    model, x = CNN(), normal(2, 8, 8, 16)
    variables = model.init(jax.random.key(0), x)
    used = qjax.usage(model.apply)(variables, x)
    fmt = FORMATS[name]
    fmt = Format("int4", None, activation=fmt.activation) if fmt.group_size else fmt
    policy = Policy([Rule("*kernel", fmt)])
    assert_bitwise(model.apply, variables, x, policy=policy, usage=used)
    fake = qjax.fake_quant(model.apply, policy, usage=used)
    grads = jax.jit(jax.grad(lambda v: (fake(v, x) ** 2).sum()))(variables)
    assert all((g != 0).mean() > 0.5 for g in jax.tree.leaves(grads))


def test_a_rounded_convolution_is_that_of_the_rounded_activation(normal):
    x, w = normal(2, 5, 5, 8), normal(3, 3, 8, 4, seed=1)
    fmt = Format("int8", activation="int4")
    qw = qjax.quantize(w, Policy([Rule("*", fmt, layout="kkkn")]))
    conv = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    step = jnp.abs(x).max(-1, keepdims=True) / 7  # of every position
    want = conv(qjax.dequantize(qw), jnp.round(x / step) * step)
    np.testing.assert_allclose(qjax.apply(conv)(qw, x), want, atol=1e-5)
    (use,) = qjax.explain(conv)(qw, x)
    assert "int4 activations per token, rounded in float" in use.implementation


def test_nnx(normal):
    module = nnx.Sequential(
        nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 8, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(module, nnx.Param)
    policy = Policy([Rule("*kernel", FORMATS["w4a4"])])
    fn = lambda p, x: nnx.merge(graph, p)(x)
    x = normal(4, 64)
    assert_bitwise(fn, params, x, policy=policy)
    grads = jax.grad(lambda p: qjax.fake_quant(fn, policy)(p, x).sum())(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_tied_embedding(normal):
    p = {"embed": normal(50, 32), "w": normal(32, 32, seed=1)}
    fn = lambda p, t: p["embed"][t] @ p["w"] @ p["embed"].T
    tokens = jnp.array([3, 3, 7])
    used = qjax.usage(fn)(p, tokens)
    fmt = Format("int4", 16)
    assert_bitwise(fn, p, tokens, fmt=fmt, usage=used)
    # Both uses contribute: the lookup adds to the rows that were looked up.
    grad = jax.grad(lambda p: qjax.fake_quant(fn, fmt, usage=used)(p, tokens).sum())(p)["embed"]
    only_head = lambda p, t: jax.lax.stop_gradient(p["embed"])[t] @ p["w"] @ p["embed"].T
    head = jax.grad(lambda p: qjax.fake_quant(only_head, fmt, usage=used)(p, tokens).sum())(p)
    rows = np.flatnonzero(np.abs(np.asarray(grad - head["embed"])).max(1) > 1e-6)
    assert rows.tolist() == [3, 7]


def test_experts(normal):
    p = {"w": normal(4, 32, 16)}
    sizes = jnp.array([2, 0, 3, 1])
    fn = lambda p, x: jax.lax.ragged_dot(x, p["w"], sizes)
    x = normal(6, 32, seed=1)
    fmt = Format("int4", 16)
    assert_bitwise(fn, p, x, fmt=fmt)
    grad = jax.grad(lambda p: qjax.fake_quant(fn, fmt)(p, x).sum())(p)["w"]
    assert (np.abs(grad).max((1, 2)) > 0).tolist() == [True, False, True, True]
    pick = lambda p, i: p["w"][i]
    fn = lambda p, x: jnp.einsum("md,mdn->mn", x, pick(p, jnp.array([1, 1, 0, 2, 3, 3])))
    assert_bitwise(fn, p, x, fmt=fmt)


@pytest.mark.parametrize("mode", ["fill", "clip"])
@pytest.mark.parametrize("shape", [(6, 32), (6, 32, 4)], ids=["rows", "experts"])
def test_lookups_outside_have_the_gradients_of_the_float_lookup(shape, mode, normal):
    """Filled entries give none to any row, clipped ones to the row at the end."""
    p = {"w": normal(*shape)}
    pick = lambda p, i: jnp.take(p["w"], i, axis=0, mode=mode)
    rows, fmt = jnp.array([-9, -7, -1, 2, 5, 6, 9]), Format("int8")
    assert_bitwise(pick, p, rows, fmt=fmt)
    total = lambda fn: jax.grad(lambda p: jnp.nansum(fn(p, rows)))(p)["w"]
    np.testing.assert_array_equal(total(qjax.fake_quant(pick, fmt)), total(pick))


def test_vmap_over_data_and_over_models(params, normal):
    x = normal(3, 4, 64, seed=2)
    fmt = FORMATS["w4a4"]
    fake = qjax.fake_quant(mlp, fmt)
    want = jnp.stack([fake(params, row) for row in x])
    np.testing.assert_allclose(jax.vmap(fake, (None, 0))(params, x), want, atol=1e-4)
    two = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
    got = jax.vmap(jax.grad(lambda p, x: fake(p, x).sum()), (0, None))(two, x[0])
    one = jax.grad(lambda p, x: fake(p, x).sum())(jax.tree.map(lambda a: a[1], two), x[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-3), got, one)


def test_custom_derivatives_of_the_model_see_the_rounded_weight(normal):
    @jax.custom_vjp
    def doubled(w, x):
        return x @ w

    doubled.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (2 * r[1].T @ g, 2 * g @ r[0].T))
    w, x = normal(64, 32), normal(4, 64, seed=1)
    fmt = Format("int4", 16)
    assert_bitwise(doubled, w, x, fmt=fmt)
    loss = lambda fn: jax.grad(lambda w, x: qjax.fake_quant(fn, fmt)(w, x).sum(), (0, 1))(w, x)
    for got, want in zip(loss(doubled), loss(lambda w, x: x @ w), strict=True):
        np.testing.assert_allclose(got, 2 * want, rtol=1e-5)


def test_weights_that_are_packed_already_stay_constants(params, normal):
    x = normal(3, 64, seed=2)
    mixed = {"up": qjax.quantize(params["up"], Format("int8")), "down": params["down"]}
    policy = Policy([Rule("down", Format("int4", 16))])
    fake = qjax.fake_quant(mlp, policy)
    want = qjax.apply(mlp)({**mixed, "down": qjax.quantize(params["down"], Format("int4", 16))}, x)
    np.testing.assert_array_equal(fake(mixed, x), want)


def test_what_does_not_fit_names_the_parameter(params, normal):
    with pytest.raises(qjax.QuantizationError, match="down: group_size=48 does not divide"):
        qjax.fake_quant(mlp, Format("int4", 48))(params, normal(3, 64))
    bad = {**params, "up": params["up"].at[0, 0].set(jnp.nan)}
    with pytest.raises(qjax.QuantizationError, match="up: 1 of its 2048 weights are NaN"):
        qjax.fake_quant(mlp, Format("int4", 16))(bad, normal(3, 64))


# ---- meshes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4", "w4a4"])
@pytest.mark.parametrize(("weights", "data"), [((), ("d",)), (("d",), ("d",))], ids=["dp", "fsdp"])
def test_one_and_eight_devices_agree(name, weights, data, normal):
    p = {"up": normal(3, 64, 128) / 8, "down": normal(3, 128, 64, seed=1) / 8}
    x = normal(16, 64, seed=2)
    fmt = FORMATS[name]
    step = jax.jit(
        jax.value_and_grad(lambda p, x: (qjax.fake_quant(scanned, fmt)(p, x) ** 2).mean())
    )
    want = step(p, x)
    mesh = Mesh(np.array(jax.devices()), ("d",))
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    got = step(jax.tree.map(lambda a: place(a, None, *weights), p), place(x, *data))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_shard_map(normal):
    p, x = {"up": normal(64, 32), "down": normal(32, 64, seed=1)}, normal(16, 64, seed=2)
    mesh = Mesh(np.array(jax.devices()), ("d",))
    fn = jax.shard_map(
        mlp, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("d")), out_specs=PartitionSpec("d")
    )
    fmt = FORMATS["w4a4"]
    assert_bitwise(fn, p, x, fmt=fmt)
    grads = [
        jax.jit(jax.grad(lambda p, f=f: (qjax.fake_quant(f, fmt)(p, x) ** 2).sum()))(p)
        for f in (fn, mlp)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2), *grads)


def test_a_weight_that_fn_holds_constant_has_no_gradient_and_is_a_weight_still():
    def fn(params, x):
        return x @ params["a"] + x @ lax.stop_gradient(params["b"])

    params = {name: jax.random.normal(jax.random.key(i), (64, 32)) for i, name in enumerate("ab")}
    x = jax.random.normal(jax.random.key(2), (5, 64))
    fake = qjax.fake_quant(fn, "int4-g32")
    used = qjax.usage(fn)(params, x)
    assert used.layout("b") == "kn"
    packed = qjax.apply(fn)(qjax.quantize(params, "int4-g32", usage=used), x)
    assert jnp.array_equal(fake(params, x), packed)
    grads = jax.grad(lambda params: jnp.sum(fake(params, x) ** 2))(params)
    assert jnp.any(grads["a"] != 0)
    assert not jnp.any(grads["b"] != 0)
