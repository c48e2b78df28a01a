"""Prepared weights lie on meshes as float ones do."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
from pallas_kernels import h100
from qjax.ops.packed_dot import packed_dot
from qjax.qtensor import is_qtensor, quantize_array
from qjax.sharding import shard_specs, shardings_of
from tests.prepare.weights import FORMATS, QUANTIZED, weight


@pytest.mark.parametrize("name", ["int4", "int3", "nf4-dq", "zero point", "uint8", "fp8"])
@pytest.mark.parametrize("spec", [("x", None), (None, "x")], ids=["rows", "columns"])
def test_shards_as_the_float_weight_does(spec, name):
    qt = weight(name, (512, 256))
    prepared = qjax.prepare(qt, "h100")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    placed = shardings_of(prepared, NamedSharding(mesh, PartitionSpec(*spec)))
    assert placed.data.spec == PartitionSpec(*spec[::-1])
    x = jax.random.normal(jax.random.key(1), (3, 512), jnp.bfloat16)
    y = jax.jit(packed_dot)(x, jax.device_put(prepared, placed))
    wanted = packed_dot(x, qt)
    # Sums of two shards are rounded to bfloat16 before they are added.
    np.testing.assert_allclose(
        y.astype(jnp.float32), wanted.astype(jnp.float32), atol=2.0**-7 * float(abs(wanted).max())
    )


@pytest.mark.parametrize(
    ("name", "transposed"),
    [
        ("int4", False),
        ("zero point", False),
        ("fp8", False),
        ("nvfp4", False),
        ("w4a8 multiples", False),
        ("int3", True),
    ],
)
def test_columns_are_split_where_they_are_no_whole_tiles(name, transposed):
    """As 13,824 over 8 GPUs. Each pads its own, and none gathers those of others."""
    w = jax.random.normal(jax.random.key(0), (256, 1536))
    qt = quantize_array(w, FORMATS[name] if name in FORMATS else QUANTIZED[name])
    prepared = qjax.prepare(qt, "h100")
    mesh = jax.make_mesh((8,), ("x",))
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))
    placed = jax.device_put(prepared, shardings_of(prepared, columns))
    assert placed.data.addressable_shards[0].data.shape[-2] == 192
    x = jax.random.normal(jax.random.key(1), (3, 1536 if transposed else 256), jnp.bfloat16)
    dot = functools.partial(packed_dot, transposed=transposed, out_dtype=jnp.float32)
    program = jax.jit(dot).lower(x, placed).compile()
    gathers = [line for line in (program.as_text() or "").splitlines() if "all-gather(" in line]
    assert all("f32[3,1536]" in line for line in gathers)  # of results, but not of the weight
    wanted = dot(x, qt)
    np.testing.assert_allclose(program(x, placed), wanted, atol=1e-4 * float(abs(wanted).max()))


def test_preparing_what_is_sharded_warns_of_what_it_costs():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    fmt, w = qjax.Format("int4", group_size=128), jnp.ones((1536, 1536))
    by_columns, by_rows = (NamedSharding(mesh, PartitionSpec(*s)) for s in [(None, "x"), ("x",)])
    qt = quantize_array(w, fmt)
    tree = {
        "up": jax.device_put(qt, shardings_of(qt, by_columns)),
        "down": jax.device_put(qt, shardings_of(qt, by_rows)),
    }
    with pytest.warns(UserWarning, match="in every product|every product gathers") as seen:
        prepared = qjax.prepare(tree, "h100")
    padded = "192 columns on each device are padded to 256 in every product"
    gathered = "its 1536 rows do not make 8 parts of whole tiles and groups for as many devices"
    assert f"up: {padded}" in str([w.message for w in seen])
    assert f"down: {gathered} (split them over 4 devices" in str([w.message for w in seen])
    x = jnp.ones((2, 1536), jnp.bfloat16)
    how = str(qjax.explain(lambda p, x: (x @ p["up"]) @ p["down"])(prepared, x))
    assert padded in how
    assert gathered in how


@pytest.mark.h100(code=False)
def test_each_of_8_gpus_pads_its_own_columns():
    w = jax.ShapeDtypeStruct((1024, 13824), jnp.float32)
    fmt = qjax.Format("int4", group_size=128, scale="bfloat16")
    prepared = jax.eval_shape(lambda w: qjax.prepare(quantize_array(w, fmt), "h100"), w)
    mesh = h100.mesh(x=8)
    placed = shardings_of(prepared, NamedSharding(mesh, PartitionSpec(None, "x")))
    struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    x = jax.ShapeDtypeStruct(
        (16, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
    )
    program = h100.compile(jax.jit(packed_dot), x, jax.tree.map(struct, prepared, placed), on=mesh)
    assert len(program.kernels) == 1
    assert "all-gather" not in program.hlo
    assert program.arguments < 1.1 * (1024 * 13824 // 2 + 8 * 13824 * 2) / 8 + 2 * 16 * 1024


def test_zero_points_are_cut_where_groups_are():
    """In bytes also one group for each shard, of which packed codes have no whole byte."""
    qt = quantize_array(
        jax.random.normal(jax.random.key(0), (512, 128)),
        qjax.Format("uint4", group_size=128, zero_point=True, scale="bfloat16"),
    )
    prepared = qjax.prepare(qt, "h100")
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    rows = PartitionSpec("x")
    placed = shardings_of(prepared, NamedSharding(mesh, rows))
    assert placed.zero.spec == placed.scale.spec == PartitionSpec("x", None)
    assert shard_specs(qt, [], ("x",), (), mesh) is None
    specs = shard_specs(prepared, [], ("x",), (), mesh)
    x = jax.random.normal(jax.random.key(1), (3, 512), jnp.bfloat16)
    of_x = PartitionSpec(None, "x")
    part = lambda x, w: lax.psum(packed_dot(x, w, out_dtype=jnp.float32), "x")
    run = jax.shard_map(part, mesh=mesh, in_specs=(of_x, specs), out_specs=PartitionSpec())
    cut = jax.device_put((x, prepared), (NamedSharding(mesh, of_x), placed))
    y, wanted = jax.jit(run)(*cut), packed_dot(x, qt, out_dtype=jnp.float32)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=2.0**-20 * float(jnp.linalg.norm(wanted)))


@pytest.mark.parametrize("name", ["w4a8 multiples", "fp4 x fp8"])
def test_multiples_are_cut_where_groups_are_and_what_they_multiply_is_not(name):
    w = jax.random.normal(jax.random.key(0), (512, 256))
    qt = quantize_array(w, QUANTIZED[name])
    prepared = qjax.prepare(qt, "h100")
    mesh = jax.make_mesh((4, 2), ("k", "n"))
    placed = shardings_of(prepared, NamedSharding(mesh, PartitionSpec("k", "n")))
    assert placed.scale.data.spec == PartitionSpec("k", "n")
    assert placed.scale.scale.spec == PartitionSpec(None, "n")
    x = jax.random.normal(jax.random.key(1), (3, 512), jnp.bfloat16)
    cut = jax.device_put((x, prepared), (NamedSharding(mesh, PartitionSpec(None, "k")), placed))
    dot = functools.partial(packed_dot, out_dtype=jnp.float32)
    program = jax.jit(dot).lower(*cut).compile()
    assert "all-gather" not in (program.as_text() or "")
    wanted = dot(x, qt)
    np.testing.assert_allclose(program(*cut), wanted, atol=2.0**-20 * float(abs(wanted).max()))


@pytest.mark.parametrize(
    "fmt",
    [
        FORMATS["nf4-dq"],
        qjax.Format("int4", 64, scale=qjax.Format("uint8", 1, group_columns=128)),
        FORMATS["fp8 blocks"],
        QUANTIZED["fp8 blocks"],
    ],
    ids=str,
)
def test_what_lies_group_after_group_is_cut_where_groups_and_columns_are(fmt):
    """Factors of nested scales, with their offsets or without, and scales of blocks."""
    qt = quantize_array(jax.random.normal(jax.random.key(0), (512, 1024)), fmt)
    prepared = qjax.prepare(qt, "h100")
    mesh = jax.make_mesh((4, 2), ("k", "n"))
    placed = shardings_of(prepared, NamedSharding(mesh, PartitionSpec("k", "n")))
    of_groups = placed.scale.scale if is_qtensor(placed.scale) else placed.scale
    assert of_groups.spec == PartitionSpec("n", "k")
    specs = shard_specs(prepared, [], ("k",), ("n",), mesh)
    assert jax.tree.leaves(specs) == [s.spec for s in jax.tree.leaves(placed)]
    x = jax.random.normal(jax.random.key(1), (3, 512), jnp.bfloat16)
    of_x = PartitionSpec(None, "k")
    cut = jax.device_put((x, prepared), (NamedSharding(mesh, of_x), placed))
    dot = functools.partial(packed_dot, out_dtype=jnp.float32)
    part = lambda x, w: lax.psum(dot(x, dataclasses.replace(w, format=unrounded)), "k")
    unrounded = fmt.weight_only  # a step of a token is that of all its parts
    run = jax.shard_map(part, mesh=mesh, in_specs=(of_x, specs), out_specs=PartitionSpec(None, "n"))
    program = jax.jit(dot).lower(*cut).compile()
    assert "all-gather" not in (program.as_text() or "")
    wanted = dot(x, qt)
    atol = 2.0**-20 * float(jnp.linalg.norm(wanted))
    np.testing.assert_allclose(program(*cut), wanted, rtol=0, atol=atol)
    wanted = dot(x, dataclasses.replace(qt, format=unrounded))
    np.testing.assert_allclose(jax.jit(run)(*cut), wanted, rtol=0, atol=atol)


def test_scales_of_a_weight_that_cannot_be_split_are_whole():
    """Else every product would gather them: 3 tiles for 2 devices."""
    prepared = qjax.prepare(weight("nvfp4", (384, 384)), "h100")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    with pytest.warns(UserWarning, match="down, prepared: its 384 rows do not make 2 parts"):
        placed = shardings_of(prepared, NamedSharding(mesh, PartitionSpec("x", None)), name="down")
    assert all(s.is_fully_replicated for s in jax.tree.leaves(placed))
    x = jax.random.normal(jax.random.key(1), (3, 384), jnp.bfloat16)
    program = jax.jit(packed_dot).lower(x, jax.device_put(prepared, placed)).compile()
    assert "all-gather" not in (program.as_text() or "")
