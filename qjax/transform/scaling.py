"""Scaling: how a factor on the axes of a value goes back to the operands it was computed from.

Every rule here is an identity. With c > 0 and the factor written as a function of axes,

  c * (a + b) = c * a + c * b        c * (a * b) = (c * a) * b = a * (c * b)
  c * max(a, b) = max(c * a, c * b)  c * sqrt(a) = sqrt(c² * a)
  c_n * sum_k a_k b_kn = sum_k a_k (c_n * b_kn)

so relu is one as max(a, 0), and silu(a) = a * sigmoid(a) has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax.transform import graph
from qjax.transform.graph import Operation, Value


class Piece(NamedTuple):
    """A part of an axis: its index i adds `i * stride` to the index into s; 0: s does not vary."""

    size: int
    stride: int


# For each axis its pieces, major to minor; none for an axis of size 1.
Dims = tuple[tuple[Piece, ...], ...]


@dataclasses.dataclass(frozen=True)
class Label:
    """That a value is divided by s[index]^power, the index being the sum over the pieces of it."""

    dims: Dims
    power: Fraction = Fraction(1)

    def to(self, dims: Sequence[tuple[Piece, ...]], power: Fraction | None = None) -> Label:
        dims = tuple(merged(d) for d in dims)
        return Label(dims, self.power if power is None else power)


class Refused(Exception):
    """There is no way back; the message says why."""


class Option(NamedTuple):
    """One way to label the operands of an operation.

    Attributes:
      labels: for each operand; None: it stays as it is.
      ties: pieces of s over which it has to be constant for this.
    """

    labels: list[Label | None]
    ties: list[Piece]


# ---- pieces --------------------------------------------------------------------------------------


def merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Returns the pieces with neighbours that count on merged, and none of size 1."""
    out: list[Piece] = []
    for piece in pieces:
        if piece.size == 1:
            continue
        if out and out[-1].stride == piece.stride * piece.size:
            piece = Piece(out.pop().size * piece.size, piece.stride)
        out.append(piece)
    return tuple(out)


def plain(size: int) -> tuple[Piece, ...]:
    """Returns the pieces of an axis along which nothing is scaled."""
    return (Piece(size, 0),) if size > 1 else ()


def varying(pieces: Sequence[Piece]) -> list[Piece]:
    return [p for p in pieces if p.stride]


def regroup(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """Returns the dims of a value after a reshape, or None if an axis ends inside a piece."""
    pending = list(merged([p for dim in dims for p in dim]))[::-1]
    out = []
    for size in shape:
        dim, need = [], size
        while need > 1:
            piece = pending.pop()
            if need % piece.size == 0:
                need //= piece.size
            elif piece.size % need == 0:
                minor = piece.size // need
                pending.append(Piece(minor, piece.stride))
                piece = Piece(need, piece.stride * minor)
                need = 1
            else:
                return None
            dim.append(piece)
        out.append(merged(dim))
    return tuple(out)


def tied(dims: Dims, ties: Sequence[Piece]) -> Dims:
    """Returns the dims for an s that is constant over `ties`.

    Raises:
      Refused: if a tie cuts through a piece.
    """
    out = []
    for dim in dims:
        for tie in ties:
            dim = [p for piece in dim for p in _tied(piece, tie)]
        out.append(merged(dim))
    return tuple(out)


def _tied(piece: Piece, tie: Piece) -> list[Piece]:
    if not piece.stride:
        return [piece]
    end = piece.stride * piece.size
    low, high = max(piece.stride, tie.stride), min(end, tie.stride * tie.size)
    if low >= high:
        return [piece]
    if low % piece.stride or high % low or end % high:
        raise Refused("channels would be tied across the boundaries of heads")
    return [
        Piece(end // high, high),
        Piece(high // low, 0),
        Piece(low // piece.stride, piece.stride),
    ]


# ---- operations ----------------------------------------------------------------------------------


def is_fixed_point(value: Value) -> bool:
    """Whether scaling leaves a value alone: zeros, infinities and NaN."""
    while value.producer is not None and value.producer.name in _MOVES:
        value = value.producer.ins[0]
    if value.literal is None or np.size(value.literal) != 1:
        return False
    number = np.asarray(value.literal).reshape(()).astype(np.float64)
    return bool(number == 0 or not np.isfinite(number))


def is_invariant(operation: Operation, operand: int) -> bool:
    """Whether a result stays as it is when an operand is scaled by something positive."""
    if operation.name in ("sign", "is_finite"):
        return True
    return operation.name in ("gt", "ge", "lt", "le", "eq", "ne") and is_fixed_point(
        operation.ins[1 - operand]
    )


def back(operation: Operation, label: Label, steps: dict[int, int]) -> list[Option]:
    """Returns the ways to have the result of an operation labelled, best first.

    Args:
      steps: by how much the index into s moves with each step of a scan.

    Raises:
      Refused: if there is none.
    """
    if operation.name == graph.SLICE:
        size = operation.ins[0].shape[0]
        first = merged([Piece(size, steps.get(operation.params["scan"], 0))])
        return [Option([label.to([first, *label.dims])], [])]
    if operation.name == graph.CONST:
        if steps.get(operation.params["scan"]):
            raise Refused(f"all steps of a scan share {operation.ins[0]}")
        return [Option([label], [])]
    if len(operation.outs) > 1:
        raise Refused(f"it is one of the results of a `{operation.name}`")
    rule = _RULES.get(operation.name)
    if rule is None:
        raise Refused(f"a scale does not pass through `{operation.name}`")
    return rule(operation, label)


def forward(operation: Operation, dims: Dims, steps: dict[int, int]) -> Dims | None:
    """Returns the dims of the result of an operation that only moves data, or None.

    Enters the stride of a scanned axis into `steps`.
    """
    if operation.name == graph.SLICE:
        if len(dims[0]) > 1:
            return None
        steps[operation.params["scan"]] = dims[0][0].stride if dims[0] else 0
        return dims[1:]
    if operation.name == graph.CONST:
        return dims
    move = _MOVES.get(operation.name)
    return None if move is None else move(operation, dims)


def _same(operation: Operation, dims: Dims) -> Dims | None:
    return dims


def _convert(operation: Operation, dims: Dims) -> Dims | None:
    dtypes = (operation.ins[0].dtype, operation.outs[0].dtype)
    return dims if all(jnp.issubdtype(d, jnp.floating) for d in dtypes) else None


def _reshape(operation: Operation, dims: Dims) -> Dims | None:
    if operation.params.get("dimensions") is not None:
        return None
    return regroup(dims, operation.outs[0].shape)


def _transpose(operation: Operation, dims: Dims) -> Dims | None:
    return tuple(dims[i] for i in operation.params["permutation"])


def _squeeze(operation: Operation, dims: Dims) -> Dims | None:
    gone = {d % len(dims) for d in operation.params["dimensions"]}
    return tuple(d for i, d in enumerate(dims) if i not in gone)


def _broadcast(operation: Operation, dims: Dims) -> Dims | None:
    out = [plain(size) for size in operation.outs[0].shape]
    for source, target in enumerate(operation.params["broadcast_dimensions"]):
        if operation.ins[0].shape[source] == operation.outs[0].shape[target]:
            out[target] = dims[source]
    return tuple(out)


# Operations with the same values in other places, and where the dims of the operand go.
_MOVES: dict[str, Callable[[Operation, Dims], Dims | None]] = {
    "convert_element_type": _convert,
    "reduce_precision": _same,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "stop_gradient": _same,
    "sharding_constraint": _same,
    "reshard": _same,
    "pvary": _same,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
}


def is_move(operation: Operation) -> bool:
    """Whether an operation has the same values in other places."""
    return operation.name in _MOVES


def _stuck(operation: Operation) -> Refused:
    return Refused(f"this `{operation.name}` mixes scaled channels with others")


def _back_same(operation, label):
    return [Option([label], [])]


def _back_convert(operation, label):
    if not jnp.issubdtype(operation.ins[0].dtype, jnp.floating):
        raise Refused("it is made of integers")
    return [Option([label], [])]


def _back_reshape(operation, label):
    dims = regroup(label.dims, operation.ins[0].shape)
    if dims is None or operation.params.get("dimensions") is not None:
        raise _stuck(operation)
    return [Option([label.to(dims)], [])]


def _back_transpose(operation, label):
    permutation = operation.params["permutation"]
    dims = [label.dims[permutation.index(i)] for i in range(len(permutation))]
    return [Option([label.to(dims)], [])]


def _back_broadcast(operation, label):
    (x,), (out,) = operation.ins, operation.outs
    dims: list[tuple[Piece, ...]] = [()] * len(x.shape)
    ties = {i: varying(d) for i, d in enumerate(label.dims)}
    for source, target in enumerate(operation.params["broadcast_dimensions"]):
        if x.shape[source] == out.shape[target]:
            dims[source] = label.dims[target]
            ties.pop(target)
    return [Option([label.to(dims)], [p for pieces in ties.values() for p in pieces])]


def _fit(label: Label, value: Value, shape: tuple[int, ...]) -> tuple[Label, list[Piece]]:
    """Returns the label of an operand that is broadcast along its axes of size 1, and ties."""
    if len(value.shape) < len(shape):  # a scalar
        return label.to([]), [p for dim in label.dims for p in varying(dim)]
    dims, ties = [], []
    for dim, size, whole in zip(label.dims, value.shape, shape, strict=True):
        dims.append(dim if size == whole else ())
        ties += [] if size == whole else varying(dim)
    return label.to(dims), ties


def _into(operation: Operation, labels: dict[int, Label]) -> Option:
    """Returns the option that labels the given operands; others stay."""
    out: list[Label | None] = [None] * len(operation.ins)
    ties = []
    for i, label in labels.items():
        out[i], more = _fit(label, operation.ins[i], operation.outs[0].shape)
        ties += more
    return Option(out, ties)


def _into_all(start: int = 0):
    """Linear in, or homogeneous of degree 1 of, all operands from `start` on together."""

    def rule(operation, label):
        own = range(start, len(operation.ins))
        return [_into(operation, {i: label for i in own if not is_fixed_point(operation.ins[i])})]

    return rule


def _power(exponent: Callable[[Operation], Fraction]):
    """x^n: s goes into x as s^(1/n)."""

    def rule(operation, label):
        n = exponent(operation)
        if not n:
            raise Refused("a power of 0 forgets its operand")
        return [Option([label.to(label.dims, label.power / n)], [])]

    return rule


def _back_mul(operation, label):
    if operation.ins[0] is operation.ins[1]:
        half = label.to(label.dims, label.power / 2)
        return [_into(operation, {0: half, 1: half})]
    # A constant cannot take the scale; trying it would only add to the reasons.
    own = [i for i in (0, 1) if operation.ins[i].source != "constant"]
    return [_into(operation, {i: label}) for i in own or (0,)]


def _back_div(operation, label):
    inverse = label.to(label.dims, -label.power)
    if operation.ins[1].source == "constant":
        return [_into(operation, {0: label})]
    return [_into(operation, {0: label}), _into(operation, {1: inverse})]


def _back_dot_general(operation, label):
    """A batch axis goes into either operand; axes that an operand lacks have to be tied for it."""
    (lc, rc), (lb, rb) = operation.params["dimension_numbers"]
    n_batch = len(lb)
    free = [
        [i for i in range(len(v.shape)) if i not in contracted and i not in batch]
        for v, contracted, batch in zip(operation.ins, (lc, rc), (lb, rb), strict=True)
    ]
    dims = [
        label.dims[n_batch : n_batch + len(free[0])],
        label.dims[n_batch + len(free[0]) :],
    ]
    options = []
    for side, batch in ((0, lb), (1, rb)):
        own = [plain(size) for size in operation.ins[side].shape]
        for axis, dim in zip(batch, label.dims[:n_batch], strict=True):
            own[axis] = dim
        for axis, dim in zip(free[side], dims[side], strict=True):
            own[axis] = dim
        labels: list[Label | None] = [None, None]
        labels[side] = label.to(own)
        options.append(Option(labels, [p for dim in dims[1 - side] for p in varying(dim)]))
    return sorted(options, key=lambda o: len(o.ties))


def _only(operation: Operation, label: Label, axis: int) -> tuple[Piece, ...]:
    """Returns the pieces of one axis, the only one that may be scaled."""
    if any(varying(d) for i, d in enumerate(label.dims) if i != axis):
        raise _stuck(operation)
    return label.dims[axis]


def _back_conv(operation, label):
    numbers = operation.params["dimension_numbers"]
    dims = [plain(size) for size in operation.ins[1].shape]
    dims[numbers.rhs_spec[0]] = _only(operation, label, numbers.out_spec[1])
    return [Option([None, label.to(dims)], [])]


def _is_plain_ragged(operation: Operation) -> bool:
    numbers = operation.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    return (
        (tuple(lc), tuple(rc), tuple(lb), tuple(rb)) == ((1,), (1,), (), ())
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )


def _back_ragged(operation, label):
    if not _is_plain_ragged(operation):
        raise _stuck(operation)
    E, K, _ = operation.ins[1].shape
    dims = [plain(E), plain(K), _only(operation, label, 1)]
    return [Option([None, label.to(dims), None], [])]


def _back_reduce(operation, label):
    x = operation.ins[0]
    rest = iter(label.dims)
    axes = operation.params["axes"]
    dims = [plain(x.shape[i]) if i in axes else next(rest) for i in range(len(x.shape))]
    return [Option([label.to(dims)], [])]


def _back_along(operation, label):
    """Operations that mix values along one axis."""
    if varying(label.dims[operation.params["axis"]]):
        raise _stuck(operation)
    return [Option([label], [])]


def _cut_to(operation: Operation, label: Label, value: Value) -> Label:
    """Returns the label of an operand whose axes are cut or extended where nothing is scaled."""
    dims = []
    for dim, size, whole in zip(label.dims, value.shape, operation.outs[0].shape, strict=True):
        if size != whole and varying(dim):
            raise _stuck(operation)
        dims.append(dim if size == whole else plain(size))
    return label.to(dims)


def _back_slice(operation, label):
    labels: list[Label | None] = [None] * len(operation.ins)
    labels[0] = _cut_to(operation, label, operation.ins[0])
    return [Option(labels, [])]


def _back_update(operation, label):
    labels: list[Label | None] = [None] * len(operation.ins)
    for i in (0, 1):
        if not is_fixed_point(operation.ins[i]):
            labels[i] = _cut_to(operation, label, operation.ins[i])
    return [Option(labels, [])]


def _back_concatenate(operation, label):
    if varying(label.dims[operation.params["dimension"]]):
        raise _stuck(operation)
    return [
        Option(
            [None if is_fixed_point(v) else _cut_to(operation, label, v) for v in operation.ins], []
        )
    ]


def _back_pad(operation, label):
    if not is_fixed_point(operation.ins[1]):
        raise _stuck(operation)
    return _back_slice(operation, label)


def _back_rev(operation, label):
    if any(varying(label.dims[i]) for i in operation.params["dimensions"]):
        raise _stuck(operation)
    return [Option([label], [])]


def _back_gather(operation, label):
    """A lookup: axes taken whole keep their scale."""
    numbers = operation.params["dimension_numbers"]
    fill = operation.params["fill_value"]
    if fill is not None and fill != 0:
        raise _stuck(operation)
    x = operation.ins[0]
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    kept = [i for i in range(len(x.shape)) if i not in gone]
    offset = sorted(numbers.offset_dims)
    if any(varying(d) for i, d in enumerate(label.dims) if i not in offset):
        raise _stuck(operation)
    dims = [plain(size) for size in x.shape]
    for source, target in zip(kept, offset, strict=True):
        if operation.params["slice_sizes"][source] == x.shape[source]:
            dims[source] = label.dims[target]
        elif varying(label.dims[target]):
            raise _stuck(operation)
    return [Option([label.to(dims), None], [])]


_RULES: dict[str, Callable[[Operation, Label], list[Option]]] = {
    "convert_element_type": _back_convert,
    **{name: _back_same for name, move in _MOVES.items() if move is _same},
    **dict.fromkeys(("reshape", "squeeze"), _back_reshape),
    "transpose": _back_transpose,
    "broadcast_in_dim": _back_broadcast,
    **dict.fromkeys(("add", "add_any", "sub", "max", "min", "neg", "abs"), _into_all()),
    "select_n": _into_all(1),
    "mul": _back_mul,
    "div": _back_div,
    "integer_pow": _power(lambda o: Fraction(o.params["y"])),
    "square": _power(lambda o: Fraction(2)),
    "sqrt": _power(lambda o: Fraction(1, 2)),
    "rsqrt": _power(lambda o: Fraction(-1, 2)),
    "dot_general": _back_dot_general,
    "conv_general_dilated": _back_conv,
    "ragged_dot_general": _back_ragged,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _back_reduce),
    **dict.fromkeys(("cumsum", "cummax", "cummin"), _back_along),
    **dict.fromkeys(("slice", "dynamic_slice"), _back_slice),
    "dynamic_update_slice": _back_update,
    "concatenate": _back_concatenate,
    "pad": _back_pad,
    "rev": _back_rev,
    "gather": _back_gather,
}


# ---- products ------------------------------------------------------------------------------------


def other_operand(operation: Operation, weight: int, dims: Dims) -> Option | None:
    """Returns how the other operand of a product is to be divided where the weight is multiplied.

    Args:
      weight: which operand is the weight.
      dims: of the weight, scaled along what the product contracts and batches.

    Returns:
      The option for both operands, the weight with power -1, or None if this is no such product.
    """
    if operation.name == "dot_general":
        contracting, batch = operation.params["dimension_numbers"]
        x = 1 - weight
        used = {*contracting[weight], *batch[weight]}
        own = [plain(size) for size in operation.ins[x].shape]
        for axes in (contracting, batch):
            for source, target in zip(axes[weight], axes[x], strict=True):
                own[target] = dims[source]
        ties = []
    elif operation.name == "conv_general_dilated" and weight == 1:
        numbers = operation.params["dimension_numbers"]
        if operation.params["feature_group_count"] != 1:
            return None
        _, into, *spatial = numbers.rhs_spec
        x, used = 0, {into, *spatial}
        own = [plain(size) for size in operation.ins[0].shape]
        own[numbers.lhs_spec[1]] = dims[into]
        ties = [p for i in spatial for p in varying(dims[i])]
    elif operation.name == "ragged_dot_general" and weight == 1 and _is_plain_ragged(operation):
        x, used = 0, {0, 1}
        own = [plain(operation.ins[0].shape[0]), dims[1]]
        ties = varying(dims[0])
    else:
        return None
    if any(varying(d) for i, d in enumerate(dims) if i not in used):
        return None
    labels: list[Label | None] = [None] * len(operation.ins)
    labels[weight] = Label(dims, Fraction(-1))
    labels[x] = Label(tuple(own))
    return Option(labels, ties)
