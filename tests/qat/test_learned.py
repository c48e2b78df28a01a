"""Learned steps: the formulas of LSQ and PACT, and trained trees that pack to what was trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Format, Policy, QuantizationError, Rule, qat


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(3), seed), shape)


def mlp(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


FORMAT = Format("int4", 16, scale="bfloat16")
W4A8 = Format("int4", 16, scale="bfloat16", activation="int8", activation_scale="static")
W4A4 = Format("int4", 16, scale="bfloat16", activation="uint4", activation_scale="static")


@pytest.fixture
def params():
    return {"up": normal(64, 32), "down": normal(32, 64, seed=1), "bias": normal(4, seed=2)}


def ranges_of(params, policy, x):
    state = qat.init_ranges(params, policy)
    return qat.tracked(mlp, policy)(params, state, x)[1]


@pytest.mark.parametrize("start", ["rule", "lsq"])
def test_the_derivative_of_a_step_is_lsqs(start):
    """dL/ds = sum over the group of dL/dŵ (q - w / s inside, q outside); dL/dw = dL/dŵ inside."""
    w, g = normal(64, 8), normal(64, 8, seed=1)
    fmt = Format("int3", 16)
    tree = qat.init(w, fmt, weights=start)
    fake = qjax.fake_quant(lambda w, x: x @ w, fmt)
    got = jax.grad(lambda t: jnp.sum(fake(t, jnp.eye(64)) * g))(tree)
    u = np.asarray(w, np.float64).reshape(4, 16, 8) / np.asarray(tree.scale)[:, None]
    inside = (u >= -4) & (u <= 3)
    assert (~inside).any() == (start == "lsq")
    q = np.clip(np.round(u), -4, 3)
    want = np.sum(np.asarray(g).reshape(4, 16, 8) * (q - np.where(inside, u, 0)), 1)
    np.testing.assert_allclose(got.scale, want, atol=1e-4)
    np.testing.assert_array_equal(got.value, np.where(inside.reshape(64, 8), g, 0))


def test_the_derivative_of_an_activations_step_is_lsqs_and_pacts():
    x, w, g = jnp.abs(normal(6, 32)) * 3, normal(32, 8, seed=1), normal(6, 8, seed=2)
    step = jnp.float32(0.2)  # clips at 3
    fmt = Format("int8", activation="uint4", activation_scale="static")
    fake = qjax.fake_quant(lambda w, x: x @ w, fmt)
    for rule in ("lsq", "pact"):
        tree = qat.Latent(w, None, step, rule)
        dt, dx = jax.grad(lambda t, x: jnp.sum(fake(t, x) * g), (0, 1))(tree, x)
        wq = np.asarray(qjax.dequantize(qjax.quantize(w, Format("int8"))), np.float64)
        u = np.asarray(x, np.float64) / 0.2
        inside, back = u <= 15, np.asarray(g, np.float64) @ wq.T
        assert 0.01 < (~inside).mean() < 0.5
        inner = np.round(u) - u if rule == "lsq" else 0
        want = np.sum(back * np.where(inside, inner, 15))
        np.testing.assert_allclose(dt.act_scale, want, rtol=1e-4)
        np.testing.assert_allclose(dx, np.where(inside, back, 0), atol=1e-4)


@pytest.mark.parametrize("fmt", [FORMAT, W4A8, W4A4], ids=str)
def test_a_trained_tree_packs_to_the_model_that_was_trained(fmt, params):
    policy, x = Policy([Rule("*", fmt)]), jnp.abs(normal(8, 64, seed=5))
    ranges = ranges_of(params, policy, x) if fmt.activation else None
    tree = qat.init(params, policy, ranges=ranges)
    fake = qjax.fake_quant(mlp, policy)

    @jax.jit
    def step(tree):
        grads = jax.grad(lambda t: jnp.mean((fake(t, x) - 1) ** 2))(tree)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, tree, grads)

    trained = step(step(tree))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained, tree)
    assert changed["up"].value
    assert changed["up"].scale
    assert changed["up"].act_scale or fmt.activation is None
    packed = jax.jit(lambda t: qjax.quantize(t, policy))(trained)
    np.testing.assert_array_equal(packed["up"].scale, trained["up"].scale.astype(jnp.bfloat16))
    want = jax.jit(qjax.apply(mlp))(packed, x)
    np.testing.assert_array_equal(jax.jit(fake)(trained, x), want)
    jax.tree.map(np.testing.assert_array_equal, qat.values(trained)["bias"], packed["bias"])


def test_stacked_layers_learn_steps_of_their_own():
    p = {"w": normal(3, 32, 32) / 6}
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    policy, x = Policy([Rule("*", W4A8)]), normal(5, 32, seed=1)
    ranges = qat.tracked(fn, policy)(p, qat.init_ranges(p, policy), x)[1]
    tree = qat.init(p, policy, ranges=ranges)
    assert tree["w"].scale.shape == (3, 2, 32)
    assert tree["w"].act_scale.shape == (3,)
    grads = jax.jit(jax.grad(lambda t: jnp.sum(qjax.fake_quant(fn, policy)(t, x) ** 2)))(tree)
    assert (grads["w"].act_scale != 0).all()
    packed = qjax.quantize(tree, policy)
    want = jax.jit(qjax.apply(fn))(packed, x)
    np.testing.assert_array_equal(jax.jit(qjax.fake_quant(fn, policy))(tree, x), want)


@pytest.mark.parametrize("with_floats", [False, True])
def test_training_starts_where_a_solver_ended(with_floats, params):
    """Latents of a quantized tree have its codes and scales, whatever the float weights are."""
    policy = Policy([Rule("up", FORMAT), Rule("down", Format("int3", rule="mse"))])
    solved = qjax.quantize(jax.tree.map(lambda w: w + 0.05 * jnp.sin(9 * w), params), policy)
    tree = qat.from_quantized(solved, params if with_floats else None)
    packed = qjax.quantize(tree, policy)
    jax.tree.map(np.testing.assert_array_equal, packed, solved)
    if with_floats:  # and the values are as near to the float weights as the codes allow
        near = jnp.abs(tree["up"].value - params["up"])
        assert (near <= jnp.abs(qjax.dequantize(solved)["up"] - params["up"]) + 1e-6).all()
    with pytest.raises(NotImplementedError, match=r"up.*only symmetric weights"):
        qat.from_quantized({"up": qjax.quantize(params["up"], Format("uint4", zero_point=True))})


def test_what_cannot_be_is_refused_by_name(params):
    with pytest.raises(QuantizationError, match="up: the step of its activations is static"):
        qat.init(params, Policy([Rule("up", W4A8)]))
    policy = Policy([Rule("up", W4A8)])
    unseen = qat.init_ranges(params, policy)
    with pytest.raises(QuantizationError, match="up: its range saw no batch"):
        qat.attach(params, policy, unseen)
    zero = {"up": qat.Range(*(jnp.zeros(()),) * 2, jnp.ones((), jnp.int32))}
    with pytest.raises(QuantizationError, match="up: its input was 0 wherever it was measured"):
        qat.attach(params, policy, zero)
    with pytest.raises(QuantizationError, match="up: steps are learned for formats without zero"):
        qat.init(params, Policy([Rule("up", Format("uint4", zero_point=True))]))
    tree = qat.init(params, Policy([Rule("up", FORMAT)]))
    with pytest.raises(QuantizationError, match="up: has learned steps, but policy 'custom'"):
        qjax.quantize(tree, Policy([Rule("down", FORMAT)]))
    with pytest.raises(TypeError, match="was used as an array"):
        mlp(tree, normal(2, 64))
    bad = {**tree, "up": qat.Latent(tree["up"].value, tree["up"].scale * jnp.nan)}
    with pytest.raises(QuantizationError, match="up/scale: a learned step is NaN"):
        qjax.quantize(bad, Policy([Rule("up", FORMAT)]))


@pytest.mark.parametrize("element", ["int3", "nf4"])
def test_counted_in_steps_a_step_learns_with_its_codes_fixed(element):
    """With w = s v and v on the codes q, dL/ds = sum over the group of dL/dŵ q: no estimate."""
    policy = Policy.of(Format(element, 16))
    qt = qjax.quantize(normal(64, 8), policy)
    x, g = normal(5, 64, seed=1), normal(5, 8, seed=2)
    counted = qat.in_steps(qat.from_quantized(qt), policy)
    fake = qjax.fake_quant(lambda w, x: jnp.sum((x @ w) * g), policy)
    got = jax.grad(lambda v: fake(qat.from_steps(v, policy), x))(counted)
    q = qjax.qtensor.read_codes(qt)

    def exact(scale):
        return jnp.sum((x @ (jnp.repeat(scale, 16, 0) * q)) * g)

    np.testing.assert_allclose(got.scale, jax.grad(exact)(counted.scale), atol=1e-4)


def test_counted_in_floats_a_step_does_not_learn_on_its_codes():
    q, s = jnp.round(normal(64, 8)).clip(-3, 2), jnp.full((4, 8), 0.5)
    fake = qjax.fake_quant(lambda w, x: jnp.sum((x @ w) ** 2), Format("int3", 16))
    got = jax.grad(lambda t: fake(t, normal(5, 64, seed=1)))(qat.Latent(0.5 * q, s))
    np.testing.assert_array_equal(got.scale, 0)


def test_counting_in_steps_changes_neither_codes_nor_what_has_none(params):
    policy = Policy([Rule("up", FORMAT), Rule("*")])
    tree = qat.init(params, policy)
    counted = qat.in_steps(tree, policy)
    np.testing.assert_allclose(
        jnp.repeat(counted["up"].scale, 16, 0) * counted["up"].value, params["up"], rtol=1e-6
    )
    back = qat.from_steps(counted, policy)
    for name in ("down", "bias"):
        assert back[name] is params[name]
    a, b = (qjax.quantize(t, policy)["up"] for t in (tree, back))
    jax.tree.map(np.testing.assert_array_equal, a, b)
