"""Weights whose output columns lie on several devices, solved where they lie."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import shard_map
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from qjax.format import Format
from qjax.layout import Layout
from qjax.ptq import gptq
from qjax.ptq.grid import is_by_column
from qjax.qtensor import QTensor
from qjax.sharding import shardings_of


class Split(NamedTuple):
    """The mesh axes over which the columns of a canonical weight are split. Static."""

    mesh: Mesh
    axes: Any

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def spec(self, ndim: int) -> PartitionSpec:
        return PartitionSpec(*[None] * (ndim - 1), self.axes)


def split_of(w: Any) -> Split | None:
    """Returns how the columns of w [*lead, K, N] are split; None if not, or if K or *lead is."""
    mesh = _mesh_of(w)
    if mesh is None or w.sharding.is_fully_replicated:
        return None
    spec = w.sharding.spec
    *others, axes = (e or None for e in (*spec, *[None] * (w.ndim - len(spec))))
    return None if axes is None or any(others) else Split(mesh, axes)


def solve(
    weights: Sequence[Float[Array, "*lead K N"]],
    h: Float[Array, "*lead K K"],
    fmt: Format,
    options: gptq.Options,
    *,
    damping: Any,
    move: Callable[..., Array] | None = None,
    extra: Sequence[Any] = (),
) -> tuple[list[QTensor], gptq.Diagnostics]:
    """Solves canonical weights that read one activation; returns a QTensor for each.

    Columns know nothing of each other. So where they are split over devices, each device solves its
    own, with all of H, and codes and scales come out split like the weight: nothing of a weight is
    sent. They stop after as many sweeps wherever they are only if `options.tolerance` is 0.

    Args:
      weights: all with the same `split_of`.
      h: second moments of their input.
      fmt: with a scale for each column, if the columns are split.
      options, damping: as for `gptq.solve`.
      move: function of (w, h, *extra, damping) from some columns to what they are solved for.
      extra: its other arguments.
    """
    split = split_of(weights[0]) if is_by_column(fmt) else None
    args = (h, jnp.asarray(damping, jnp.float32), tuple(extra))
    run = functools.partial(_here, fmt, options, move)
    if split is None:
        return run(tuple(weights), *args)
    return _sharded(fmt, options, move, split)(tuple(weights), *beside(args, weights[0]))


def _here(fmt: Format, options: gptq.Options, move, weights, h, damping, extra):
    """Solves weights, or a device's part of them, side by side."""
    w = jnp.concatenate(weights, -1) if len(weights) > 1 else weights[0]
    target = w if move is None else move(w, h, *extra, damping)
    qt, what = gptq.solve(target, h, fmt, Layout.parse("kn", w.shape), options, damping=damping)
    ends = np.cumsum([v.shape[-1] for v in weights])
    return [columns_of(qt, e - v.shape[-1], e) for v, e in zip(weights, ends, strict=True)], what


@functools.lru_cache(maxsize=256)
def _sharded(fmt: Format, options: gptq.Options, move, split: Split) -> Any:
    def part(weights, h, damping, extra):
        parts, what = _here(fmt, options, move, weights, h, damping, extra)
        # Of each device's columns; their errors have the same law.
        mean = lambda a: jax.lax.pmean(a.astype(jnp.float32), split.axes)
        return parts, jax.tree.map(mean, what)

    def run(weights, h, damping, extra):
        specs = tuple(split.spec(w.ndim) for w in weights)
        out = [split.spec(w.ndim) for w in weights]
        return shard_map(
            part, mesh=split.mesh, in_specs=(specs, PartitionSpec(), PartitionSpec(),
            PartitionSpec()), out_specs=(out, PartitionSpec()), check_vma=False,
        )(weights, h, damping, extra)  # fmt: skip

    return jax.jit(run)


def automatic(tree: Any) -> Any:
    """Returns arrays on meshes without explicit axes: solvers know nothing of typed shardings."""

    def move(a: Any) -> Any:
        mesh = _mesh_of(a)
        if mesh is None or not mesh.explicit_axes:
            return a
        auto = Mesh(mesh.devices, mesh.axis_names)
        return jax.device_put(a, NamedSharding(auto, a.sharding.spec))

    return jax.tree.map(move, tree)


def placed(qt: QTensor, w: Any) -> QTensor:
    """Returns a QTensor sharded as the weight [*shape] was that it stands for."""
    return qt if _mesh_of(w) is None else jax.device_put(qt, shardings_of(qt, w.sharding))


def beside(tree: Any, w: Any) -> Any:
    """Returns arrays [*lead, ...] on the devices of a weight [*lead, K, N], split only as its lead.

    XLA would otherwise split the results as it happened to split the second moments.
    """
    mesh = _mesh_of(w)
    if mesh is None:
        return tree
    lead = [*w.sharding.spec, *[None] * w.ndim][: w.ndim - 2]
    place = lambda a: NamedSharding(mesh, PartitionSpec(*lead[: jnp.ndim(a)]))
    return jax.device_put(tree, jax.tree.map(place, tree))


def _mesh_of(a: Any) -> Mesh | None:
    sharding = getattr(a, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return None


def fetch(a: Any) -> np.ndarray:
    """Returns a small array on the host, of which other processes may hold parts."""
    if isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated):
        assert isinstance(a.sharding, NamedSharding)
        a = jax.device_put(a, NamedSharding(a.sharding.mesh, PartitionSpec()))
    return np.asarray(a)


def sample(weights: Sequence[Float[Array, "*lead K N"]], count: int) -> Float[Array, "*lead K n"]:
    """Returns evenly spaced columns of weights side by side, on every device."""
    starts = np.cumsum([0, *(w.shape[-1] for w in weights)])
    at = np.unique(np.linspace(0, starts[-1] - 1, min(starts[-1], count)).astype(int))
    split = split_of(weights[0])
    parts = []
    for w, start, end in zip(weights, starts[:-1], starts[1:], strict=True):
        own = at[(at >= start) & (at < end)] - start
        parts.append(_take(None if split is None else split.replicated)(w, own))
    return jnp.concatenate(parts, -1)


@functools.lru_cache(maxsize=256)
def _take(sharding: NamedSharding | None) -> Callable:
    return jax.jit(lambda w, at: w[..., at], out_shardings=sharding)


def columns_of(qt: QTensor, start: int, end: int) -> QTensor:
    """Returns some columns of a canonical QTensor with a scale for each."""
    if end - start == qt.data.shape[-1]:
        return qt
    return jax.tree.map(lambda a: a[..., start:end], qt)
