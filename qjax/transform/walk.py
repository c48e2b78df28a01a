"""The walk: evaluates a jaxpr in which some values are Views of stored weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from qjax import _compat
from qjax.transform import operations
from qjax.transform.handler import Handler, arrays_of
from qjax.transform.operations import split_views
from qjax.view import View

__all__ = ["Handler", "evaluate", "evaluate_closed"]


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
                rule = _RULES.get(eqn.primitive.name, operations.fall_back)
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


# ---- operations with bodies ----------------------------------------------------------------------


def _call(key):
    def rule(handler, eqn, values):
        return evaluate_closed(handler, eqn.params[key], values)

    return rule


def _out_arrays(handler, out, primitive):
    return arrays_of(handler, out, primitive, f"it leaves a `{primitive}`")


def _remat(handler, eqn, values):
    arrays, merge = split_views(values)

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
    carry = arrays_of(handler, carry, "scan", "a scan may write to its carry")
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
    carry = arrays_of(handler, values[n_cond + n_body :], "while", "a loop may write to its carry")

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
    arrays, merge = split_views(operands)

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
            return _compat.bind(eqn, arrays_of(handler, merge(operands), name, why))

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
    **operations.RULES,
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
