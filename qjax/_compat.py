"""Everything that JAX does not export or has changed between the supported versions."""

from __future__ import annotations

from typing import Any

import jax
from jax._src import core as _core
from jax.extend.core import Primitive

__all__ = ["Primitive", "align_varying", "bind", "open_jaxpr", "out_aval", "runs_on_one_device",
           "scan_counts", "shard_map_axes"]  # fmt: skip


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Returns the open jaxpr and its constants.

    Up to 0.11 an equation may hold a ClosedJaxpr; 0.12 merged the two classes.
    """
    consts = list(getattr(jaxpr, "consts", ()))
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def bind(eqn: Any, args: list[Any]) -> list[Any]:
    """Runs one equation of a jaxpr as it stands, under the context in which it was traced."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Returns (num_consts, num_carry) of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def shard_map_axes(params: dict[str, Any]) -> Any:
    """Returns the mesh axes that a shard_map equation makes manual."""
    return params.get("newly_manual_axes", params.get("manual_axes"))


def align_varying(*args: Any) -> list[Any]:
    """Makes all arrays vary over the same manual mesh axes, as JAX's own primitives require."""
    varying = [_core.typeof(a).mat.varying for a in args]
    wanted = frozenset().union(*varying)
    return [
        jax.lax.pcast(a, tuple(wanted - has), to="varying") if wanted - has else a
        for a, has in zip(args, varying, strict=True)
    ]


def out_aval(x: Any, shape: tuple[int, ...], dtype: Any, spec: tuple[Any, ...]) -> Any:
    """Returns an output's abstract value: that of `x` with another shape, dtype and sharding.

    `spec` only matters on meshes with explicit axes.
    """
    if hasattr(x.sharding, "mesh") and not x.sharding.mesh.empty:
        sharding = x.sharding.update(spec=jax.sharding.PartitionSpec(*spec))
        return x.update(shape=shape, dtype=jax.numpy.dtype(dtype), weak_type=False, sharding=sharding)
    return _core.ShapedArray(shape, jax.numpy.dtype(dtype))


def runs_on_one_device(lowering_context: Any) -> bool:
    """Whether the program being lowered is for one device, so that nothing is partitioned."""
    axis_context = lowering_context.module_context.axis_context
    return getattr(axis_context, "num_devices", None) == 1
