"""Every step of every tile is computed once, evenly, and its sums are added once."""

from __future__ import annotations

import collections

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import shares
from pallas_kernels.shares import Share
from pallas_kernels.tuning import Tuning


@st.composite
def grids(draw):
    split = draw(st.sampled_from([1, 2, 3, 4, 8]))
    steps = split * draw(st.integers(1, 4))
    tiles, most = draw(st.integers(1, 40)), draw(st.integers(0, 8))
    ctas = min(draw(st.integers(1, 132)), (tiles + most) * split)
    return ctas, tiles, steps, split


@settings(max_examples=200)
@given(grids())
def test_every_step_of_every_tile_is_computed_once_and_has_a_sum_of_its_own(grid):
    ctas, tiles, steps, split = grid
    computed, sums = collections.Counter(), collections.defaultdict(set)
    busy = []
    for cta in range(ctas):
        share = Share(cta, ctas, tiles, steps, split)
        count, walked = int(share.count), []
        for i in range(int(share.fragments)):
            tile, part, (first, end) = int(share.tile(i)), int(share.part(i)), share.bounds(i)
            assert part not in sums[tile]
            sums[tile].add(part)
            walked += [(tile, k) for k in range(int(first), int(end))]
        # Who loads counts the same steps as who computes.
        assert walked == [tuple(map(int, share.step(i))) for i in range(count)]
        computed.update(walked)
        busy.append(count)
    assert computed == {(t, k): 1 for t in range(tiles) for k in range(steps)}
    assert max(busy) - min(busy) <= steps // split  # a piece more, of a tile if it is not cut
    for tile, parts in sums.items():
        n = int(Share(0, ctas, tiles, steps, split).parts(np.array(tile)))
        assert parts == set(range(n))
        assert n <= split


def test_sums_are_added_where_there_are_some():
    tuning, sizes = Tuning(8, 2, tile_k=128, split_k=4, sms=3), (16, 512, 256)
    share = shares.share_of(tuning, sizes)
    parts = shares.most_parts(tuning, sizes)
    sums = np.full((parts, 16, 256), np.nan, np.float32)
    wanted = np.zeros((16, 256), np.float32)
    for tile in range(4):
        n, m = divmod(tile, 2)
        for part in range(int(share.parts(np.array(tile)))):
            at = slice(m * 8, m * 8 + 8), slice(n * 128, n * 128 + 128)
            sums[part][at] = part + tile + 1
            wanted[at] += part + tile + 1
    assert np.isnan(sums).any()  # of tiles on fewer CTAs than others
    np.testing.assert_array_equal(shares.added(jnp.asarray(sums), share, 8), wanted)
