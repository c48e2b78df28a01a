"""packed_rows: rows of a prepared weight by the Hopper kernel, as a JAX primitive.

Only where kernels are asked for. By default XLA looks rows up, in two or three kernels, and joins
the last of them with what follows.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad, batching, mlir
from jaxtyping import Float, Int

from qjax import _compat, qtensor
from qjax.ops import mosaic_dot
from qjax.ops.packed_dot import batch_first, refuse_weight_tangents, scales_of
from qjax.prepare import Prepared, are_apart, are_natural
from qjax.qtensor import QTensor, is_qtensor

DESCRIPTION = "mosaic (asked for), where XLA does not partition the program; else xla"


def reason_against(qt: QTensor) -> str | None:
    """Returns why the kernel cannot look up rows of a weight, or None if it can."""
    if type(qt) is not Prepared:
        return "it is not prepared for it"
    if qt.data.ndim != 2:
        return "it is stacked"
    if qt.pre_scale is not None or qt.perm is not None or qt.format.offset is not None:
        return "it has factors or an order of channels, or offsets"
    if are_apart(qt.data, qt.format) or are_natural(qt.data, qt.format):
        return "its codes lie as products of bytes take them"
    if jnp.dtype(qt.dtype).name not in ("bfloat16", "float16", "float32"):
        return f"it is of {jnp.dtype(qt.dtype).name}"
    if is_qtensor(qt.scale) or qt.format.group_columns != 1:
        return "its scales are nested, or of many columns"
    return None


def packed_rows(indices: Int[Array, " i"], qt: Prepared) -> Float[Array, "i K"]:
    """Returns Wᵀ[indices] of a canonical weight W [K, N], in its dtype.

    Args:
      indices: where one is not in 0 .. N - 1 the row is NaN.
      qt: one that `reason_against` has nothing against.
    """
    leaves, tree = jax.tree.flatten(qt)
    operands = _compat.align_varying(indices.astype(jnp.int32), *leaves)
    return packed_rows_p.bind(*operands, tree=tree)


packed_rows_p = _compat.Primitive("packed_rows")


@packed_rows_p.def_abstract_eval
def _abstract(indices, data, *rest, tree):
    qt: Prepared = jax.tree.unflatten(tree, (data, *rest))
    K, _ = qt.canonical_shape
    partition = ()
    if not indices.sharding.mesh.empty:
        partition = (*indices.sharding.spec, data.sharding.spec[1])
    return _compat.out_aval(indices, (*indices.shape, K), qt.dtype, partition)


@functools.lru_cache(maxsize=4096)
def _eager(tree: Any):
    return jax.jit(functools.partial(packed_rows_p.bind, tree=tree))


packed_rows_p.def_impl(lambda *args, tree: _eager(tree)(*args))


def _jvp(primals, tangents, *, tree):
    refuse_weight_tangents("packed_rows", tangents[1:])
    y = packed_rows_p.bind(*primals, tree=tree)
    return y, ad.Zero.from_primal_value(y)  # pyright: ignore[reportAttributeAccessIssue]


def _batch(args, axes, *, tree):
    indices, *leaves = args
    if all(a is None for a in axes[1:]):
        indices = jnp.moveaxis(indices, axes[0], 0)
        y = packed_rows_p.bind(indices.reshape(-1), *leaves, tree=tree)
        return y.reshape(*indices.shape, -1), 0
    one = lambda args: packed_rows_p.bind(*args, tree=tree)
    return lax.map(one, batch_first(args, axes)), 0


ad.primitive_jvps[packed_rows_p] = _jvp
batching.primitive_batchers[packed_rows_p] = _batch


def _by_kernel(indices, *leaves, tree):
    qt: Prepared = jax.tree.unflatten(tree, leaves)
    scale, zero, factor = scales_of(qt)
    assert factor is None
    if not math.prod(indices.shape):
        return jnp.zeros((0, qt.canonical_shape[0]), qt.dtype)
    return mosaic_dot.rows(
        indices, qt.data, scale, zero, format=qt.format, extra=qt.extra, out_dtype=qt.dtype
    )


def _by_xla(indices, *leaves, tree):
    qt: Prepared = jax.tree.unflatten(tree, leaves)
    is_inside = (indices >= 0) & (indices < qt.canonical_shape[1])
    rows = qtensor.dequantize_columns(qt.canonical(), jnp.where(is_inside, indices, 0))
    return jnp.where(is_inside[:, None], rows, jnp.nan).astype(qt.dtype)


def _lower(ctx, *args: Any, tree: Any):
    run = _by_xla if _compat.is_partitioned(ctx) else _by_kernel
    with _compat.without_mesh():
        ctx = _compat.unplaced(ctx)
        run = functools.partial(run, tree=tree)
        return mlir.lower_fun(run, multiple_results=False)(ctx, *args)


def _refuse(ctx, *args: Any, tree: Any):
    del ctx, args, tree
    raise NotImplementedError(
        'implementation="mosaic" runs on NVIDIA GPUs only. Leave the choice to None: then plain JAX'
        " looks rows up."
    )


mlir.register_lowering(packed_rows_p, _refuse)
mlir.register_lowering(packed_rows_p, _lower, platform="cuda")
