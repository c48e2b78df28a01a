"""Products whose activation is quantized or rescaled at run time, against references in NumPy."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.format import Format
from qjax.ops import activation
from qjax.ops.packed_dot import packed_dot
from qjax.qtensor import dequantize_array, dequantize_canonical, quantize_array, read_codes
from qjax.sharding import shardings_of

W8A8 = Format("int8", activation="int8")
TENSOR = dataclasses.replace(W8A8, activation_scale="tensor")
STATIC = dataclasses.replace(W8A8, activation_scale="static")
GROUPS = Format("int4", 16, activation="int8")
RAGGED = Format("int8", 48, activation="int8", remainder="ragged")
FP8 = Format("e4m3", activation="e4m3")
FP8_STATIC = dataclasses.replace(FP8, activation_scale="static")
FP8_GROUPS = Format("int4", 16, activation="e4m3", activation_scale="tensor")
OUTLIERS = Format("int8", activation="int8", outliers=6.0, outlier_capacity=4)
OUTLIER_GROUPS = dataclasses.replace(OUTLIERS, element="int4", group_size=16)
BY_GROUP = dataclasses.replace(GROUPS, activation_scale="group")
RAGGED_BY_GROUP = dataclasses.replace(RAGGED, activation_scale="group")
FP8_BLOCKS = Format("e4m3", 16, 16, remainder="ragged", activation="e4m3", activation_scale="group")
QUANTIZED = [W8A8, TENSOR, STATIC, GROUPS, RAGGED, FP8, FP8_STATIC, FP8_GROUPS]
QUANTIZED += [BY_GROUP, RAGGED_BY_GROUP, FP8_BLOCKS]

packed = jax.jit(packed_dot, static_argnames=("transposed", "out_dtype", "implementation"))


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def factors(*shape):
    return jnp.exp(normal(*shape, seed=9) / 2)


def make(fmt, *shape, pre_scale=False, **kwargs):
    *lead, K, _ = shape
    kwargs["act_scale"] = jnp.full(lead, 0.02) if fmt.activation_scale == "static" else None
    if pre_scale:
        kwargs["pre_scale"] = factors(*lead, K)
    return quantize_array(normal(*shape), fmt, **kwargs)


def entry(qt, i):
    return jax.tree.map(lambda a: a[i], qt)


def reference(x, qt):
    """Codes of x by NumPy, an exact product of codes, then the scales, in float64."""
    fmt = qt.format
    x = np.asarray(x, np.float32)
    if qt.pre_scale is not None:
        x = x * np.asarray(qt.pre_scale)
    outside = np.zeros_like(x)
    if fmt.outliers is not None:
        columns = (np.abs(x) >= fmt.outliers).any(0)
        outside, x = x * columns, x * ~columns
    qmax = {"int8": 127, "e4m3": 448}[fmt.activation]
    if fmt.activation_scale == "static":
        s = np.asarray(qt.act_scale)
    elif fmt.activation_scale == "tensor":
        s = np.abs(x).max() / np.float32(qmax)
    elif fmt.activation_scale == "group":
        starts = np.arange(0, x.shape[-1], fmt.group_size)
        s = np.maximum.reduceat(np.abs(x), starts, axis=-1) / np.float32(qmax)
        s = np.repeat(s, fmt.group_size, axis=-1)[..., : x.shape[-1]]
    else:
        s = np.abs(x).max(-1, keepdims=True) / np.float32(qmax)
    s = np.where(s == 0, np.float32(1), s)
    if fmt.activation == "int8":
        xq = np.clip(np.round(x / s), -128, 127).astype(np.int32)
    else:
        xq = np.asarray(jnp.asarray(np.clip(x / s, -448, 448)).astype(jnp.float8_e4m3fn))
    inner = dataclasses.replace(qt, pre_scale=None)
    w = np.asarray(dequantize_canonical(inner), np.float64)
    if fmt.activation == "int8" and fmt.group_size is None:
        codes = np.asarray(read_codes(qt)).astype(np.int32)
        y = s * ((xq @ codes) * np.asarray(qt.scale, np.float64))
    else:
        y = (s * xq.astype(np.float64)) @ w
    return y + outside.astype(np.float64) @ w


def assert_exact(got, want, k=1):
    """Within a few roundings of the largest result; of `k` float terms where so many are added."""
    bound = 4 * k * np.spacing(np.float32(np.abs(want).max()))
    assert np.abs(np.asarray(got, np.float64) - want).max() <= bound


# ---- codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_scale", [False, True])
@pytest.mark.parametrize("fmt", QUANTIZED, ids=str)
def test_the_product_of_codes_is_exact(fmt, pre_scale):
    qt, x = make(fmt, 64, 24, pre_scale=pre_scale), normal(5, 64)
    if pre_scale and fmt.activation_scale != "static":
        # A product by NumPy or XLA may round to the other side of a tie; powers of two do not.
        s = jnp.exp2(jnp.round(jnp.log2(qt.pre_scale)))
        qt = quantize_array(normal(64, 24), fmt, pre_scale=s)
    # Per channel the sum is of integers; over groups, and of FP8 values, it is one of floats.
    k = 1 if fmt.group_size is None and fmt.activation == "int8" else 64
    assert_exact(packed(x, qt), reference(x, qt), k)


@pytest.mark.parametrize("K", [1024, 3000])
def test_integers_add_up_beyond_what_a_float_holds(K):
    """127 * 127 * K is more than 2^24: in float32 the odd sums would be lost."""
    codes = jnp.where(jnp.arange(K) == 0, 126.0, 127.0)
    qt = quantize_array(jnp.stack([codes, jnp.full(K, 127.0)], 1), W8A8)
    x = jnp.full((2, K), 127.0)
    y = 127 * 127 * K - np.array([127, 0])
    np.testing.assert_array_equal(packed(x, qt), np.stack([y, y]).astype(np.float32))


@pytest.mark.parametrize("fmt", [TENSOR, OUTLIERS], ids=str)
def test_what_belongs_to_the_whole_activation_is_that_of_each_example(fmt):
    qt = make(fmt, 64, 24)
    x = normal(3, 5, 64) * jnp.array([1.0, 4.0, 9.0])[:, None, None]
    want = np.stack([reference(x[i], qt) for i in range(3)])
    assert_exact(jax.vmap(packed_dot, (0, None))(x, qt), want, 64)
    assert_exact(lax.map(lambda x: packed_dot(x, qt), x), want, 64)


@pytest.mark.parametrize("fmt", [STATIC, FP8_STATIC], ids=str)
def test_a_static_step_saturates(fmt):
    qt = make(fmt, 64, 24)
    top = {"int8": 127, "e4m3": 448}[fmt.activation] * 0.02
    edge = packed(jnp.full((1, 64), top), qt)
    for far in (2 * top, 1e6, 3e38):
        np.testing.assert_array_equal(packed(jnp.full((1, 64), far), qt), edge)
    assert np.isfinite(packed(jnp.full((1, 64), -3e38), qt)).all()


def test_a_static_step_is_asked_for():
    qt = dataclasses.replace(make(STATIC, 64, 24), act_scale=None)
    with pytest.raises(ValueError, match=r"takes the step .* Quantize it with calibration data"):
        packed_dot(normal(5, 64), qt)
    assert packed_dot(normal(5, 24), qt, transposed=True).shape == (5, 64)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("fmt", [*QUANTIZED, OUTLIERS], ids=str)
def test_what_is_not_finite_gives_nan(fmt, bad):
    x = normal(3, 64).at[1, 7].set(bad)
    y = packed(x, make(fmt, 64, 24))
    assert np.isnan(y[1]).all()
    assert np.isnan(y[0]).all() == (fmt.activation_scale == "tensor")  # one step for all tokens


@pytest.mark.parametrize("fmt", [*QUANTIZED, OUTLIERS], ids=str)
def test_zeros_give_zeros(fmt):
    assert not packed(jnp.zeros((3, 64)), make(fmt, 64, 24, pre_scale=True)).any()


@pytest.mark.parametrize("fmt", [TENSOR, STATIC, OUTLIERS], ids=str)
def test_no_tokens_and_one_token_alone(fmt):
    qt = make(fmt, 64, 24)
    assert packed(jnp.zeros((0, 64)), qt).shape == (0, 24)
    x = normal(64)
    assert_exact(packed(x, qt), reference(x[None], qt)[0], 64)


@pytest.mark.parametrize("fmt", [*QUANTIZED, OUTLIERS, OUTLIER_GROUPS], ids=str)
def test_derivatives_are_those_without_rounding(fmt):
    qt, x, ct = make(fmt, 64, 24, pre_scale=True), 4 * normal(5, 64), normal(5, 24)
    w = np.asarray(dequantize_canonical(qt))
    dot = functools.partial(packed_dot, qt=qt)
    back = jax.jit(lambda x: jax.vjp(dot, x)[1](ct)[0])(x)
    assert_exact(back, np.asarray(ct) @ w.T, 64)
    _, tangent = jax.jvp(dot, (x,), (x,))
    assert_exact(tangent, np.asarray(x) @ w, 64)


@pytest.mark.parametrize("fmt", [BY_GROUP, FP8_BLOCKS], ids=str)
def test_groups_of_an_activation_are_those_of_the_stored_rows(fmt):
    perm = jax.random.permutation(jax.random.key(3), 64)
    qt = dataclasses.replace(make(fmt, 64, 24), perm=perm)
    x = normal(5, 64) * factors(64)
    plain = dataclasses.replace(qt, perm=None)
    np.testing.assert_array_equal(packed(x, qt), packed(x[:, perm], plain))
    value = np.asarray(activation.rounded(x, qt).value, np.float64)
    assert_exact(packed(x, qt), value @ np.asarray(dequantize_canonical(qt), np.float64), 64)


def test_an_outlier_sets_the_step_of_its_group_alone():
    x = normal(5, 64).at[:, 3].set(1e4)
    for i, group in enumerate(jnp.split(x, 4, axis=1)):
        codes, step = activation.quantize_groups(x, "int8", 16)
        own, wanted = activation.quantize_tokens(group, "int8")
        np.testing.assert_array_equal(codes[:, 16 * i : 16 * i + 16], own)
        np.testing.assert_array_equal(step[:, i : i + 1], wanted)


def test_a_convolution_has_no_groups_of_activations():
    kernel = quantize_array(normal(1, 3, 16, 24), BY_GROUP, "kkkn")
    conv = lambda w, x: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    with pytest.raises(NotImplementedError, match="use activation_scale='token' for it"):
        qjax.apply(conv)(kernel, normal(1, 1, 5, 16))


# ---- outliers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 4, 5, 64])
@pytest.mark.parametrize("fmt", [OUTLIERS, OUTLIER_GROUPS], ids=str)
def test_outliers_are_decomposed_exactly_however_many(fmt, n):
    qt, x = make(fmt, 64, 24), jnp.clip(normal(5, 64), -5, 5)
    for i in range(n):  # each in some token, at the threshold or far above it
        x = x.at[i % 5, 7 * i % 64].set([6.0, -100.0][i % 2])
    assert_exact(packed(x, qt), reference(x, qt), 64)


def test_outliers_no_longer_set_the_step():
    x, w = normal(16, 64).at[:, 3].mul(100.0), normal(64, 24)
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    error = {
        fmt: np.linalg.norm(packed(x, quantize_array(w, fmt)) - want) for fmt in (W8A8, OUTLIERS)
    }
    assert error[OUTLIERS] < error[W8A8]


@pytest.mark.parametrize("n", [3, 6])
def test_outliers_of_stacked_weights(n):
    qt, x = make(OUTLIERS, 3, 64, 24), normal(3, 5, 64).at[:, 2, :n].set(9.0)
    want = np.stack([reference(x[i], entry(qt, i)) for i in range(3)])
    assert_exact(packed(x, qt), want, 64)
    assert_exact(jax.vmap(packed_dot)(x, qt), want, 64)


# ---- pre_scale ----------------------------------------------------------------------------------

PLAIN = [Format("int4", 16), Format("int3", 32, zero_point=True), Format("nf4", 16)]


@pytest.mark.parametrize("fmt", PLAIN, ids=str)
def test_a_pre_scale_is_part_of_the_weight(fmt):
    qt = make(fmt, 2, 64, 24, pre_scale=True)
    w = np.asarray(dequantize_canonical(qt))
    x, ct = normal(2, 5, 64), normal(2, 5, 24)
    assert_exact(packed(x, qt), np.asarray(x) @ w, 64)
    assert_exact(packed(ct, qt, transposed=True), np.asarray(ct) @ w.swapaxes(1, 2), 64)
    assert_exact(jax.vmap(packed_dot)(x, qt), np.asarray(x) @ w, 64)
    back = jax.grad(lambda x: (packed_dot(x, qt) * ct).sum())(x)
    assert_exact(back, np.asarray(ct) @ w.swapaxes(1, 2), 64)
    y = packed(x.astype(jnp.bfloat16), qt)
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("fmt", [PLAIN[0], STATIC], ids=str)
def test_scan_over_a_stack_slices_its_factors(fmt):
    qt = {"w": make(fmt, 3, 32, 32, pre_scale=True)}

    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    x = normal(5, 32)
    got = jax.jit(qjax.apply(fn))(qt, x)
    for i in range(3):
        x = jnp.tanh(packed(x, entry(qt["w"], i)))
    np.testing.assert_allclose(got, x, atol=1e-5)


USES = {
    "product": ("kn", (64, 48), lambda w, x: x @ w),
    "transposed": ("kn", (64, 48), lambda w, x: x[:, :48] @ w.T),
    "rows": ("nk", (48, 64), lambda w, x: w[jnp.array([3, 40])]),
    "columns": ("kn", (64, 48), lambda w, x: w[jnp.array([3, 40])]),
    "part of N": ("kn", (64, 48), lambda w, x: x @ w[:, 8:24]),
    "reshaped": ("kn", (4, 64, 48), lambda w, x: x @ w.reshape(2, 2, 64, 48)[1, 0]),
    "heads": ("knn", (64, 4, 12), lambda w, x: jnp.einsum("mk,khd->mhd", x, w)),
    "expert": ("kn", (4, 64, 48), lambda w, x: x @ w[jnp.array(2)]),
    "experts": ("kn", (4, 64, 48), lambda w, x: jnp.einsum("mk,ekn->emn", x, w)),
    "ragged": ("kn", (4, 64, 48), lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 0, 1, 2]))),
    "pointwise": ("kkkn", (1, 1, 64, 48), lambda w, x: lax.conv_general_dilated(
        x.reshape(1, 1, 5, 64), w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))),
    "conv": ("kkkn", (1, 3, 64, 48), lambda w, x: lax.conv_general_dilated(
        x.reshape(1, 1, 5, 64), w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))),
    "returned": ("kn", (64, 48), lambda w, x: w),
}  # fmt: skip


@pytest.mark.parametrize("fmt", [PLAIN[0], Format("int8")], ids=str)
@pytest.mark.parametrize("name", USES)
def test_every_use_honours_the_pre_scale(name, fmt):
    letters, shape, fn = USES[name]
    inner = jax.eval_shape(lambda: quantize_array(jnp.zeros(shape), fmt, letters)).canonical_shape
    qt = quantize_array(normal(*shape), fmt, letters, pre_scale=factors(*inner[:-1]))
    x = normal(5, 64)
    want = np.asarray(fn(dequantize_array(qt), x))
    assert_exact(jax.jit(qjax.apply(fn))({"w": qt}["w"], x), want, 192)


@pytest.mark.parametrize("fmt", [STATIC, W8A8, BY_GROUP, OUTLIERS], ids=str)
def test_experts_are_rounded_as_each_alone(fmt):
    qt, sizes = make(fmt, 4, 64, 48, pre_scale=True), (2, 0, 1, 2)
    x = normal(5, 64)
    fn = qjax.apply(lambda w, x: lax.ragged_dot(x, w, jnp.array(sizes)))
    got, start = jax.jit(fn)(qt, x), 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        if size:
            one = entry(qt, e)
            assert_exact(got[rows], reference(x[rows], one), 64)
        start += size


# ---- meshes -------------------------------------------------------------------------------------


BOTH = (AxisType.Auto, AxisType.Explicit)
SPLITS = [(fmt, P("y", "x"), kind) for fmt in (PLAIN[0], STATIC, OUTLIERS) for kind in BOTH]
SPLITS += [(fmt, P(("x", "y")), BOTH[0]) for fmt in (TENSOR, GROUPS, FP8, OUTLIER_GROUPS)]
SPLITS += [(OUTLIERS, P(None, "y"), BOTH[1])]
# A group for each of 8 parts of K, two for each, and two parts for each.
SPLITS += [(dataclasses.replace(GROUPS, group_size=32), P(("x", "y")), BOTH[0])]
SPLITS += [
    (dataclasses.replace(BY_GROUP, group_size=g), P(("x", "y")), BOTH[0]) for g in (16, 32, 256)
]


@pytest.mark.parametrize(("fmt", "spec", "kind"), SPLITS, ids=str)
def test_a_split_weight_gives_the_same(fmt, spec, kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    qt = make(fmt, 256, 64, pre_scale=True)
    x = normal(4, 256)
    fn = jax.jit(qjax.apply(lambda w, x: x @ w))
    want = np.asarray(fn(qt, x))
    placed = jax.device_put(qt, shardings_of(qt, NamedSharding(mesh, spec)))
    assert placed.pre_scale.sharding.spec == P(*spec[:1])
    x = jax.device_put(x, NamedSharding(mesh, P(None, spec[0])))
    if kind == AxisType.Explicit and spec[0] is not None:
        out = NamedSharding(mesh, P(None, None))  # a sum over a mesh axis says where it goes
        fn = jax.jit(qjax.apply(lambda w, x: jnp.dot(x, w, out_sharding=out)))
    with jax.set_mesh(mesh):
        compiled = fn.lower(placed, x).compile()
        assert_exact(compiled(placed, x), want, 64)
    assert not re.search(
        r"= [su]8\[\S* all-gather", compiled.as_text()
    )  # codes stay where they are


# ---- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "says"),
    [
        (Format("int4", 16), "xla, blocks of K (asked for), x * pre_scale"),
        (TENSOR, "xla, x * pre_scale, int8 activations per tensor, int32 accumulator"),
        (STATIC, "xla, x * pre_scale, int8 activations in static steps, int32 accumulator"),
        (FP8, "xla, x * pre_scale, e4m3 activations per token, FP8 values"),
        (
            BY_GROUP,
            "xla, x * pre_scale, int8 activations per token and group of 16, int32 accumulator",
        ),
        (
            OUTLIERS,
            "xla, x * pre_scale, int8 activations per token, CHANNELS, int32 accumulator",
        ),
    ],
    ids=str,
)
def test_explain_says_what_happens_to_activations(fmt, says):
    explain = qjax.explain(lambda w, x: x @ w, implementation="xla")
    (use,) = explain(make(fmt, 64, 24, pre_scale=True), normal(5, 64))
    room = "room for 4, else in a branch, for which a scan copies layers"
    says = says.replace("CHANNELS", f"channels from 6 on in float ({room})")
    assert use.implementation == says


def test_split_outliers_add_up():
    x = 4 * normal(3, 5, 64)
    inside, outside, mask = activation.split_outliers(x, 6.0, 1)
    np.testing.assert_array_equal(inside + outside, x)
    assert (np.abs(inside) < 6).all()
    np.testing.assert_array_equal(mask, (np.abs(x) >= 6).any(1))
