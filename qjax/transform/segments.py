"""segments: an unmodified function cut at its weights, to be run piece by piece over many batches.

Quantizing while executing needs the input of each weight as the already quantized part of the model
makes it. So the traced function is flattened to one list of operations (calls are inlined, a scan
over stacked weights becomes its iterations) and cut into levels:

  level 0     what depends on no product with a weight
  level j+1   the products whose inputs level j made, and what depends on them

All weights read at one level are solved together, and none of them waits for another. Layers that
are alike give segments that are alike: these share one compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from qjax import _compat
from qjax.layout import Layout
from qjax.ops import weight
from qjax.paths import path_str
from qjax.qtensor import is_qtensor
from qjax.transform import apply, calibrate, floats, walk
from qjax.transform.trace import CALLS, take_apart, trace
from qjax.view import View


class SegmentError(ValueError):
    """A function that cannot be cut at its weights; the message names the weight."""


class Key(NamedTuple):
    """A weight, or one slice of a stacked one: parameter path and leading indices."""

    path: str
    at: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.path + "".join(f"[{i}]" for i in self.at)


class Rows(NamedTuple):
    """What a weight reads: rows [*lead, M, K] of its canonical input, and which of them count."""

    x: Float[Array, "*lead M K"]
    mask: Bool[Array, "*lead M"]


@dataclasses.dataclass(eq=False, slots=True)
class _Var:
    """A value of the flat program."""

    aval: Any


# Operations that only move a weight: they run again in every segment that reads it.
_MOVES = {
    "transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "copy", "copy_p",
    "sharding_constraint", "slice", "dynamic_slice", "split", "pvary", "name", "stop_gradient",
}  # fmt: skip
# Moves that do the same to a slice of a stack as to all of it, with the same parameters.
_ELEMENTWISE = {"convert_element_type", "copy", "copy_p", "name", "stop_gradient"}
_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}


def _is_literal(v: Any) -> bool:
    return hasattr(v, "val")


class _Flattener:
    """Collects the operations of a jaxpr and of all that it calls in one list."""

    def __init__(self):
        self.eqns: list[Any] = []
        self.consts: dict[_Var, Any] = {}
        self.weights: dict[_Var, Key] = {}
        self.moved_by: dict[_Var, Any] = {}  # derived from a weight by moves alone
        self.slices: dict[Key, _Var] = {}

    def is_weight(self, v: Any) -> bool:
        return not _is_literal(v) and (v in self.weights or v in self.moved_by)

    def root(self, v: _Var) -> Key:
        """Returns the weight that `v` is a view of."""
        while v not in self.weights:
            v = next(u for u in self.moved_by[v].invars if self.is_weight(u))
        return self.weights[v]

    def run(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Adds the operations of a jaxpr; returns what its outputs are called."""
        jaxpr, consts = _compat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = {}
        for v, value in zip(jaxpr.constvars, consts, strict=True):
            env[v] = _Var(v.aval)
            self.consts[env[v]] = value
        env.update(zip(jaxpr.invars, args, strict=True))
        read = lambda v: v if _is_literal(v) else env[v]
        for eqn in jaxpr.eqns:
            out = self._eqn(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, out, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _eqn(self, eqn: Any, args: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name in CALLS:
            return self.run(eqn.params[CALLS[name]], args)
        if name == "optimization_barrier":
            return args  # it orders the operations of one program; here they are several
        weights = [a for a in args if self.is_weight(a)]
        if name == "scan" and weights:
            return self._scan(eqn, args)
        if name in ("while", "cond", "shard_map") and weights:
            raise SegmentError(
                f"{self.root(weights[0])}: is used inside a `{name}`, which cannot be cut. Quantize"
                ' layer-parallel instead (`mode="parallel"`).'
            )
        return self._add(eqn, args, [v.aval for v in eqn.outvars])

    def _add(self, eqn: Any, args: list[Any], avals: Sequence[Any]) -> list[_Var]:
        out = [_Var(aval) for aval in avals]
        flat = eqn.replace(invars=args, outvars=out)
        self.eqns.append(flat)
        if eqn.primitive.name in _MOVES and any(map(self.is_weight, args)):
            self.moved_by.update(dict.fromkeys(out, flat))
        return out

    def _emit(self, fn: Callable, *args: Any) -> list[Any]:
        closed = jax.make_jaxpr(fn)(
            *(jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in args)
        )
        return self.run(closed, args)

    def _scan(self, eqn: Any, args: list[Any]) -> list[Any]:
        p = eqn.params
        n_consts, n_carry = _compat.scan_counts(p)
        consts, carry = args[:n_consts], args[n_consts : n_consts + n_carry]
        xs = args[n_consts + n_carry :]
        steps = range(p["length"])
        ys: list[list[Any]] = [[]] * p["length"]
        for i in reversed(steps) if p["reverse"] else steps:
            out = self.run(p["jaxpr"], [*consts, *carry, *(self._slice(x, i) for x in xs)])
            carry, ys[i] = out[:n_carry], out[n_carry:]
        stacked = []
        for parts in zip(*ys, strict=True):
            arrays = [a if not _is_literal(a) else self._constant(a) for a in parts]
            stacked += self._emit(lambda *a: jnp.stack(a), *arrays)
        return [*carry, *stacked]

    def _constant(self, literal: Any) -> _Var:
        out = _Var(literal.aval)
        self.consts[out] = jnp.asarray(literal.val, literal.aval.dtype)
        return out

    def _slice(self, x: Any, i: int) -> Any:
        """Returns entry i of a scanned value; that of a weight is a weight of its own."""
        if not self.is_weight(x):
            return self._emit(lambda a: lax.index_in_dim(a, i, keepdims=False), x)[0]
        if x in self.weights:
            key = self.weights[x]._replace(at=(*self.weights[x].at, i))
            if key not in self.slices:
                aval = _compat.ShapedArray(x.aval.shape[1:], x.aval.dtype)
                self.slices[key] = _Var(aval)
                self.weights[self.slices[key]] = key
            return self.slices[key]
        eqn = self.moved_by[x]
        if eqn.primitive.name not in _ELEMENTWISE:
            raise SegmentError(
                f"{self.root(x)}: goes through a `{eqn.primitive.name}` before it is scanned over."
                ' Scan over the parameter as it is, or quantize layer-parallel (`mode="parallel"`).'
            )
        args = [self._slice(a, i) if self.is_weight(a) else a for a in eqn.invars]
        avals = [_compat.ShapedArray(v.aval.shape[1:], v.aval.dtype) for v in eqn.outvars]
        return self._add(eqn, args, avals)[eqn.outvars.index(x)]


class _Opened(NamedTuple):
    """A jaxpr with its constants, as `_compat.open_jaxpr` takes it."""

    jaxpr: Any
    consts: Sequence[Any]


class _Jaxpr(NamedTuple):
    """What `walk.evaluate` needs of a jaxpr."""

    invars: list[Any]
    eqns: list[Any]
    outvars: list[Any]
    constvars: tuple = ()


class Program(NamedTuple):
    """A piece of the flat program: `outputs` from weights and values made before."""

    weights: list[_Var]
    inputs: list[_Var]
    eqns: list[Any]
    outputs: list[_Var]

    @property
    def jaxpr(self) -> _Jaxpr:
        return _Jaxpr([*self.weights, *self.inputs], self.eqns, self.outputs)


def _signature(program: Program) -> Hashable:
    """Returns a key that is equal for programs that compute the same from their arguments."""
    number: dict[Any, int] = {}

    def token(v):
        if _is_literal(v):
            return ("literal", repr(v.val), str(v.aval))
        return number.setdefault(v, len(number))

    head = tuple((token(v), str(v.aval)) for v in (*program.weights, *program.inputs))
    body = tuple(
        (
            eqn.primitive.name,
            tuple((k, _param_key(v)) for k, v in sorted(eqn.params.items())),
            tuple(map(token, eqn.invars)),
            tuple((token(v), str(v.aval)) for v in eqn.outvars),
        )
        for eqn in program.eqns
    )
    return len(program.weights), head, body, tuple(map(token, program.outputs))


def _param_key(value: Any) -> Hashable:
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        _, consts = _compat.open_jaxpr(value)
        return str(value), tuple(map(id, consts))
    if isinstance(value, (tuple, list)):
        return tuple(map(_param_key, value))
    return repr(value), id(value) if callable(value) and not isinstance(value, type) else 0


class _Capture(calibrate.Collector):
    """Keeps the rows that each weight reads instead of folding them into statistics."""

    def __init__(self, mask: Any):
        super().__init__((), mask)
        self.rows: dict[str, list[Rows]] = {}

    def _fold(self, name, x, mask):
        self.rows.setdefault(name, []).append(Rows(lax.stop_gradient(x), mask))


class Level(NamedTuple):
    """One level: how to make its values, and which weights then have their inputs.

    Attributes:
      make: the program of its values; it reads the weights of the level before.
      read: the program of the products with its own weights, run to see what they read.
      keys: the weights of those products.
      freed: values that nothing reads after this level was made and its weights were seen.
    """

    make: Program
    read: Program
    keys: tuple[Key, ...]
    freed: tuple[_Var, ...]


class Segments:
    """A function cut into levels at a set of weights. Holds no arrays but the trace's constants.

    Args:
      fn: of `(params, *args)`.
      params, args: arrays or ShapeDtypeStructs to trace with.
      layouts: of the weights at which to cut, by parameter path.

    Raises:
      SegmentError: a weight is used in a loop or branch that cannot be cut.
    """

    def __init__(self, fn: Callable, params: Any, args: tuple, layouts: Mapping[str, Layout]):
        call = take_apart((params, *args), {})
        jaxpr, consts, _ = trace(fn, call)
        flat = _Flattener()
        self.layouts = layouts
        self.static_inputs: list[tuple[str, _Var]] = []
        self.batch_inputs: list[_Var] = []
        invars = [_Var(v.aval) for v in jaxpr.invars]
        for var, path in zip(invars, call.paths, strict=True):
            name = path_str(path[2:])
            is_param = path[0].idx == 0 and path[1].idx == 0
            if is_param and name in layouts:
                flat.weights[var] = Key(name)
            elif is_param:
                self.static_inputs.append((name, var))
            else:
                self.batch_inputs.append(var)
        flat.run(_Opened(jaxpr, consts), invars)
        self._flat = flat
        self._cut()
        self._compiled: dict[Hashable, Any] = {}

    @property
    def keys(self) -> list[Key]:
        """The weights in the order in which they are reached."""
        return [key for level in self.levels for key in level.keys]

    def read_keys(self, level: Level) -> list[Key]:
        """Returns the weights whose positions name what `reader` folds."""
        return [self._flat.weights[v] for v in level.read.weights]

    # ---- cutting ----

    def _cut(self) -> None:
        flat = self._flat
        level: dict[Any, int] = dict.fromkeys(self.batch_inputs, 0)  # others are -1: no batch
        of_eqn: list[int] = []
        products: dict[int, list[Any]] = {}
        for eqn in flat.eqns:
            values = [v for v in eqn.invars if not _is_literal(v) and not flat.is_weight(v)]
            at = max((level.get(v, -1) for v in values), default=-1)
            weights = [v for v in eqn.invars if flat.is_weight(v)]
            if weights and not flat.is_weight(eqn.outvars[0]):
                at = max(at, 0)
                if eqn.primitive.name in _PRODUCTS:
                    products.setdefault(at, []).append(eqn)
                    at += 1
            of_eqn.append(at)
            level.update(dict.fromkeys(eqn.outvars, at))
        # A level without products has no weights to solve: what it makes is made where it is read.
        last = max(products, default=-1)
        by_level: list[list[Any]] = [[] for _ in range(last + 2)]
        wanted = {v for eqns in products.values() for eqn in eqns for v in eqn.invars}
        for eqn, at in zip(reversed(flat.eqns), reversed(of_eqn), strict=True):
            if at > last or flat.is_weight(eqn.outvars[0]):
                continue
            if any(v in wanted for v in eqn.outvars):
                wanted |= {v for v in eqn.invars if not _is_literal(v)}
                by_level[at + 1].append(eqn)  # from -1 on
        by_level = [eqns[::-1] for eqns in by_level]
        # Read at or after each level, by makers and by the products themselves.
        static, *made = by_level
        reads = [[*eqns, *products.get(j, ())] for j, eqns in enumerate(made)]
        later: set[Any] = set()
        alive_after: list[set[Any]] = []
        for eqns in reversed(reads):
            alive_after.append(set(later))
            later |= {v for eqn in eqns for v in eqn.invars if not _is_literal(v)}
        alive_after.reverse()
        needed = {v for eqns in reads for eqn in eqns for v in eqn.invars if not _is_literal(v)}
        self.static = self._program(static, [v for e in static for v in e.outvars if v in needed])
        levels = []
        present = set(self.batch_inputs)
        for j, eqns in enumerate(made):
            own = {v for eqn in products.get(j, ()) for v in eqn.invars if not _is_literal(v)}
            outputs = [v for eqn in eqns for v in eqn.outvars if v in alive_after[j] or v in own]
            make = self._program(eqns, outputs)
            read = self._program(products.get(j, []), [])
            keys = tuple(dict.fromkeys(flat.weights[v] for v in read.weights))
            present |= set(outputs)
            freed = tuple(v for v in present if v not in alive_after[j])
            present -= set(freed)
            levels.append(Level(make, read, keys, freed))
        self.levels: list[Level] = levels

    def _program(self, eqns: Sequence[Any], outputs: list[_Var]) -> Program:
        """Returns a program of operations, with the moves of the weights that they read."""
        flat = self._flat
        weights: dict[_Var, None] = {}
        inputs: dict[_Var, None] = {}
        made: set[Any] = set()
        body: list[Any] = []

        def need(v):
            if _is_literal(v) or v in made:
                return
            if v in flat.weights:
                weights[v] = None
            elif v in flat.moved_by:
                add(flat.moved_by[v])
            else:
                inputs[v] = None

        def add(eqn):
            for v in eqn.invars:
                need(v)
            body.append(eqn)
            made.update(eqn.outvars)

        for eqn in eqns:
            add(eqn)
        return Program(list(weights), list(inputs), body, outputs)

    # ---- running ----

    def constants(self, params: Any) -> dict[_Var, Any]:
        """Returns the values that all batches share: parameters, constants, what they make."""
        leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
        named = {path_str(path): leaf for path, leaf in leaves}
        env = {v: named[name] for name, v in self.static_inputs}
        env |= self._flat.consts
        made = self.run(self.static, {}, env)
        return env | made

    def start(self, args: tuple) -> dict[_Var, Any]:
        """Returns the values that one batch begins with."""
        return dict(zip(self.batch_inputs, take_apart(args, {}).leaves, strict=True))

    def run(
        self, program: Program, weights: Mapping[Key, Any], env: Mapping[_Var, Any]
    ) -> dict[_Var, Any]:
        """Computes the outputs of a program, on packed weights where `weights` holds QTensors."""
        if not program.outputs:
            return {}
        signature = ("make", _signature(program))
        if signature not in self._compiled:
            names = [str(self._flat.weights[v]) for v in program.weights]

            def make(weights, inputs):
                handler = apply.Packed(None)
                views = [
                    weight.as_view(w, name) if is_qtensor(w) else w
                    for w, name in zip(weights, names, strict=True)
                ]
                out = walk.evaluate(handler, program.jaxpr, (), [*views, *inputs])
                return [
                    handler.materialize(v, "segment", "it leaves the segment")
                    if isinstance(v, View)
                    else v
                    for v in out
                ]

            self._compiled[signature] = jax.jit(make)
        values = self._compiled[signature](
            [weights[self._flat.weights[v]] for v in program.weights],
            [env[v] for v in program.inputs],
        )
        return dict(zip(program.outputs, values, strict=True))

    def reader(self, level: Level, fold: Callable) -> Callable:
        """Returns the jitted `fold` of what the weights of a level read.

        Args:
          fold: of `(state, rows, other_rows)`, with lists of `Rows` for each activation by the
            position of its owner in `level.keys`; `other_rows` is None without a second stream.

        Returns:
          A function of (state, float weights by Key, env, other env or None, mask).
        """
        signature = ("read", fold, _signature(level.read))
        if signature not in self._compiled:

            def captured(state, weights, inputs, others, mask):
                mine = self._capture(level, weights, inputs, mask)[0]
                theirs = None
                if others is not None:
                    theirs = self._capture(level, weights, others, mask)[0]
                return fold(state, mine, theirs)

            self._compiled[signature] = jax.jit(captured)
        compiled = self._compiled[signature]
        read = level.read

        def run(state, weights, env, other, mask):
            return compiled(
                state,
                [weights[self._flat.weights[v]] for v in read.weights],
                [env[v] for v in read.inputs],
                None if other is None else [other[v] for v in read.inputs],
                mask,
            )

        return run

    def owners(
        self, level: Level, weights: Mapping[Key, Any], env: Mapping[_Var, Any], mask: Any
    ) -> dict[Key, Key]:
        """Returns the owner of the input of each weight at a level: itself, or one that shares."""
        shared: dict[str, str] = {}

        def run(weights, inputs, mask):
            rows, names = self._capture(level, weights, inputs, mask)
            shared.update(names)
            return rows

        jax.eval_shape(
            run,
            [weights[key] for key in self.read_keys(level)],
            [env[v] for v in level.read.inputs],
            mask,
        )
        keys = self.read_keys(level)
        return {keys[int(mine)]: keys[int(owner)] for mine, owner in shared.items()}

    def _capture(self, level: Level, weights: Sequence[Any], inputs: Sequence[Any], mask: Any):
        handler = _Capture(mask)
        program = level.read
        views = [
            floats.as_view(w, self._layout(self._flat.weights[v]), str(i), tag=True)
            for i, (v, w) in enumerate(zip(program.weights, weights, strict=True))
        ]
        walk.evaluate(handler, program.jaxpr, (), [*views, *inputs])
        return handler.rows, handler.shared

    def _layout(self, key: Key) -> Layout:
        return self.layouts[key.path]


def slice_of(array: Any, key: Key) -> Any:
    """Returns the part of a parameter that a key names."""
    for i in key.at:
        array = array[i]
    return array


def stack_slices(parts: Mapping[Key, Any], path: str) -> Any:
    """Returns the slices of one parameter as one tree again, stacked in order of their indices."""
    own = {key.at: part for key, part in parts.items() if key.path == path}
    if () in own:
        return own[()]
    heads: dict[int, dict[Key, Any]] = {}
    for index, part in own.items():
        heads.setdefault(index[0], {})[Key(path, index[1:])] = part
    stacked = [stack_slices(heads[i], path) for i in sorted(heads)]
    return jax.tree.map(lambda *a: jnp.stack(a), *stacked)
