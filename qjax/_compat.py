"""Everything that JAX does not export or has changed between the supported versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src import ad_util as _ad_util
from jax._src import config as _config
from jax._src import core as _core
from jax._src import dispatch as _dispatch
from jax._src import dtypes as _dtypes
from jax._src import earray as _earray
from jax._src import sharding_impls as _sharding_impls
from jax._src import source_info_util as _source_info
from jax._src.interpreters import pxla as _pxla
from jax.extend.core import Primitive
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

__all__ = [
    "FUSES_ROWS",
    "LOADS_ACROSS",
    "ExtendedDType",
    "Primitive",
    "ShapedArray",
    "abstract_like",
    "align_varying",
    "as_traced",
    "bind",
    "capability_of",
    "decoded_spec",
    "enter_auto",
    "explicit_mesh",
    "extended_results",
    "is_exported",
    "is_partitioned",
    "leave_auto",
    "lower_with_devices",
    "open_jaxpr",
    "out_aval",
    "reshard_like",
    "scan_counts",
    "shard_map_axes",
    "spec_of",
    "split_over",
    "unplaced",
    "untracked_axes",
    "without_mesh",
]


# Whether XLA for CPUs fuses rows that are dequantized, multiplied and added with one another; that
# of JAX before 0.12 writes the float rows to memory first.
FUSES_ROWS = jax.__version_info__ >= (0, 12)

# Whether Mosaic GPU loads tiles across their rows, as the kernel for x @ Wᵀ does; 0.11.0 does not.
LOADS_ACROSS = jax.__version_info__ >= (0, 11, 2)

ShapedArray = _core.ShapedArray
ExtendedDType = _dtypes.ExtendedDType


def extended_results(aval: Any, sharding: Any, committed: bool) -> Any:
    """Returns how buffers become an array of an extended dtype that has its physical shape."""
    make = _pxla.global_result_handlers[_core.ShapedArray]
    physical = make(_core.physical_aval(aval), sharding, committed)
    return lambda buffers: _earray.EArray(aval, physical(buffers))


# JAX knows how to add arrays of extended dtypes, but outside of `jit` not their class.
_ad_util.raw_jaxval_adders.setdefault(
    _earray.EArray, lambda x, y: x.dtype._rules.add(x.dtype, x, y)
)


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Returns the open jaxpr and its constants.

    Up to 0.11 an equation may hold a ClosedJaxpr; 0.12 merged the two classes.
    """
    consts = list(getattr(jaxpr, "consts", ()))
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def as_traced(eqn: Any) -> Any:
    """Returns a context in which operations bear the names and source lines of an equation.

    Profiles and errors of the compiled program then speak of the user's modules and lines.
    """
    names = _source_info.current_name_stack() + eqn.source_info.name_stack
    return _source_info.user_context(eqn.source_info.traceback, name_stack=names)


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


def untracked_axes() -> tuple[str, ...]:
    """Returns the mesh axes of a shard_map without `check_vma`, whose types do not say what varies.

    Outside of one, and inside of one with it, there are none.
    """
    return () if _config._check_vma.value else tuple(jax.sharding.get_abstract_mesh().manual_axes)


def split_over(x: Any) -> tuple[str, ...]:
    """Returns the mesh axes over which parts of an array may lie, inside a shard_map; else ()."""
    varying = _core.typeof(x).mat.varying
    return untracked_axes() or tuple(sorted(varying))


def out_aval(x: Any, shape: tuple[int, ...], dtype: Any, spec: tuple[Any, ...]) -> Any:
    """Returns an output's abstract value: that of `x` with another shape, dtype and sharding.

    `spec` only matters on meshes with explicit axes.
    """
    dtype = jax.numpy.dtype(dtype)
    if not x.sharding.mesh.empty:
        sharding = x.sharding.update(spec=PartitionSpec(*spec))
        return x.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)
    return _core.ShapedArray(shape, dtype)


def abstract_like(arrays: Sequence[Any], shape: tuple[int, ...], dtype: Any, spec: Any) -> Any:
    """Returns the abstract array that JAX's types would make of `arrays` taken together.

    It varies over the manual mesh axes over which one of them varies, and is sharded as `spec`
    where their mesh has explicit axes.
    """
    types = [_core.typeof(a) for a in arrays if not isinstance(a, jax.ShapeDtypeStruct)]
    varying = frozenset().union(*(t.mat.varying for t in types))
    mesh = explicit_mesh(arrays)
    extra = {}
    if varying:
        like = next(t for t in types if t.mat.varying)
        mesh = like.sharding.mesh
        extra["manual_axis_type"] = like.mat.update(varying=varying)
    if mesh is not None:
        extra["sharding"] = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, **extra)


def explicit_mesh(arrays: Sequence[Any]) -> Any:
    """Returns the mesh of the first array whose type has explicit axes, or None."""
    for a in arrays:
        if isinstance(a, jax.ShapeDtypeStruct):
            continue
        mesh = _core.typeof(a).sharding.mesh
        if not mesh.empty and mesh.explicit_axes:
            return mesh
    return None


def enter_auto(tree: Any, mesh: Any) -> tuple[Any, Any]:
    """Returns (context, tree): `mesh` with its explicit axes automatic, and the arrays on it."""
    kinds = [AxisType.Auto if t == AxisType.Explicit else t for t in mesh.axis_types]
    auto = mesh.update(axis_types=tuple(kinds))
    place = lambda a: jax.sharding.reshard(a, NamedSharding(auto, PartitionSpec(*[None] * a.ndim)))
    with jax.sharding.use_abstract_mesh(auto):
        return jax.sharding.use_abstract_mesh(auto), jax.tree.map(place, tree)


def leave_auto(tree: Any, specs: Any, mesh: Any) -> Any:
    """Returns arrays of `enter_auto`'s context on `mesh`, sharded by `specs`."""
    with jax.sharding.use_abstract_mesh(mesh):
        move = lambda a, s: jax.sharding.reshard(a, NamedSharding(mesh, s))
        return jax.tree.map(move, tree, specs)


def reshard_like(tree: Any, specs: Any, mesh: Any) -> Any:
    """Moves arrays to where `specs` says, if their types say anything; else leaves them."""
    if explicit_mesh(jax.tree.leaves(tree)) is None:
        return tree
    move = lambda a, s: jax.sharding.reshard(a, NamedSharding(mesh, s))
    return jax.tree.map(move, tree, specs)


def looked_up(table: Any, at: Any) -> Any:
    """Returns `table[at]` for a table [n], sharded as the type of `at` says.

    On meshes with explicit axes, plain indexing looks for those of `at` in the mesh of the table.
    """
    if explicit_mesh([at]) is None:
        return table[at]
    return table.at[at].get(out_sharding=_core.typeof(at).sharding)


def spec_of(x: Any) -> tuple[Any, ...]:
    """Returns how the type of `x` says that it is sharded, an entry per axis."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return (None,) * len(x.shape)
    spec = tuple(_core.typeof(x).sharding.spec)
    return spec + (None,) * (len(x.shape) - len(spec))


# ---- lowering -----------------------------------------------------------------------------------


def is_partitioned(lowering_context: Any) -> bool:
    """Whether the program being lowered is still to be partitioned over several devices."""
    axes = lowering_context.module_context.axis_context
    if hasattr(axes, "manual_axes"):  # inside shard_map, or in one partition
        return axes.mesh.size > 1 and set(axes.manual_axes) != set(axes.mesh.axis_names)
    return getattr(axes, "num_devices", 1) != 1


def is_exported(lowering_context: Any) -> bool:
    """Whether the program being lowered is for `jax.export`: other processes will run it."""
    return lowering_context.module_context.lowering_parameters.for_export


def capability_of(device: Any) -> int:
    """Returns the compute capability of an NVIDIA GPU, such as 90; 0 for any other device."""
    return int(str(getattr(device, "compute_capability", "0")).replace(".", ""))


def target(lowering_context: Any) -> Any:
    """Returns a device that the program being lowered is for, or None where that is not known."""
    module = lowering_context.module_context
    if is_exported(lowering_context):
        return None
    axes = module.axis_context
    devices = getattr(axes, "device_assignment", None)
    if devices is None:  # inside shard_map, whose mesh may be abstract
        devices = getattr(getattr(axes, "mesh", None), "devices", None)
    if devices is None:
        backend = module.get_backend(optional=True)
        devices = [] if backend is None else backend.devices()
    return next(iter(np.ravel(devices)), None)


def unplaced(lowering_context: Any) -> Any:
    """Returns the lowering context with the shapes and dtypes of its values, without shardings."""
    plain = lambda avals: [_core.ShapedArray(a.shape, a.dtype) for a in avals]
    ins, outs = lowering_context.avals_in, lowering_context.avals_out
    return lowering_context.replace(avals_in=plain(ins), avals_out=plain(outs))


def without_mesh() -> Any:
    """Returns a context in which arrays have no mesh, whatever the caller has set."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def decoded_spec(sharding: Any, mesh: Any) -> tuple[Any, ...]:
    """Returns the mesh axes of a sharding that XLA's partitioner chose, an entry per axis.

    Inside a program it may split an array over part of a mesh axis, which no PartitionSpec can say:
    four groups over eight devices. Such an array counts as replicated, and is gathered.
    """
    if sharding is None or mesh.empty:
        return ()
    try:
        return tuple(_sharding_impls.parse_flatten_op_sharding(sharding._hlo_sharding, mesh)[0])
    except ValueError:  # IndivisibleError is one
        return ()


def lower_with_devices(primitive: Any) -> None:
    """Declares that lowering `primitive` needs the devices, as it emits a custom_partitioning."""
    _dispatch.prim_requires_devices_during_lowering.add(primitive)
