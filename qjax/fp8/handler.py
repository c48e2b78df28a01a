"""The handler that runs products with float parameters in FP8, on the walk of `qjax.transform`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from qjax import _compat
from qjax.fp8 import block_dot, emulated
from qjax.fp8.product import OPERAND, Spec, product
from qjax.fp8.recipe import Fp8Recipe
from qjax.layout import Layout
from qjax.ops import weight
from qjax.transform import apply
from qjax.view import Atom, View, view_of

# Arguments of a convolution that are not about precision.
_CONV = (
    "window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers",
    "feature_group_count", "batch_group_count",
)  # fmt: skip


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scales", "probe"],
    meta_fields=["block"],
)
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """The payload of a View of a float parameter whose products run in FP8.

    Attributes:
      data: the canonical weight [*lead, K, N].
      scales: float32 [*lead, 3] of input, weight and gradient; None: from what is multiplied.
      probe: meters [*lead, 3], see `qjax.fp8.product`; or None.
      block: static. The side of its blocks, or None.
    """

    data: Any
    scales: Any
    probe: Any
    block: int | None

    @property
    def data_axes(self) -> str:
        """The order of the last two axes of `data`."""
        return "kn"


def as_view(
    w: Array, layout: Layout, name: str, *, scales: Any, probe: Any, block: int | None
) -> View:
    """Returns the view of a float parameter with the given layout."""
    data = layout.to_canonical(jnp.asarray(w))
    *lead, K, N = data.shape
    payload = Fp8Weight(data, scales, probe, block)
    return view_of(payload, lead, layout, K, N, data.dtype, name)


class Fp8(apply.Packed):
    """Multiplies by Fp8Weights in FP8; what is no product sees the float weight and is recorded."""

    def __init__(self, recipe: Fp8Recipe):
        super().__init__(None)
        self.recipe = recipe
        # Mesh axes over which leading axes are split, inside a shard_map, by weight.
        self.stacked_over: dict[str, tuple[str, ...]] = {}

    def materialize(self, view, primitive, why):
        if not isinstance(view.payload, Fp8Weight):
            return super().materialize(view, primitive, why)
        self.record(view, primitive, f"float: {why}")
        return self.placed(_dense, view, [], self._shape(view))

    def _shape(self, view: View) -> Any:
        data = view.payload.data
        return _compat.abstract_like([data], view.shape, view.dtype, weight.partition(view))

    def product(self, view):
        if not isinstance(view.payload, Fp8Weight):
            return super().product(view)

        def run(x, *, transposed=False, out_dtype=None):
            payload = view.payload
            self._check_meters(view)
            x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
            spec = self._spec(view, x, out_dtype, transposed=transposed)
            return product(x, payload.data, spec, payload.scales, payload.probe)

        return run

    def _spec(self, view: View, x: Array, out_dtype: Any, *, transposed: bool = False) -> Spec:
        recipe = self.recipe
        return Spec(
            block=view.payload.block,
            transposed=transposed,
            out_dtype=jnp.dtype(x.dtype if out_dtype is None else out_dtype).name,
            x_dtype=x.dtype.name,
            w_dtype=view.payload.data.dtype.name,
            gradient=recipe.gradient,
            margin=recipe.margin,
            power_of_two=recipe.power_of_two,
            stacked_over=self.stacked_over.get(view.name, ()),
        )

    def _check_meters(self, view: View) -> None:
        if view.payload.probe is not None and _compat.untracked_axes():
            raise NotImplementedError(
                f"{view.name}: delayed scaling inside a shard_map with check_vma=False, where JAX"
                " cannot tell which magnitudes are shared. Use check_vma=True, or current scaling."
            )

    def describe(self, view, form):
        payload = view.payload
        if not isinstance(payload, Fp8Weight):
            return super().describe(view, form)
        scaled = "current scales"
        if payload.block is not None:
            scaled = block_dot.describe(payload.block, payload.data.ndim - 2)
        elif payload.scales is not None:
            scaled = f"delayed scales, {self.recipe.history} steps"
        return f"{OPERAND} x {OPERAND}, gradients {self.recipe.gradient} x {OPERAND}, {scaled}"

    def conv(self, view, x, params):
        payload = view.payload
        if not isinstance(payload, Fp8Weight) or weight.is_pointwise(view, params):
            return super().conv(view, x, params)
        static = tuple((name, params[name]) for name in _CONV)
        op = emulated.Conv(static, payload.data.ndim - 2)
        return self._emulated(op, view, x, None, params, "conv_general_dilated", "x * W")

    def ragged_dot(self, view, x, group_sizes, params):
        if not isinstance(view.payload, Fp8Weight):
            return super().ragged_dot(view, x, group_sizes, params)
        if [[a.kind for a in dim] for dim in view.dims] != [["b"], ["k"], ["n"]]:
            return None
        op = emulated.Ragged()
        return self._emulated(op, view, x, group_sizes, params, "ragged_dot", "x @ W by expert")

    def _emulated(
        self, op: emulated.Op, view: View, x: Array, sizes: Any, params: dict, name: str, how: str
    ) -> Array:
        payload = view.payload
        if payload.block is not None:
            raise NotImplementedError(
                f"{view.name}: {name} has an FP8 form with one scale a tensor (fp8.TENSOR), not in"
                f" blocks. Give it that format, or leave it out. {_leave(view)}"
            )
        self._check_meters(view)
        self.record(view, name, how, self.describe(view, "forward") + ", emulated in float32")
        out_dtype = params["preferred_element_type"] or jnp.result_type(x.dtype, view.dtype)
        w = weight.rearrange_from_stored(payload.data, view)
        spec = self._spec(view, x, out_dtype)
        return emulated.product(op, x, w, sizes, spec, payload.scales, payload.probe)

    def gather(self, view, axis, indices, params):
        if isinstance(view.payload, Fp8Weight):
            return None  # a lookup multiplies nothing
        return super().gather(view, axis, indices, params)

    def take_axis(self, view, axis, take, size):
        payload = view.payload
        if not isinstance(payload, Fp8Weight):
            return super().take_axis(view, axis, take, size)
        if len(view.dims[axis]) != 1:
            return None
        (atom,) = view.dims[axis]
        stored = weight.lead_axis(view, atom)
        if stored is not None:
            if payload.probe is not None:
                raise NotImplementedError(
                    f"{view.name}: delayed scaling of a stack of which layers are picked. Scan over"
                    " it, or use current scaling."
                )
            payload = jax.tree.map(lambda a: take(a, stored), payload)
        elif atom.kind == "b":
            return None
        else:
            payload = dataclasses.replace(payload, data=_cut(view, atom, take))
        return view.replace(axis, (atom._replace(size=size),) if size > 1 else (), payload)

    def rebind(self, view, bind):
        if not isinstance(view.payload, Fp8Weight):
            return super().rebind(view, bind)
        # Scales and meters stay what they are on every device: meters are not summed.
        return view.with_payload(dataclasses.replace(view.payload, data=bind(view.payload.data)))

    def shard_specs(self, payload, lead, k, n, mesh):
        if not isinstance(payload, Fp8Weight):
            return super().shard_specs(payload, lead, k, n, mesh)
        entry = lambda names: tuple(names) or None
        stacked = [entry(names) for names in lead]
        of_lead = lambda a: None if a is None else PartitionSpec(*stacked, None)
        return Fp8Weight(
            PartitionSpec(*stacked, entry(k), entry(n)),
            of_lead(payload.scales),
            of_lead(payload.probe),
            payload.block,
        )

    def shard(self, view, spec, mesh):
        sharded = super().shard(view, spec, mesh)
        if sharded is not None and isinstance(view.payload, Fp8Weight):
            entries = tuple(sharded[0].data)[: view.payload.data.ndim - 2]
            names = tuple(name for entry in entries if entry for name in entry)
            self.stacked_over[view.name] = (*self.stacked_over.get(view.name, ()), *names)
        return sharded


def _cut(view: View, atom: Atom, take: Callable) -> Array:
    """Returns the canonical weight with part of one atom of K or N."""
    data, atoms = view.payload.data, view.atoms(atom.kind)
    axis = data.ndim - (2 if atom.kind == "k" else 1)
    apart = data.reshape(*data.shape[:axis], *(a.size for a in atoms), *data.shape[axis + 1 :])
    part = take(apart, axis + atoms.index(atom))
    merged = math.prod(part.shape[axis : axis + len(atoms)])
    return part.reshape(*data.shape[:axis], merged, *data.shape[axis + 1 :])


def _dense(view: View) -> Array:
    """Returns the float array that a view stands for."""
    return weight.rearrange_from_stored(view.payload.data.astype(view.dtype), view)


def _leave(view: View) -> str:
    return (
        "To leave the parameter in float, put a rule without a format before the others:"
        f" Rule({view.name!r})."
    )
