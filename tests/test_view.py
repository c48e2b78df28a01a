"""Views move logical axes about as NumPy moves data, without moving any."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.layout import Layout
from qjax.ops.weight import rearrange_from_stored
from qjax.view import contraction, view_of


def make(shape, letters):
    """Returns a view of an array and the array."""
    w = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    layout = Layout.parse(letters, shape)
    canonical = layout.to_canonical(w)
    *lead, K, N = canonical.shape
    return view_of(canonical, lead, layout, K, N, w.dtype, "w"), w


def assert_same(view, w):
    assert view.shape == w.shape
    assert np.array_equal(rearrange_from_stored(view.payload, view), w)


@pytest.mark.parametrize(
    ("shape", "letters"),
    [((4, 6), "kn"), ((4, 6), "nk"), ((3, 4, 6), "kn"), ((4, 2, 6), "knn"), ((2, 4, 6), "kkn"),
     ((2, 3, 4, 6), "kkkn"), ((4, 3, 6), "kbn"), ((1, 4, 1), "kkn"), ((2, 6, 4, 5), "nkkn")],
)  # fmt: skip
def test_a_view_is_its_logical_array(shape, letters):
    assert_same(*make(shape, letters))


@st.composite
def moves(draw):
    """A view, the array it stands for, and both after a few transposes and reshapes."""
    letters = draw(st.sampled_from(["kn", "nk", "knn", "kkn", "kbn", "nkb"]))
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 4, 6, 12]), min_size=len(letters),
                                max_size=len(letters) + 1)))  # fmt: skip
    view, w = make(shape, letters)
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["transpose", "merge", "split", "squeeze", "expand"]))
        axis = draw(st.integers(0, max(0, w.ndim - 1)))
        if kind == "transpose":
            order = draw(st.permutations(range(w.ndim)))
            view, w = view.transpose(order), w.transpose(order)
            continue
        new = list(w.shape)
        if kind == "merge" and w.ndim > axis + 1:
            new[axis : axis + 2] = [new[axis] * new[axis + 1]]
        elif kind == "split" and w.ndim and new[axis] % 2 == 0:
            new[axis : axis + 1] = draw(st.sampled_from([[2, new[axis] // 2], [new[axis] // 2, 2]]))
        elif kind == "squeeze" and w.ndim and new[axis] == 1:
            view, w = view.squeeze([axis]), w.squeeze(axis)
            continue
        elif kind == "expand":
            new.insert(axis, 1)
        moved = view.reshape(new)
        if moved is not None:  # None: the split falls inside two atoms that do not nest
            view, w = moved, w.reshape(new)
    return view, w


@given(moves())
def test_moves_are_those_of_numpy(case):
    assert_same(*case)


def test_a_split_that_atoms_do_not_follow_is_refused():
    view, _ = make((4, 6), "kn")
    assert view.reshape((6, 4)) is None  # 6 = 4 * 1.5
    assert view.reshape((5, 5)) is None  # another size
    assert view.reshape((8, 3)) is not None  # 4 and 2 of the 6


def test_broadcasts_may_add_axes_of_size_one_only():
    view, w = make((4, 6), "kn")
    assert_same(view.broadcast_in_dim((1, 4, 1, 6), (1, 3)), w[None, :, None])
    assert view.broadcast_in_dim((2, 4, 6), (1, 2)) is None


def test_contractions():
    view, _ = make((3, 4, 2, 6), "knn")  # [stacked, K, N, N]
    forward = contraction(view, [1], [0])
    assert (forward.form, len(forward.batched), forward.summed) == ("forward", 1, [])
    transposed = contraction(view, [2, 3], [])
    assert (transposed.form, transposed.batched) == ("transposed", [])
    summed = contraction(view, [0, 1], [])
    assert (summed.form, len(summed.summed)) == ("forward", 1)
    assert contraction(view, [2], []) is None  # part of N
    assert contraction(view, [1, 2, 3], []) is None  # all of it
    assert contraction(view, [2, 3], [1]) is None  # batched along K
    split = view.reshape((3, 2, 2, 2, 6))
    assert contraction(split, [1], []) is None  # half of K
    assert contraction(split, [2, 1], []).form == "forward"


def test_a_view_keeps_its_name_and_dtype():
    view, _ = make((4, 6), "kn")
    moved = view.transpose((1, 0)).reshape((2, 3, 4)).astype(jnp.bfloat16)
    assert (moved.name, moved.dtype) == ("w", jnp.bfloat16)
    assert moved.payload is view.payload
