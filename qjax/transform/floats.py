"""FloatWeight: a float parameter in canonical order, for transforms that look at products."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.layout import Layout
from qjax.ops import weight
from qjax.transform import walk
from qjax.view import View, view_of


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["tag"])
@dataclasses.dataclass(frozen=True)
class FloatWeight:
    """The payload of a View of a float parameter.

    Attributes:
      data: the canonical weight [*lead, K, N].
      tag: static; what the transform needs to know about it.
    """

    data: Array
    tag: Any = None


def as_view(w: Array, layout: Layout, name: str, tag: Any = None) -> View:
    """Returns the view of a float parameter with the given layout."""
    data = layout.to_canonical(w)
    *lead, K, N = data.shape
    return view_of(FloatWeight(data, tag), lead, layout, K, N, w.dtype, name)


def product(
    x: Float[Array, "*lead *m K"], w: Float[Array, "*lead K N"], transposed: bool, out_dtype: Any
) -> Float[Array, "*lead *m N"]:
    """Returns x @ W, or x @ Wᵀ, for a canonical float weight."""
    lead = tuple(range(w.ndim - 2))
    inner = w.ndim - 1 if transposed else w.ndim - 2
    numbers = (((x.ndim - 1,), (inner,)), (lead, lead))
    return lax.dot_general(x, w, numbers, preferred_element_type=out_dtype)


class FloatHandler(walk.Handler):
    """Runs every product through `product`; everything else as plain evaluation would."""

    def product(self, x: Array, view: View, key: Any, *, transposed: bool, out_dtype: Any) -> Array:
        """Multiplies canonical x [*lead, *m, K] by the view's weight.

        Args:
          key: equal for products in one scope that read the same activation in the same way.
        """
        return product(x, view.payload.data.astype(view.dtype), transposed, out_dtype)

    def materialize(self, view, primitive, why):
        w = view.payload.data.astype(view.dtype)
        return weight.rearrange_from_stored(w, view)

    def dot_general(self, view, x, how, *, weight_first, x_axes, w_axes, params):
        out_dtype = params["preferred_element_type"]
        if out_dtype is None:
            out_dtype = jnp.result_type(x.dtype, view.dtype)
        contracted = tuple(view.dims[i] for i in w_axes[0])
        which = (how.form, tuple(how.batched), tuple(how.summed))
        key = (id(x), tuple(x_axes[0]), tuple(x_axes[1]), contracted, which)

        def run(x_canonical, *, transposed, out_dtype):
            return self.product(
                x_canonical, view, (key, x), transposed=transposed, out_dtype=out_dtype
            )

        return weight.dot_general(
            x,
            view,
            how,
            x_contracting=x_axes[0],
            x_batch=x_axes[1],
            w_contracting=w_axes[0],
            w_batch=w_axes[1],
            weight_first=weight_first,
            out_dtype=out_dtype,
            product=run,
        )

    def take_axis(self, view, axis, take, size):
        return weight.take_axis(view, axis, take, size)

    def unstack(self, view):
        return weight.can_unstack(view)
