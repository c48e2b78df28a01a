"""Rules of the walk for operations without a body: how a View goes through each."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from qjax import _compat
from qjax.transform.handler import arrays_of
from qjax.view import View


def fall_back(handler, eqn, values, why=None):
    """The rule for what has none: the operation as it stands, on float arrays."""
    name = eqn.primitive.name
    why = why or f"`{name}` has no rule for packed weights"
    return _compat.bind(eqn, arrays_of(handler, values, name, why))


def split_views(values):
    """Separates arrays from Views: (arrays, merge), with merge(arrays) -> values.

    Views are closed over: JAX lifts the arrays they hold into operands of the operation.
    """
    views = {i: v for i, v in enumerate(values) if isinstance(v, View)}
    arrays = [v for v in values if not isinstance(v, View)]

    def merge(arrays):
        rest = iter(arrays)
        return [views[i] if i in views else next(rest) for i in range(len(values))]

    return arrays, merge


# ---- moves ---------------------------------------------------------------------------------------


def _move(move):
    """A rule for an operation that only rearranges: `move(view, params)` or None."""

    def rule(handler, eqn, values):
        view, *rest = values
        if isinstance(view, View) and not any(isinstance(v, View) for v in rest):
            out = move(view, eqn.params)
            if out is not None:
                return [out]
        why = f"this `{eqn.primitive.name}` would rearrange stored data"
        return fall_back(handler, eqn, values, why)

    return rule


def _reshape(handler, eqn, values):
    (view,) = values
    out = None
    if eqn.params.get("dimensions") is None:
        out = view.reshape(eqn.params["new_sizes"])
    if out is None:
        return fall_back(handler, eqn, values, "this `reshape` would rearrange stored data")
    return [handler.reshaped(out)]


def _convert(view, params):
    dtype = params["new_dtype"]
    return view.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else None


def _same(view, params):
    return view


def _rebind(handler, eqn, values):
    """Operations on all operands at once that change types, not values."""
    out = [
        handler.rebind(v, lambda a: _compat.bind(eqn, [a])[0])
        if isinstance(v, View)
        else _compat.bind(eqn, [v])[0]
        for v in values
    ]
    return out if all(v is not None for v in out) else fall_back(handler, eqn, values)


def _stop_gradient(handler, eqn, values):
    out = handler.rebind(values[0], lax.stop_gradient)  # which leaves integers alone
    return [out] if out is not None else fall_back(handler, eqn, values)


def _reshard(handler, eqn, values):
    out = handler.reshard(values[0], eqn.params["dst_sharding"])
    return [out] if out is not None else fall_back(handler, eqn, values)


def _barrier(handler, eqn, values):
    arrays, merge = split_views(values)
    return merge(lax.optimization_barrier(tuple(arrays)) if arrays else ())


def _slice(handler, eqn, values):
    (view,) = values
    p = eqn.params
    strides = p["strides"] or (1,) * view.ndim
    cuts = []
    for start, limit, stride in zip(p["start_indices"], p["limit_indices"], strides, strict=True):
        size = -(-(limit - start) // stride)
        cuts.append((start, size, functools.partial(_slice_in_dim, start, limit, stride)))
    return _cut(handler, eqn, values, cuts)


def _slice_in_dim(start, limit, stride, a, axis):
    return lax.slice_in_dim(a, start, limit, stride, axis=axis)


def _dynamic_slice(handler, eqn, values):
    view, *starts = values
    if any(isinstance(s, View) for s in starts) or not isinstance(view, View):
        return fall_back(handler, eqn, values)
    cuts = [
        (start, size, functools.partial(_dynamic_slice_in_dim, start, size))
        for start, size in zip(starts, eqn.params["slice_sizes"], strict=True)
    ]
    return _cut(handler, eqn, values, cuts)


def _dynamic_slice_in_dim(start, size, a, axis):
    # The primitive clamps a negative start; counting from the end happened before it, if at all.
    return lax.dynamic_slice_in_dim(a, start, size, axis=axis, allow_negative_indices=False)


def _wide(index):
    """Returns an index in a type that holds the length of any axis, which uint8 may not."""
    index = jnp.asarray(index)
    return index if index.dtype.itemsize >= 4 else index.astype(jnp.int32)


def _cut(handler, eqn, values, cuts):
    """Cuts the axes of a view; `cuts` has (start, size, cut(array, axis)) for each.

    A single entry of an axis that cannot stay packed is looked up.
    """
    out = values[0]
    for axis, (start, size, cut) in enumerate(cuts):
        if size == out.shape[axis]:
            continue
        if size == 0:
            return [_empty(eqn.outvars[0])]
        if not isinstance(out, View):
            out = cut(out, axis)
            continue
        part = handler.take_axis(out, axis, cut, size)
        if part is None and size == 1:
            index = jnp.clip(_wide(start), 0, out.shape[axis] - 1)
            params = {"mode": lax.GatherScatterMode.PROMISE_IN_BOUNDS, "fill_value": None}
            part = handler.gather(out, axis, index, params)
            part = None if part is None else jnp.expand_dims(part, axis)
        if part is None:
            return fall_back(handler, eqn, values, "this slice would cut packed data")
        out = part
    return [out]


def _empty(var):
    """Returns the array without entries that a part of length 0 is: nothing is left to pack."""
    return jnp.zeros(var.aval.shape, var.aval.dtype)


def _split_axis(handler, eqn, values):
    (view,) = values
    axis, out, start = eqn.params["axis"], [], 0
    for size, var in zip(eqn.params["sizes"], eqn.outvars, strict=True):
        cut = functools.partial(_slice_in_dim, start, start + size, 1)
        if size == 0:
            out.append(_empty(var))
        else:
            whole = size == view.shape[axis]
            out.append(view if whole else handler.take_axis(view, axis, cut, size))
        start += size
    if any(part is None for part in out):
        return fall_back(handler, eqn, values, "this split would cut packed data")
    return out


# ---- contractions and lookups -------------------------------------------------------------------


def _dot_general(handler, eqn, values):
    lhs, rhs = values
    if isinstance(lhs, View) and isinstance(rhs, View):
        # One operand has to be an array; the smaller one costs less.
        smaller = min((0, 1), key=lambda i: _size(values[i]))
        values = list(values)
        why = "the other operand of this `dot_general` is a packed weight too"
        values[smaller] = handler.materialize(values[smaller], "dot_general", why)
        lhs, rhs = values
    weight_first = isinstance(lhs, View)
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    view, x = (lhs, rhs) if weight_first else (rhs, lhs)
    w_axes, x_axes = ((lc, lb), (rc, rb)) if weight_first else ((rc, rb), (lc, lb))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return fall_back(handler, eqn, values, "the other operand is complex")
    how = handler.contraction(view, *w_axes)
    if how is None:
        why = "it contracts neither all of K nor all of N of the weight"
        return fall_back(handler, eqn, values, why)

    def run(view, x):
        return handler.dot_general(
            view, x, how, weight_first=weight_first, x_axes=x_axes, w_axes=w_axes, params=eqn.params
        )

    out = handler.placed(run, view, [x], eqn.outvars[0].aval)
    return [out] if out is not None else fall_back(handler, eqn, values)


def _size(view):
    size = 1
    for n in view.shape:
        size *= n
    return size


def _conv(handler, eqn, values):
    x, w = values
    if isinstance(w, View) and not isinstance(x, View):
        run = lambda w, x: handler.conv(w, x, eqn.params)
        out = handler.placed(run, w, [x], eqn.outvars[0].aval)
        if out is not None:
            return [out]
    return fall_back(handler, eqn, values)


def _ragged_dot(handler, eqn, values):
    x, w, group_sizes = values
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    plain = (
        isinstance(w, View)
        and not isinstance(x, View)
        and (tuple(lc), tuple(rc), tuple(lb), tuple(rb)) == ((1,), (1,), (), ())
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
        and eqn.params.get("group_offset") is None
    )
    run = lambda w, x, sizes: handler.ragged_dot(w, x, sizes, eqn.params)
    out = handler.placed(run, w, [x, group_sizes], eqn.outvars[0].aval) if plain else None
    return [out] if out is not None else fall_back(handler, eqn, values)


def _gather(handler, eqn, values):
    view, indices = values
    p = eqn.params
    numbers = p["dimension_numbers"]
    if not isinstance(view, View) or isinstance(indices, View):
        return fall_back(handler, eqn, values)
    axes = tuple(numbers.start_index_map)
    whole = all(
        size == (1 if i in axes else view.shape[i]) for i, size in enumerate(p["slice_sizes"])
    )
    if (
        len(axes) != 1
        or not whole
        or tuple(numbers.collapsed_slice_dims) != axes
        or getattr(numbers, "operand_batching_dims", ())
        or view.shape[axes[0]] == 1
    ):
        return fall_back(handler, eqn, values, "this gather is no lookup along one whole axis")
    # [*indices, *others] -> the offset axes stand where the dimension numbers say.
    offset = list(numbers.offset_dims)
    ndim = indices.ndim - 1 + len(offset)
    batch = [i for i in range(ndim) if i not in offset]
    source = {position: i for i, position in enumerate([*batch, *offset])}

    def run(view, indices):
        out = handler.gather(view, axes[0], _wide(indices[..., 0]), p)
        return None if out is None else out.transpose([source[i] for i in range(ndim)])

    out = handler.placed(run, view, [indices], eqn.outvars[0].aval)
    if out is None:
        return fall_back(handler, eqn, values, "this lookup would cut packed data")
    return [out]


RULES: dict[str, Callable] = {
    "transpose": _move(lambda view, p: view.transpose(p["permutation"])),
    "reshape": _reshape,
    "squeeze": _move(lambda view, p: view.squeeze(p["dimensions"])),
    "broadcast_in_dim": _move(
        lambda view, p: view.broadcast_in_dim(p["shape"], p["broadcast_dimensions"])
    ),
    "convert_element_type": _move(_convert),
    "copy": _move(_same),
    "copy_p": _move(_same),
    # The stored arrays keep the sharding they came with.
    "sharding_constraint": _move(_same),
    "reshard": _reshard,
    "pvary": _rebind,
    "name": _rebind,
    "stop_gradient": _stop_gradient,
    "optimization_barrier": _barrier,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split_axis,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
    "gather": _gather,
}
