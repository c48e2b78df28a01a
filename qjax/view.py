"""View: a logical array over a stored weight, moved around without moving data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from qjax.layout import Axis, Layout


class Atom(NamedTuple):
    """An indivisible piece of an axis of the stored weight.

    Attributes:
      kind: "b" (stacked or batched), "k" (contracted) or "n" (kept).
      position: sorts the atoms of one kind from major to minor; (i,) splits into (i, 0), (i, 1).
      size: its length.
    """

    kind: str
    position: tuple[int, ...]
    size: int


class View:
    """A logical array whose axes are products of atoms of a stored weight.

    Transposing permutes `dims`, reshaping regroups the atoms; the stored `payload` (a QTensor, or
    whatever a transform keeps there) stays as it is. Atoms of size 1 are left out: an axis of size
    1 is an empty product.

    Attributes:
      payload: the stored weight, opaque to this module.
      dims: for each logical axis, its atoms from major to minor. Over all axes every atom of the
        payload occurs exactly once.
      dtype: the logical dtype.
      name: parameter path, for reports and errors.
    """

    __slots__ = ("dims", "dtype", "name", "payload")

    def __init__(self, payload: Any, dims: Sequence[tuple[Atom, ...]], dtype: Any, name: str):
        self.payload = payload
        self.dims = tuple(dims)
        self.dtype = dtype
        self.name = name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(a.size for a in dim) for dim in self.dims)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    def atoms(self, kind: str) -> list[Atom]:
        """Returns the atoms of one kind in stored order, major to minor."""
        return sorted(a for dim in self.dims for a in dim if a.kind == kind)

    def with_dims(self, dims: Sequence[tuple[Atom, ...]]) -> View:
        return View(self.payload, dims, self.dtype, self.name)

    def with_payload(self, payload: Any, dims: Sequence[tuple[Atom, ...]] | None = None) -> View:
        return View(payload, self.dims if dims is None else dims, self.dtype, self.name)

    def astype(self, dtype: Any) -> View:
        return View(self.payload, self.dims, dtype, self.name)

    # ---- structural moves: each returns a View, or None if it would have to move data ----

    def transpose(self, permutation: Sequence[int]) -> View:
        return self.with_dims([self.dims[i] for i in permutation])

    def reshape(self, shape: Sequence[int]) -> View | None:
        """Regroups the atoms, splitting one where a new axis ends inside it."""
        if math.prod(shape) != math.prod(self.shape):
            return None
        # Work on a copy of the atoms in which a split replaces one atom by two.
        pending = [a for dim in self.dims for a in dim][::-1]
        out = []
        for size in shape:
            dim, need = [], size
            while need > 1:
                atom = pending.pop()
                if need % atom.size == 0:
                    need //= atom.size
                elif atom.size % need == 0:
                    minor = Atom(atom.kind, (*atom.position, 1), atom.size // need)
                    pending.append(minor)
                    atom = Atom(atom.kind, (*atom.position, 0), need)
                    need = 1
                else:
                    return None
                dim.append(atom)
            out.append(tuple(dim))
        return self.with_dims(out)

    def squeeze(self, dimensions: Sequence[int]) -> View:
        return self.with_dims([d for i, d in enumerate(self.dims) if i not in dimensions])

    def broadcast_in_dim(self, shape: Sequence[int], dimensions: Sequence[int]) -> View | None:
        """Only new axes of size 1 keep every atom occurring once."""
        dims: list[tuple[Atom, ...]] = [()] * len(shape)
        for source, target in enumerate(dimensions):
            if self.shape[source] != shape[target]:
                return None
            dims[target] = self.dims[source]
        kept = set(dimensions)
        if any(size != 1 for i, size in enumerate(shape) if i not in kept):
            return None
        return self.with_dims(dims)

    def replace(self, axis: int, dim: tuple[Atom, ...], payload: Any) -> View:
        """Returns the view with one axis, and the payload, exchanged."""
        dims = [*self.dims[:axis], dim, *self.dims[axis + 1 :]]
        return View(payload, dims, self.dtype, self.name)


def view_of(
    payload: Any, lead: Sequence[int], layout: Layout, K: int, N: int, dtype: Any, name: str
) -> View:
    """Returns the view of a canonical weight [*lead, K, N] in its logical shape."""
    shape = layout.logical_shape(tuple(lead), K, N)
    n_stacked = len(shape) - len(layout)
    axes = [Axis("b", None)] * n_stacked + list(layout)
    counts = {"b": 0, "k": 0, "n": 0}
    dims = []
    for axis, size in zip(axes, shape, strict=True):
        position = counts[axis.kind]
        counts[axis.kind] += 1
        dims.append((Atom(axis.kind, (position,), size),) if size > 1 else ())
    return View(payload, dims, dtype, name)


class Contraction(NamedTuple):
    """How a `dot_general` uses a weight.

    Attributes:
      form: "forward", x @ W, contracts all of K; "transposed", x @ Wᵀ, contracts all of N.
      batched: b atoms that are batch axes of the dot, in stored order.
      summed: b atoms that are contracted as well.
    """

    form: str
    batched: list[Atom]
    summed: list[Atom]


def contraction(view: View, contracting: Sequence[int], batch: Sequence[int]) -> Contraction | None:
    """Returns how the given axes of `view` are used, or None if that is no product with W or Wᵀ."""
    contracted = {a for i in contracting for a in view.dims[i]}
    batched = {a for i in batch for a in view.dims[i]}
    if any(a.kind != "b" for a in batched):
        return None
    kinds = {kind: set(view.atoms(kind)) for kind in "bkn"}
    for form, kind in (("forward", "k"), ("transposed", "n")):
        other = "n" if kind == "k" else "k"
        if kinds[kind] <= contracted and not (contracted & kinds[other]):
            summed = contracted & kinds["b"]
            return Contraction(form, sorted(batched), sorted(summed))
    return None
