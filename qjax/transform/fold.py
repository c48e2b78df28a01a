"""fold: per-channel factors of weights' inputs, moved into the parameters that make the inputs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.paths import path_str
from qjax.tables import align
from qjax.transform import graph, scaling
from qjax.transform.graph import Operation, Value
from qjax.transform.scaling import Dims, Label, Piece, Refused, varying
from qjax.transform.usage import Usage
from qjax.transform.usage import usage as usage_of

# Choices that may be tried for one group; each either leads on or is refused at once.
_BUDGET = 2000


@dataclasses.dataclass(frozen=True)
class Target:
    """A parameter that takes up a factor, and along what.

    Attributes:
      path: of the parameter.
      dims: for each of its axes the pieces, major to minor, by which the flat index into s moves;
        a stride of 0 is an axis along which s does not vary.
      power: the parameter is divided by s^power.
    """

    path: str
    dims: Dims
    power: float

    def factor(self, s: Float[Array, "*lead K"]) -> Array:
        """Returns s^-power, broadcastable to the parameter."""
        index = np.zeros((1,) * len(self.dims), np.int64)
        for axis, dim in enumerate(self.dims):
            if not varying(dim):
                continue
            along = np.zeros(1, np.int64)
            for piece in dim:
                along = (along[:, None] + np.arange(piece.size) * piece.stride).reshape(-1)
            shape = [1] * len(self.dims)
            shape[axis] = along.size
            index = index + along.reshape(shape)
        return jnp.ravel(s)[index] ** -self.power


@dataclasses.dataclass(frozen=True)
class Group:
    """Weights that read one activation x in the same way, and where a division of x can go.

    With positive s [*lead, K], x / s times diag(s) W is x times W for every reader W. Hashable.

    Attributes:
      readers: paths of the weights.
      shape: (*lead, K), the shape of s.
      weights: how the readers are multiplied; None: not even that is exact (see `why`), as a
        reader is also used for something else.
      targets: the parameters whose division by s divides x; None: there are none (see `why`).
      tied: pieces of the flat index into s over which s has to be constant: query heads that share
        a value head. `tie` makes it so.
      why: why there are no targets; "" if there are.
    """

    readers: tuple[str, ...]
    shape: tuple[int, ...]
    weights: tuple[Target, ...] | None
    targets: tuple[Target, ...] | None
    tied: tuple[Piece, ...] = ()
    why: str = ""

    @property
    def channels(self) -> int:
        """How many channels of one x can be scaled independently."""
        return _free_channels(self.shape[-1], self.tied)

    def tie(self, s: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
        """Returns s made constant over tied channels, by their geometric mean."""
        return tie(s, self.tied)


class Groups(tuple[Group, ...]):
    """The groups of a function. Prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = [("weights", "channels", "into")]
        for g in self:
            into = g.why if g.targets is None else ", ".join(t.path for t in g.targets)
            lines.append((", ".join(g.readers), str(g.channels), into))
        return "\n".join(align(lines))


def tie(s: Float[Array, "*lead K"], tied: Sequence[Piece]) -> Float[Array, "*lead K"]:
    """Returns s made constant over the given pieces of its flat index, by the geometric mean."""
    log = jnp.log(s.astype(jnp.float32))
    for size, stride in tied:
        digits = log.reshape(-1, size, stride)
        mean = jnp.mean(digits, axis=1, keepdims=True)
        log = jnp.broadcast_to(mean, digits.shape).reshape(s.shape)
    return jnp.exp(log).astype(s.dtype)


# ---- scaling parameters --------------------------------------------------------------------------


def fold(params: Any, group: Group, s: Float[Array, "*lead K"]) -> Any:
    """Multiplies the readers of a group by s and divides its targets by it.

    The function of the new parameters is that of the old ones, up to rounding: computed in float32
    and cast back, which for bfloat16 parameters is exact only where s is a power of two. Inputs of
    other groups stay as they are, so their statistics do too. Works under `jit`.

    Args:
      params: the tree that `find` was called with.
      group: one with targets.
      s: positive. It is tied as `group.tie` does, which changes nothing if that was done before.

    Raises:
      ValueError: if s has another shape than `group.shape`, or the group has no targets.
    """
    if group.targets is None:
        raise ValueError(
            f"{group.readers[0]}: the scale of its input cannot be folded: {group.why}. Keep it as"
            " a `pre_scale`, after `fold.scale_readers`."
        )
    assert group.weights is not None
    return _scale(params, group, s, (*group.weights, *group.targets))


def scale_readers(params: Any, group: Group, s: Float[Array, "*lead K"]) -> Any:
    """Multiplies only the readers of a group by s: their input then has to be divided by it.

    Raises:
      ValueError: if s has another shape than `group.shape`, or a reader is also used elsewhere.
    """
    if group.weights is None:
        raise ValueError(f"{group.readers[0]}: it cannot be scaled alone: {group.why}.")
    return _scale(params, group, s, group.weights)


def _scale(params: Any, group: Group, s: Any, targets: Sequence[Target]) -> Any:
    if tuple(s.shape) != group.shape:
        raise ValueError(
            f"{group.readers[0]}: `s` must have the shape {group.shape} of its input channels, got"
            f" {tuple(s.shape)}."
        )
    s = group.tie(jnp.asarray(s, jnp.float32))
    left = {t.path: t for t in targets}

    def scaled(path, leaf):
        target = left.pop(path_str(path), None)
        if target is None:
            return leaf
        return (leaf.astype(jnp.float32) * target.factor(s)).astype(leaf.dtype)

    out = jax.tree_util.tree_map_with_path(scaled, params)
    if left:
        raise ValueError(f"{next(iter(left))}: there is no such parameter in `params`.")
    return out


# ---- finding groups ------------------------------------------------------------------------------


class _Reader(NamedTuple):
    """A weight and the product that reads it."""

    path: str
    shape: tuple[int, ...]
    product: Operation
    labels: tuple[Label | None, ...]  # of the product's operands
    ties: tuple[Piece, ...]
    steps: tuple[tuple[int, int], ...]  # scan -> by how much a step moves the index into s


def find(fn: Callable, *, usage: Usage | None = None) -> Callable[..., Groups]:
    """Returns a function of fn's arguments that finds where scales of weights' inputs can go.

    Dividing the input x of weights by s, and multiplying the weights by it, changes nothing; the
    division is free where it goes back, operation by operation, into parameters of fn: the scale of
    a norm, the output channels and the bias of the layer before. An abstract trace; nothing is
    computed, and nothing is known of any architecture: a value on the way may have no reader that
    would notice.

    Every weight of a product is in exactly one group. Call it without a cache: a cache is an input.

    Args:
      fn: any function whose first argument holds its parameters.
      usage: `qjax.usage(fn)(params, *args)` if it is at hand.

    Example:
      >>> def fn(p, x):
      ...     return jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]
      >>> p = {"a": jnp.ones((3, 4)), "bias": jnp.ones(4), "b": jnp.ones((4, 2))}
      >>> print(find(fn)(p, jnp.ones((1, 3))))
      weights  channels  into
      a        3         it reaches input 1, which is no parameter
      b        4         a, bias
    """

    @functools.wraps(fn)
    def found(params, *args, **kwargs) -> Groups:
        used = usage if usage is not None else usage_of(fn)(params, *args, **kwargs)
        program = graph.build(fn, params, args, kwargs)
        alike: dict[Any, list[_Reader]] = {}
        lost: list[Group] = []
        for path, parameter in used.parameters.items():
            if not parameter.is_multiplied or parameter.layout is None:
                continue
            value = program.parameters[path]
            shape, dims = _canonical(value.shape, parameter.layout)
            try:
                reader = _reader(path, value, shape, dims)
            except Refused as why:
                lost.append(Group((path,), shape, None, None, why=str(why)))
            else:
                alike.setdefault(_activation(reader), []).append(reader)
        order = {path: i for i, path in enumerate(program.parameters)}
        groups = [*lost, *(_group(readers, order) for readers in alike.values())]
        return Groups(sorted(groups, key=lambda g: order[g.readers[0]]))

    return found


def _canonical(shape: tuple[int, ...], letters: str) -> tuple[tuple[int, ...], Dims]:
    """Returns (*lead, K) of a weight, and its dims in terms of that."""
    lead = tuple(n for n, kind in zip(shape, letters, strict=True) if kind == "b")
    K = math.prod(n for n, kind in zip(shape, letters, strict=True) if kind == "k")
    stride = {"k": 1, "b": K}
    dims: list[tuple[Piece, ...]] = []
    for size, kind in zip(reversed(shape), reversed(letters), strict=True):
        dims.append(scaling.merged([Piece(size, stride.get(kind, 0))]))
        if kind in stride:
            stride[kind] *= size
    return (*lead, K), tuple(reversed(dims))


def _reader(path: str, value: Value, shape: tuple[int, ...], dims: Dims) -> _Reader:
    """Follows a weight to the product that reads it."""
    steps: dict[int, int] = {}
    while True:
        if len(value.readers) != 1:
            names = ", ".join(dict.fromkeys(f"`{o.name}`" for o, _ in value.readers))
            raise Refused(
                f"{path} is read more than once: by {names}" if names else f"{path} has no effect"
            )
        operation, operand = value.readers[0]
        moved = scaling.forward(operation, dims, steps)
        if moved is None:
            break
        (value,), dims = operation.outs, moved
    option = scaling.other_operand(operation, operand, dims)
    if option is None:
        raise Refused(f"{path} is not multiplied as a whole: `{operation.name}` reads it")
    return _Reader(
        path, shape, operation, tuple(option.labels), tuple(option.ties), tuple(steps.items())
    )


def _activation(reader: _Reader) -> Any:
    """Returns what readers of the same activation in the same way have in common."""
    operand = next(i for i, label in enumerate(reader.labels) if label and label.power > 0)
    value, label = reader.product.ins[operand], reader.labels[operand]
    assert label is not None
    while value.producer is not None and scaling.is_move(value.producer):
        try:
            (option,) = scaling.back(value.producer, label, {})
        except Refused:
            break
        moved = option.labels[0]
        if option.ties or moved is None:
            break
        value, label = value.producer.ins[0], moved
    return id(value), label, reader.shape, reader.ties, reader.steps


def _free_channels(K: int, ties: Sequence[Piece]) -> int:
    (dim,) = scaling.tied(((Piece(K, 1),),), ties)
    return math.prod(p.size for p in varying(dim))


def _group(readers: list[_Reader], order: dict[str, int]) -> Group:
    paths, shape = tuple(r.path for r in readers), readers[0].shape

    def finished(targets, ties):
        targets = sorted(targets, key=lambda t: order[t.path])
        return tuple(dataclasses.replace(t, dims=scaling.tied(t.dims, ties)) for t in targets)

    solved = _Search(readers, both=True)
    state = solved.run()
    if state is not None:
        weights = tuple(t for t in state.targets if t.power < 0 and t.path in paths)
        targets = tuple(t for t in state.targets if t not in weights)
        if {t.path for t in weights} == set(paths):
            ties = state.ties
            return Group(paths, shape, finished(weights, ties), finished(targets, ties), ties)
    why = "; ".join(list(dict.fromkeys(solved.reasons))[:3])
    alone = _Search(readers, both=False).run()
    if alone is None or {t.path for t in alone.targets} != set(paths):
        return Group(paths, shape, None, None, why=why)
    return Group(paths, shape, finished(alone.targets, alone.ties), None, alone.ties, why)


@dataclasses.dataclass
class _State:
    """A partial assignment of labels.

    Attributes:
      labels: of values.
      pending: values whose producers have still to be labelled.
      wanted: what every operation passed needs of its operands; absent: not passed.
      ties: over what s has to be constant so far.
      targets: parameters reached.
    """

    labels: dict[Value, Label]
    pending: dict[Value, None]
    wanted: dict[tuple[Operation, int], Label | None]
    ties: tuple[Piece, ...]
    targets: tuple[Target, ...]

    def copy(self) -> _State:
        return _State(
            dict(self.labels), dict(self.pending), dict(self.wanted), self.ties, self.targets
        )


class _Search:
    """Labels values from the readers' inputs back to parameters."""

    def __init__(self, readers: list[_Reader], *, both: bool):
        self.K = readers[0].shape[-1]
        self.steps = dict(readers[0].steps)
        self.reasons: list[str] = []
        self.budget = _BUDGET
        self.start = _State({}, {}, {}, (), ())
        self.possible = True
        for reader in readers:
            labels = [
                label if both or (label is not None and label.power < 0) else None
                for label in reader.labels
            ]
            option = scaling.Option(labels, list(reader.ties))
            self.possible = self.possible and self._take(self.start, reader.product, option)
            if not both:  # what becomes of the input is not our concern
                self.start.wanted = {k: v for k, v in self.start.wanted.items() if v is not None}

    def run(self) -> _State | None:
        return self._search(self.start) if self.possible else None

    def _equal(self, state: _State, a: Label | None, b: Label | None) -> bool:
        if a is None or b is None:
            return a is b
        return a.power == b.power and (
            a.dims == b.dims or scaling.tied(a.dims, state.ties) == scaling.tied(b.dims, state.ties)
        )

    def _take(self, state: _State, operation: Operation, option: scaling.Option) -> bool:
        """Labels the operands of an operation; returns whether they can be so."""
        new = [p for p in option.ties if p not in state.ties]
        state.ties = (*state.ties, *new)
        try:
            for i, (value, label) in enumerate(zip(operation.ins, option.labels, strict=True)):
                state.wanted[operation, i] = label
                if label is None:
                    continue
                if value.source == "constant":
                    return self._refuse(f"a constant in `{operation.name}` would have to be scaled")
                if not self._equal(state, state.labels.setdefault(value, label), label):
                    return self._refuse(f"{value} would be scaled in two ways")
                state.pending[value] = None
            if new and self.K > 1 and _free_channels(self.K, state.ties) == 1:
                return self._refuse("only one factor for all channels could pass")
        except Refused as why:
            return self._refuse(str(why))
        return True

    def _refuse(self, why: str) -> bool:
        self.reasons.append(why)
        return False

    def _is_unnoticed(self, state: _State, value: Value, label: Label) -> bool:
        """Whether all that reads a value expects it to be labelled, or does not mind."""
        if value.is_returned:
            return self._refuse(f"{value} is returned")
        for operation, i in value.readers:
            if (operation, i) in state.wanted:
                if not self._equal(state, state.wanted[operation, i], label):
                    return self._refuse(f"{value} is also read by `{operation.name}`")
            elif not scaling.is_invariant(operation, i):
                return self._refuse(f"{value} is also read by `{operation.name}`")
        return True

    def _search(self, state: _State) -> _State | None:
        """Returns the solution with the fewest ties from here on."""
        while state.pending:
            self.budget -= 1
            if self.budget < 0:
                self.reasons.append("there are too many ways to look at")
                return None
            # Readers come later in the program, so they have been passed when it is their turn.
            value = max(state.pending, key=lambda v: v.producer.index if v.producer else -1)
            del state.pending[value]
            label = state.labels[value]
            if not self._is_unnoticed(state, value, label):
                return None
            if value.source == "parameter":
                if not jnp.issubdtype(value.dtype, jnp.floating):
                    self.reasons.append(f"{value} is no float")
                    return None
                target = Target(value.name, label.dims, float(label.power))
                state.targets = (*state.targets, target)
                continue
            if value.producer is None:
                self.reasons.append(f"it reaches {value}, which is no parameter")
                return None
            try:
                options = scaling.back(value.producer, label, self.steps)
            except Refused as why:
                self.reasons.append(str(why))
                return None
            if len(options) > 1:
                return self._best(state, value.producer, options)
            if not self._take(state, value.producer, options[0]):
                return None
        return state

    def _best(self, state, operation, options) -> _State | None:
        best = None
        for option in options:
            trial = state.copy()
            if not self._take(trial, operation, option):
                continue
            solution = self._search(trial)
            if solution is None:
                continue
            if best is None or self._freedom(solution) > self._freedom(best):
                best = solution
            if solution.ties == state.ties:  # no better one can be
                break
        return best

    def _freedom(self, state: _State) -> int:
        return _free_channels(self.K, state.ties)
