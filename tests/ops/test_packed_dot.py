"""packed_dot against the dequantized product, and the primitive's rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.format import Format
from qjax.ops import partitioning
from qjax.ops.packed_dot import packed_dot
from qjax.ops.spec import Spec
from qjax.qtensor import dequantize_canonical, quantize_array
from qjax.sharding import shardings_of

FORMATS = [
    Format("int4", 16),
    Format("int4", 16, zero_point=True, scale="bfloat16"),
    Format("uint4", 32, offset=Format("int8", 2)),
    Format("int3", 32),
    Format("int8"),
    Format("nf4", 16, scale=Format("int8", 4)),
    Format("e4m3", 32, 16),
    Format("e2m1", 32, scale="e8m0"),
    Format("ternary", group_columns=None),
    Format("int4", 48, remainder="ragged"),
]
# One program for a new format or shape instead of one for every operation.
quantize = jax.jit(quantize_array, static_argnums=1)
dequantize = jax.jit(dequantize_canonical)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def assert_close(y, x, w):
    """An error of 2 K eps of what the absolute products, three times as large, add up to."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    bound = np.abs(x) @ np.abs(w) + np.abs(x).sum(-1, keepdims=True) * np.abs(w).max()
    assert y.shape == bound.shape
    eps = max(float(jnp.finfo(y.dtype).eps), 2 * x.shape[-1] * 2.0**-23)
    assert (np.abs(np.asarray(y, np.float64) - x @ w) <= 3 * eps * bound).all()


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_both_products(fmt, implementation):
    qt = quantize(normal(64, 48), fmt)
    w = dequantize(qt)
    dot = jax.jit(functools.partial(packed_dot, implementation=implementation),
                  static_argnames=("transposed",))  # fmt: skip
    x = normal(5, 64)
    assert_close(dot(x, qt), x, w)
    x = normal(5, 48)
    assert_close(dot(x, qt, transposed=True), x, w.T)


def test_leading_axes_are_batched_and_tokens_free():
    qt = quantize_array(normal(2, 3, 64, 48), Format("int4", 16))
    w = dequantize_canonical(qt)
    x = normal(2, 3, 4, 5, 64)
    y = jax.jit(packed_dot)(x, qt)
    assert y.shape == (2, 3, 4, 5, 48)
    np.testing.assert_allclose(y, jnp.einsum("abijk,abkn->abijn", x, w), atol=1e-4)
    assert packed_dot(x[0, 0, 0, 0], jax.tree.map(lambda a: a[0, 0], qt)).shape == (48,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_result_has_the_dtype_asked_for(dtype):
    qt = quantize_array(normal(64, 48), Format("int4", 16))
    x = normal(5, 64).astype(dtype)
    assert packed_dot(x, qt).dtype == dtype
    y = packed_dot(x, qt, out_dtype="float32")
    assert y.dtype == jnp.float32
    assert_close(y, x.astype(jnp.float32), dequantize_canonical(qt))  # accumulated in float32


def test_it_is_linear_in_x():
    qt = quantize_array(normal(64, 48), Format("int4", 16))
    w, x, ct = dequantize_canonical(qt), normal(5, 64), normal(5, 48)
    _, tangent = jax.jvp(lambda x: packed_dot(x, qt), (x,), (2 * x,))
    assert_close(tangent, 2 * x, w)
    back = jax.vjp(lambda x: packed_dot(x, qt), x)[1](ct)[0]
    assert_close(back, ct, w.T)
    text = str(jax.make_jaxpr(jax.linear_transpose(lambda x: packed_dot(x, qt), x))(ct))
    assert text.count("packed_dot[") == 1
    x16 = x.astype(jnp.bfloat16)
    back = jax.vjp(lambda x: packed_dot(x, qt, out_dtype="float32"), x16)[1](ct)[0]
    assert back.dtype == jnp.bfloat16


@pytest.mark.parametrize("axes", [(0, None), (1, None), (None, 0), (0, 0), (2, 1)])
def test_vmap(axes):
    x_axis, w_axis = axes
    qt = quantize_array(normal(3, 64, 48), Format("int4", 16))
    x = normal(3, 5, 64)
    if w_axis is None:
        qt = jax.tree.map(lambda a: a[0], qt)
    w = dequantize_canonical(qt)
    want = jnp.einsum("bmk,bkn->bmn" if w_axis is not None else "bmk,kn->bmn", x, w)
    x_in = x[0] if x_axis is None else jnp.moveaxis(x, 0, x_axis)
    if x_axis is None:
        want = jnp.einsum("mk,bkn->bmn", x[0], w)
    stored = jax.tree.map(lambda a: jnp.moveaxis(a, 0, w_axis or 0), qt)
    got = jax.vmap(packed_dot, axes)(x_in, stored)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_derivatives_with_respect_to_scales_are_refused():
    qt = quantize_array(normal(64, 48), Format("int4", 16))
    with pytest.raises(TypeError, match="with respect to the scales of a packed weight"):
        jax.grad(lambda qt: packed_dot(normal(5, 64), qt).sum(), allow_int=True)(qt)


def test_shapes_that_do_not_fit_are_named():
    qt = quantize_array(normal(2, 64, 48), Format("int4", 16))
    with pytest.raises(TypeError, match=r"x of shape \(2, 5, 63\) does not fit a weight"):
        packed_dot(normal(2, 5, 63), qt)
    with pytest.raises(TypeError, match=r"\[\*lead, K, N\] = \(2, 64, 48\)"):
        packed_dot(normal(3, 5, 64), qt)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spec", [P("y", "x"), P(("x", "y"))], ids=str)
@pytest.mark.parametrize("fmt", [FORMATS[1], FORMATS[3], FORMATS[5], FORMATS[9]], ids=str)
def test_a_split_weight_is_never_gathered_where_its_storage_splits(fmt, spec, transposed):
    """8-bit collectives of the size of the codes only where groups or bytes would be cut."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    qt = quantize_array(normal(256, 64), fmt)
    x = normal(4, 64 if transposed else 256)
    want = packed_dot(x, qt, transposed=transposed)
    placed = jax.device_put(qt, shardings_of(qt, NamedSharding(mesh, spec)))
    compiled = jax.jit(packed_dot, static_argnames="transposed").lower(
        x, placed, transposed=transposed
    ).compile()  # fmt: skip
    np.testing.assert_allclose(compiled(x, placed), want, atol=1e-3)
    if fmt.remainder == "error":
        assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("fmt", [FORMATS[1], FORMATS[5], FORMATS[7]], ids=str)
def test_derivatives_keep_scales_as_they_are_stored(fmt):
    """A scan over layers keeps those of all, which in float32 are a quarter of 4 bits in 32s."""
    stack = quantize(normal(3, 64, 64), fmt)

    def f(x):
        return jax.lax.scan(lambda x, w: (packed_dot(x, w), None), x, stack)[0].sum()

    x = normal(2, 64)
    _, back = jax.vjp(f, x)
    stored = {(a.shape, a.dtype) for a in jax.tree.leaves(stack)}
    kept = {(a.shape, a.dtype) for a in jax.tree.leaves(back) if a.ndim == 3}
    assert kept
    assert kept <= stored
    w = dequantize(stack)
    wanted = jax.grad(lambda x: (x @ w[0] @ w[1] @ w[2]).sum())(x)
    np.testing.assert_allclose(back(jnp.ones(()))[0], wanted, rtol=1e-3, atol=1e-3)


def test_the_sharding_rule_names_shared_factors():
    def rule(fmt, K=64, N=48, transposed=False):
        qt = jax.eval_shape(lambda: quantize_array(jnp.zeros((K, N)), fmt))
        scale = jax.ShapeDtypeStruct(fmt.groups(K, N), jnp.float32)
        spec = Spec(qt.format, qt.pad, transposed, "float32", None)
        x = jax.ShapeDtypeStruct((5, N if transposed else K), jnp.float32)
        return partitioning.rule(partitioning.shapes_of(spec, x, qt.data, scale, False), transposed)

    # 4 groups of 16: K = 4 x 16, 32 packed rows = 4 x 8.
    assert rule(Format("int4", 16)) == ("m0 (k p), (k r) n, k n -> m0 n", {"p": 16, "r": 8})
    assert rule(Format("int8")) == ("m0 k, k n, g n -> m0 n", {})
    assert rule(Format("int8"), transposed=True) == ("m0 n, k n, g n -> m0 k", {})
    # 8 units of 8 codes in 3 bytes.
    assert rule(Format("int3", 32))[0] == "m0 (k p), (k r) n, k n -> m0 n"
    # A group is cut, so nothing is shared.
    assert rule(Format("int4", 48, remainder="ragged")) == ("m0 p, r n, g n -> m0 n", {})
