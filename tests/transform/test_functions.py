"""Plain functions of arrays run unmodified on packed weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import qjax
from qjax import Format


@pytest.fixture
def w(quantize, normal):
    return quantize({"w": normal(64, 32)})["w"]


@pytest.fixture
def table(quantize, normal):
    return quantize({"w": normal(50, 64)}, {"w": "nk"})["w"]


@pytest.fixture
def experts(quantize, normal):
    return quantize({"w": normal(4, 64, 32)})["w"]


DOTS = {
    "matmul": lambda w, x: x @ w,
    "vector": lambda w, x: x[0] @ w,
    "dot": lambda w, x: jnp.dot(x, w),
    "tensordot": lambda w, x: jnp.tensordot(x, w, axes=1),
    "left": lambda w, x: jnp.einsum("kn,bk->nb", w, x),
    "left-transposed": lambda w, x: w.T @ x.T,
    "transposed": lambda w, x: (x[:, :32] @ w.T) @ w,
    "three-operands": lambda w, x: jnp.einsum("bk,kn,bn->n", x, w, jnp.sin(x[:, :32])),
    "three-operands-last": lambda w, x: jnp.einsum("ab,bk,kn->an", x[:, :5], x, w),
    "reshaped": lambda w, x: x @ w.reshape(8, 8, 2, 16).reshape(64, 32),
    "heads": lambda w, x: jnp.einsum("bk,khd->bhd", x, w.reshape(64, 4, 8)),
    "split": lambda w, x: [x @ part for part in jnp.split(w, 2, axis=1)],
    "sliced-columns": lambda w, x: x @ w[:, 8:24],
    "squeezed": lambda w, x: x @ w[None].squeeze(0),
    "constrained": lambda w, x: x @ lax.optimization_barrier((w, x))[0],
    "constant": lambda w, x: x @ lax.stop_gradient(w),
    "named": lambda w, x: x @ checkpoint_name(w, "w"),
    "dot-general": lambda w, x: lax.dot_general(x, w, (((1,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("name", DOTS)
def test_products_are_packed(assert_agrees, w, normal, name):
    assert_agrees(DOTS[name], w, normal(5, 64), depth=2)


def test_shapes_of_tokens_do_not_matter(assert_agrees, w, normal):
    for shape in [(64,), (1, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64)]:
        assert_agrees(lambda w, x: x @ w, w, jnp.zeros(shape) if 0 in shape else normal(*shape))


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "out_dtype"),
    [
        ("bfloat16", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", None),
        ("float32", "bfloat16", None),
        ("float16", "float16", None),
    ],
)
def test_dtypes_are_those_of_the_float_product(
    assert_agrees, w, normal, x_dtype, w_dtype, out_dtype
):
    def fn(w, x):
        x, w = x.astype(x_dtype), w.astype(w_dtype)
        numbers = (((1,), (0,)), ((), ()))
        if x.dtype != w.dtype:
            return jnp.matmul(x, w)
        return lax.dot_general(x, w, numbers, preferred_element_type=out_dtype)

    (use,) = qjax.explain(fn)(w, normal(5, 64))
    assert use.is_packed
    got, want = qjax.apply(fn)(w, normal(5, 64)), fn(qjax.dequantize(w), normal(5, 64))
    assert got.dtype == want.dtype
    # The float weight is rounded to w_dtype, half an ulp of each of 64 products; the packed is not.
    eps = float(jnp.finfo(w_dtype).eps)
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.abs(got - want).max() <= 8 * eps * np.abs(want).max()


LOOKUPS = {
    "take": lambda w, i: jnp.take(w, i, axis=0),
    "take-clip": lambda w, i: jnp.take(w, i, axis=0, mode="clip"),
    "index": lambda w, i: w[i],
    "scalar": lambda w, i: w[i[0, 1]] + 1.0,
    "static": lambda w, i: w[3] + w[-1],
    "columns": lambda w, i: w[:, i],
    "then-dot": lambda w, i: w[i] @ w.T,
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_read_rows(assert_agrees, table, name):
    indices = jnp.array([[1, 2, -1], [49, 0, 60]])  # the last one is out of range
    explanation = assert_agrees(LOOKUPS[name], table, indices)
    assert {use.op for use in explanation} <= {"gather", "dot_general"}


EXPERTS = {
    "batched": lambda w, x, i: jnp.einsum("ebk,ekn->ebn", x, w),
    "all-of-them": lambda w, x, i: jnp.einsum("bk,ekn->ebn", x[0], w),
    "summed": lambda w, x, i: jnp.einsum("ebk,ekn->bn", x, w),
    "picked": lambda w, x, i: jnp.einsum("bk,bkn->bn", x[0], w[i]),
    "taken": lambda w, x, i: jnp.einsum("bk,bekn->ben", x[0], jnp.take(w, i[:, None], axis=0)),
    "one": lambda w, x, i: x[0] @ w[2],
    "some": lambda w, x, i: jnp.einsum("ebk,ekn->ebn", x[1:3], w[1:3]),
    "loop": lambda w, x, i: sum(x[0] @ w[e] for e in range(4)),
    "dynamic": lambda w, x, i: x[0] @ w[i[0]],
    "batch-last": lambda w, x, i: jnp.einsum("bke,ekn->bne", x.transpose(1, 2, 0), w),
    "ragged": lambda w, x, i: lax.ragged_dot(x[0], w, jnp.array([2, 0, 1, 2])),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_packed(assert_agrees, experts, normal, name):
    assert_agrees(EXPERTS[name], experts, normal(4, 5, 64), jnp.array([1, 0, 3, 3, 9]), depth=4)


@pytest.mark.parametrize(
    "fmt",
    [
        Format("int8"),
        Format("int3", 16, zero_point=True),
        Format("uint4", 16, offset="float16"),
        Format("nf4", 16, scale=Format("int8", 4)),
        Format("e4m3", 32, 16),
        Format("int4", 48, remainder="ragged"),
        Format("int8", group_columns=None),
        Format("e2m1", 16, scale=Format("e4m3", None, None)),
    ],
    ids=str,
)
def test_every_kind_of_format(quantize, assert_agrees, normal, fmt):
    qparams = quantize({"w": normal(64, 32), "table": normal(50, 64), "experts": normal(4, 64, 32)},
                       {"table": "nk"}, fmt)  # fmt: skip

    def fn(p, x, i):
        y = x @ p["w"] @ p["w"].T
        picked = jnp.einsum("bk,bkn->bn", y, p["experts"].astype(jnp.float32)[i])
        ragged = lax.ragged_dot(y, p["experts"], jnp.array([1, 2, 0, 2]))
        return p["table"][i] @ p["table"].T, picked, ragged

    assert_agrees(fn, qparams, normal(5, 64), jnp.array([1, 3, 0, 0, 2]), depth=4)


STARTS = [-100, -64, -40, -9, -6, -1, 0, 2, 50, 70]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("axis", [0, 1, 2], ids="ekn")
def test_a_slice_starts_where_that_of_the_float_weight_does(quantize, normal, axis, size):
    """Starts outside of the axis count from its end once, then are clamped."""
    w = quantize({"w": normal(4, 64, 32)})["w"]
    fn = lambda w, at: lax.dynamic_slice_in_dim(w, at, size, axis)
    got, want = [
        jax.jit(jax.vmap(f, (None, 0)))(a, jnp.array(STARTS))
        for f, a in ((qjax.apply(fn), w), (fn, qjax.dequantize(w)))
    ]
    np.testing.assert_array_equal(got, want)


def test_narrow_indices_reach_every_row(quantize, normal):
    """258, the last row, is no uint8: bounds are those of the axis, not of the index type."""
    w = quantize({"w": normal(259, 16, 4)})["w"]
    rows = jnp.array([0, 3, 200], jnp.uint8)
    fn = lambda w: jnp.take(w, rows, axis=0, mode="clip")
    np.testing.assert_array_equal(qjax.apply(fn)(w), fn(qjax.dequantize(w)))


def test_an_empty_part_of_a_weight_is_an_empty_array(assert_agrees, experts, normal):
    def fn(w, x):
        none, some = jnp.split(w, [0])
        return x @ some, x @ none, x[:0] @ w[0], w[2:2].reshape(0, 8), w[..., :0]

    assert_agrees(fn, experts, normal(5, 64))
    qjax.usage(fn)(qjax.dequantize(experts), normal(5, 64))


FALLBACKS = {
    "sort": ("sort", lambda w, x: x @ jnp.sort(w, axis=0)),
    "mul": ("mul", lambda w, x: x @ (w * 2)),
    "concatenate": ("concatenate", lambda w, x: x @ jnp.concatenate([w, x.T @ x[:, :32]])[:64]),
    "part-of-k": ("slice", lambda w, x: x[:, :8] @ w[:8]),
    "all-of-k-and-n": ("dot_general", lambda w, x: jnp.vdot(w, jnp.outer(x[0], x[1, :32]))),
    "returned": ("return", lambda w, x: (w, x)),
    "complex": ("dot_general", lambda w, x: (1j * x + x[::-1]) @ w),
    "weights-product": ("dot_general", lambda w, x: x @ (w @ w.T)),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_has_no_packed_form_is_dequantized_and_said(assert_agrees, w, normal, name):
    op, fn = FALLBACKS[name]
    explanation = assert_agrees(fn, w, normal(5, 64), dequantized=[op], depth=64)
    (use,) = explanation.dequantized
    assert use.how.startswith("dequantized: ")


CONTROL = {
    "scan-xs": lambda w, x: lax.scan(
        lambda c, wi: (c + x @ wi, (x @ wi)[0]), jnp.zeros((5, 32)), w
    ),
    "scan-reverse": lambda w, x: lax.scan(
        lambda c, wi: (jnp.sin(c) + x @ wi, None), jnp.zeros((5, 32)), w, reverse=True, unroll=2
    ),
    "scan-const": lambda w, x: lax.scan(lambda c, xi: (c + xi @ w[1], None), jnp.zeros(32), x),
    "map": lambda w, x: lax.map(lambda wi: x @ wi, w),
    "map-batched": lambda w, x: lax.map(lambda wi: x @ wi, w, batch_size=2),
    "fori": lambda w, x: lax.fori_loop(0, 4, lambda i, c: c + x @ w[i], jnp.zeros((5, 32))),
    "while": lambda w, x: lax.while_loop(
        lambda c: (c[0] < 3) & ((x @ w[0]).sum() < 1e9),
        lambda c: (c[0] + 1, c[1] + x @ w[c[0]]),
        (0, jnp.zeros((5, 32))),
    ),
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ w[0], lambda w: -(x @ w[1]), w),
    "cond-closed": lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w[0], lambda: -(x @ w[1])),
    "switch": lambda w, x: lax.switch(2, [lambda w, i=i: x @ w[i] for i in range(3)], w),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w[0] / 8))(w, x),
    "jit": lambda w, x: jax.jit(lambda w, x: jnp.sin(x @ w[0] / 8))(w, x),
    "vmap-both": lambda w, x: jax.vmap(lambda w, x: x @ w)(w, jnp.stack([x] * 4)),
    "vmap-w": lambda w, x: jax.vmap(lambda w: x @ w)(w),
    "vmap-x": lambda w, x: jax.vmap(lambda x: x @ w[0])(x),
    "vmap-other-axis": lambda w, x: jax.vmap(lambda w: x @ w, 1, 1)(w.transpose(1, 0, 2)),
    "grad": lambda w, x: jax.grad(lambda x: jnp.sin(x @ w[0] / 8).sum())(x),
    "nested": lambda w, x: qjax.apply(qjax.apply(lambda w, x: x @ w[0]))(w, x),
    "nothing": lambda w, x: (x @ w[0], None, {"k": []}),
}


@pytest.mark.parametrize("name", CONTROL)
def test_inside_fn(assert_agrees, experts, normal, name):
    assert_agrees(CONTROL[name], experts, normal(5, 64), depth=8)


@jax.custom_jvp
def sin_dot(w, x):
    return jnp.sin(x @ w / 8)


@sin_dot.defjvp
def _(primals, tangents):
    w, x = primals
    return sin_dot(w, x), 2.0 * (tangents[1] @ w)  # not the derivative, so that one sees it used


@jax.custom_vjp
def cos_dot(w, x):
    return jnp.cos(x @ w / 8)


cos_dot.defvjp(
    lambda w, x: (cos_dot(w, x), (w, x)), lambda r, g: (3.0 * r[1].T @ g, 3.0 * g @ r[0].T)
)


@pytest.mark.parametrize("fn", [sin_dot, cos_dot])
def test_custom_derivatives_keep_their_rule(assert_agrees, assert_close, w, normal, fn):
    x = normal(5, 64)
    assert_agrees(fn, w, x)
    got = jax.grad(lambda x: qjax.apply(fn)(w, x).sum())(x)
    want = jax.grad(lambda x: fn(qjax.dequantize(w), x).sum())(x)
    assert_close(got, want)
    inner = lambda w, x: jax.grad(lambda x: fn(w, x).sum())(x)
    assert_close(qjax.apply(inner)(w, x), want)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    assert_close(
        jax.vmap(qjax.apply(fn), in_axes=(0, None))(stack, x),
        jnp.stack([fn(qjax.dequantize(w), x)] * 2),
    )


def test_python_values_stay_static(w, normal):
    def fn(w, x, flag, count, name, nothing, *, scale=1):
        assert flag is True
        assert type(count) is int
        assert name == "tanh"
        assert nothing is None
        assert type(scale) is float
        return [getattr(jnp, name)(x @ w * scale)] * count, name, flag

    x = normal(5, 64)
    outs, name, flag = qjax.apply(fn)(w, x, True, 2, "tanh", None, scale=0.5)
    assert len(outs) == 2
    assert (name, flag) == ("tanh", True)


def test_without_qtensors_fn_runs_untouched(normal):
    calls = []

    def fn(x, y):
        calls.append(type(x))
        return x @ y

    x = np.asarray(normal(4, 4))
    assert isinstance(qjax.apply(fn)(x, x), np.ndarray)
    assert calls == [np.ndarray]


def test_the_wrapper_has_the_name_and_docstring_of_fn():
    def project(w, x):
        """Projects."""
        return x @ w

    assert qjax.apply(project).__name__ == "project"
    assert qjax.apply(project).__doc__ == "Projects."


def test_errors_of_fn_are_its_own(w, normal):
    class ModelError(Exception):
        pass

    def broken(w, x):
        raise ModelError("no such layer")

    with pytest.raises(ModelError, match="no such layer"):
        qjax.apply(broken)(w, normal(5, 64))
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        qjax.apply(lambda w, x: x @ w)(w, normal(5, 63))


def test_outside_of_apply_a_qtensor_says_what_to_do(w, normal):
    for wrong in (lambda: normal(5, 64) @ w, lambda: w * 2, lambda: jnp.sin(w)):
        with pytest.raises(TypeError, match=r"qjax\.apply"):
            wrong()


def test_a_nan_scale_reaches_the_output(w, normal):
    broken = jax.tree.map(lambda a: a.at[0, 3].set(jnp.nan) if a.dtype == jnp.bfloat16 else a, w)
    y = qjax.apply(lambda w, x: x @ w)(broken, normal(5, 64))
    assert np.isnan(y[:, 3]).all()
    assert not np.isnan(np.delete(np.asarray(y), 3, axis=1)).any()


def test_nan_and_inf_activations_reach_the_output(w, normal):
    for bad in (jnp.nan, jnp.inf):
        y = qjax.apply(lambda w, x: x @ w)(w, normal(5, 64).at[2, 7].set(bad))
        assert not np.isfinite(y[2]).any()
        assert np.isfinite(np.delete(np.asarray(y), 2, axis=0)).all()
