"""Products with stacked weights agree with float64, and read the experts that have tokens alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import experts, interpreter, reference
from pallas_kernels.testing import Laws
from pallas_kernels.tuning import Tuning
from tests.pallas_kernels import test_weight_only as one

INT4 = {"w": "int4", "group": 128}
ZEROS = {"w": "int4", "group": 128, "zero": True}
NATURAL = {"w": "int8", "group": 128, "natural": True}
INT2 = {"w": "int8", "group": 128, "bits": 2}
_FOR_ALL = Tuning(8, 2, sms=8)  # one item for every CTA, so that races can be looked for


class TestExperts(Laws):
    formats: ClassVar = {
        "int4 groups of 128": INT4,
        "zero points": ZEROS,
        "int8 channels": {"w": "int8", "group": 256},
        "int8 in its natural order": {"w": "int8", "group": 256, "natural": True},
        "int8 zero points": {"w": "int8", "group": 128, "zero": True},
        "a codebook": {"w": "int4", "group": 64, "codebook": one.LEVELS},
        "fp8 in blocks": {"w": "float8_e4m3fn", "group": 128, "blocks": True},
        "powers of two": {"w": "int4", "group": 32, "codebook": one.E2M1, "scale": "uint8"},
    }

    def make(self, M, K, N, seed=0, *, sizes=None, **format):
        sizes = (0, M) if sizes is None else sizes  # in one tile, as the laws expect
        each = [one.TestWeightOnly().make(M, K, N, seed + e, **format) for e in range(len(sizes))]
        names = (
            ("w", "scale", "zero") if isinstance(each[0].get("zero"), jax.Array) else ("w", "scale")
        )
        stack = lambda *arrays: jnp.stack(arrays)
        stacked = {name: jax.tree.map(stack, *(a[name] for a in each)) for name in names}
        return each[0] | stacked | {"group_sizes": jnp.array(sizes, jnp.int32)}

    def run(self, arrays, *, tuning, interpret, product=experts.matmul):
        if arrays["scale"].dtype.itemsize == 1:
            tuning = dataclasses.replace(tuning, scale_on="weight")
        arrays = arrays | {"w": jnp.stack([one.in_order(**arrays | {"w": w}) for w in arrays["w"]])}
        return product(**arrays, out_dtype=jnp.float32, tuning=tuning, interpret=interpret)

    def exact(self, arrays):
        y, start = np.zeros((arrays["x"].shape[0], arrays["w"].shape[1])), 0
        for e, size in enumerate(np.asarray(arrays["group_sizes"])):
            rows = slice(start, start := start + size)
            stacked = {n: arrays[n] for n in ("w", "scale", "zero") if n in arrays}
            own = jax.tree.map(lambda a, e=e: a[e], stacked)
            own["x"] = arrays["x"][rows]
            y[rows] = one.TestWeightOnly().exact(arrays | own)
        return y

    @pytest.mark.parametrize("sizes", [(1, 0, 2), (9, 2), (0, 0, 3), (0, 0, 0)])
    def test_tokens_meet_their_experts_and_those_of_none_are_zero(self, sizes):
        M = 12
        arrays = self.make(M, 256, 128, sizes=sizes, **INT4)
        with interpreter.interpreting() as races:
            y = self.run(arrays, tuning=_FOR_ALL, interpret=interpreter.params())
            y = np.asarray(y, np.float64)
        np.testing.assert_allclose(y, self.exact(arrays), rtol=1e-4, atol=1e-4)
        assert not y[sum(sizes) :].any()
        assert not races.found

    def test_an_expert_without_tokens_has_no_part_in_the_result(self):
        arrays = self.make(3, 256, 128, sizes=(1, 0, 2), **INT4)
        arrays["scale"] = arrays["scale"].at[1].set(jnp.nan)
        assert self.error(arrays, _FOR_ALL)[0] <= self.budget

    def test_the_weights_of_another_expert_are_an_error(self, monkeypatch):
        original = experts.tiles_of

        def next_expert(*args):
            tiles = original(*args)
            return tiles._replace(experts=tiles.experts.at[:-1].set(tiles.experts[:-1] ^ 1))

        monkeypatch.setattr(experts, "tiles_of", next_expert)
        assert not self.error(self.make(3, 256, 128, sizes=(1, 2), **INT4), _FOR_ALL)[0] <= 0.01

    def test_a_tile_that_is_not_counted_is_an_error(self, monkeypatch):
        original = experts.tiles_of

        def fewer(*args):
            tiles = original(*args)
            return tiles._replace(experts=tiles.experts.at[-1].add(-1))

        monkeypatch.setattr(experts, "tiles_of", fewer)
        assert not self.error(self.make(3, 256, 128, sizes=(1, 2), **INT4), _FOR_ALL)[0] <= 0.01

    @pytest.mark.parametrize("weight", [INT4, ZEROS], ids=["int4", "zero points"])
    def test_a_batch_of_products_is_one_kernel_for_as_many_tokens_each(self, weight):
        arrays = self.make(6, 256, 128, sizes=(3, 3), **weight)
        batch = {name: arrays[name] for name in arrays if name not in ("x", "group_sizes")}
        with interpreter.interpreting():
            y = self.run(
                batch | {"x": arrays["x"].reshape(2, 3, -1)}, tuning=_FOR_ALL,
                interpret=interpreter.params(), product=experts.batched,
            )  # fmt: skip
            y = np.asarray(y.reshape(6, -1), np.float64)
        np.testing.assert_allclose(y, self.exact(arrays), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "weight",
        [INT4, ZEROS, INT2, NATURAL],
        ids=["int4", "zero points", "int2", "int8 in its natural order"],
    )
    def test_derivatives_meet_the_transposed_weight(self, weight):
        arrays = self.make(3, 128, 256, sizes=(1, 0, 2), **weight)
        arrays["x"] = jax.random.normal(jax.random.key(9), (3, 256), jnp.bfloat16)
        with interpreter.interpreting() as races:
            dx = self.run(
                arrays, tuning=dataclasses.replace(_FOR_ALL, scale_on="weight"),
                interpret=interpreter.params(),
                product=functools.partial(experts.matmul, transposed=True),
            )  # fmt: skip
            dx = np.asarray(dx, np.float64)
        plain = {"x": jnp.eye(128, dtype=jnp.bfloat16), "codebook": None}
        names = [name for name in ("w", "scale", "zero") if name in arrays]
        w = [
            one.TestWeightOnly().exact(plain | {name: arrays[name][e] for name in names})  # [K, N]
            for e in range(3)
        ]
        dy = np.asarray(arrays["x"], np.float64)
        wanted = np.stack([dy[0] @ w[0].T, dy[1] @ w[2].T, dy[2] @ w[2].T])
        assert np.linalg.norm(dx - wanted) <= 2.0**-9 * np.linalg.norm(wanted)
        assert not races.found

    @pytest.mark.parametrize("zero", [None, True])
    def test_the_reference_agrees_with_float64(self, zero):
        arrays = self.make(5, 64, 5, sizes=(1, 0, 3), w="int4", group=32, zero=zero)
        np.testing.assert_allclose(reference.experts(**arrays), self.exact(arrays), rtol=1e-5)

    def test_refuses_what_it_cannot_compute(self):
        arrays = self.make(8, 256, 128, **INT4)
        with pytest.raises(ValueError, match="one for each expert"):
            experts.matmul(**(arrays | {"group_sizes": jnp.array([8])}))
        with pytest.raises(ValueError, match="must be"):
            experts.matmul(**(arrays | {"scale": arrays["scale"][:1]}))


_tiles_of = jax.jit(experts.tiles_of, static_argnums=(1, 2))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=4, max_size=4), st.sampled_from([2, 8]))
def test_tiles_are_of_one_expert_and_hold_all_of_its_tokens(sizes, tile_m):
    M = 36
    tiles = jax.tree.map(np.asarray, _tiles_of(jnp.array(sizes), M, tile_m))
    *expert, count = tiles.experts
    owner = np.repeat(np.arange(len(sizes)), sizes)  # of each token
    assert count == sum(-(-size // tile_m) for size in sizes) <= len(expert)
    assert len(expert) == experts.most_tiles(M, len(sizes), tile_m)
    assert set(expert[:count]) == set(owner)  # no other weights are read
    np.testing.assert_array_equal(tiles.has_expert, np.arange(M) < len(owner))
    places = tiles.places[: len(owner)]
    np.testing.assert_array_equal(tiles.tokens[places], np.arange(len(owner)))
    np.testing.assert_array_equal(np.array(expert)[places // tile_m], owner)
    assert (places // tile_m < count).all()


def test_groups_of_more_tokens_than_there_are_stay_in_bounds():
    tiles = experts.tiles_of(jnp.array([40, 40]), 16, 8)
    assert tiles.experts[-1] == len(tiles.experts) - 1
    assert int(tiles.tokens.max()) == 15
    assert int(tiles.places.max()) < len(tiles.tokens)
