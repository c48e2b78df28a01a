"""The transforms: what takes part, what the state holds, and how a training loop uses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax

import qjax
from qjax import Format, Policy, Rule, fp8, qat
from qjax.fp8 import scaling

SMALL = Format("e4m3", group_size=8, group_columns=8)
RECIPES = {
    "current": fp8.Fp8Recipe(),
    "delayed": fp8.Fp8Recipe(scaling="delayed", history=3),
    "block": fp8.Fp8Recipe(Policy.of(SMALL)),
}
ALL = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def normal(*shape, seed=0, scale=1.0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(3), seed), shape) * scale


PARAMS = {
    "up": normal(16, 24, scale=0.3),
    "down": normal(24, 16, seed=1, scale=0.2),
    "b": jnp.ones(16),
}
X = normal(6, 16, seed=2)


def loss_of(params, x):
    h = jnp.tanh(x @ params["up"])
    return jnp.mean((h @ params["down"] + params["b"] - 1) ** 2)


def start(fn, recipe, *args, **options):
    return jax.jit(fp8.init(fn, recipe, **options))(*args)


def step(fn, recipe, *args, **options):
    return jax.jit(fp8.value_and_grad(fn, recipe, **options))(*args)


def assert_close(a, b, rtol=1e-5):
    """Compares trees up to the order of sums, relative to the largest entry of each leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.max(np.abs(y), initial=0.0))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


# ---- what is computed ----------------------------------------------------------------------------


@ALL
def test_gradients_are_those_of_apply(recipe):
    state = start(loss_of, recipe, PARAMS, X)
    (value, _), grads = step(loss_of, recipe, state, PARAMS, X)
    applied = jax.jit(jax.value_and_grad(fp8.apply(loss_of, recipe, state)))
    assert_close((value, grads), applied(PARAMS, X))
    assert not equal(grads, jax.grad(loss_of)(PARAMS, X))
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(grads))


@ALL
def test_gradients_are_close_to_those_of_float(recipe):
    state = start(loss_of, recipe, PARAMS, X)
    _, grads = step(loss_of, recipe, state, PARAMS, X)
    for got, want in zip(*map(jax.tree.leaves, (grads, jax.grad(loss_of)(PARAMS, X))), strict=True):
        # Half a step of e5m2 is 1/8 of a value, of e4m3 1/16; a few of them meet in a gradient.
        assert jnp.linalg.norm(got - want) <= 0.25 * jnp.linalg.norm(want)


def test_the_function_is_not_changed_where_nothing_takes_part():
    recipe = fp8.Fp8Recipe(Policy([Rule("up"), Rule("*", fp8.TENSOR)]))
    only_up = lambda params, x: jnp.sum(jnp.tanh(x @ params["up"]))
    params = {"up": PARAMS["up"], "down": PARAMS["down"]}
    assert equal(fp8.apply(only_up, recipe)(params, X), only_up(params, X))


def test_each_product_is_listed_and_so_is_what_stays_float():
    def fn(params, tokens):
        x = params["table"][tokens] * params["scale"]
        return jnp.tanh(x @ params["w"]) @ params["table"].T

    params = {"table": normal(16, 8), "w": normal(8, 8), "scale": jnp.ones((8, 8))}
    uses = fp8.explain(fn, "delayed")(params, jnp.arange(8))
    assert [(u.path, u.op, u.how.split(":")[0]) for u in uses] == [
        ("table", "gather", "float"),
        ("w", "dot_general", "x @ W"),
        ("table", "dot_general", "x @ W"),
    ]
    assert uses[1].implementation == (
        "e4m3 x e4m3, gradients e5m2 x e4m3, delayed scales, 16 steps"
    )


@ALL
def test_a_sliced_weight_multiplies_in_fp8_too(recipe):
    def fn(params, x):
        return jnp.sum(x @ params["w"][:, :8]) + jnp.sum(x @ params["w"][:, 8:])

    uses = fp8.explain(fn, recipe)({"w": normal(16, 24)}, X)
    assert [(u.op, u.count) for u in uses] == [("dot_general", 2)]
    assert all(use.is_packed for use in uses)


@ALL
def test_vmap_is_a_loop(recipe):
    state = start(loss_of, recipe, PARAMS, X)
    run = jax.jit(fp8.value_and_grad(loss_of, recipe))
    xs = normal(3, 6, 16, seed=5) * jnp.array([1.0, 10.0, 0.1])[:, None, None]
    mapped = jax.jit(jax.vmap(lambda x: run(state, PARAMS, x)))(xs)
    loop = [run(state, PARAMS, x) for x in xs]
    assert_close(mapped, jax.tree.map(lambda *a: jnp.stack(a), *loop))


def test_layers_of_a_stack_may_be_picked_one_by_one():
    params = {"w": normal(3, 16, 16)}

    def fn(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["w"][i])
        return jnp.sum(x**2)

    uses = fp8.explain(fn)(params, X)
    assert [(u.op, u.count, u.is_packed) for u in uses] == [("dot_general", 3, True)]
    scanned = lambda params, x: jnp.sum(
        lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0] ** 2
    )
    one = step(fn, "current", None, params, X)
    assert_close(one, step(scanned, "current", None, params, X))


# ---- the state of delayed scaling ----------------------------------------------------------------


def amax_of(grads_and_operands):
    return [float(jnp.max(jnp.abs(a))) for a in grads_and_operands]


def test_history_holds_the_magnitudes_of_input_weight_and_gradient():
    w = {"w": normal(16, 8)}
    fn = lambda params, x: jnp.sum((x @ params["w"]) * jnp.arange(8.0))
    recipe = RECIPES["delayed"]
    state = start(fn, recipe, w, X)
    run = jax.jit(fp8.value_and_grad(fn, recipe))
    want = [*amax_of([X, w["w"]]), 7.0]
    for history, amax in zip(state.history["w"], want, strict=True):
        assert history.tolist() == [np.float32(amax), 0.0, 0.0]
    for factor in (2.0, 3.0, 4.0):
        (_, state), _ = run(state, w, X * factor)
    seen = [np.float32(want[0] * f) for f in (4.0, 3.0, 2.0)]  # the newest first, three at most
    np.testing.assert_allclose(state.history["w"].input, seen, rtol=1e-6)


def test_scales_come_from_the_history_alone():
    w = {"w": normal(16, 8)}
    fn = lambda params, x: x @ params["w"]
    recipe = RECIPES["delayed"]
    of = lambda amax: jnp.array([0.0, amax, 0.0])
    amax = fp8.Amax(of(2.0**14), of(float(jnp.max(jnp.abs(w["w"])))), of(1.0))
    got = fp8.apply(fn, recipe, fp8.State({"w": amax}))(w, X)
    s = scaling.scale_of(jnp.float32(2.0**14), "e4m3", margin=0, power_of_two=True)
    rounded = scaling.cast(X, s, "e4m3").astype(jnp.float32) * s
    assert_close(got, fp8.apply(fn)(w, rounded))
    assert not np.array_equal(got, fp8.apply(fn)(w, X))


def test_evaluation_leaves_the_state_alone_and_uses_it():
    state = start(loss_of, "delayed", PARAMS, X)
    evaluated = jax.jit(fp8.apply(loss_of, "delayed", state))(PARAMS, X)
    assert_close(evaluated, step(loss_of, "delayed", state, PARAMS, X)[0][0])


def repeated(params, x, n):
    for _ in range(n):
        x = jnp.tanh(x @ params["w"])
    return jnp.sum(x**2)


def scanned(params, x, n):
    body = jax.checkpoint(lambda x, _: (jnp.tanh(x @ params["w"]), None))
    return jnp.sum(lax.scan(body, x, None, length=n)[0] ** 2)


def branched(params, x, n):
    def body(x, i):
        return lax.cond(i < n, lambda x: jnp.tanh(x @ params["w"]), lambda x: x, x), None

    return jnp.sum(lax.scan(body, x, jnp.arange(n + 2))[0] ** 2)


def test_several_uses_need_no_jit():
    params, recipe = {"w": normal(16, 16)}, RECIPES["delayed"]
    eager = fp8.init(lambda params, x: repeated(params, x, 3), recipe)(params, X)
    assert_close(eager, start(lambda params, x: repeated(params, x, 3), recipe, params, X))


@pytest.mark.parametrize("loop", [repeated, scanned, branched])
def test_several_uses_share_their_largest_magnitude_not_the_sum(loop):
    params = {"w": normal(16, 16)}
    x = X * 5.0  # larger than any later input
    recipe = RECIPES["delayed"]

    def apart(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params[f"w{i}"])
        return jnp.sum(x**2)

    each = start(apart, recipe, {f"w{i}": params["w"] for i in range(3)}, x)
    together = start(lambda params, x: loop(params, x, 3), recipe, params, x)
    want = jax.tree.map(lambda *a: jnp.max(jnp.stack(a), 0), *each.history.values())
    assert want.input[0] == jnp.max(jnp.abs(x))
    assert_close(together.history["w"], want)


# ---- loops ---------------------------------------------------------------------------------------


def train(one, state, n=25):
    losses = []
    for i in range(n):
        state, loss = one(state, normal(32, 16, seed=i))
        losses.append(float(loss))
    return state, losses


@ALL
def test_training_follows_float(recipe):
    tx = optax.adam(1e-2)

    def loop(value_and_grad, state):
        @jax.jit
        def one(carry, x):
            params, opt, state = carry
            (loss, state), grads = value_and_grad(state, params, x)
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt, state), loss

        return train(one, (PARAMS, tx.init(PARAMS), state))

    def in_float(state, params, x):
        loss, grads = jax.value_and_grad(loss_of)(params, x)
        return (loss, state), grads

    (_, _, state), losses = loop(
        fp8.value_and_grad(loss_of, recipe), start(loss_of, recipe, PARAMS, X)
    )
    _, want = loop(in_float, fp8.State({}))
    assert losses[-1] < 0.6 * losses[0]
    np.testing.assert_allclose(losses, want, rtol=0.1)
    for amax in state.history.values():  # all three entries are of steps that ran
        assert all((h > 0).all() for h in amax)


@ALL
def test_a_train_state_and_multi_steps_need_nothing_special(recipe):
    class State(TrainState):
        fp8: fp8.State

    tx = optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2)
    state = State.create(
        apply_fn=loss_of, params=PARAMS, tx=tx, fp8=start(loss_of, recipe, PARAMS, X)
    )

    @jax.jit
    def one(state, x):
        (loss, scales), grads = fp8.value_and_grad(loss_of, recipe)(state.fp8, state.params, x)
        return state.apply_gradients(grads=grads, fp8=scales), loss

    once, _ = one(state, X)
    assert equal(once.params, PARAMS)  # half a step of the optimizer
    twice, _ = one(once, X)
    assert not equal(twice.params, PARAMS)
    assert equal(jax.tree.map(jnp.shape, twice.fp8), jax.tree.map(jnp.shape, state.fp8))


def test_an_nnx_model_trains():
    model = nnx.Sequential(
        nnx.Linear(16, 24, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(24, 16, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(model)

    def loss_of(params, x):
        return jnp.mean((nnx.merge(graph, params)(x) - 1) ** 2)

    state = start(loss_of, "delayed", params, X)
    assert sorted(state.history) == ["layers/0/kernel", "layers/2/kernel"]
    (_, _), grads = step(loss_of, "delayed", state, params, X)
    want = jax.grad(loss_of)(params, X)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert jnp.linalg.norm(a - b) <= 0.25 * jnp.linalg.norm(b)


@ALL
def test_what_else_the_loss_returns_is_passed_on(recipe):
    fn = lambda params, x: (loss_of(params, x), {"mean": jnp.mean(x)})
    state = start(fn, recipe, PARAMS, X, has_aux=True)
    (value, after, aux), grads = step(fn, recipe, state, PARAMS, X, has_aux=True)
    assert_close(((value, after), grads), step(loss_of, recipe, state, PARAMS, X))
    assert_close(aux["mean"], jnp.mean(X))


@ALL
def test_fake_quantized_weights_multiply_in_fp8(recipe):
    policy = Policy([Rule("*", Format("int4", group_size=8))])
    transform = lambda f: qjax.fake_quant(f, policy)
    state = start(loss_of, recipe, PARAMS, X, transform=transform)
    (value, _), grads = step(loss_of, recipe, state, PARAMS, X, transform=transform)
    # Equal to FP8 on the weights that are packed afterwards; nothing is clipped, so the gradients
    # go straight through.
    packed = qjax.dequantize(qjax.quantize(PARAMS, policy))
    (want, _), want_grads = step(loss_of, recipe, state, packed, X)
    assert_close((value, grads), (want, want_grads))


def test_learned_steps_learn_in_fp8_and_pack():
    policy = Policy([Rule("*", Format("int4", group_size=8))])
    transform = lambda f: qjax.fake_quant(f, policy)
    tree = qat.init(PARAMS, policy)
    state = start(loss_of, "delayed", tree, X, transform=transform)
    (value, _), grads = step(loss_of, "delayed", state, tree, X, transform=transform)
    packed = qjax.dequantize(qjax.quantize(tree, policy))
    (want, _), want_grads = step(loss_of, "delayed", state, packed, X)
    assert_close((value, qat.values(grads)), (want, want_grads))
    assert (grads["up"].scale != 0).any()
    assert grads["up"].scale.shape == tree["up"].scale.shape


# ---- errors --------------------------------------------------------------------------------------


def test_a_step_with_nan_or_infinity_names_the_leaf():
    params = PARAMS | {"down": PARAMS["down"].at[0, 0].set(jnp.inf)}
    state = start(loss_of, "delayed", PARAMS, X)
    fp8.check_finite(0, state=state)
    (loss, state), grads = step(loss_of, "delayed", state, params, X)
    with pytest.raises(fp8.NonFiniteError, match=r"step 7 in .*state/history/down/weight"):
        fp8.check_finite(7, state=state)
    with pytest.raises(fp8.NonFiniteError, match="loss"):
        fp8.check_finite(7, loss=loss)
    with pytest.raises(fp8.NonFiniteError, match="grads/down"):
        fp8.check_finite(7, grads=grads)


def test_a_state_that_does_not_fit_is_refused():
    state = jax.eval_shape(fp8.init(loss_of, "delayed"), PARAMS, X)
    run = functools.partial(jax.eval_shape, fp8.value_and_grad(loss_of, "delayed"))
    with pytest.raises(ValueError, match="up: has no history"):
        run(fp8.State({"down": state.history["down"]}), PARAMS, X)
    with pytest.raises(ValueError, match=r"down: its input history has shape \(3,\), not \(16,\)"):
        run(jax.eval_shape(fp8.init(loss_of, RECIPES["delayed"]), PARAMS, X), PARAMS, X)
    with pytest.raises(ValueError, match=r"fp8\.init"):
        run(None, PARAMS, X)
    with pytest.raises(ValueError, match="has a history but is no FP8 weight"):
        fp8.value_and_grad(loss_of, "current")(state, PARAMS, X)


def test_a_weight_that_no_gradient_reaches_has_no_history():
    params = PARAMS | {"side": normal(16, 4)}
    fn = lambda params, x: loss_of(params, x) + jnp.sum(lax.stop_gradient(x @ params["side"]))
    with pytest.raises(ValueError, match=r"side: no gradient came .*`stop_gradient`"):
        fp8.init(fn, "delayed")(params, X)


def either(params, batch):
    """One of two weights, by a branch."""
    x, left = batch
    one, other = (lambda x, w=w: x @ params[w] for w in ("left", "right"))
    return jnp.sum(lax.cond(left, one, other, x) ** 2)


def test_the_state_of_branches_is_made_from_arguments_that_take_them_all():
    params = {"left": normal(16, 4), "right": normal(16, 4, seed=1)}
    with pytest.raises(ValueError, match=r"right: no gradient came .* branch of a `cond`"):
        fp8.init(either, "delayed")(params, (X, True))
    every = lambda params, *batches: sum(either(params, b) for b in batches)  # as the error says
    state = fp8.init(every, "delayed")(params, (X, True), (2 * X, False))
    largest = [state.history[w].input[0] for w in ("left", "right")]
    assert largest == [jnp.max(jnp.abs(X)), 2 * jnp.max(jnp.abs(X))]


def test_steps_that_do_not_use_a_weight_do_not_forget_it():
    params = {"left": normal(16, 4), "right": normal(16, 4, seed=1)}
    recipe = RECIPES["delayed"]
    every = lambda params, *batches: sum(either(params, b) for b in batches)
    before = state = start(every, recipe, params, (X, True), (X, False))
    for _ in range(recipe.history + 1):
        (_, state), _ = step(either, recipe, state, params, (2 * X, True))
    for a, b in zip(before.history["right"], state.history["right"], strict=True):
        np.testing.assert_array_equal(a, b)
    assert (state.history["left"].input == 2 * jnp.max(jnp.abs(X))).all()


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(TypeError, match=r"a loss is one float, got float32 of shape \(6, 24\)"):
        fp8.value_and_grad(lambda p, x: x @ p["up"], "current")(None, PARAMS, X)
