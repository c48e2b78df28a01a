"""usage: how a function consumes each of its parameters - contracted, kept and stacked axes."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from qjax.paths import check_unique, path_str
from qjax.tables import align
from qjax.transform import walk
from qjax.transform.trace import logical, take_apart, trace
from qjax.view import Atom, View

# The kinds of a parameter's axes are what we want to find out.
_UNKNOWN = "?"


@dataclasses.dataclass(frozen=True)
class Consumption:
    """One way in which a parameter is consumed.

    Attributes:
      op: the JAX operation.
      letters: a letter for each axis of the parameter: k contracted, n kept, b stacked (sliced by a
        scan or batched with the other operand), "." not seen (of size 1); "" if the operation is no
        contraction and no lookup.
    """

    op: str
    letters: str


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What a function does with one parameter.

    Attributes:
      path, shape: of the parameter.
      consumptions: the distinct ways, in the order of the trace.
    """

    path: str
    shape: tuple[int, ...]
    consumptions: tuple[Consumption, ...]

    @property
    def layout(self) -> str | None:
        """The layout in which to quantize it, e.g. "kn"; None if it is no weight of a product.

        A table that is looked up and also multiplied (a tied embedding) follows the product; of two
        products that disagree the first decides.
        """
        ordered = sorted(self.consumptions, key=lambda c: c.op == "gather")
        letters = next((c.letters for c in ordered if c.letters), None)
        if letters is None:
            return None
        if "k" not in letters:  # an axis of size 1 is contracted without a trace
            letters = letters.replace(".", "k", 1)
        if "k" not in letters:
            return None
        return letters.replace(".", "n")

    @property
    def is_multiplied(self) -> bool:
        """Whether it is a weight of a product, and not only looked up."""
        return self.layout is not None and any(
            c.letters and c.op != "gather" for c in self.consumptions
        )

    @property
    def note(self) -> str:
        """What a reader should know: why it is no weight, or that its uses disagree."""
        if not self.consumptions:
            return "not used by the traced function"
        layouts = {c.letters for c in self.consumptions if c.letters and c.op != "gather"}
        if len(layouts) > 1:
            return f"contracted in different ways: {', '.join(sorted(layouts))}"
        if self.layout is None:
            ops = ", ".join(dict.fromkeys(c.op for c in self.consumptions))
            return f"no weight of a product: used by {ops}"
        return ""


class Usage:
    """How a function consumes each leaf of its first argument. Prints as a table."""

    def __init__(self, parameters: dict[str, Parameter]):
        self.parameters = parameters

    def __getitem__(self, path: str) -> Parameter:
        try:
            return self.parameters[path]
        except KeyError:
            raise ValueError(
                f"{path}: the traced function has no such parameter. `usage` must be traced with"
                f" the same tree that is quantized; it has {', '.join(list(self.parameters)[:4])},"
                " ..."
            ) from None

    def layout(self, path: str) -> str | None:
        """Returns the layout letters of a parameter, or None if it is no weight."""
        return self[path].layout

    def why_not(self, path: str) -> str:
        """Returns why a parameter has no layout."""
        return self[path].note

    def to_dict(self) -> dict[str, Any]:
        return {
            p.path: {
                "shape": list(p.shape),
                "layout": p.layout,
                "consumptions": [dataclasses.asdict(c) for c in p.consumptions],
                "note": p.note,
            }
            for p in self.parameters.values()
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [("parameter", "shape", "layout", "used by", "note")]
        for p in self.parameters.values():
            ops = ", ".join(dict.fromkeys(c.op for c in p.consumptions))
            lines.append((p.path, "x".join(map(str, p.shape)), p.layout or "-", ops, p.note))
        return "\n".join(align(lines))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["ndim"])
@dataclasses.dataclass(frozen=True)
class _Tracked:
    """A float parameter, or what a scan or a shard has left of it.

    `ndim` is that of the whole parameter, so `ndim - array.ndim` leading axes are gone.
    """

    array: Any
    ndim: int


def _view(w: Any, name: str) -> View:
    dims = [
        (Atom(_UNKNOWN, (axis,), size),) if size > 1 else () for axis, size in enumerate(w.shape)
    ]
    return View(_Tracked(w, w.ndim), dims, w.dtype, name)


def _array(view: View) -> Any:
    """Returns the float array of a view."""
    stored = view.atoms(_UNKNOWN)
    logical = [a for dim in view.dims for a in dim]
    w = view.payload.array.reshape([a.size for a in stored])
    w = w.transpose([stored.index(a) for a in logical]).reshape(view.shape)
    return w.astype(view.dtype)


class _Recorder(walk.Handler):
    def __init__(self):
        self.seen: dict[str, dict[Consumption, None]] = {}
        # Axes of which every device has a single entry, inside a shard_map.
        self.one_each: dict[str, set[int]] = {}

    def record(self, view: View, op: str, kinds: dict[int, str] | None = None) -> None:
        """Notes a use; `kinds` maps axes of the view to letters, the others are kept."""
        letters = ""
        if kinds is not None:
            payload = view.payload
            of = ["."] * payload.ndim
            of[: payload.ndim - payload.array.ndim] = "b" * (payload.ndim - payload.array.ndim)
            for axis, dim in enumerate(view.dims):
                letter = kinds.get(axis, "n")
                for atom in dim:
                    root = atom.position[0]
                    if of[root] not in (".", letter):  # part of an axis is contracted, part kept
                        return self.record(view, op)
                    of[root] = letter
            if "k" in of:  # one expert each
                alone = self.one_each.get(view.name, ())
                of = ["b" if c == "." and i in alone else c for i, c in enumerate(of)]
            letters = "".join(of)
        self.seen.setdefault(view.name, {})[Consumption(op, letters)] = None

    def materialize(self, view, primitive, why):
        self.record(view, primitive)
        return _array(view)

    def contraction(self, view, contracting, batch) -> Any:
        return dict.fromkeys(contracting, "k") | dict.fromkeys(batch, "b")

    def dot_general(self, view, x, how: Any, *, weight_first, x_axes, w_axes, params):
        self.record(view, "dot_general", how)
        operands = (_array(view), x) if weight_first else (x, _array(view))
        return lax.dot_general(
            *operands,
            params["dimension_numbers"],
            preferred_element_type=params["preferred_element_type"],
        )

    def conv(self, view, x, params):
        out = params["dimension_numbers"].rhs_spec[0]
        kinds = {i: "n" if i == out else "k" for i in range(view.ndim)}
        self.record(view, "conv_general_dilated", kinds)
        return lax.conv_general_dilated_p.bind(x, _array(view), **params)

    def ragged_dot(self, view, x, group_sizes, params):
        self.record(view, "ragged_dot", {0: "b", 1: "k", 2: "n"})
        return lax.ragged_dot_general(x, _array(view), group_sizes, **params)

    def gather(self, view, axis, indices, params):
        self.record(view, "gather", {i: "n" if i == axis else "k" for i in range(view.ndim)})
        others = [size for i, size in enumerate(view.shape) if i != axis]
        return lax.full((*indices.shape, *others), 0, view.dtype)

    def take_axis(self, view, axis, take, size):
        if len(view.dims[axis]) != 1:
            return None
        (atom,) = view.dims[axis]
        stored = view.atoms(_UNKNOWN)
        sizes = [a.size for a in stored]
        array = take(view.payload.array.reshape(sizes), stored.index(atom))
        # Back to one axis for each axis of the parameter that is left.
        gone = view.payload.ndim - view.payload.array.ndim
        shape = [1] * view.payload.array.ndim
        for a in stored:
            shape[a.position[0] - gone] *= size if a == atom else a.size
        payload = dataclasses.replace(view.payload, array=array.reshape(shape))
        dim = (atom._replace(size=size),) if size > 1 else ()
        return view.replace(axis, dim, payload)

    def shard(self, view, spec, mesh):
        payload, stored = view.payload, view.atoms(_UNKNOWN)
        gone = payload.ndim - payload.array.ndim
        entries: list[Any] = [None] * payload.array.ndim
        dims = list(view.dims)
        for axis, entry in enumerate(spec):
            names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            if not names:
                continue
            if not dims[axis]:
                return None
            atom, *minor = dims[axis]
            parts = math.prod(mesh.shape[name] for name in names)
            root = atom.position[0]
            is_major = atom == next(a for a in stored if a.position[0] == root)
            if atom.size % parts or not is_major:
                return None
            entries[root - gone] = names
            if view.shape[axis] == parts:
                self.one_each.setdefault(view.name, set()).add(root)
            local = (atom._replace(size=atom.size // parts),) if atom.size > parts else ()
            dims[axis] = (*local, *minor)
        specs = dataclasses.replace(payload, array=PartitionSpec(*entries))
        return specs, view.with_dims(dims)

    def unstack(self, view):
        size = view.payload.array.shape[0]
        if not view.dims or size == 1:
            return bool(view.dims) and not view.dims[0]
        first = view.atoms(_UNKNOWN)[0]
        return view.dims[0] == (first,) and first.size == size


def usage(fn: Callable) -> Callable[..., Usage]:
    """Returns a function of fn's arguments that says how fn consumes each leaf of the first one.

    An abstract trace; nothing is computed, and arguments may be ShapeDtypeStructs or quantized. It
    looks through jit, scan, remat, cond, transposes and reshapes. Pass the result to `quantize`: it
    then knows the contracted axes of every kernel, whatever its name and shape, and leaves alone
    what is never multiplied.

    Example:
      >>> import jax.numpy as jnp
      >>> def fn(p, tokens):
      ...     return p["embed"][tokens] @ p["embed"].T * p["scale"]
      >>> p = {"embed": jnp.zeros((7, 4)), "scale": jnp.zeros(7)}
      >>> used = usage(fn)(p, jnp.zeros(3, int))
      >>> used.layout("embed"), used.layout("scale"), used.why_not("scale")
      ('nk', None, 'no weight of a product: used by mul')
    """

    @functools.wraps(fn)
    def used(params, *args, **kwargs) -> Usage:
        call = take_apart((params, *args), kwargs)
        call = call._replace(leaves=[logical(leaf) for leaf in call.leaves])
        recorder = _Recorder()
        # Names under the first positional argument start with "0/".
        own = {i for i, path in enumerate(call.paths) if path[0].idx == 0 and path[1].idx == 0}
        names = [path_str(path[2:]) for path in call.paths]
        check_unique(names[i] for i in own)

        def run(*leaves):
            jaxpr, consts, _ = trace(fn, call._replace(leaves=list(leaves)))
            values = [
                _view(leaf, name) if i in own and leaf.ndim else leaf
                for i, (leaf, name) in enumerate(zip(leaves, names, strict=True))
            ]
            out = walk.evaluate(recorder, jaxpr, consts, values)
            return [
                recorder.materialize(v, "return", "") if isinstance(v, View) else v for v in out
            ]

        jax.eval_shape(run, *call.leaves)
        return Usage(
            {
                names[i]: Parameter(
                    names[i],
                    tuple(call.leaves[i].shape),
                    tuple(recorder.seen.get(names[i], ())),
                )
                for i in sorted(own)
            }
        )

    return used
