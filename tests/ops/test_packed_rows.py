"""Rows that the Hopper kernel looks up are those that XLA does, bit for bit."""

from __future__ import annotations

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from pallas_kernels import h100, hlo, interpreter
from qjax import Format
from qjax.ops import packed_rows
from qjax.qtensor import quantize_array

FORMATS = {
    "int4": Format("int4", 128, scale="bfloat16"),
    "zero point": Format("uint4", 32, zero_point=True),
    "int3": Format("int3", 64),
    "uint2": Format("uint2", 32, zero_point=True, scale="float16"),
    "ternary": Format("ternary", 128),
    "int8": Format("int8"),
    "uint8": Format("uint8", 128, zero_point=True),
    "nf4": Format("nf4", 64, scale="bfloat16"),
    "mxfp4": Format("e2m1", 32, scale="e8m0"),
    "e4m3": Format("e4m3", scale="bfloat16"),
}
OTHERS = {
    "nested": (Format("nf4", 64, scale=Format("int8", 4)), {}, "its scales are nested"),
    "offsets": (Format("uint4", 64, offset="float16"), {}, "or offsets"),
    "w8a8": (Format("int8", activation="int8"), {}, "as products of bytes take them"),
    "blocks": (Format("e4m3", 128, 128), {}, "of many columns"),
    "a factor": (Format("int4", 64), {"pre_scale": jnp.full(256, 2.0)}, "factors or an order"),
}
V, D = 300, 256


def _table(fmt, dtype="bfloat16", **factors):
    w = jax.random.normal(jax.random.key(0), (V, D), dtype)
    return quantize_array(w, fmt, "nk", **factors)


def _by_the_kernel(f, *args):
    """What `f` returns on a GPU, interpreted."""

    # Not a lowered program: the interpreter calls back into Python, which that cannot.
    with (
        mock.patch.object(packed_rows.packed_rows_p, "bind", packed_rows._by_kernel),
        interpreter.interpreting(),
        interpreter.everywhere(),
    ):
        return np.asarray(qjax.apply(f, implementation="mosaic")(*args))


def _same(got, wanted):
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(np.float32(got), np.float32(wanted))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_that_xla_looks_up(name):
    qt = _table(FORMATS[name], "float32" if FORMATS[name].zero_point else "bfloat16")
    at = jnp.array([[0, V - 1, 7], [7, V, -1 - V]])
    f = lambda w: jnp.take(w, at, axis=0)
    got = _by_the_kernel(f, qjax.prepare(qt, "h100"))
    _same(got, qjax.apply(f)(qt))
    assert np.isnan(np.float32(got[1, 1:])).all()
    assert np.isfinite(np.float32(got[0])).all()


@pytest.mark.parametrize(
    "options", [{"mode": "clip"}, {"mode": "fill", "fill_value": 2}, {"mode": "wrap"}], ids=str
)
def test_indices_outside_follow_the_mode(options):
    qt = _table(FORMATS["int4"])
    f = lambda w: jnp.take(w, jnp.array([3, V, -1000, -2]), axis=0, **options)
    _same(_by_the_kernel(f, qjax.prepare(qt, "h100")), qjax.apply(f)(qt))


def test_tables_that_are_cut_or_transposed_are_looked_up():
    prepared = qjax.prepare(_table(FORMATS["zero point"]), "h100")
    for f in (
        lambda w: w[jnp.array([5, 1])],
        lambda w: w.T[:, jnp.array([5, 1])],
        lambda w: w[:200][jnp.array([5, 1])],
        lambda w: w.reshape(V, 4, 64)[jnp.array([5, 1])],
    ):
        _same(_by_the_kernel(f, prepared), qjax.apply(f)(prepared))


def test_no_rows_are_no_rows():
    prepared = qjax.prepare(_table(FORMATS["int4"]), "h100")
    none = lambda w: w[jnp.zeros(0, int)]
    assert _kernels(none, prepared) == 0
    assert jax.eval_shape(qjax.apply(none, implementation="mosaic"), prepared).shape == (0, D)


def _use(f, *args, implementation="mosaic"):
    (use,) = qjax.explain(f, implementation=implementation)(*args)
    return use.implementation


def _kernels(f, *args, implementation="mosaic", **options):
    f = jax.jit(qjax.apply(f, implementation=implementation), **options)
    program = f.trace(*args).lower(lowering_platforms=("cuda",))
    return program.as_text().count("@mosaic_gpu_v2")


def _look_up(w, at):
    return w[at]


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_kernel_does_not_take_xla_looks_up_and_says_why(name):
    fmt, factors, why = OTHERS[name]
    qt = _table(fmt, **factors)
    prepared, at = qjax.prepare(qt, "h100"), jnp.array([5, 1])
    assert _use(_look_up, prepared, at).startswith("xla, reads those rows alone: ")
    assert why in _use(_look_up, prepared, at)
    assert _kernels(_look_up, prepared, at) == 0
    got = qjax.apply(_look_up, implementation="mosaic")(prepared, at)
    _same(got, qjax.apply(_look_up)(prepared, at))


def test_it_is_taken_where_it_is_asked_for_alone():
    qt, at = _table(FORMATS["int4"]), jnp.array([5, 1])
    prepared = qjax.prepare(qt, "h100")
    assert _use(_look_up, prepared, at, implementation=None) == "xla, reads those rows alone"
    assert _kernels(_look_up, prepared, at, implementation=None) == 0
    assert _use(_look_up, prepared, at) == packed_rows.DESCRIPTION
    assert _kernels(_look_up, prepared, at) == 1
    assert _use(_look_up, qt, at).endswith(": it is not prepared for it")
    along_v = qjax.prepare(quantize_array(jnp.ones((D, V)), FORMATS["int4"]), "h100")
    assert _use(_look_up, along_v, at).endswith(": its rows are not contiguous")
    with pytest.raises(NotImplementedError, match="runs on NVIDIA GPUs only"):
        qjax.apply(_look_up, implementation="mosaic")(prepared, at)


def test_batches_of_indices_are_one_kernel_and_batches_of_tables_a_loop():
    prepared, at = qjax.prepare(_table(FORMATS["int4"]), "h100"), jnp.arange(6).reshape(2, 3)
    rows = qjax.apply(_look_up, implementation="mosaic")
    assert _kernels(jax.vmap(_look_up, (None, 0)), prepared, at) == 1
    f = jax.jit(jax.vmap(rows, (None, 0)))
    program = f.trace(prepared, at).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@mosaic_gpu_v2") == 1
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), prepared)
    f = jax.jit(jax.vmap(rows, (0, 0)))
    program = f.trace(stack, at).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@mosaic_gpu_v2") == 1
    assert "while" in program


def test_derivatives_of_what_follows():
    prepared, at = qjax.prepare(_table(FORMATS["int4"]), "h100"), jnp.array([5, 1])
    loss = lambda s, w: jnp.sum(s * _look_up(w, at).astype(jnp.float32))
    assert _kernels(jax.grad(loss), 2.0, prepared) == 1
    rows = lambda s: packed_rows.packed_rows(at, dataclasses.replace(prepared, scale=s))
    with pytest.raises(TypeError, match="packed_rows: differentiation"):
        jax.jvp(rows, [prepared.scale], [prepared.scale])


def test_partitioned_programs_look_up_by_xla_and_shards_by_the_kernel():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    prepared, at = qjax.prepare(_table(FORMATS["int4"]), "h100"), jnp.arange(16)
    spread = jax.device_put(at, NamedSharding(mesh, P("x")))
    whole = jax.device_put(prepared, NamedSharding(mesh, P()))
    assert _kernels(_look_up, whole, spread) == 0
    leaves, tree = jax.tree.flatten(prepared)
    by_xla = packed_rows._by_xla(at.at[3].set(V), *leaves, tree=tree)
    _same(by_xla, qjax.apply(lambda w: jnp.take(w, at.at[3].set(V), axis=0))(prepared))
    rows = qjax.apply(_look_up, implementation="mosaic")
    f = jax.shard_map(rows, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"))
    program = jax.jit(f).trace(whole, spread).lower(lowering_platforms=("cuda",))
    assert program.as_text().count("@mosaic_gpu_v2") == 1


@pytest.mark.h100(code=False)
@pytest.mark.parametrize("M", [1, 16, 4096])
@pytest.mark.parametrize("name", ["int4", "zero point", "int3", "int8", "nf4", "e4m3"])
def test_on_an_h100_it_is_one_kernel_that_holds_nothing(name, M):
    """Where XLA's own, of 4096 rows, holds all of their codes."""
    quantized = lambda w: qjax.prepare(quantize_array(w, FORMATS[name], "nk"), "h100")
    table = jax.eval_shape(quantized, jax.ShapeDtypeStruct((32768, 4096), jnp.bfloat16))
    rows = jax.ShapeDtypeStruct((M,), jnp.int32)
    look_up = lambda w, rows: w.at[rows].get(mode="promise_in_bounds")
    program = h100.compile(jax.jit(qjax.apply(look_up, implementation="mosaic")), table, rows)
    (kernel,) = program.kernels
    assert kernel.spills == kernel.stack == 0
    assert kernel.registers <= 128  # of four CTAs on an SM
    executed = hlo.executed(program.hlo)
    assert executed["mosaic_gpu_v2"] == 1
    assert executed["fusion"] <= 1
    assert program.temporaries <= 4 * M + 128  # of indices, and a codebook
