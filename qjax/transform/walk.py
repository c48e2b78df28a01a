"""The walk: evaluates a jaxpr in which some values are Views of stored weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from qjax import _compat
from qjax.view import Contraction, View, contraction


class Handler:
    """What a transform does with weights; the walk does everything else.

    A method that returns None has no way to do the operation on the stored weight: the walk then
    calls `materialize` and runs the operation as it stands.
    """

    def materialize(self, view: View, primitive: str, why: str) -> Any:
        """Returns the float array of a view that `primitive` cannot use as it is."""
        raise NotImplementedError

    def contraction(self, view: View, contracting: Sequence[int], batch: Sequence[int]) -> Any:
        """Returns how a dot uses the weight, passed on to `dot_general`, or None if unsuitable."""
        return contraction(view, contracting, batch)

    def dot_general(
        self, view: View, x: Any, how: Contraction, *, weight_first: bool,
        x_axes: tuple, w_axes: tuple, params: dict,
    ) -> Any:  # fmt: skip
        return None

    def placed(self, run: Callable, view: View, arrays: Sequence[Any], out: Any) -> Any:
        """Calls `run(view, *arrays)`, whose result stands for one of the abstract type `out`."""
        return run(view, *arrays)

    def conv(self, view: View, x: Any, params: dict) -> Any:
        return None

    def ragged_dot(self, view: View, x: Any, group_sizes: Any, params: dict) -> Any:
        return None

    def gather(self, view: View, axis: int, indices: Any, params: dict) -> Any:
        """Looks up entries of one axis; returns [*indices.shape, *other axes].

        Args:
          params: with "mode" and "fill_value", as for `lax.gather`.
        """
        return None

    def take_axis(self, view: View, axis: int, take: Callable, size: int) -> View | None:
        return None

    def reshaped(self, view: View) -> View:
        """Lets the stored arrays follow a reshape; they need not."""
        return view

    def unstack(self, view: View) -> bool:
        """Whether the leading axis of the view is the leading axis of every stored array."""
        return False

    def rebind(self, view: View, bind: Callable) -> View | None:
        """Applies an operation that leaves values alone to all stored arrays."""
        return view.with_payload(jax.tree.map(bind, view.payload))

    def reshard(self, view: View, sharding: Any) -> View | None:
        """Moves the stored arrays to where `sharding` has the logical array."""
        return None

    # What a handler collects inside the body of an operation has to leave it as an output.

    def nested(self, run: Callable) -> tuple[Any, Any]:
        """Evaluates a body; returns its outputs and a dict of what was collected in it."""
        return run(), {}

    def absorb(self, collected: Any) -> None:
        """Takes what a body collected, outside of it."""

    def absorb_stacked(self, collected: Any, sliced: set[str]) -> None:
        """Takes what the steps of a scan collected; `sliced` names the weights it walked along."""

    def empty_like(self, collected: Any) -> Any:
        """Returns what a body collects that does not run."""
        return {}

    def joined(self, a: Any, b: Any) -> Any:
        """Returns two collections as one."""
        return {}

    def checkpoint_policy(self, policy: Any) -> Any:
        """Returns a `jax.checkpoint` policy for what the handler makes of the operations."""
        return policy

    def shard(self, view: View, spec: PartitionSpec, mesh: Any) -> tuple[Any, View] | None:
        """Returns PartitionSpecs for the stored arrays, and the view of one shard."""
        return None


def evaluate(handler: Handler, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluates an open jaxpr on arrays and Views; its outputs may be Views too."""
    env: dict[Any, Any] = {}

    def read(v):
        return v.val if hasattr(v, "val") else env[v]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    last_use = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not hasattr(v, "val"):
                last_use[v] = i
    for v in jaxpr.outvars:
        last_use.pop(v, None) if not hasattr(v, "val") else None
    for i, eqn in enumerate(jaxpr.eqns):
        values = [read(v) for v in eqn.invars]
        with _compat.as_traced(eqn):
            if any(isinstance(v, View) for v in values):
                rule = _RULES.get(eqn.primitive.name, _fall_back)
                with eqn.ctx.manager:
                    out = rule(handler, eqn, values)
            else:
                out = _compat.bind(eqn, values)
        env.update(zip(eqn.outvars, out, strict=True))
        for v in eqn.invars:  # free what is not read again, as plain evaluation does
            if not hasattr(v, "val") and last_use.get(v) == i:
                env.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def evaluate_closed(handler: Handler, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr that carries its constants."""
    inner, consts = _compat.open_jaxpr(jaxpr)
    return evaluate(handler, inner, consts, args)


# ---- operations without a rule ------------------------------------------------------------------


def _arrays(handler: Handler, values: Sequence[Any], primitive: str, why: str) -> list[Any]:
    return [handler.materialize(v, primitive, why) if isinstance(v, View) else v for v in values]


def _fall_back(handler, eqn, values, why=None):
    name = eqn.primitive.name
    why = why or f"`{name}` has no rule for packed weights"
    return _compat.bind(eqn, _arrays(handler, values, name, why))


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
        return _fall_back(handler, eqn, values, why)

    return rule


def _reshape(handler, eqn, values):
    (view,) = values
    out = None
    if eqn.params.get("dimensions") is None:
        out = view.reshape(eqn.params["new_sizes"])
    if out is None:
        return _fall_back(handler, eqn, values, "this `reshape` would rearrange stored data")
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
    return out if all(v is not None for v in out) else _fall_back(handler, eqn, values)


def _stop_gradient(handler, eqn, values):
    out = handler.rebind(values[0], lax.stop_gradient)  # which leaves integers alone
    return [out] if out is not None else _fall_back(handler, eqn, values)


def _reshard(handler, eqn, values):
    out = handler.reshard(values[0], eqn.params["dst_sharding"])
    return [out] if out is not None else _fall_back(handler, eqn, values)


def _barrier(handler, eqn, values):
    arrays, merge = _split(values)
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
        return _fall_back(handler, eqn, values)
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
            return _fall_back(handler, eqn, values, "this slice would cut packed data")
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
        return _fall_back(handler, eqn, values, "this split would cut packed data")
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
        return _fall_back(handler, eqn, values, "the other operand is complex")
    how = handler.contraction(view, *w_axes)
    if how is None:
        why = "it contracts neither all of K nor all of N of the weight"
        return _fall_back(handler, eqn, values, why)

    def run(view, x):
        return handler.dot_general(
            view, x, how, weight_first=weight_first, x_axes=x_axes, w_axes=w_axes, params=eqn.params
        )

    out = handler.placed(run, view, [x], eqn.outvars[0].aval)
    return [out] if out is not None else _fall_back(handler, eqn, values)


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
    return _fall_back(handler, eqn, values)


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
    return [out] if out is not None else _fall_back(handler, eqn, values)


def _gather(handler, eqn, values):
    view, indices = values
    p = eqn.params
    numbers = p["dimension_numbers"]
    if not isinstance(view, View) or isinstance(indices, View):
        return _fall_back(handler, eqn, values)
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
        return _fall_back(handler, eqn, values, "this gather is no lookup along one whole axis")
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
        return _fall_back(handler, eqn, values, "this lookup would cut packed data")
    return [out]


# ---- higher-order operations ---------------------------------------------------------------------


def _call(key):
    def rule(handler, eqn, values):
        return evaluate_closed(handler, eqn.params[key], values)

    return rule


def _split(values):
    """Separates arrays from Views: (arrays, merge), with merge(arrays) -> values.

    Views are closed over: JAX lifts the arrays they hold into operands of the operation.
    """
    views = {i: v for i, v in enumerate(values) if isinstance(v, View)}
    arrays = [v for v in values if not isinstance(v, View)]

    def merge(arrays):
        rest = iter(arrays)
        return [views[i] if i in views else next(rest) for i in range(len(values))]

    return arrays, merge


def _out_arrays(handler, out, primitive):
    return _arrays(handler, out, primitive, f"it leaves a `{primitive}`")


def _remat(handler, eqn, values):
    arrays, merge = _split(values)

    def body(*arrays):
        def run():
            out = evaluate_closed(handler, eqn.params["jaxpr"], merge(arrays))
            return _out_arrays(handler, out, "checkpoint")

        return handler.nested(run)

    p = eqn.params
    policy = handler.checkpoint_policy(p["policy"])
    out, collected = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=policy)(*arrays)
    handler.absorb(collected)
    return out


def _scan(handler, eqn, values):
    p = eqn.params
    n_consts, n_carry = _compat.scan_counts(p)
    consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
    xs = values[n_consts + n_carry :]
    carry = _arrays(handler, carry, "scan", "a scan may write to its carry")
    # A stacked weight is scanned by its stored arrays, if its leading axis is theirs.
    xs = [
        handler.materialize(v, "scan", "its scanned axis is not a stacked one")
        if isinstance(v, View) and not handler.unstack(v)
        else v
        for v in xs
    ]
    payloads = [v.payload if isinstance(v, View) else v for v in xs]

    def body(carry, sliced):
        views = [
            whole.with_payload(part, whole.dims[1:]) if isinstance(whole, View) else part
            for whole, part in zip(xs, sliced, strict=True)
        ]

        def run():
            out = evaluate_closed(handler, p["jaxpr"], [*consts, *carry, *views])
            return _out_arrays(handler, out, "scan")

        out, collected = handler.nested(run)
        return out[:n_carry], (out[n_carry:], collected)

    carry, (ys, collected) = lax.scan(
        body, carry, payloads, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    handler.absorb_stacked(collected, {v.name for v in xs if isinstance(v, View)})
    return [*carry, *ys]


def _while(handler, eqn, values):
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    carry = _arrays(handler, values[n_cond + n_body :], "while", "a loop may write to its carry")

    def cond(carry):
        def run():
            return evaluate_closed(handler, p["cond_jaxpr"], [*cond_consts, *carry])[0]

        return handler.nested(run)

    def step(carry):
        def run():
            out = evaluate_closed(handler, p["body_jaxpr"], [*body_consts, *carry])
            return _out_arrays(handler, out, "while")

        return handler.nested(run)

    if type(handler).empty_like is Handler.empty_like:  # nothing is collected
        return lax.while_loop(lambda carry: cond(carry)[0], lambda carry: step(carry)[0], carry)

    # A condition returns nothing but itself: what is collected in one leaves with the step before.
    def body(state):
        carry, _, collected = state
        carry, more = step(carry)
        goes_on, also = cond(carry)
        return carry, goes_on, handler.joined(handler.joined(collected, more), also)

    goes_on, collected = cond(carry)
    nothing = handler.empty_like(jax.eval_shape(step, carry)[1])
    state = (carry, goes_on, handler.joined(nothing, collected))
    carry, _, collected = lax.while_loop(lambda state: state[1], body, state)
    handler.absorb(collected)
    return carry


def _cond(handler, eqn, values):
    index, *operands = values
    arrays, merge = _split(operands)

    def branch(jaxpr):
        def run(*arrays):
            out = evaluate_closed(handler, jaxpr, merge(arrays))
            return _out_arrays(handler, out, "cond")

        return lambda *arrays: handler.nested(lambda: run(*arrays))

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    # All branches have to return the same: each also returns nothing for what others collect.
    nothing: dict[str, Any] = {}
    if type(handler).empty_like is not Handler.empty_like:
        for run in branches:
            nothing |= handler.empty_like(jax.eval_shape(run, *arrays)[1])

    def complete(run):
        def completed(*arrays):
            out, collected = run(*arrays)
            return out, handler.joined(nothing, collected)

        return completed

    out, collected = lax.switch(index, [complete(run) for run in branches], *arrays)
    handler.absorb(collected)
    return out


def _custom_derivative(make):
    """custom_jvp and custom_vjp: packed when evaluated, their own rule on floats when derived."""

    def rule(handler, eqn, values):
        name = eqn.primitive.name
        # A function with a derivative of its own may not close over what is derived.
        operands = [v.payload if isinstance(v, View) else v for v in values]

        def merge(operands):
            return [
                v.with_payload(a) if isinstance(v, View) else a
                for v, a in zip(values, operands, strict=True)
            ]

        def packed(*operands):
            out = evaluate_closed(handler, eqn.params["call_jaxpr"], merge(operands))
            return _out_arrays(handler, out, name)

        def dense(*operands):
            why = "a custom derivative rule sees the float weight"
            return _compat.bind(eqn, _arrays(handler, merge(operands), name, why))

        return make(packed, dense)(*operands)

    return rule


def _custom_jvp(packed, dense):
    f = jax.custom_jvp(packed)
    f.defjvp(lambda primals, tangents: jax.jvp(dense, primals, tangents))
    return f


def _custom_vjp(packed, dense):
    f = jax.custom_vjp(packed)
    f.defvjp(lambda *arrays: jax.vjp(dense, *arrays), lambda pullback, ct: pullback(ct))
    return f


def _shard_map(handler, eqn, values):
    p = eqn.params
    mesh, in_specs = p["mesh"], list(p["in_specs"])
    locals_: list[View | None] = []
    operands, specs = [], []
    for value, spec in zip(values, in_specs, strict=True):
        local = None
        if isinstance(value, View):
            sharded = handler.shard(value, spec, mesh)
            if sharded is None:
                why = f"its storage cannot be split as {spec}"
                value = handler.materialize(value, "shard_map", why)
            else:
                spec, local = sharded
                value = _compat.reshard_like(value.payload, spec, mesh)
        operands.append(value)
        specs.append(spec)
        locals_.append(local)

    def body(*operands):
        args = [
            local.with_payload(part) if local is not None else part
            for part, local in zip(operands, locals_, strict=True)
        ]
        out = evaluate_closed(handler, p["jaxpr"], args)
        return tuple(_out_arrays(handler, out, "shard_map"))

    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=tuple(p["out_specs"]),
        axis_names=set(_compat.shard_map_axes(p)),
        check_vma=p["check_vma"],
    )(*operands)


_RULES: dict[str, Callable] = {
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
    "jit": _call("jaxpr"),
    "pjit": _call("jaxpr"),
    "closed_call": _call("call_jaxpr"),
    "core_call": _call("call_jaxpr"),
    "custom_jvp_call": _custom_derivative(_custom_jvp),
    "custom_vjp_call": _custom_derivative(_custom_vjp),
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
