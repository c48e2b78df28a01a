"""Tunings tile what they are for, and fit."""

from __future__ import annotations

import pytest

from pallas_kernels import tuning
from pallas_kernels.tuning import SMEM_BYTES, SMS, TILE_N, split_k


@pytest.mark.parametrize("tiles", [1, 8, 32, 64, 131, 132, 448])
@pytest.mark.parametrize("steps", [1, 16, 32, 112])
def test_parts_are_whole_steps_and_as_many_as_fill_the_gpu(tiles, steps):
    parts = split_k(tiles, steps)
    assert steps % parts == 0
    assert tiles * parts >= SMS or parts == steps


@pytest.mark.parametrize("M", [1, 8, 9, 16, 32, 64, 65, 4096])
@pytest.mark.parametrize(
    ("bits", "group"),
    [(2, 64), (3, 128), (4, 32), (4, 64), (4, 128), (4, 384), (4, 512), (8, 4096)],
)
def test_weight_only_fits_any_shape(M, bits, group):
    for K, N in ((4096, 4096), (4608, 128), (128, 256)):
        t = tuning.weight_only(M, K, N, min(group, K), bits)
        assert K % (t.tile_k * t.split_k) == 0
        assert min(group, K) % t.tile_k == 0 or t.tile_k % group == 0
        buffers = t.stages * t.tile_k * (TILE_N * bits + t.tile_m * 16) // 8
        assert t.stages >= 2
        assert buffers + 4 * TILE_N * t.tile_m <= SMEM_BYTES


def test_scales_go_where_they_cost_least_or_else_where_they_are_exact():
    on = lambda bits, group, M: tuning.weight_only(M, 4096, 4096, group, bits).scale_on
    assert on(4, 128, 64) == on(4, 64, 16) == on(2, 128, 32) == on(8, 4096, 64) == "accumulator"
    assert on(4, 64, 64) == on(4, 32, 1) == on(2, 128, 64) == on(2, 32, 16) == "weight"


def test_tokens_are_tiled_by_the_first_row_that_is_large_enough():
    assert [tuning.weight_only(M, 4096, 4096).tile_m for M in (1, 8, 9, 17, 64, 65, 999)] == [
        8, 8, 16, 32, 64, 128, 128,
    ]  # fmt: skip


@pytest.mark.parametrize("experts", [1, 8, 64])
@pytest.mark.parametrize("M", [1, 16, 128, 2048])
def test_sums_of_experts_are_few_whatever_their_weights(M, experts):
    for K, N in ((4096, 4096), (7168, 2048), (28672, 128), (2048, 7168)):
        t = tuning.weight_only(M, K, N, experts=experts)
        assert t.split_k <= 8
        assert K % (t.tile_k * t.split_k) == 0
