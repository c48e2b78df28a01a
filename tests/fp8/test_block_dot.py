"""Products of blocks: every implementation computes the same, and each runs where it should."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import hlo, interpreter
from qjax import Format, fp8
from qjax.fp8 import block_dot
from qjax.fp8.block_dot import Blocks

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


def blocks(seed, R, C, dtype, g=128, lead=(), *, shared=False):
    """Returns codes, and powers of two as scales: for each row, or shared by g of them."""
    keys = jax.random.split(jax.random.key(seed), 2)
    rows = -(-R // g) if shared else R
    scale = 2.0 ** jax.random.randint(keys[1], (*lead, rows, C), -3, 4).astype(jnp.float32)
    return Blocks(jax.random.normal(keys[0], (*lead, R, C, g)).astype(dtype), scale)


def exact(a, b):
    wide = [np.asarray(t.codes, np.float64) * np.asarray(t.by_row)[..., None] for t in (a, b)]
    return np.einsum("...rcj,...scj->...rs", *wide)


def error(y, a, b):
    wanted = exact(a, b)
    return np.linalg.norm(np.asarray(y, np.float64) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("shared", [False, True])
def test_implementations_agree_with_float64(shared):
    a, b = blocks(0, 5, 3, E5M2), blocks(1, 200, 3, E4M3, shared=shared)
    for y in (block_dot.upcast(a, b, True), block_dot.by_block(a, b)):
        assert error(y, a, b) < 1e-6
    with interpreter.interpreting() as races:
        y = block_dot.hopper(a, b, "float32", interpret=interpreter.params())
        assert error(y, a, b) < 2e-6
    assert not races.found


@pytest.mark.parametrize(("R", "S"), [(1, 1), (130, 128)])
def test_the_kernel_takes_any_number_of_rows(R, S):
    a, b = blocks(0, R, 2, E4M3), blocks(1, S, 2, E5M2)
    with interpreter.interpreting():
        y = block_dot.hopper(a, b, "bfloat16", interpret=interpreter.params())
    assert y.shape == (R, S)
    assert y.dtype == jnp.bfloat16
    assert error(y, a, b) < 2.0**-8


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize(("S", "shared"), [(5, False), (5, True), (32, True)])
def test_a_batch_is_as_many_products(in_axes, S, shared):
    lead = [() if axis is None else (3,) for axis in in_axes]
    a = blocks(0, 4, 2, E4M3, g=16, lead=lead[0])
    b = blocks(1, S, 2, E4M3, g=16, lead=lead[1], shared=shared)
    dot = lambda a, b: block_dot.block_dot(a, b, exact_scale=True, out_dtype="float32")
    of = lambda t, axis, i: t if axis is None else Blocks(t.codes[i], t.scale[i])
    each = [dot(of(a, in_axes[0], i), of(b, in_axes[1], i)) for i in range(3)]
    y = jax.vmap(dot, in_axes=in_axes)(a, b)
    np.testing.assert_allclose(y, jnp.stack(each), rtol=1e-6, atol=1e-6)


def test_a_batch_of_inputs_is_more_rows_for_the_kernel():
    a, b = _structs()
    many: Any = [jax.ShapeDtypeStruct((3, *t.shape), t.dtype) for t in a]
    jaxpr = jax.make_jaxpr(jax.vmap(_dot, in_axes=(0, None)))(Blocks(*many), b)
    (product,) = (e for e in jaxpr.eqns if e.primitive is block_dot.block_dot_p)
    shapes: Any = [v.aval for v in product.invars]
    assert [aval.shape for aval in shapes] == [
        (768, 2, 128), (768, 2), (256, 2, 128), (256, 2),
    ]  # fmt: skip


def _structs(R=256, S=256, C=2, g=128, lead=(), *, shared=False):
    struct: Any = jax.ShapeDtypeStruct
    code = lambda n: struct((*lead, n, C, g), jnp.dtype(E4M3))
    scale = lambda n: struct((*lead, n, C), jnp.float32)
    return Blocks(code(R), scale(R)), Blocks(code(S), scale(-(-S // g) if shared else S))


def _dot(a, b):
    return block_dot.block_dot(a, b, exact_scale=True, out_dtype="bfloat16")


def test_what_the_kernel_does_not_take_is_explained():
    def explained(size, n_lead=0):
        w = jnp.ones((*[2] * n_lead, 256, 256))
        form = Format("e4m3", group_size=size, group_columns=size, remainder="ragged")
        x = jnp.ones((*[2] * n_lead, 8, 256))
        return str(fp8.explain(lambda w, x: x @ w, form)(w, x))

    assert "on an H100 in one kernel" in explained(128)
    assert "one after another (no kernel: blocks of 64: it takes 128)" in explained(64)
    assert "one after another (no kernel: stacked weights)" in explained(128, n_lead=1)
    assert block_dot.against_hopper((0, 2, 128), (3, 2, 128)) == "nothing to multiply"


def test_a_program_for_unknown_gpus_has_no_kernel_for_hopper():
    exported = jax.export.export(jax.jit(_dot), platforms=["cuda", "cpu"])(*_structs())
    assert "mosaic_gpu" not in exported.mlir_module()
    a, b = blocks(0, 256, 2, E4M3), blocks(1, 256, 2, E4M3)
    assert error(exported.call(a, b), a, b) < 2.0**-8


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("of_a", "of_b"),
    [
        (P("x"), P()),
        (P("x"), P("y")),
        (P(None, "x"), P(None, "x")),
        (P("x", "y"), P("x")),
        (P(), P(("x", "y"))),
    ],
    ids=str,
)
def test_sharded_equals_unsharded(of_a, of_b, shared):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    a, b = blocks(0, 4, 2, E4M3, g=4), blocks(1, 16, 2, E5M2, g=4, shared=shared)

    def run(qa, sa, qb, sb, out_dtype="float32"):
        return block_dot.by_block(Blocks(qa, sa), Blocks(qb, sb)).astype(out_dtype)

    wanted = run(*a, *b)
    place = lambda t, spec: jax.device_put(t, NamedSharding(mesh, spec))
    placed = place(a, of_a) + place(b, of_b)
    y = jax.jit(lambda *args: block_dot._partitioned(run, "float32", *args)(*args))(*placed)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.h100
@pytest.mark.parametrize("split", [None, "rows", "columns", "blocks", "shard_map"])
def test_an_h100_has_the_kernel(split):
    """So has each of two, over which operands are split; only parts of a sum are exchanged."""
    from pallas_kernels import h100

    mesh = h100.mesh(x=2 if split else 1)
    a, b = _structs(shared=True)
    of_a = P(*("x" if split == axis else None for axis in ("rows", "blocks")))
    of_b = P(*("x" if split == axis else None for axis in ("columns", "blocks")))

    def placed(t, spec) -> Any:
        place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec))
        return jax.tree.map(place, t)

    f = _dot
    if split == "shard_map":
        f = jax.shard_map(_dot, in_specs=(P("x"), P()), out_specs=P("x"), check_vma=False)
    program = h100.compile(f, placed(a, of_a), placed(b, of_b), on=mesh)
    assert program.hlo.count('custom_call_target="mosaic_gpu_v2"') == 1
    moved = hlo.collectives(program.hlo)
    assert moved == ({"all-reduce": 1} if split == "blocks" else {})
