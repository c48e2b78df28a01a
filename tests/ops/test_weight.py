"""Lookups, slices, convolutions and ragged products of a packed weight against the float one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from pallas_kernels import h100, hlo
from qjax.format import Format
from qjax.ops import weight
from qjax.ops.packed_dot import packed_dot
from qjax.qtensor import dequantize_array, quantize_array

FORMATS = [
    Format("int4", 16),
    Format("int3", 16, zero_point=True),
    Format("uint4", 16, offset="float16"),
    Format("int8"),
    Format("nf4", 16, scale=Format("int8", 4)),
    Format("e4m3", 32, 16),
    Format("int8", group_columns=None),
    Format("int5", 48, remainder="ragged"),
]


def make(shape, layout, fmt):
    w = jax.random.normal(jax.random.key(0), shape)
    qt = quantize_array(w, fmt, layout)
    return weight.as_view(qt, "w"), dequantize_array(qt)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("layout", "axis"), [("nk", 0), ("nk", 1), ("kn", 0), ("kn", 1)])
def test_lookups_along_k_and_n_are_exact(fmt, layout, axis):
    view, w = make((64, 48) if layout == "kn" else (48, 64), layout, fmt)
    indices = jnp.array([[0, 5], [47, 11]])
    got = weight.lookup(view, axis, indices, "clip", None)
    # One rounding may differ: XLA contracts q * scale + offset.
    np.testing.assert_allclose(got, jnp.moveaxis(w, axis, 0)[indices], rtol=1e-6, atol=1e-6)


def test_lookups_outside_follow_the_mode():
    view, w = make((50, 64), "nk", Format("int4", 16))
    outside = jnp.array([3, 50, -7])
    fill = weight.lookup(view, 0, outside, "fill", None)
    assert np.isnan(fill[1:]).all()
    assert np.array_equal(fill[0], w[3])
    assert (weight.lookup(view, 0, outside, "fill", 2.0)[1:] == 2).all()
    assert np.array_equal(weight.lookup(view, 0, outside, "clip", None), w[jnp.array([3, 49, 0])])


def test_lookups_of_heads_return_their_shape():
    view, w = make((50, 4, 16), "nkk", Format("int4", 16))
    got = weight.lookup(view, 0, jnp.array([7, 9]), "clip", None)
    assert np.array_equal(got, w[jnp.array([7, 9])])
    assert weight.lookup(view, 1, jnp.array([0]), "clip", None) is None  # part of K


def test_a_lookup_reads_what_it_needs():
    V, K = 4096, 512
    qt = jax.eval_shape(lambda: quantize_array(jnp.zeros((V, K)), Format("int4", 128), "nk"))
    fn = lambda qt, i: weight.lookup(weight.as_view(qt, "w"), 0, i, "clip", None)
    compiled = jax.jit(fn).lower(qt, jax.ShapeDtypeStruct((8,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 16 * 8 * K * 4


def test_experts_are_picked_packed():
    view, w = make((6, 64, 48), "kn", Format("int4", 16))
    got = weight.lookup(view, 0, jnp.array([[5, 0, 0]]), "clip", None)
    assert got.shape == (1, 3, 64, 48)
    assert got.payload.data.shape == (3, 32, 48)
    assert np.array_equal(weight.materialize(got), w[jnp.array([[5, 0, 0]])])
    outside = weight.lookup(view, 0, jnp.array([1, 6]), "fill", np.nan)
    assert np.isnan(weight.materialize(outside)[1]).all()
    nested, _ = make((6, 64, 48), "kn", FORMATS[4])
    assert weight.lookup(nested, 0, jnp.array([1, 6]), "fill", None) is None


@pytest.mark.parametrize("fmt", [FORMATS[1], FORMATS[4], FORMATS[5]], ids=str)
def test_slices_keep_what_stays_whole(fmt):
    view, w = make((3, 64, 48), "kn", fmt)
    cut = lambda start, stop: lambda a, axis: lax.slice_in_dim(a, start, stop, axis=axis)
    layers = weight.take_axis(view, 0, cut(1, 3), 2)
    assert np.array_equal(weight.materialize(layers), w[1:3])
    columns = weight.take_axis(view, 2, cut(16, 40), 24)
    nested = not isinstance(fmt.scale, str)
    if fmt.group_columns == 1 and not nested:
        assert np.array_equal(weight.materialize(columns), w[..., 16:40])
    else:
        assert columns is None
    assert weight.take_axis(view, 1, cut(0, 16), 16) is None  # K
    assert weight.take_axis(view, 2, cut(7, 8), 1) is None  # a lookup


def test_stacked_axes_can_be_regrouped():
    view, w = make((6, 64, 48), "kn", Format("int4", 16))
    regrouped = view.reshape((2, 3, 64, 48))
    assert not weight.can_unstack(regrouped)
    aligned = weight.align_lead(regrouped)
    assert weight.can_unstack(aligned)
    assert aligned.payload.data.shape == (2, 3, 32, 48)
    assert np.array_equal(weight.materialize(aligned), w.reshape(2, 3, 64, 48))
    assert weight.align_lead(view) is view


@pytest.mark.parametrize(
    ("fmt", "K"),
    [(FORMATS[0], 64), (FORMATS[1], 512), (FORMATS[4], 512), (FORMATS[7], 512)],
    ids=str,
)
def test_ragged_dot(fmt, K):
    view, w = make((4, K, 48), "kn", fmt)
    x = jax.random.normal(jax.random.key(1), (9, K))
    sizes = jnp.array([2, 0, 4, 3])
    run = lambda x: weight.ragged_dot(x, view, sizes, out_dtype=jnp.float32, precision=None)
    want = lambda x: lax.ragged_dot(x, w, sizes)
    np.testing.assert_allclose(jax.jit(run)(x), want(x), atol=2e-5 * K**0.5)
    grad = jax.jit(jax.grad(lambda x: jnp.sin(run(x)).sum()))(x)
    np.testing.assert_allclose(grad, jax.grad(lambda x: jnp.sin(want(x)).sum())(x), atol=1e-2)


def conv_params(x, w, numbers, **options):
    jaxpr = jax.make_jaxpr(
        lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)
    )(x, w)
    return jaxpr.jaxpr.eqns[0].params


@pytest.mark.parametrize(
    ("numbers", "x_shape", "w_shape", "layout", "stride"),
    [
        (("NHWC", "HWIO", "NHWC"), (2, 6, 5, 64), (1, 1, 64, 48), "kkkn", 1),
        (("NCHW", "OIHW", "NCHW"), (2, 64, 6, 5), (48, 64, 1, 1), "nkkk", 2),
        (("CNHW", "HIWO", "HWNC"), (64, 2, 6, 5), (1, 64, 1, 48), "kkkn", 2),
    ],
    ids=str,
)
def test_pointwise_convolutions(numbers, x_shape, w_shape, layout, stride):
    view, w = make(w_shape, layout, Format("int4", 16))
    x = jax.random.normal(jax.random.key(1), x_shape)
    options = {"window_strides": (stride, stride), "padding": "VALID"}
    params = conv_params(x, w, numbers, **options)
    assert weight.is_pointwise(view, params)
    product = functools.partial(packed_dot, qt=view.payload)
    got = weight.pointwise_conv(x, view, params, out_dtype=jnp.float32, product=product)
    want = lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"padding": ((1, 1), (0, 0))}, {"lhs_dilation": (2, 1)}, {"feature_group_count": 2}],
    ids=str,
)
def test_what_is_more_than_pointwise_is_not(options):
    view, w = make((1, 1, 32, 48), "kkkn", Format("int4", 16))
    x = jnp.zeros((2, 6, 5, 32 * options.get("feature_group_count", 1)))
    options = {"window_strides": (1, 1), "padding": ((0, 0), (0, 0))} | options
    params = conv_params(x, w, ("NHWC", "HWIO", "NHWC"), **options)
    assert not weight.is_pointwise(view, params)
    want = lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
    how = {"dequantize": lambda view: w, "rounded": lambda x, view: x}
    assert np.array_equal(weight.conv(x, view, params, **how), want)


@pytest.mark.h100
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["int4", "int8", "nf4-dq"])
def test_a_lookup_on_an_h100_reads_the_rows_that_it_returns(name, axis):
    """XLA's own fusion of the gather, the decoding and the scale: no kernel could read less."""
    fmt = {
        "int4": Format("int4", 128, scale="bfloat16"),
        "int8": Format("int8"),
        "nf4-dq": Format("nf4", 64, scale=Format("int8", 4)),
    }[name]
    V, D, M = 128256, 4096, 64
    shape = (V, D) if axis == 0 else (D, V)
    rows = jax.ShapeDtypeStruct((M,), jnp.int32)
    for prepare in (lambda qt: qt, lambda qt: qjax.prepare(qt, "h100")):
        table = jax.eval_shape(
            lambda w, prepare=prepare: prepare(quantize_array(w, fmt)),
            jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        )
        look_up = lambda table, rows: jnp.take(table, rows, axis=axis)
        (use,) = qjax.explain(look_up)(table, rows)
        assert use.implementation == "xla, reads those rows alone"
        program = h100.compile(jax.jit(qjax.apply(look_up)), table, rows)
        steps = hlo.executed(program.hlo)
        assert steps["fusion"] <= 2
        assert set(steps) <= {"parameter", "constant", "bitcast", "fusion", "get-tuple-element"}
        assert program.temporaries <= 4 * M * D + 1024  # of rows, not of the table
