"""Tunings tile what they are for, and fit."""

from __future__ import annotations

import pytest

from pallas_kernels import tuning
from pallas_kernels.tuning import SMEM_BYTES, SMS, TILE_N, cut


@pytest.mark.parametrize("tiles", [1, 8, 32, 64, 131, 132, 448])
@pytest.mark.parametrize("steps", [1, 16, 32, 112])
def test_parts_are_whole_steps_and_as_many_as_fill_the_gpu(tiles, steps):
    _, parts = cut(tiles, steps)
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


@pytest.mark.parametrize("out_bits", [16, 32])
@pytest.mark.parametrize("M", [1, 64, 129, 512, 1024, 4096])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (8, 128), (4, 128)])
def test_eight_bit_fits_any_shape(M, bits, group, out_bits):
    for K, N in ((4096, 4096), (4608, 128), (128, 256), (4096, 28672)):
        t = tuning.eight_bit(M, K, N, bits, group, out_bits)
        assert K % (t.tile_k * t.split_k) == 0
        buffers = t.stages * t.tile_k * (TILE_N * bits + t.tile_m * 8) // 8
        out = TILE_N * min(t.tile_m, 128) * (out_bits if t.split_k == 1 else 32) // 8
        assert t.stages >= 2
        assert buffers + out <= SMEM_BYTES


def test_a_tile_is_wide_where_nothing_is_decoded_and_the_gpu_stays_full():
    tile_m = lambda *args: tuning.eight_bit(*args).tile_m
    assert tile_m(1024, 4096, 28672) == tile_m(4096, 4096, 4096) == 256
    assert tile_m(1024, 4096, 28672, 4) == tile_m(1024, 4096, 28672, 8, 128) == 128
    assert tile_m(128, 4096, 28672) == tile_m(384, 4096, 28672) == 128  # no tokens more
    assert tile_m(512, 4096, 4096) == 128  # 64 tiles of 256 would leave half of it idle


@pytest.mark.parametrize("experts", [1, 8, 64])
@pytest.mark.parametrize("M", [1, 16, 128, 2048])
def test_sums_of_experts_are_few_whatever_their_weights(M, experts):
    for K, N in ((4096, 4096), (7168, 2048), (28672, 128), (2048, 7168)):
        t = tuning.weight_only(M, K, N, experts=experts)
        assert t.split_k <= 8
        assert K % (t.tile_k * t.split_k) == 0
