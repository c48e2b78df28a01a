"""Products with packed experts: on a kernel, in plain JAX, differentiated, batched, on a mesh."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import qjax
from pallas_kernels import h100, hlo, interpreter
from qjax.ops import ragged
from qjax.ops.dispatch import compute
from qjax.ops.packed_dot import packed_dot, packed_dot_p
from qjax.prepare import Prepared
from qjax.qtensor import quantize_array
from qjax.sharding import shardings_of

FORMATS = {
    "int4": qjax.Format("int4", group_size=128, scale="bfloat16"),
    "zero point": qjax.Format("int4", group_size=64, zero_point=True),
    "int3": qjax.Format("int3", group_size=64),
    "nf4": qjax.Format("nf4", group_size=64),
    "nf4-dq": qjax.Format(
        "nf4", group_size=64, scale=qjax.Format("uint8", group_size=1, group_columns=128)
    ),
    "nvfp4": qjax.Format("e2m1", group_size=16, scale=qjax.Format("e4m3", group_columns=None)),
}
SIZES = (2, 0, 3)
M = 6  # one row is no expert's


def _experts(name, shape=(3, 256, 128)):
    return quantize_array(jax.random.normal(jax.random.key(0), shape), FORMATS[name])


def _rows(*shape):
    return jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)


@qjax.apply
def _product(x, w, sizes):
    return lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)


def _by_the_kernel(run):
    """What `run` returns on a GPU, interpreted."""

    # Not a lowered program: the interpreter calls back into Python, which that cannot.
    def bind(*args, **static):
        return ragged._compute(*args, **static, platform="cuda")

    def bind_dot(*args, spec):
        return compute(*args, spec=spec, platform="cuda")

    with (
        mock.patch.object(ragged.ragged_dot_p, "bind", bind),
        mock.patch.object(packed_dot_p, "bind", bind_dot),
        interpreter.interpreting(),
        interpreter.everywhere(),
    ):
        return np.asarray(run(), np.float64)


def _close(got, wanted, budget):
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= budget * np.linalg.norm(wanted)


def _budget(name):  # levels of nf4 are rounded to bfloat16, of 8 places
    return 2.0**-9 if name.startswith("nf4") else 2e-6


@pytest.mark.parametrize("name", ["int4", "zero point", "int3", "nvfp4"])
def test_the_kernel_agrees_with_float64(name):
    qt, x = _experts(name), _rows(M, 256)
    w = np.asarray(qjax.dequantize(qt), np.float64)
    own = np.repeat(np.arange(3), SIZES)
    wanted = np.einsum("mk,mkn->mn", np.asarray(x, np.float64)[: len(own)], w[own])
    prepared = qjax.prepare(qt, "h100")
    y = _by_the_kernel(lambda: _product(x, prepared, jnp.array(SIZES)))
    _close(y, np.concatenate([wanted, np.zeros((M - len(own), 128))]), _budget(name))


ROUNDED = {
    "w8a8": qjax.Format("int8", activation="int8"),
    "w8a8, one step": qjax.Format("int8", activation="int8", activation_scale="tensor"),
    "fp8": qjax.Format("e4m3", activation="e4m3"),
    "w4a8": qjax.Format("int4", group_size=128, scale="bfloat16", activation="int8"),
    "w4a8 multiples": qjax.Format(
        "int4", group_size=128, scale=qjax.Format("int8_max15"), activation="int8"
    ),
    "int4 x fp8": qjax.Format("int4", group_size=128, scale="bfloat16", activation="e4m3"),
    "fp4 x fp8": qjax.Format(
        "e2m1", group_size=64, scale=qjax.Format("e4m3_for_e2m1"), activation="e4m3"
    ),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_activations_are_codes_to_the_kernel(name):
    w = jax.random.normal(jax.random.key(0), (3, 256, 128))
    qt, x, sizes = quantize_array(w, ROUNDED[name]), _rows(M, 256), jnp.array(SIZES)
    prepared = qjax.prepare(qt, "h100")
    assert type(prepared) is Prepared
    wanted = np.asarray(_product(x, qt, sizes), np.float64)
    _close(_by_the_kernel(lambda: _product(x, prepared, sizes)), wanted, 2e-6)


@pytest.mark.parametrize("name", ["w8a8", "w8a8, one step", "int4 x fp8", "fp4 x fp8"])
def test_a_batch_of_products_of_rounded_activations_is_one_kernel(name):
    w = jax.random.normal(jax.random.key(0), (2, 256, 128))
    qt, x = quantize_array(w, ROUNDED[name]), _rows(2, 3, 256)
    prepared = qjax.prepare(qt, "h100")
    wanted = np.asarray(packed_dot(x, qt, out_dtype=jnp.float32), np.float64)
    y = _by_the_kernel(lambda: packed_dot(x, prepared, out_dtype=jnp.float32))
    _close(y, wanted, 2e-6)


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_derivatives_of_rounded_activations_are_those_without_rounding(name):
    w = jax.random.normal(jax.random.key(0), (3, 256, 128))
    qt, x, sizes = quantize_array(w, ROUNDED[name]), _rows(M, 256), jnp.array(SIZES)
    dy = jax.random.normal(jax.random.key(2), (M, 128))
    pull = lambda w: jax.vjp(lambda x: _product(x, w, sizes), x)[1](dy)[0]
    own = np.repeat(np.arange(3), SIZES)
    wanted = np.zeros((M, 256))
    values = np.asarray(qjax.dequantize(qt), np.float64)[own]
    wanted[: len(own)] = np.einsum("mn,mkn->mk", np.asarray(dy, np.float64)[: len(own)], values)
    for weight in (qt, qjax.prepare(qt, "h100")):
        _close(np.asarray(pull(weight), np.float64), wanted, 2.0**-7)


@pytest.mark.parametrize("name", ["int4", "zero point", "int3", "nf4-dq"])
def test_a_batch_of_products_is_one_kernel(name):
    qt, x = _experts(name, (2, 256, 128)), _rows(2, 3, 256)
    w = np.asarray(qjax.dequantize(qt), np.float64)
    prepared = qjax.prepare(qt, "h100")
    y = _by_the_kernel(lambda: packed_dot(x, prepared, out_dtype=jnp.float32))
    _close(y, np.asarray(x, np.float64) @ w, _budget(name))
    dy = _rows(2, 3, 128)
    dx = _by_the_kernel(lambda: packed_dot(dy, prepared, transposed=True, out_dtype=jnp.float32))
    _close(dx, np.asarray(dy, np.float64) @ w.swapaxes(1, 2), 2.0**-8)


def test_blocks_of_columns_may_reach_beyond_the_last_one():
    w = jax.random.normal(jax.random.key(0), (2, 256, 100))
    qt, x = quantize_array(w, qjax.Format("int4", 128, 128)), _rows(2, 3, 256)
    prepared = qjax.prepare(qt, "h100")
    y = _by_the_kernel(lambda: packed_dot(x, prepared, out_dtype=jnp.float32))
    _close(y, np.asarray(x, np.float64) @ np.asarray(qjax.dequantize(qt), np.float64), 2e-6)


@pytest.mark.parametrize("name", ["zero point", "nf4"])
def test_the_derivative_on_the_kernel_agrees_with_float64(name):
    qt, dy = _experts(name), _rows(M, 128)
    prepared = qjax.prepare(qt, "h100")
    w = np.asarray(qjax.dequantize(qt), np.float64)
    own = np.repeat(np.arange(3), SIZES)
    scale, zero = qjax.qtensor.read_scales(prepared)[0], prepared.zero
    spec = ragged.Spec(
        qt.format, qt.pad, True, "float32", "mosaic", extra=prepared.extra
    )  # what `_transpose` binds
    operands = [prepared.data, scale] + ([] if zero is None else [zero])
    static = {"spec": spec, "dtype": "bfloat16", "precision": None}
    dx = _by_the_kernel(lambda: ragged.ragged_dot_p.bind(dy, jnp.array(SIZES), *operands, **static))
    wanted = np.einsum("mn,mkn->mk", np.asarray(dy, np.float64)[: len(own)], w[own])
    _close(dx, np.concatenate([wanted, np.zeros((M - len(own), 256))]), 2.0**-8)


@pytest.mark.parametrize("name", FORMATS)
def test_on_a_cpu_a_prepared_weight_computes_the_same(name):
    qt, x, sizes = _experts(name), _rows(M, 256), jnp.array(SIZES)
    prepared = qjax.prepare(qt, "h100")
    loss = lambda x, w, sizes: jnp.sum(jnp.sin(_product(x, w, sizes)))
    for run in (_product, jax.grad(loss)):
        # JAX has no vmap of the float product over groups.
        many = jnp.stack([x, x[::-1]]), jnp.stack([sizes, sizes[::-1]])
        got = jax.jit(jax.vmap(run, (0, None, 0)))(many[0], prepared, many[1])
        wanted = jnp.stack([jax.jit(run)(x, qt, sizes) for x, sizes in zip(*many, strict=True)])
        _close(np.asarray(got, np.float64), np.asarray(wanted, np.float64), 2.0**-7)


@pytest.mark.parametrize("axis", range(3))
def test_shards_over_experts_contraction_and_features(axis):
    qt, x = _experts("int4", (4, 256, 256)), _rows(9, 256)
    sizes = jnp.array([2, 0, 4, 2])
    prepared = qjax.prepare(qt, "h100")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=auto)
    placed = jax.device_put(prepared, shardings_of(prepared, _split(mesh, axis)))
    y = jax.jit(_product)(x, placed, sizes)
    wanted = _product(x, qt, sizes)
    _close(np.asarray(y, np.float64), np.asarray(wanted, np.float64), 2e-6)


def test_explain_names_the_kernel_and_why_there_is_none():
    x, qt, sizes = _rows(M, 256), _experts("int4"), jnp.array(SIZES)
    prepared = qjax.prepare(qt, "h100")
    dot = lambda x, w, sizes: lax.ragged_dot(x, w, sizes)
    how = lambda w, **k: qjax.explain(dot, **k)(x, w, sizes)[0].implementation
    assert how(prepared).startswith("mosaic on CUDA")
    assert how(qt) == "xla, blocks of K"
    assert how(prepared, implementation="xla") == "xla, blocks of K, codes repacked in the op"
    rounded = lambda **how: qjax.prepare(
        quantize_array(jnp.ones((3, 256, 128)), qjax.Format("int8", activation="int8", **how)),
        "h100",
    )
    text = how(rounded())
    assert text.startswith("mosaic on CUDA, int8 activations per token as bfloat16, one kernel")
    assert "no kernel for experts with outliers" in how(rounded(outliers=6.0))
    grouped = rounded(activation_scale="group", group_size=128)
    assert "no kernel for experts with activations rounded in groups" in how(grouped)


@pytest.mark.parametrize("shape", [(1, 256, 128), (2, 1, 128), (2, 256, 1)])
def test_one_expert_input_or_feature_stays_packed(shape):
    x, sizes = _rows(3, shape[1]), jnp.array([2] if shape[0] == 1 else [2, 1])
    qt = quantize_array(jax.random.normal(jax.random.key(0), shape), qjax.Format("int8"))
    dot = lambda x, w: lax.ragged_dot(x, w, sizes)
    assert not qjax.explain(dot)(x, qt).dequantized
    for w in (qt, qjax.prepare(qt, "h100")):
        y, wanted = qjax.apply(dot)(x, w), dot(x, qjax.dequantize(qt))
        _close(np.asarray(y, np.float64), np.asarray(wanted, np.float64), 2.0**-8)


@pytest.mark.parametrize("scale", ["token", "tensor", "static"])
def test_rounded_rows_may_be_zero_not_finite_or_far_beyond_the_codes(scale):
    fmt = qjax.Format("e4m3", activation="e4m3", activation_scale=scale)
    w = jax.random.normal(jax.random.key(0), (3, 256, 128))
    qt = quantize_array(w, fmt, act_scale=jnp.full(3, 0.02) if scale == "static" else None)
    prepared, x, sizes = qjax.prepare(qt, "h100"), _rows(M, 256), jnp.array(SIZES)
    dy, last = jax.random.normal(jax.random.key(2), (M, 128)), M - 1  # no expert's
    loss = lambda x, w: jnp.sum(dy * _product(x, w, sizes))
    values = np.asarray(qjax.dequantize(qt), np.float64)
    for rows in (x.at[1].set(0), 0 * x, 1e9 * x, x.at[last].set(jnp.nan), x.at[2, 0].set(jnp.inf)):
        got, wanted = (np.asarray(_product(rows, w, sizes), np.float64) for w in (prepared, qt))
        np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
        _close(np.nan_to_num(got), np.nan_to_num(wanted), 2.0**-7)
        if jnp.isfinite(rows).all():
            got, wanted = (np.asarray(jax.grad(loss)(rows, w), np.float64) for w in (prepared, qt))
            _close(got, wanted, 2.0**-7)
    if scale == "static":  # the far ones are the largest code
        far = 448 * 0.02 * np.sign(np.asarray(x, np.float64)[: SIZES[0]])
        _close(
            np.asarray(_product(1e9 * x, qt, sizes), np.float64)[: SIZES[0]], far @ values[0], 1e-6
        )


def test_factors_of_experts_are_found_without_a_loop():
    qt, x, sizes = _experts("nvfp4"), _rows(M, 256), jnp.array(SIZES)
    run = jax.jit(_product).trace(x, qjax.prepare(qt, "h100"), sizes)
    assert "stablehlo.while" not in run.lower(lowering_platforms=("cuda",)).as_text()


def test_a_forced_kernel_that_cannot_run_says_why():
    x, qt, sizes = _rows(M, 256), _experts("int4"), jnp.array(SIZES)
    run = qjax.apply(lambda x, w: lax.ragged_dot(x, w, sizes), implementation="mosaic")
    with pytest.raises(ValueError, match=r"qjax\.prepare"):
        run(x, qt)
    with pytest.raises(NotImplementedError, match="GPUs only"):
        run(x, qjax.prepare(qt, "h100"))
    with pytest.raises(ValueError, match="float32"):
        run(x.astype(jnp.float32), qjax.prepare(qt, "h100"))
    fmt = qjax.Format("int8", activation="int8", outliers=6.0)
    rounded = quantize_array(jnp.ones((3, 256, 128)), fmt)
    with pytest.raises(NotImplementedError, match="no kernel for experts with outliers"):
        run(x, qjax.prepare(rounded, "h100"))


def test_derivatives_of_scales_are_refused():
    prepared = qjax.prepare(_experts("int4"), "h100")
    scale = qjax.qtensor.read_scales(prepared)[0]
    spec = ragged.Spec(prepared.format, 0, False, "float32", None, extra=prepared.extra)
    f = lambda scale: ragged.ragged_dot_p.bind(
        _rows(M, 256), jnp.array(SIZES), prepared.data, scale, spec=spec, dtype="bfloat16",
        precision=None,
    ).sum()  # fmt: skip
    with pytest.raises(TypeError, match="constant"):
        jax.grad(f)(scale)


def _split(mesh, axis):
    return NamedSharding(mesh, PartitionSpec(*("x" if i == axis else None for i in range(3))))


def _abstract(E, K, N, tokens):
    array = jax.ShapeDtypeStruct
    quantized = lambda w: qjax.prepare(quantize_array(w, FORMATS["int4"]), "h100")
    w = jax.eval_shape(quantized, array((E, K, N), jnp.float32))
    return array((tokens, K), jnp.bfloat16), w, array((E,), jnp.int32)


@pytest.mark.h100
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_experts_on_h100s_are_one_kernel_that_reads_them_where_they_lie(axis):
    x, w, sizes = _abstract(8, 4096, 4096, 32)
    run = lambda x, w, sizes: lax.ragged_dot(x, w, sizes)
    mesh = h100.mesh(x=1 if axis is None else 2)
    placed = shardings_of(w, _split(mesh, axis))
    w = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), w, placed)
    program = h100.compile(jax.jit(qjax.apply(run)), x, w, sizes, on=mesh)
    assert len(program.kernels) == 1
    assert program.temporaries <= 8e6  # the packed experts are 70 MB
    found = hlo.collectives(program.hlo)
    # Features stay split, as XLA is free to leave them; sums over experts or inputs are added.
    assert found == ({} if axis in (None, 2) else {"all-reduce": 1})


@pytest.mark.h100(code=False)
@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_experts_with_rounded_activations_are_one_kernel(name):
    quantized = lambda w: qjax.prepare(quantize_array(w, ROUNDED[name]), "h100")
    x, _, sizes = _abstract(8, 4096, 4096, 32)
    w = jax.eval_shape(quantized, jax.ShapeDtypeStruct((8, 4096, 4096), jnp.bfloat16))
    run = lambda x, w, sizes: lax.ragged_dot(x, w, sizes)
    program = h100.compile(jax.jit(qjax.apply(run)), x, w, sizes)
    assert len(program.kernels) == 1
    assert program.temporaries <= 8e6  # the codes of experts are 134 MB


@pytest.mark.h100(code=False)
@pytest.mark.parametrize("is_ragged", [True, False])
def test_experts_of_stacked_layers_are_read_where_they_lie(is_ragged):
    L, E, K, tokens = 4, 8, 4096, 32
    array = jax.ShapeDtypeStruct
    quantized = lambda w: qjax.prepare(quantize_array(w, FORMATS["int4"]), "h100")
    w = jax.eval_shape(quantized, array((L, E, K, K), jnp.bfloat16))
    if is_ragged:
        x = array((tokens, K), jnp.bfloat16), array((E,), jnp.int32)
        layer = lambda x, w, sizes: lax.ragged_dot(x, w, sizes)
    else:
        x = (array((E, tokens // E, K), jnp.bfloat16),)
        layer = lambda x, w: jnp.einsum("emk,ekn->emn", x, w)

    def run(w, x, *sizes):
        return lax.scan(lambda x, w: (layer(x, w, *sizes), None), x, w)[0]

    program = h100.compile(jax.jit(qjax.apply(run)), w, *x)
    assert len(program.kernels) == 1
    assert hlo.executed(program.hlo)["mosaic_gpu_v2"] == L
    assert program.temporaries <= 0.01 * program.arguments  # one expert is 3 %
