"""Tests of qjax/qtensor.py: laws that every format obeys, and a QTensor as a pytree."""

import copy
import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import kquants, numerics, scales
from qjax.format import Format
from qjax.layout import Layout
from qjax.qtensor import (
    dequantize_array,
    dequantize_canonical,
    dequantize_rows,
    is_qtensor,
    quantize_array,
    read_codes,
    read_scales,
)

K, N = 96, 10
FORMATS = [
    Format("int8"),
    Format("int8", group_columns=None, scale="bfloat16"),
    Format("int3", 32, scale="bfloat16"),
    Format("int5", 24, rule="absmax_full", scale="float16"),
    Format("int4", 32, scale="bfloat16", rule="signed_absmax"),
    Format("int4", 32, 4),
    Format("int4", 40, remainder="shrink", scale="float16"),
    Format("int4", 32, scale="e4m3"),
    Format("int4", 32, scale="e8m0", rule="absmax_full"),
    Format("int4", 32, zero_point=True, scale="bfloat16"),
    Format("int3", 40, zero_point=True, remainder="ragged"),
    Format("uint4", 32, zero_point=True, scale="e8m0"),
    Format("uint5", 32, 3, offset="float32"),
    Format("uint4", 8, scale=Format("uint6", 4), offset=Format("uint6", 4, rule="absmax")),
    Format("int6", 16, scale=Format("int8", 2, scale="float16")),
    Format("int4", 32, scale=Format("int8_max15"), rule="mse"),
    Format("e2m1", 32, scale=Format("e4m3_for_e2m1"), rule="mse"),
    Format("nf4", 32),
    Format("nf4", 16, scale=Format("uint8", 1, 4)),
    Format("fp4", 64, remainder="ragged", scale="bfloat16"),
    Format("e2m1", 32, scale="e8m0"),
    Format("e2m1", 16, scale=Format("e4m3", group_columns=None)),
    Format("e4m3", 32, 8),
    Format("e5m2", group_columns=None),
    Format("ternary"),
    Format("int4", 32, rule="mse", scale="bfloat16"),
    Format("int3", 32, rule="mse", zero_point=True),
    Format("uint3", 32, rule="mse", offset="float16"),
]
# A search picks the best of candidates whose errors can be equal to the last bit; there, and where
# a scale is a mean, another order of the sums may choose another scale.
SUMS = ("mse", "absmean")


def name(fmt):
    return f"{fmt} {fmt.scale_rule} {fmt.remainder}".replace("error", "").strip()


every_format = pytest.mark.parametrize(
    "fmt",
    # Each compiles; a third of them only on request keeps the whole suite short.
    [pytest.param(f, marks=[pytest.mark.slow] * (i % 3 == 2)) for i, f in enumerate(FORMATS)],
    ids=map(name, FORMATS),
)


@functools.cache
def weight():
    w = np.random.default_rng(0).normal(size=(3, K, N)).astype(np.float32)
    w[0, :32] = 0.0  # an all-zero group in every column
    w[1, :, 3] = 0.0  # an all-zero column
    w[1, 40, 2] = 30.0  # an outlier
    w[2] = np.abs(w[2])  # one sign only
    return jnp.asarray(w)


@functools.cache
def jitted(fmt, layout="kn"):
    return jax.jit(lambda w: quantize_array(w, fmt, layout))


@functools.cache
def quantized(fmt):
    return jitted(fmt)(weight())


dequantized = jax.jit(dequantize_array)


@jax.jit
def parts(qt):
    """Canonical weight, and the codes, scales and zeros of every weight."""
    rows, columns = qt.canonical_shape[-2:]
    scale, zero = read_scales(qt)
    wide = scales.spread(scale, qt.format, rows, columns)
    z = None if zero is None else scales.spread(zero, qt.format, rows, columns)
    return dequantize_canonical(qt), read_codes(qt), wide, 0.0 if z is None else z


def leaves_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def squared_error(qt, w):
    return float(jnp.sum((dequantized(qt).astype(jnp.float32) - w) ** 2))


def assert_same_quantization(a, b, w):
    if a.format.scale_rule in SUMS:
        assert squared_error(a, w) == pytest.approx(squared_error(b, w), rel=1e-5)
    else:
        leaves_equal(a, b)


# ---- rounding ----


@every_format
def test_error_is_at_most_half_a_stored_step(fmt):
    w = weight()
    deq, q, scale, zero = parts(quantized(fmt))
    element = numerics.get_element(fmt.element)
    z = zero if fmt.zero_point else 0.0
    offset = zero if fmt.offset is not None else 0.0
    ends = jnp.stack([(element.qmin - z) * scale + offset, (element.qmax - z) * scale + offset])
    inside = (w >= ends.min(0)) & (w <= ends.max(0))
    assert inside.mean() > 0.5
    # Three float32 roundings: w / scale, q * scale and the sum with an offset.
    slack = 2.0**-22 * (jnp.abs(w) + jnp.abs(offset) + jnp.abs(q * scale))
    half = numerics.half_step(fmt.element) * jnp.abs(scale)
    assert (jnp.abs(deq - w) <= half + slack)[inside].all()
    # Outside the range a value saturates at the end next to it.
    clipped = jnp.where(w > ends.max(0), ends.max(0), ends.min(0))
    assert (jnp.abs(deq - clipped) <= 2 * slack)[~inside].all()


@every_format
def test_zeros_stay_exactly_zero(fmt):
    if fmt.offset is not None:
        pytest.skip("an offset need not be a multiple of its scale")
    w = weight()
    assert (dequantized(quantized(fmt))[w == 0] == 0).all()


CLOSED = [
    f
    for f in FORMATS
    if f.scale_rule in ("absmax", "signed_absmax")
    and not f.zero_point
    and not (f.scale == "e8m0" and f.element != "e2m1")  # 7 is 1.75 * 4, which rounds up
]


@pytest.mark.parametrize("fmt", CLOSED, ids=name)
def test_quantizing_what_is_quantized_changes_nothing(fmt):
    once = dequantized(quantized(fmt))
    twice = dequantized(jitted(fmt)(once))
    # (scale * qmax) / qmax may be off by an ulp, and is multiplied by q once more.
    np.testing.assert_allclose(twice, once, rtol=2.0**-21)


@every_format
def test_scaling_by_a_power_of_two_scales_the_result(fmt):
    w = weight()
    np.testing.assert_array_equal(dequantized(jitted(fmt)(w * 4)), dequantized(quantized(fmt)) * 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fmt", FORMATS[::9], ids=name)
def test_half_precision_weights_are_quantized_as_float32_and_come_back_in_their_type(fmt, dtype):
    w = weight().astype(dtype)
    qt = jitted(fmt)(w)
    assert (qt.dtype, dequantized(qt).dtype) == (dtype, dtype)
    as_float = jitted(fmt)(w.astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(qt), jax.tree.leaves(as_float), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    "fmt",
    [
        Format("int3", 4, remainder="ragged"),
        Format("int5", zero_point=True),
        Format("nf4", 64, 2, remainder="ragged"),
    ],
    ids=name,
)
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (2, 13, 3)], ids=str)
def test_small_and_odd_shapes(fmt, shape):
    w = jax.random.normal(jax.random.key(1), shape)
    qt = jitted(fmt)(w)
    assert qt.shape == shape
    assert qt.bits_per_weight == pytest.approx(fmt.bits_per_weight(*shape[-2:]))
    deq, _, scale, _ = parts(qt)
    covers = 2.0 if fmt.element == "nf4" else 1.0  # only nf4 reaches both ends of every group
    assert (jnp.abs(deq - w) <= covers * jnp.abs(scale) * 1.001 + 1e-3 * jnp.abs(w)).all()


# ---- NaN and Inf ----


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@every_format
def test_a_bad_weight_spoils_its_group_and_no_other(fmt, bad):
    w = weight()
    broken = dequantized(jitted(fmt)(w.at[0, 90, 1].set(bad)))
    g = fmt.fit(K).group_size or K
    c = fmt.group_columns or N
    group = np.zeros(w.shape, bool)
    group[0, 90 // g * g : 90 // g * g + g, 1 // c * c : 1 // c * c + c] = True
    if isinstance(fmt.scale, Format):  # its scale spoils the group of scales that it is in
        assert jnp.isnan(broken[group]).all()
        assert not jnp.isnan(broken[1:]).any()
    else:
        np.testing.assert_array_equal(np.isnan(broken), group)


# ---- transforms ----


@pytest.mark.parametrize(
    "scale",
    [Format("int8_max15"), Format("uint4"), Format("uint8", 3, flatten=True)],
    ids=str,
)
def test_a_group_of_small_weights_beside_large_ones_keeps_its_levels(scale):
    """As an integer its scale would be 0, and all of it."""
    w = jax.random.normal(jax.random.key(0), (K, N))
    w = w.at[32:64].multiply(1e-4).at[64:].set(0)
    qt = quantize_array(w, Format("int4", 32, scale=scale))
    stored = read_scales(qt)[0]
    least = np.asarray(stored[1])
    assert (least > 0).all()
    assert (least < np.asarray(stored[0])).all()
    np.testing.assert_array_equal(stored[2], 0)
    error = np.abs(dequantize_array(qt) - w)[32:64]
    assert (error <= least / 2).all()


@pytest.mark.parametrize("fmt", FORMATS[::4], ids=name)
def test_a_stack_is_quantized_slice_by_slice(fmt):
    w, qt = weight(), quantized(fmt)
    assert_same_quantization(jax.vmap(jitted(fmt))(w), qt, w)
    one_by_one = [jitted(fmt)(x) for x in w]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    assert_same_quantization(stacked, qt, w)


@pytest.mark.parametrize("fmt", FORMATS[::5], ids=name)
def test_eager_is_jit(fmt):
    w = weight()
    assert_same_quantization(quantize_array(w, fmt), quantized(fmt), w)


@every_format
def test_planned_shapes_and_bytes_are_the_real_ones(fmt):
    qt = quantized(fmt)
    plan = jax.eval_shape(jitted(fmt), jax.ShapeDtypeStruct((3, K, N), jnp.float32))
    assert jax.tree.structure(plan) == jax.tree.structure(qt)
    for a, b in zip(jax.tree.leaves(plan), jax.tree.leaves(qt), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert (plan.shape, plan.nbytes) == (qt.shape, qt.nbytes)
    assert qt.nbytes == sum(np.asarray(a).nbytes for a in jax.tree.leaves(qt))
    assert qt.bits_per_weight == pytest.approx(fmt.bits_per_weight(K, N))
    assert repr(plan) == repr(qt)


@pytest.mark.parametrize("fmt", FORMATS[1::4], ids=name)
def test_static_fields_survive_losing_the_leading_axis(fmt):
    w, qt = weight(), quantized(fmt)
    sliced = jax.tree.map(lambda a: a[1], qt)
    assert (sliced.shape, sliced.ndim, sliced.size) == ((K, N), 2, K * N)
    deq = dequantized(qt)
    # q * scale + offset may be one rounding or two.
    same = functools.partial(
        np.testing.assert_allclose, rtol=0, atol=2.0**-22 * float(abs(deq).max())
    )
    same(dequantized(sliced), deq[1])
    same(jax.lax.scan(lambda _, q: (None, dequantized(q)), None, qt)[1], deq)
    same(jax.vmap(dequantized)(qt), deq)
    assert sliced.format == jitted(fmt)(w[1]).format


# ---- layouts ----

LAYOUTS = [
    ("kn", (6, 10), (6, 10)),
    ("nk", (10, 6), (6, 10)),
    ("knn", (6, 2, 5), (6, 10)),
    ("kkn", (2, 3, 10), (6, 10)),
    ("nnk", (2, 5, 6), (6, 10)),
    ("nkk", (10, 2, 3), (6, 10)),
    ("knk", (2, 10, 3), (6, 10)),
    ("kkkn", (1, 2, 3, 10), (6, 10)),
    ("k", (6,), (6, 1)),
    ("bkn", (4, 6, 10), (4, 6, 10)),
    ("kbn", (6, 4, 10), (4, 6, 10)),
    ("knb", (6, 10, 4), (4, 6, 10)),
    ("nbkb", (10, 4, 6, 2), (4, 2, 6, 10)),
]


@pytest.mark.parametrize(("letters", "shape", "canonical"), LAYOUTS, ids=lambda x: str(x))
@pytest.mark.parametrize("stacked", [(), (3,), (2, 3)], ids=str)
def test_a_layout_and_its_inverse(letters, shape, canonical, stacked):
    w = np.arange(np.prod(stacked + shape)).reshape(stacked + shape)
    layout = Layout.parse(letters, w.shape)
    c = layout.to_canonical(w)
    assert c.shape == stacked + canonical
    np.testing.assert_array_equal(layout.from_canonical(c), w)
    assert layout.logical_shape(c.shape[:-2], *c.shape[-2:]) == w.shape
    assert layout.letters == letters.lstrip("b")


@pytest.mark.parametrize(("letters", "shape", "_"), LAYOUTS[1::3], ids=lambda x: str(x))
def test_a_layout_is_a_transpose_of_the_canonical_quantization(letters, shape, _):
    w = jax.random.normal(jax.random.key(2), (2, *shape))
    fmt = Format("int4", 3)
    qt = jitted(fmt, letters)(w)
    assert qt.shape == w.shape
    canonical = jitted(fmt)(qt.layout.to_canonical(w))
    np.testing.assert_array_equal(qt.data, canonical.data)
    np.testing.assert_array_equal(qt.layout.to_canonical(dequantized(qt)), dequantized(canonical))


@pytest.mark.parametrize("letters", ["", "n", "bn", "kx", "KN"])
def test_a_layout_has_a_contracted_axis_and_no_other_letters(letters):
    with pytest.raises(ValueError, match="letters k, n and b"):
        Layout.parse(letters, (4, 4))


def test_a_layout_is_no_longer_than_the_shape():
    with pytest.raises(ValueError, match=r"'kkn' has more axes than the shape \(4, 4\)"):
        Layout.parse("kkn", (4, 4))


# ---- a pytree, and no array ----


@pytest.fixture
def qt():
    return quantized(Format("int4", 32, zero_point=True, scale="bfloat16"))


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))]
)
def test_copies_are_equal(qt, clone):
    leaves_equal(clone(qt), qt)
    nested = quantized(Format("nf4", 16, scale=Format("uint8", 1, 4)))
    leaves_equal(clone(nested), nested)


def test_tree_operations_keep_the_type(qt):
    leaves, tree = jax.tree.flatten(qt)
    assert len(leaves) == 3
    leaves_equal(jax.tree.unflatten(tree, leaves), qt)
    leaves_equal(jax.device_put(qt), qt)
    assert is_qtensor(jax.tree.map(lambda a: None, qt))
    for child in ("anything", jnp.dtype("uint8"), 1.5, (2, 3)):
        assert repr(jax.tree.map(lambda a, child=child: child, qt)).startswith("QTensor(")
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(qt)]
    assert paths == [".data", ".scale", ".zero"]


def test_structures_compare_by_their_static_fields(qt):
    other = quantized(Format("int4", 32, zero_point=True))
    assert jax.tree.structure(qt) != jax.tree.structure(other)
    assert hash(jax.tree.structure(qt)) == hash(jax.tree.structure(copy.copy(qt)))


@pytest.mark.parametrize(
    "fmt",
    [Format("int8"), Format("e4m3"), Format("int4", 32), Format("uint4", 32, zero_point=True)],
)
def test_codes_that_a_cast_of_the_tree_changed_are_refused(fmt, tmp_path):
    params = {"a": {"w": weight()[0]}}
    qparams = qjax.quantize(params, fmt)
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), qparams)
    run = qjax.apply(lambda p, x: x @ p["a"]["w"])
    with pytest.raises(TypeError, match=r"0/a/w: its codes are bfloat16.*is_qtensor"):
        run(cast, jnp.ones((2, K)))
    with pytest.raises(TypeError, match="its codes are bfloat16"):
        qjax.dequantize(cast)
    with pytest.raises(TypeError, match="a/w: its codes are bfloat16"):
        qjax.save(tmp_path / "c", cast)
    spared = lambda a: a if is_qtensor(a) else a.astype(jnp.bfloat16)
    run(jax.tree.map(spared, qparams, is_leaf=is_qtensor), jnp.ones((2, K)))
    if fmt.zero_point:
        zero = dataclasses.replace(qparams["a"]["w"], zero=cast["a"]["w"].zero)
        with pytest.raises(TypeError, match="its zero points are bfloat16"):
            run({"a": {"w": zero}}, jnp.ones((2, K)))


def test_repr_says_shape_format_and_cost(qt):
    assert repr(qt) == "QTensor(3x96x10 float32 as int4 g32 zp bf16, 4.667 bpw)"


X = np.ones((2, K), np.float32)
USES = {
    "x @ q": lambda q: jnp.asarray(X) @ q,
    "q @ x": lambda q: q @ jnp.asarray(X),
    "numpy x @ q": lambda q: X @ q,
    "q @ numpy x": lambda q: q @ X,
    "jnp.dot": lambda q: jnp.dot(jnp.asarray(X), q),
    "jnp.einsum": lambda q: jnp.einsum("mk,lkn->mln", jnp.asarray(X), q),
    "np.dot": lambda q: np.dot(X, q),
    "jit": lambda q: jax.jit(lambda x, q: x @ q)(X, q),
    "asarray": lambda q: jnp.asarray(q),
    "np.asarray": lambda q: np.asarray(q),
    "sum": lambda q: jnp.sum(q),
    "take": lambda q: jnp.take(q, jnp.arange(2), axis=0),
    "where": lambda q: jnp.where(True, q, 0.0),
    "x + q": lambda q: X + q,
    "2 * q": lambda q: 2.0 * q,
    "x / q": lambda q: X / q,
    "-q": lambda q: -q,
    "abs": abs,
    "q < 1": lambda q: q < 1,
    "float": float,
    "bool": bool,
    "len": len,
    "iter": list,
    "in": lambda q: 1.0 in q,
    "q[0]": lambda q: q[0],
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_use_as_an_array_says_what_to_do(qt, use):
    with pytest.raises(TypeError, match=r"(?s)used as an array.*qjax\.apply.*qjax\.dequantize"):
        use(qt)


@pytest.mark.parametrize("attribute", ["T", "astype", "reshape", "at", "mean"])
def test_an_array_attribute_says_what_to_do(qt, attribute):
    with pytest.raises(AttributeError, match=rf"'{attribute}'.*qjax\.apply.*qjax\.dequantize"):
        getattr(qt, attribute)
    assert not hasattr(qt, attribute)


def test_lax_refuses_it_too(qt):
    with pytest.raises((TypeError, ValueError)):
        jax.lax.dot(jnp.asarray(X), qt)


# ---- against other implementations ----


@pytest.fixture(scope="module")
def golden(request):
    return lambda stem: np.load(request.path.parent / "golden" / f"{stem}.npz")


def ct_codes(g, tag, bits):
    """Codes [K, N] from rows of little-endian words."""
    words = np.ascontiguousarray(g[f"{tag}_weight_packed"])
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return (codes << np.arange(bits)).sum(-1).astype(np.uint8).T


@pytest.mark.parametrize(
    ("tag", "fmt"),
    [
        *((f"pack{b}_sym", Format(f"int{b}", 32, rule="absmax_full")) for b in range(2, 9)),
        ("pack4_chan_k40", Format("int4", rule="absmax_full")),
        ("pack3_asym", Format("int3", 32, zero_point=True)),
        ("pack4_asym", Format("int4", 32, zero_point=True)),
        ("naive4_group", Format("int4", 32, zero_point=True)),
        ("int8_chan", Format("int8", rule="absmax_full")),
        ("fp8_tensor", Format("e4m3", group_columns=None)),
        ("fp8_chan", Format("e4m3")),
        ("fp8_block", Format("e4m3", 16, 16, remainder="ragged")),
        ("mxfp8", Format("e4m3", 32, scale="e8m0")),
    ],
)
def test_compressed_tensors_chooses_the_same_scales_and_codes(golden, tag, fmt):
    g = golden("compressed_tensors")
    W = g[f"{tag}_W"]  # [N, K]
    qt = jitted(fmt, "nk")(jnp.asarray(W))
    stored = g[f"{tag}_weight_scale"]
    ours = np.asarray(qt.scale).T.reshape(stored.shape)
    if fmt.scale == "e8m0":
        np.testing.assert_array_equal(ours, stored)
    else:
        np.testing.assert_allclose(ours, stored, rtol=2.0**-23)
    if fmt.element == "e4m3":
        np.testing.assert_array_equal(np.asarray(qt.data).view(np.uint8), g[f"{tag}_weight"].T)
        np.testing.assert_allclose(dequantized(qt), g[f"{tag}_decoded"], rtol=2.0**-22)
        return
    q, bits = np.asarray(parts(qt)[1]), qt.element.bits
    if tag.startswith("pack"):
        want = ct_codes(g, tag, bits)[: q.shape[0]] - 2.0 ** (bits - 1)
    else:
        want = g[f"{tag}_weight"].T.astype(np.float32)
    # A group's largest value is at (2^b - 1) / 2 steps: a tie that an ulp of the scale decides.
    steps = W.T / np.repeat(stored.T, len(q) // stored.shape[1], axis=0)
    tie = np.abs(np.abs(steps - np.round(steps)) - 0.5) <= 2.0**-22 * np.abs(steps)
    np.testing.assert_array_equal(q[~tie], want[~tie])
    assert (np.abs(q - want) <= tie).all()
    theirs = g[f"{tag}_decoded"].T
    np.testing.assert_allclose(dequantized(qt).T[~tie], theirs[~tie], rtol=2.0**-22)


def test_compressed_tensors_chooses_the_same_zero_points(golden):
    g = golden("compressed_tensors")
    qt = quantize_array(jnp.asarray(g["naive4_group_W"]), Format("int4", 32, zero_point=True), "nk")
    zero = np.asarray(read_scales(qt)[1])
    np.testing.assert_array_equal(zero.T, g["naive4_group_weight_zero_point"])


def fp4_codes(packed):
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).T  # [K, N]


def test_mxfp4_is_that_of_compressed_tensors(golden):
    g = golden("compressed_tensors")
    qt = quantize_array(jnp.asarray(g["mxfp4_W"]), Format("e2m1", 32, scale="e8m0"), "nk")
    np.testing.assert_array_equal(qt.scale.T, g["mxfp4_weight_scale"])
    codes = numerics.decode(jnp.asarray(fp4_codes(g["mxfp4_weight_packed"])), qt.element)
    np.testing.assert_array_equal(read_codes(qt), codes)
    np.testing.assert_array_equal(dequantized(qt), g["mxfp4_decoded"])


def test_nvfp4_is_that_of_compressed_tensors(golden):
    g = golden("compressed_tensors")
    fmt = Format("e2m1", 16, scale=Format("e4m3", group_columns=None))
    qt = quantize_array(jnp.asarray(g["nvfp4_W"]), fmt, "nk")
    np.testing.assert_array_equal(
        np.asarray(qt.scale.data).view(np.uint8).T, g["nvfp4_weight_scale"]
    )
    # Theirs divides by the global scale, ours multiplies.
    np.testing.assert_allclose(1 / qt.scale.scale[0, 0], g["nvfp4_weight_global_scale"], 2.0**-22)
    codes = numerics.decode(jnp.asarray(fp4_codes(g["nvfp4_weight_packed"])), qt.element)
    np.testing.assert_array_equal(read_codes(qt), codes)
    # Theirs decodes in bfloat16: two roundings of 2^-9.
    np.testing.assert_allclose(dequantized(qt), g["nvfp4_decoded"], rtol=2.0**-8)


@pytest.mark.parametrize("element", ["nf4", "fp4"])
def test_bitsandbytes_chooses_the_same_scales_and_codes(golden, element):
    g = golden("bitsandbytes")
    A = g["A"]
    qt = quantize_array(jnp.asarray(A), Format(element, 64), "nk")
    np.testing.assert_array_equal(np.asarray(qt.scale).T.reshape(-1), g[f"{element}_absmax"])
    np.testing.assert_array_equal(qt.element.levels, g[f"{element}_code"])
    packed = g[f"{element}_packed"].reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(A.shape).T
    # FP4 has two codes of zero, 0 and 8, and bitsandbytes uses either: values are compared.
    want = numerics.decode(jnp.asarray(codes), qt.element)
    np.testing.assert_array_equal(read_codes(qt), want)
    np.testing.assert_array_equal(dequantized(qt)[:4], g[f"{element}_deq_first4rows"])


BNB_SCALE = Format(
    "dynamic8", 256, flatten=True, remainder="ragged", rule="centered", offset="float32"
)


@pytest.mark.parametrize("element", ["nf4", "fp4"])
def test_bitsandbytes_quantizes_scales_again_the_same_way(golden, element):
    g = golden("bitsandbytes")
    qt = quantize_array(jnp.asarray(g["A"]), Format(element, 64, scale=BNB_SCALE), "nk")
    assert qt.bits_per_weight == qt.format.bits_per_weight(256, 192)
    # The mean depends on the order of its sum, so a scale between two levels may fall to either.
    np.testing.assert_allclose(qt.scale.zero, g[f"{element}_dq_offset"], rtol=2.0**-22)
    np.testing.assert_allclose(
        qt.scale.scale[:, 0], g[f"{element}_dq_nested_absmax"], atol=2.0**-25, rtol=2.0**-22
    )
    ours, theirs = np.asarray(qt.scale.data)[:, 0], g[f"{element}_dq_absmax_u8"]
    assert (np.abs(ours.astype(int) - theirs) <= 1).all()
    assert (ours != theirs).sum() <= 1


def test_flattened_scales_follow_vmap():
    w = weight()
    fmt = Format("nf4", 32, scale=BNB_SCALE)
    stacked, mapped = quantize_array(w, fmt), jax.vmap(lambda w: quantize_array(w, fmt))(w)
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(mapped), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(dequantize_array(stacked), dequantize_array(mapped))
    error = np.abs(dequantize_array(stacked) - w)
    assert error.mean() < 0.1 * np.abs(w).mean()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"element": "int8", "rule": "centered"}, r"'centered'.* needs an `offset`"),
        ({"element": "nf4", "flatten": True, "group_columns": None}, r"set group_columns=1"),
        ({"element": "nf4", "offset": "float32"}, r"need an integer element"),
    ],
)
def test_centered_and_flattened_formats_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Format(**kwargs)


# ---- factors of the activation ------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[2], FORMATS[9], FORMATS[16]], ids=name)
def test_a_pre_scale_multiplies_the_rows_of_what_is_stored(fmt):
    w = weight()
    s = jnp.exp2(jnp.arange(3 * K).reshape(3, K) % 5 - 2.0)  # powers of two: no rounding
    qt = quantize_array(w, fmt, pre_scale=s, act_scale=jnp.ones(3))
    inner = quantize_array(w / s[..., None], fmt)
    assert (qt.shape, qt.dtype) == (inner.shape, inner.dtype)
    np.testing.assert_array_equal(qt.data, inner.data)
    np.testing.assert_array_equal(dequantize_array(qt), s[..., None] * dequantize_array(inner))
    assert qt.nbytes == inner.nbytes + s.nbytes + 3 * 4
    assert repr(qt).endswith("bpw, pre_scale, act_scale)")
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(qt)]
    assert paths[-2:] == [".pre_scale", ".act_scale"]


def test_factors_follow_vmap_and_layout():
    w, s = weight(), jnp.linspace(0.5, 2, 3 * K).reshape(3, K)
    fmt = Format("int8", activation="int8", activation_scale="static")
    stacked = quantize_array(w, fmt, pre_scale=s, act_scale=jnp.arange(3.0))
    mapped = jax.vmap(lambda w, s, a: quantize_array(w, fmt, pre_scale=s, act_scale=a))(
        w, s, jnp.arange(3.0)
    )
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(mapped), strict=True):
        np.testing.assert_array_equal(a, b)
    turned = quantize_array(w.swapaxes(1, 2), fmt, "nk", pre_scale=s, act_scale=jnp.ones(3))
    np.testing.assert_array_equal(turned.data, stacked.data)
    np.testing.assert_array_equal(
        dequantize_array(turned), dequantize_array(stacked).swapaxes(1, 2)
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pre_scale": jnp.ones(K)}, r"`pre_scale` must have the shape \(3, 96\).*got \(96,\)"),
        ({"act_scale": jnp.ones(())}, r"`act_scale` must have the shape \(3,\).*got \(\)"),
    ],
)
def test_factors_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        quantize_array(weight(), FORMATS[0], **kwargs)


@pytest.mark.parametrize(
    "fmt",
    [
        kquants.FORMATS["Q4_K"],
        kquants.FORMATS["Q6_K"],
        Format("nf4", 64, scale=Format("uint8", 1, group_columns=256)),
        Format("nf4", 64, scale=Format("dynamic8", 240, flatten=True)),
        Format("e2m1", 16, scale=Format("e4m3", group_columns=None)),
        Format("int4", 64, scale=Format("uint8", 8, zero_point=True)),
        Format("int4", 128, scale=Format("uint3", 3, remainder="ragged")),
    ],
    ids=str,
)
def test_rows_are_those_of_the_whole_weight_with_scales_that_are_nested(fmt):
    """Of which only those of the rows are decoded, also if the weight is prepared."""
    qt = quantize_array(jax.random.normal(jax.random.key(0), (512, 300)), fmt)
    rows = jnp.array([0, 3, 511, 256, 17])
    wanted = dequantize_array(qt)[rows]
    for stored in (qt, qjax.prepare(qt, "h100")):
        np.testing.assert_array_equal(dequantize_rows(stored, rows), wanted)
