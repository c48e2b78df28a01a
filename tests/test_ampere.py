"""Weights for GPUs before Hopper are the same weights; products are right on every platform."""

from __future__ import annotations

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import NamedSharding, PartitionSpec

import qjax
from pallas_kernels import h100
from pallas_kernels.triton import versions
from qjax.ampere import PreparedTriton, reason_against
from qjax.ops import triton_dot
from qjax.ops.packed_dot import packed_dot
from qjax.qtensor import dequantize_rows, quantize_array, read_scales
from qjax.sharding import shardings_of

FORMATS = {
    "int4": qjax.Format("int4", group_size=128, scale="bfloat16"),
    "zero point": qjax.Format("uint4", group_size=64, zero_point=True, scale="bfloat16"),
    "signed, zero point": qjax.Format("int4", group_size=32, zero_point=True),
    "offset": qjax.Format("uint4", group_size=32, offset="float32"),
    "channels": qjax.Format("int8"),
    "uint8": qjax.Format("uint8", group_size=128, zero_point=True),
    "uint8, no zero point": qjax.Format("uint8", group_size=128),
    "one scale": qjax.Format("int4", group_columns=None),
    "last group shorter": qjax.Format("int4", group_size=128, remainder="ragged"),
    "nf4": qjax.Format("nf4", group_size=64),
    "e2m1": qjax.Format("e2m1", group_size=32, scale="e8m0"),
}
W8A8 = qjax.Format("int8", activation="int8")
LAYER = (256, 128)
needs_triton = pytest.mark.skipif(
    versions.missing() is not None, reason="needs the wheels of `--extra h100`"
)


def _weight(name, shape=LAYER):
    if name == "last group shorter":
        shape = (*shape[:-2], 200, 100)
    w = jax.random.normal(jax.random.key(0), shape)
    return quantize_array(jnp.abs(w) if name == "uint8, no zero point" else w, FORMATS[name])


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", FORMATS)
def test_restore_is_the_inverse(name):
    for shape in (LAYER, (2, *LAYER)):
        qt = _weight(name, shape)
        prepared = qjax.prepare(qt, "a100")
        assert isinstance(prepared, PreparedTriton)
        assert prepared.shape == qt.shape
        _same(qjax.restore(prepared), qt)
        np.testing.assert_array_equal(qjax.dequantize(prepared), qjax.dequantize(qt))


@pytest.mark.parametrize("name", ["int4", "uint8"])
def test_some_rows_are_those_of_the_weight(name):
    qt, rows = _weight(name), jnp.array([0, 15, 16, 31, 32, 255])
    got = dequantize_rows(qjax.prepare(qt, "rtx4090"), rows)
    np.testing.assert_array_equal(got, dequantize_rows(qt, rows))


def test_it_is_no_larger_and_knows_its_gpu():
    qt = _weight("int4")
    prepared = qjax.prepare(qt, "rtx4090")
    assert prepared.nbytes == qt.nbytes
    assert prepared.capability == 89
    assert qjax.prepare(prepared, "a100") is prepared


def test_other_formats_are_left_alone_and_say_why():
    for fmt, why in (
        (qjax.Format("int3", group_size=64), "int3 codes"),
        (qjax.Format("int4", group_size=16), "groups of 16"),
        (qjax.Format("int4", group_size=128, activation="int8"), "int8 activations"),
        (qjax.Format("int8", group_size=128, group_columns=128), "128 columns share"),
    ):
        qt = quantize_array(jnp.ones((256, 256)), fmt)
        assert qjax.prepare(qt, "a100") is qt
        assert why in reason_against(qt)


@pytest.mark.parametrize("name", FORMATS)
def test_products_on_a_cpu_are_those_of_the_canonical_weight(name):
    qt = _weight(name)
    prepared = qjax.prepare(qt, "a100")
    K, N = qt.shape
    for size, transposed in ((K, False), (N, True)):
        x = jax.random.normal(jax.random.key(1), (3, size), jnp.bfloat16)
        run = functools.partial(packed_dot, x, out_dtype=jnp.float32, transposed=transposed)
        wanted = run(qt)
        atol = 2.0**-20 * float(jnp.linalg.norm(wanted))  # sums in another order
        np.testing.assert_allclose(run(prepared), wanted, rtol=0, atol=atol)


class _Stand:
    """The kernels' arithmetic in NumPy on the operands that they would get."""

    @staticmethod
    def matmul(x, w, scale, zero=0.0, *, codes, out_dtype, capability):
        from pallas_kernels.triton.packing import unpack

        assert capability == 80
        w = w if codes == "int8" else unpack(lax.bitcast_convert_type(w, jnp.uint8))
        q = np.asarray(w) if isinstance(codes, str) else np.asarray(codes)[np.asarray(w)]
        g = x.shape[1] // scale.shape[0]
        wide = lambda a: np.repeat(np.asarray(a, np.float64), g, axis=0)
        shift = wide(zero) if isinstance(zero, jax.Array) else zero
        y = np.asarray(x, np.float64) @ ((q.T.astype(np.float64) - shift) * wide(scale))
        return jnp.asarray(y, out_dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_gets_operands_that_mean_the_weight(name, monkeypatch):
    import pallas_kernels.triton as package

    stand = types.SimpleNamespace(matmul=_Stand.matmul)
    monkeypatch.setitem(sys.modules, "pallas_kernels.triton.weight_only", stand)
    monkeypatch.setattr(package, "weight_only", stand, raising=False)
    qt = _weight(name)
    x = jax.random.normal(jax.random.key(1), (3, qt.shape[0]), jnp.bfloat16)
    prepared = qjax.prepare(qt, "a100")
    scale, zero = read_scales(qt)
    y = triton_dot.weight_only(
        x, prepared.data, scale, zero,
        format=qt.format, extra=prepared.extra, capability=80, out_dtype=jnp.float32,
    )  # fmt: skip
    wanted = np.asarray(x, np.float64) @ np.asarray(qjax.dequantize(qt), np.float64)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-6 * np.linalg.norm(wanted))


def test_explain_names_the_kernel():
    x, f = jnp.ones((3, 256), jnp.bfloat16), lambda x, w: x @ w
    (use,) = qjax.explain(f)(x, qjax.prepare(_weight("nf4"), "a100"))
    assert use.implementation.startswith("triton on CUDA")
    w8a8 = quantize_array(jnp.ones(LAYER), W8A8)
    (use,) = qjax.explain(f)(x, qjax.prepare(w8a8, "a100"))
    assert use.implementation.startswith("triton on CUDA")


def test_a_forced_kernel_that_cannot_run_says_why():
    qt, x = _weight("int4"), jnp.ones((3, 256), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"qjax\.prepare"):
        packed_dot(x, qt, implementation="triton")
    with pytest.raises(ValueError, match="not prepared for it"):
        packed_dot(x, qjax.prepare(qt, "h100"), implementation="triton")
    prepared = qjax.prepare(qt, "a100")
    with pytest.raises(ValueError, match="not prepared for it"):
        packed_dot(x, prepared, implementation="mosaic")
    with pytest.raises(ValueError, match="float32"):
        packed_dot(x.astype(jnp.float32), prepared, implementation="triton")
    with pytest.raises(NotImplementedError, match="GPUs only"):
        packed_dot(x, prepared, implementation="triton")


@pytest.mark.parametrize("spec", [("x", None), (None, "x")], ids=["rows", "columns"])
def test_shards_as_the_float_weight_does(spec):
    qt = quantize_array(jax.random.normal(jax.random.key(0), (512, 256)), FORMATS["int4"])
    prepared = qjax.prepare(qt, "a100")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    placed = shardings_of(prepared, NamedSharding(mesh, PartitionSpec(*spec)))
    assert placed.data.spec == PartitionSpec(*spec[::-1])
    x = jax.random.normal(jax.random.key(1), (3, 512), jnp.bfloat16)
    y = jax.jit(packed_dot)(x, jax.device_put(prepared, placed)).astype(jnp.float32)
    wanted = packed_dot(x, qt).astype(jnp.float32)
    # Sums of two shards are rounded to bfloat16 before they are added.
    np.testing.assert_allclose(y, wanted, atol=2.0**-7 * float(abs(wanted).max()))


def test_checkpoints_hold_the_canonical_layout(tmp_path):
    tree = {"w": _weight("nf4")}
    qjax.save(tmp_path / "ckpt", qjax.prepare(tree, "a100"))
    _same(qjax.load(tmp_path / "ckpt"), tree)


@needs_triton
@pytest.mark.h100
@pytest.mark.parametrize("fmt", [*FORMATS.values(), W8A8], ids=[*FORMATS, "w8a8"])
def test_one_exported_program_has_the_kernel_and_runs_on_a_cpu(fmt):
    w = jnp.abs(jax.random.normal(jax.random.key(0), LAYER))
    if fmt.remainder == "ragged":
        w = w[:200]
    qt = quantize_array(w, fmt)
    leaves, tree = jax.tree.flatten(qjax.prepare(qt, "rtx4090"))
    x = jax.random.normal(jax.random.key(1), (3, len(w)), jnp.bfloat16)
    f = jax.jit(lambda x, *leaves: packed_dot(x, jax.tree.unflatten(tree, leaves)))
    allowed = [export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]
    both = export.export(f, platforms=("cpu", "cuda"), disabled_checks=allowed)(x, *leaves)
    assert "triton_kernel_call_ffi" in both.mlir_module()
    np.testing.assert_array_equal(jax.jit(both.call)(x, *leaves), f(x, *leaves))


@needs_triton
@pytest.mark.h100
def test_layers_of_a_stack_are_read_where_they_lie():
    D = 2048

    def layers(x, stack):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    def make():
        w = jnp.ones((3, D, D), jnp.bfloat16)
        fmt = qjax.Format("int4", group_size=128, scale="bfloat16")
        return qjax.prepare(quantize_array(w, fmt), "a100")

    x = jax.ShapeDtypeStruct((4, D), jnp.bfloat16)
    # For an H100, the one GPU that can be compiled for here: memory is planned alike for all.
    program = h100.compile(qjax.apply(layers), x, jax.eval_shape(make))
    assert "triton_kernel_call_ffi" in program.hlo
    assert program.temporaries < D * D // 2  # less than the codes of one layer


def test_a_gpu_without_triton_is_an_error_that_says_what_to_install(monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="8.0")
    tree = {"w": _weight("int4")}
    monkeypatch.setattr(versions, "missing", lambda: "`pip install 'triton>=3.7'`")
    with pytest.raises(RuntimeError, match=r"pip install 'triton.*plain JAX"):
        qjax.prepare(tree, gpu)
    monkeypatch.setattr(versions, "missing", lambda: None)
    assert isinstance(qjax.prepare(tree, gpu)["w"], PreparedTriton)
