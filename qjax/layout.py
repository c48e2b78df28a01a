"""Layout: which axes of a logical array are contracted, and the order they are stored in."""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Array


class Axis(NamedTuple):
    """One logical axis: its kind, and its size unless that is read off the stored data.

    Kinds: "k" contracted, "n" kept (output features), "b" batched with the other operand (experts).
    The major axis of the k axes and of the n axes has size None, like every "b": a `scan` or a
    mesh may shorten it, so it must not be static. Axes of one kind merge in the order of their
    `rank`, and of their places where that is the same.
    """

    kind: str
    size: int | None
    rank: int = 0


class Layout(tuple[Axis, ...]):
    """The trailing logical axes of a quantized array; all axes before them are stacked.

    Written as letters: a Dense kernel is "kn", an embedding table used as `x @ E.T` is "nk",
    attention's input projection [D, H, Dh] "knn", its output projection [H, Dh, D] "kkn", a HWIO
    convolution "kkkn", experts [E, K, N] "bkn" (or just "kn": leading axes are stacked anyway).

    The canonical order is `[*stacked, *b, K, N]`, k axes merged to K and n axes to N in the order
    in which they stand.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, letters: str, shape: tuple[int, ...]) -> Layout:
        """Builds the layout of an array of the given shape.

        Raises:
          ValueError: if `letters` has other letters than k, n, b, has no k, or is longer than
            `shape`.
        """
        check_letters(letters)
        if len(letters) > len(shape):
            raise ValueError(f"layout {letters!r} has more axes than the shape {shape}.")
        # A leading b is a stacked axis like any other.
        while letters[0] == "b":
            letters = letters[1:]
        axes, seen = [], set()
        for kind, size in zip(letters, shape[len(shape) - len(letters) :], strict=True):
            static = kind != "b" and kind in seen
            axes.append(Axis(kind, size if static else None))
            seen.add(kind)
        return cls(axes)

    @property
    def letters(self) -> str:
        return "".join(a.kind for a in self)

    def indices(self, kind: str) -> list[int]:
        """Returns the positions of one kind of axis, from major to minor."""
        return sorted((i for i, a in enumerate(self) if a.kind == kind), key=lambda i: self[i].rank)

    def logical_shape(self, lead: tuple[int, ...], K: int, N: int) -> tuple[int, ...]:
        """Returns the logical shape of canonical `[*lead, K, N]`; lead ends with the b axes."""
        n_b = len(self.indices("b"))
        stacked, b = lead[: len(lead) - n_b], list(lead[len(lead) - n_b :])
        minor = {kind: math.prod(self[i].size or 1 for i in self.indices(kind)) for kind in "kn"}
        major = {"k": K // minor["k"], "n": N // minor["n"]}
        sizes = []
        for axis in self:
            if axis.kind == "b":
                sizes.append(b.pop(0))
            else:
                sizes.append(major[axis.kind] if axis.size is None else axis.size)
        return (*stacked, *sizes)

    def _order(self, ndim: int) -> list[int]:
        """Logical axes in canonical order: stacked, b, k, n."""
        n_stacked = ndim - len(self)
        order = self.indices("b") + self.indices("k") + self.indices("n")
        return [*range(n_stacked), *(n_stacked + i for i in order)]

    def to_canonical(self, w: Array) -> Array:
        """Returns `w` as [*stacked, *b, K, N]."""
        order = self._order(w.ndim)
        n_lead = w.ndim - len(self) + len(self.indices("b"))
        shape = [w.shape[i] for i in order]
        K = math.prod(shape[n_lead : n_lead + len(self.indices("k"))])
        N = math.prod(shape[n_lead + len(self.indices("k")) :])
        return w.transpose(order).reshape(*shape[:n_lead], K, N)

    def from_canonical(self, w: Array) -> Array:
        """Inverse of `to_canonical`."""
        *lead, K, N = w.shape
        shape = self.logical_shape(tuple(lead), K, N)
        order = self._order(len(shape))
        inverse = sorted(range(len(shape)), key=order.__getitem__)
        return w.reshape([shape[i] for i in order]).transpose(inverse)


def check_letters(letters: str) -> None:
    """Refuses what is no layout.

    Raises:
      ValueError: if `letters` has other letters than k, n, b, or has no k.
    """
    if not isinstance(letters, str) or set(letters) - set("knb") or "k" not in letters:
        raise ValueError(
            f"a layout is written with the letters k, n and b and has at least one k,"
            f" got {letters!r}."
        )


def flattened(G: int) -> Layout:
    """Returns the layout that keeps [G, C] as one vector, column after column."""
    return Layout([Axis("k", G, 1), Axis("k", None)])


# Without a traced function to look at, the convention of Flax kernels: last axis N, the one before
# K, all earlier ones stacked.
DEFAULT = "kn"
