"""Shardings of a QTensor's parts, derived from the sharding of the float array it stands for."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.tuning import TILE_N
from qjax import packing
from qjax.layout import Layout
from qjax.qtensor import QTensor, in_order

_Mesh = Mesh | AbstractMesh
_Axes = tuple[str, ...]  # the mesh axes that one array axis is split over


def shardings_of(qt: QTensor, sharding: NamedSharding, *, name: str = "a weight") -> QTensor:
    """Returns the NamedShardings of `qt`'s arrays, for a logical array sharded by `sharding`.

    With the spec over canonical axes `[*lead, K, N]`, and K and N sharded by all mesh axes of the
    logical axes merged into them, in that order:

      data   (*lead, K, N)   K only in whole packing units and without padding
      scale  (*lead, K, N)   K only in whole groups, N only in whole column blocks
      zero   like scale; packed zero points also only in whole packing units
      pre_scale (*lead, K), like data; act_scale (*lead); with a `perm`, K is not split

    Where an axis cannot be split over all its mesh axes, it is split over as many of the first ones
    as can be, so a per-channel scale (G = 1) is replicated along K. K of a weight of `qjax.prepare`
    is split in whole tiles of 128, and its scales only where it is; where codes are on more devices
    than asked for, a warning says so.

    Args:
      qt: arrays or ShapeDtypeStructs.
      sharding: of the logical array, of shape `qt.shape`.
      name: of the weight, for the warning.

    Returns:
      A QTensor of the same structure with NamedShardings as leaves.

    Raises:
      ValueError: if `sharding` does not fit `qt.shape`.
    """
    lead, k, n = canonical_axes(qt.layout, qt.shape, sharding)
    if qt.perm is not None:  # a part of the stored rows is no part of the channels
        k = ()
    if (why := _cut_short(qt, k, n, sharding.mesh)) is not None:
        warnings.warn(f"{name}, prepared: {why}, and are on all of them.", stacklevel=2)
    return _canonical(qt, sharding, lead, k, n)


def _cut_short(qt: QTensor, k: _Axes, n: _Axes, mesh: _Mesh) -> str | None:
    """Returns why codes of a prepared weight cannot be split as wanted, or None."""
    if qt.data_axes != "nk":
        return None
    *_, K, N = qt.canonical_shape
    for what, size, axes, most in zip(("rows", "columns"), (K, N), (k, n), qt.parts(), strict=True):
        wanted = _parts(axes, mesh)
        if most % wanted:
            fit = math.gcd(most, wanted)
            remedy = f"split them over {fit} devices" if fit > 1 else "do not split them"
            return (
                f"its {size} {what} do not make {wanted} parts of whole tiles and groups for as"
                f" many devices ({remedy}, or keep the weight out of `qjax.prepare`)"
            )
    return None


def beside_kernel(qt: QTensor) -> str | None:
    """Returns what the placement of a prepared weight costs in every product, or None for nothing.

    Args:
      qt: arrays or ShapeDtypeStructs; only what they say of their sharding counts, so tracers of
        a mesh with automatic axes say nothing.
    """
    like = getattr(qt.data, "sharding", None)
    if qt.data_axes != "nk" or not isinstance(like, NamedSharding):
        return None
    spec = (*like.spec, *[None] * (qt.data.ndim - len(like.spec)))
    n, k = (() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec[-2:])
    if (why := _cut_short(qt, k, n, like.mesh)) is not None:
        return f"{why}: every product gathers them"
    parts, N = _parts(n, like.mesh), qt.canonical_shape[-1]
    if parts > 1 and (more := -(N // parts) % TILE_N):
        own = N // parts
        return f"{own} columns on each device are padded to {own + more} in every product"
    return None


def canonical_axes(
    layout: Layout, shape: tuple[int, ...], sharding: NamedSharding
) -> tuple[list[_Axes], _Axes, _Axes]:
    """Returns the mesh axes of the leading axes, of K and of N of a logical array's canonical form.

    Raises:
      ValueError: if `sharding` does not fit `shape`.
    """
    axes = _axes_of(sharding.spec, shape, sharding.mesh)
    order = layout._order(len(shape))
    n_k, n_n = len(layout.indices("k")), len(layout.indices("n"))
    n_lead = len(shape) - n_k - n_n
    by_order = [axes[i] for i in order]
    k = tuple(a for part in by_order[n_lead : n_lead + n_k] for a in part)
    n = tuple(a for part in by_order[n_lead + n_k :] for a in part)
    return by_order[:n_lead], k, n


def float_sharding(qt: QTensor) -> NamedSharding:
    """Returns the sharding of the logical array, from that of the codes: the way back.

    The mesh axes of K and of N go to the first logical axis merged into them, as far as its size
    can be split.

    Args:
      qt: arrays or tracers on a mesh with explicit axes.
    """
    like = jax.typeof(qt.data).sharding
    *lead, k, n = _axes_of(like.spec, qt.data.shape, like.mesh)
    n_b = len(qt.layout.indices("b"))
    stacked, batch = lead[: len(lead) - n_b], lead[len(lead) - n_b :]
    major = {"k": k, "n": n}
    shape, axes = qt.shape, list(stacked)
    for axis in qt.layout:
        size = shape[len(axes)]
        names = batch.pop(0) if axis.kind == "b" else major.pop(axis.kind, ())
        axes.append(_splittable(names, like.mesh, lambda parts, size=size: size % parts == 0))
    return NamedSharding(like.mesh, PartitionSpec(*(_entry(a) for a in axes)))


def _canonical(qt: QTensor, like: NamedSharding, lead, k: _Axes, n: _Axes) -> QTensor:
    """Shards canonical axes over `lead`, `k` and `n`, as far as they can be split."""
    fmt, element, mesh = qt.format, qt.element, like.mesh
    *_, K, N = qt.canonical_shape
    G, C = fmt.groups(K, N)
    if qt.data_axes == "nk":  # and scales of what is not split are needed whole
        k_parts, n_parts = qt.parts()
        k = _splittable(k, mesh, lambda parts: k_parts % parts == 0)
        n = _splittable(n, mesh, lambda parts: n_parts % parts == 0)
    whole_groups = fmt.group_size is not None and G * fmt.group_size == K
    whole_columns = fmt.group_columns is not None and C * fmt.group_columns == N
    g = _splittable(k, mesh, lambda parts: whole_groups and G % parts == 0)
    c = _splittable(n, mesh, lambda parts: whole_columns and C % parts == 0)

    def named(k: _Axes, n: _Axes) -> NamedSharding:
        spec = PartitionSpec(*(_entry(a) for a in (*lead, k, n)))
        return NamedSharding(mesh, spec, memory_kind=like.memory_kind)

    def packed(rows: int, k: _Axes) -> _Axes:
        if not element.is_packed:
            return k
        return _splittable(k, mesh, lambda parts: rows % (parts * packing.unit(element.bits)) == 0)

    def part(stored, k: _Axes, order: str = "gc") -> NamedSharding | QTensor:
        if isinstance(stored, QTensor):
            if stored.format.flatten:  # one vector for the whole weight
                return _canonical(stored, like, lead, (), ())
            return _canonical(stored, like, lead, k, c)
        return named(*in_order(order, k, c))

    zero = None
    if qt.zero is not None:
        whole_bytes = lambda parts: G % (parts * qt.zero_unit) == 0
        zero = part(qt.zero, _splittable(g, mesh, whole_bytes) if fmt.zero_point else g)
    k = packed(K, k)
    factors = _factors(qt, lead, k)
    place = lambda spec: NamedSharding(mesh, spec, memory_kind=like.memory_kind)
    return dataclasses.replace(
        qt,
        data=named(*_ordered(qt, k, n)),
        scale=part(qt.scale, g, qt.scale_axes),
        zero=zero,
        **jax.tree.map(place, factors),
    )


def _ordered(qt: QTensor, k: _Axes, n: _Axes) -> tuple[_Axes, _Axes]:
    """Returns the mesh axes of K and N in the order that `data` has them."""
    return (k, n) if qt.data_axes == "kn" else (n, k)


def _factors(qt: QTensor, lead, k: _Axes) -> dict[str, PartitionSpec | None]:
    """Returns the PartitionSpecs of `pre_scale`, `perm` [*lead, K] and `act_scale` [*lead]."""
    stacked = [_entry(a) for a in lead]
    return {
        "pre_scale": None if qt.pre_scale is None else PartitionSpec(*stacked, _entry(k)),
        "act_scale": None if qt.act_scale is None else PartitionSpec(*stacked),
        "perm": None if qt.perm is None else PartitionSpec(*stacked, _entry(k)),
    }


def _axes_of(spec: PartitionSpec, shape: tuple[int, ...], mesh: _Mesh) -> list[_Axes]:
    """Returns the mesh axes of every array axis, after checking that they divide it."""
    if len(spec) > len(shape):
        raise ValueError(
            f"the sharding {spec} names {len(spec)} axes, but the array has shape {shape}."
            " Give one entry for each axis, or fewer."
        )
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    axes = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]
    for size, names in zip(shape, axes, strict=True):
        if size % _parts(names, mesh):
            raise ValueError(
                f"the sharding {spec} splits an axis of size {size} of the shape {shape} over"
                f" {_parts(names, mesh)} devices, which does not divide it. Leave that axis None."
            )
    return axes


def _splittable(axes: _Axes, mesh: _Mesh, fits: Callable[[int], bool]) -> _Axes:
    """Returns the longest prefix of `axes` whose number of parts fits."""
    while axes and not fits(_parts(axes, mesh)):
        axes = axes[:-1]
    return axes


def _parts(axes: _Axes, mesh: _Mesh) -> int:
    return math.prod(mesh.shape[a] for a in axes)


def _entry(axes: _Axes) -> str | _Axes | None:
    return axes[0] if len(axes) == 1 else (axes or None)


def shard_specs(qt: QTensor, lead: list, k: _Axes, n: _Axes, mesh) -> QTensor | None:
    """Returns the PartitionSpecs under which each shard of `qt` is itself a whole QTensor.

    Unlike `shardings_of` this never replicates an axis that was to be split: inside `shard_map` the
    shapes of codes and scales must agree.

    Args:
      lead: mesh axes of each leading axis; k, n: those of K and of N.

    Returns:
      A QTensor of PartitionSpecs, or None if a group or a byte would be cut in two.
    """
    *_, K, N = qt.canonical_shape
    fmt = qt.format
    G, C = fmt.groups(K, N)
    k_parts, n_parts = _parts(k, mesh), _parts(n, mesh)
    if qt.data_axes == "nk":
        whole_k, whole_n = qt.parts()
        if whole_k % k_parts or whole_n % n_parts:
            return None
    elif k_parts > 1 and (qt.pad or qt.data.shape[-2] % k_parts):
        return None
    if k_parts > 1 and G > 1 and (G * (fmt.group_size or K) != K or G % k_parts):
        return None
    if n_parts > 1 and C > 1 and (C * (fmt.group_columns or N) != N or C % n_parts):
        return None
    if N % n_parts or K % k_parts or (k_parts > 1 and qt.perm is not None):
        return None
    g, c = (k if G > 1 else ()), (n if C > 1 else ())

    def part(stored, order="gc"):
        if isinstance(stored, QTensor):
            if stored.format.flatten and (g or c):
                return None
            return shard_specs(stored, lead, g, c, mesh)
        return PartitionSpec(*(_entry(a) for a in (*lead, *in_order(order, g, c))))

    scale, zero = part(qt.scale, qt.scale_axes), None
    if qt.zero is not None:
        rows = qt.zero.shape[-2] if fmt.zero_point else G
        unit = qt.zero_unit if fmt.zero_point else 1
        if _parts(g, mesh) > 1 and (rows % _parts(g, mesh) or G % (unit * _parts(g, mesh))):
            return None
        zero = part(qt.zero)
    if scale is None or (qt.zero is not None and zero is None):
        return None
    data = PartitionSpec(*(_entry(a) for a in (*lead, *_ordered(qt, k, n))))
    return dataclasses.replace(qt, data=data, scale=scale, zero=zero, **_factors(qt, lead, k))
