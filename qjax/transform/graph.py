"""Graph: the operations of a traced function in one flat list, with every value's readers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qjax import _compat
from qjax.paths import path_str
from qjax.transform.trace import CALLS, take_apart, trace

# Where the body of a scan reads what is outside: one step's slice, or the same in every step.
SLICE, CONST = "scan slice", "scan const"


class Value:
    """One array of the traced function.

    Attributes:
      shape, dtype: of the array.
      source: "computed", or where it comes from: "parameter", "input", "constant", "carry".
      name: path of a parameter or an input.
      literal: the number that a constant is, if it is one.
      producer: the operation that computes it.
      readers: (operation, operand) pairs, in the order of the program; only of live operations.
      is_returned: whether the function returns it.
    """

    __slots__ = (
        "dtype", "is_returned", "literal", "name", "producer", "readers", "shape", "source",
    )  # fmt: skip

    def __init__(self, aval: Any, source: str = "computed", name: str = "", literal: Any = None):
        self.shape: tuple[int, ...] = tuple(aval.shape)
        self.dtype = aval.dtype
        self.source = source
        self.name = name
        self.literal = literal
        self.producer: Operation | None = None
        self.readers: list[tuple[Operation, int]] = []
        self.is_returned = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        if self.source == "computed":
            assert self.producer is not None
            return f"the {shape} result of `{self.producer.name}`"
        return f"{self.source} {self.name or shape}"


class Operation:
    """One primitive operation.

    Attributes:
      index: its place in the program.
      name, params: those of the primitive; `SLICE` and `CONST` have "scan", the number of theirs.
      ins, outs: its operands and results.
    """

    __slots__ = ("index", "ins", "name", "outs", "params")

    def __init__(
        self, index: int, name: str, params: dict, ins: Sequence[Value], outs: Sequence[Value]
    ):
        self.index, self.name, self.params = index, name, params
        self.ins, self.outs = tuple(ins), tuple(outs)
        for value in self.outs:
            value.producer = self


class Graph:
    """The operations of a function that its results depend on.

    Calls are inlined. So is the body of a scan, once: what it carries starts anew in it, and a
    `scan` operation reads what it hands out and computes what the scan returns. Other operations
    with bodies stay whole.

    Attributes:
      parameters: the leaves of the first argument by path.
    """

    def __init__(self, parameters: dict[str, Value]):
        self.parameters = parameters
        self._operations: list[Operation] = []
        self._scans = 0

    def _add(self, name: str, params: dict, ins: Sequence[Value], avals: Sequence[Any]):
        outs = [Value(aval) for aval in avals]
        self._operations.append(Operation(len(self._operations), name, params, ins, outs))
        return outs

    def _inline(self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(v):
            return Value(v.aval, "constant", literal=v.val) if hasattr(v, "val") else env[v]

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            name = eqn.primitive.name
            if name in CALLS:
                outs = self._closed(eqn.params[CALLS[name]], ins)
            elif name == "scan":
                outs = self._scan(eqn, ins)
            elif name == "optimization_barrier":  # every result is its own operand
                outs = [self._add("copy", {}, [v], [v])[0] for v in ins]
            else:
                outs = self._add(name, eqn.params, ins, [v.aval for v in eqn.outvars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _closed(self, closed: Any, args: Sequence[Value]) -> list[Value]:
        jaxpr, consts = _compat.open_jaxpr(closed)
        return self._inline(jaxpr, [_constant(c) for c in consts], args)

    def _scan(self, eqn: Any, ins: Sequence[Value]) -> list[Value]:
        n_consts, n_carry = _compat.scan_counts(eqn.params)
        here = {"scan": self._scans}
        self._scans += 1
        body = eqn.params["jaxpr"]
        avals = [v.aval for v in _compat.open_jaxpr(body)[0].invars]
        args = []
        for i, (value, aval) in enumerate(zip(ins, avals, strict=True)):
            if i < n_consts:
                args += self._add(CONST, here, [value], [aval])
            elif i < n_consts + n_carry:
                args.append(Value(aval, "carry"))
            else:
                args += self._add(SLICE, here, [value], [aval])
        outs = self._closed(body, args)
        start = ins[n_consts : n_consts + n_carry]
        return self._add("scan", eqn.params, [*start, *outs], [v.aval for v in eqn.outvars])

    def _finish(self, outs: Sequence[Value]) -> Graph:
        """Notes who reads what, of the operations that `outs` depend on."""
        for value in outs:
            value.is_returned = True
        live, pending = set(), [v.producer for v in outs]
        while pending:
            operation = pending.pop()
            if operation is not None and operation not in live:
                live.add(operation)
                pending += [v.producer for v in operation.ins]
        for operation in sorted(live, key=lambda o: o.index):
            for i, value in enumerate(operation.ins):
                value.readers.append((operation, i))
        return self


def _constant(array: Any) -> Value:
    return Value(np.empty(np.shape(array), array.dtype), "constant")


def build(fn: Callable, params: Any, args: tuple, kwargs: dict) -> Graph:
    """Traces `fn(params, *args, **kwargs)`; nothing is computed."""
    call = take_apart((params, *args), kwargs)
    jaxpr, consts, _ = trace(fn, call)
    values, parameters = [], {}
    for leaf, path, name in zip(call.leaves, call.paths, call.names, strict=True):
        is_parameter = path[0].idx == 0 and path[1].idx == 0
        if is_parameter:
            name = path_str(path[2:])
        value = Value(leaf, "parameter" if is_parameter else "input", name)
        values.append(value)
        if is_parameter:
            parameters[name] = value
    graph = Graph(parameters)
    return graph._finish(graph._inline(jaxpr, [_constant(c) for c in consts], values))
