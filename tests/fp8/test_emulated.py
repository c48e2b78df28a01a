"""Convolutions and experts: what they compute is what rounded operands give, forward and back."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from qjax import Policy, Rule, fp8
from qjax.fp8 import emulated, meter
from qjax.fp8.product import Spec, product

SPEC = Spec(None, False, "float32", "float32", "float32")
E4M3, E5M2 = (ml_dtypes.float8_e4m3fn, 448.0), (ml_dtypes.float8_e5m2, 57344.0)


def normal(*shape, seed=0, scale=1.0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(7), seed), shape) * scale


def rounded(x, element):
    """Returns s * round(x / s) for s = max |x| / largest code, up to a power of two."""
    dtype, qmax = element
    s = 2.0 ** np.ceil(np.log2(np.max(np.abs(x)) / qmax))
    return jnp.asarray((np.asarray(x) / s).astype(dtype).astype(np.float32) * np.float32(s))


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.max(np.abs(want), initial=0))


# ---- experts -------------------------------------------------------------------------------------

SIZES = jnp.array([3, 0, 5, 2])  # an expert without rows; the last two rows have no expert
EXPERTS = normal(4, 8, 6) * jnp.array([1.0, 1.0, 100.0, 1e-3])[:, None, None]
ROWS, OUT = normal(12, 8, seed=1) * 2.0 ** jnp.arange(12)[:, None], normal(12, 6, seed=2)


def ragged(x, w, probe=None, scales=None):
    return emulated.product(emulated.Ragged(), x, w, SIZES, SPEC, scales, probe)


@pytest.mark.parametrize("scales", [None, 2.0 ** -jnp.arange(12.0).reshape(4, 3)])
def test_each_expert_is_the_product_that_it_would_be_alone(scales):

    @functools.partial(jax.jit, static_argnums=0)
    def run(multiply, x, w, g, scales):
        """Returns the result, both derivatives, and the largest magnitudes."""
        probe = meter.meter(jnp.zeros((*w.shape[:-2], 3)))
        y, pull = jax.vjp(lambda *args: multiply(*args, scales), x, w, probe)
        dx, dw, seen = pull(g)
        return y, dx, dw, meter.read(seen)

    y, dx, dw, seen = run(ragged, ROWS, EXPERTS, OUT, scales)
    alone = lambda x, w, probe, scales: product(x, w, SPEC, scales, probe)
    end = np.cumsum(SIZES)
    for e, (a, b) in enumerate(zip(end - SIZES, end, strict=True)):
        own = None if scales is None else scales[e]
        *want, seen_e = run(alone, ROWS[a:b], EXPERTS[e], OUT[a:b], own)
        for left, right in zip((y[a:b], dx[a:b], dw[e]), want, strict=True):
            assert_close(left, right)
        np.testing.assert_array_equal(seen[e], seen_e)
    assert (y[end[-1] :] == 0).all()
    assert (dx[end[-1] :] == 0).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_row_makes_nan_of_its_expert_alone(bad):
    y = jax.jit(ragged)(ROWS.at[4, 0].set(bad), EXPERTS)
    assert np.isnan(y[4]).all()
    assert np.isfinite(y[:3]).all()


def moe(params, x):
    h = jax.nn.relu(lax.ragged_dot(x, params["up"], SIZES))
    return jnp.mean((lax.ragged_dot(h, params["down"], SIZES) - 1) ** 2)


MOE = {"up": normal(4, 8, 6, scale=0.3), "down": normal(4, 6, 8, seed=3, scale=0.3)}


def test_experts_train_with_a_history_each():
    state = jax.jit(fp8.init(moe, "delayed"))(MOE, ROWS / 100)
    assert state.history["up"].gradient.shape == (4, 16)
    step = jax.jit(fp8.value_and_grad(moe, "delayed"))
    (value, after), grads = step(state, MOE, ROWS / 100)
    # The first step sees what `init` saw: its scales are those of this very step.
    (now, _), same = jax.jit(fp8.value_and_grad(moe, "current"))(None, MOE, ROWS / 100)
    assert value == now
    jax.tree.map(np.testing.assert_array_equal, grads, same)
    np.testing.assert_array_equal(
        after.history["up"].weight[:, 0], jnp.max(jnp.abs(MOE["up"]), (1, 2))
    )
    want = jax.jit(jax.grad(moe))(MOE, ROWS / 100)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert jnp.linalg.norm(a - b) <= 0.25 * jnp.linalg.norm(b)


# ---- convolutions --------------------------------------------------------------------------------

IMAGE, KERNEL = normal(2, 7, 6, 3), normal(3, 2, 3, 5, seed=1, scale=0.1)
DIMS = ("NHWC", "HWIO", "NHWC")


def conv(x, w):
    return lax.conv_general_dilated(
        x, w, (2, 1), ((1, 1), (0, 1)), None, (1, 2), DIMS, precision=lax.Precision.HIGHEST
    )


def test_a_convolution_and_its_derivatives_are_those_of_rounded_operands():
    run = fp8.apply(lambda p, x: conv(x, p["k"]))
    g = normal(*jax.eval_shape(conv, IMAGE, KERNEL).shape, seed=2, scale=1e-4)

    @functools.partial(jax.jit, static_argnums=0)
    def both(fn, x, w, g):
        y, pull = jax.vjp(fn, x, w)
        return y, *pull(g)

    got = both(lambda x, w: run({"k": w}, x), IMAGE, KERNEL, g)
    want = both(conv, rounded(IMAGE, E4M3), rounded(KERNEL, E4M3), rounded(g, E5M2))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


def test_a_convolution_trains_with_a_history():
    loss = lambda p, x: jnp.mean((conv(x, p["k"]) - 1) ** 2)
    params = {"k": KERNEL}
    state = jax.jit(fp8.init(loss, "delayed"))(params, IMAGE)
    np.testing.assert_array_equal(state.history["k"].input[0], jnp.max(jnp.abs(IMAGE)))
    (value, _), grads = jax.jit(fp8.value_and_grad(loss, "delayed"))(state, params, IMAGE)
    (now, _), same = jax.jit(fp8.value_and_grad(loss, "current"))(None, params, IMAGE)
    assert value == now
    np.testing.assert_array_equal(grads["k"], same["k"])


def test_kernels_of_a_stack_have_scales_of_their_own():
    stack = jnp.stack([normal(3, 3, 1, 3), normal(3, 3, 1, 3, seed=1) * 50])
    depthwise = lambda w, x: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", None, None, DIMS, feature_group_count=3
    )
    loss = lambda p, x: jnp.sum(depthwise(p["k"][1], depthwise(p["k"][0], x)))
    policy = Policy([Rule("k", fp8.TENSOR, layout="bkkkn")])
    single = lambda p, x: jnp.sum(depthwise(p["b"], depthwise(p["a"], x)))
    (value, _), grads = jax.jit(fp8.value_and_grad(loss, policy))(None, {"k": stack}, IMAGE)
    apart = {"a": stack[0], "b": stack[1]}
    alone = jax.jit(fp8.value_and_grad(single, "current"))(None, apart, IMAGE)
    assert value == alone[0][0]
    assert_close(grads["k"], jnp.stack(jax.tree.leaves(alone[1])))
    delayed = fp8.Fp8Recipe(policy, scaling="delayed")
    with pytest.raises(NotImplementedError, match="k: delayed scaling of a stack"):
        jax.eval_shape(fp8.init(loss, delayed), {"k": stack}, IMAGE)


def test_a_pointwise_convolution_is_a_product():
    k, x = normal(1, 1, 3, 5), normal(2, 4, 4, 3, seed=1)
    plain = lambda p, x: lax.conv_general_dilated(x, p["k"], (1, 1), "VALID", None, None, DIMS)
    want = jax.jit(fp8.apply(lambda p, x: x @ p["k"]))({"k": k[0, 0]}, x)
    assert_close(jax.jit(fp8.apply(plain))({"k": k}, x), want)
    assert "emulated" not in str(fp8.explain(plain)({"k": k}, x))


# ---- what is said --------------------------------------------------------------------------------


def test_explain_says_what_is_emulated():
    uses = fp8.explain(moe)(MOE, ROWS)
    assert [(u.op, u.how) for u in uses] == [("ragged_dot", "x @ W by expert")] * 2
    assert all(u.implementation.endswith("emulated in float32") for u in uses)


def test_blocks_are_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"up: ragged_dot .* not in blocks"):
        fp8.apply(moe, fp8.BLOCK)(MOE, ROWS)
