"""Predictions are what bytes and instructions say."""

from __future__ import annotations

import collections

import pytest

from pallas_kernels import bench, h100, tuning
from pallas_kernels.bench import FORMS, Form


def _kernel(instructions):
    loop = collections.Counter(FFMA=instructions)
    products = collections.Counter()
    return h100.Kernel("", "ptxas", 168, 0, 0, 0, (), products, (loop, loop))


def test_a_kernel_of_few_instructions_is_bound_by_its_bytes(monkeypatch):
    monkeypatch.setattr(bench, "compiled", lambda form, tile: _kernel(1))
    row = bench.predict(Form("W8A8", "int8", "int8", None, "float32"), 16, 4096, 4096)
    assert row["bound"] == "memory"
    assert row["bytes"] == 4096 * 4096 + 4 * 4096 + 16 * 4096 + 2 * 16 * 4096
    assert row["us"] == pytest.approx(1e6 * row["bytes"] / 3.35e12)
    assert row["expected us"] > row["us"] + bench.LAUNCH_US


def test_one_of_many_is_bound_by_their_issue(monkeypatch):
    monkeypatch.setattr(bench, "compiled", lambda form, tile: _kernel(64 * tile.tile_k))
    row = bench.predict(FORMS[0], 16, 4096, 4096)  # 128 instructions a weight, one a clock
    assert row["bound"] == "issue"
    inputs = 2 * 4096 // row["split_k"]  # 256 items on 132 SMs are two rounds
    assert row["us"] == pytest.approx(1e6 * inputs * 128 / 1.83e9)
    assert "issue" in bench.table([{"model": "m"} | row | {"xla us": 1.0, "bfloat16 us": 1.0}])


def test_many_tokens_are_a_table_of_their_own_with_the_largest_product_of_each_form(monkeypatch):
    monkeypatch.setattr(bench, "compiled", lambda form, tile: _kernel(100))
    lines = bench.prompt_table(bench.static((1024,))).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [form.name for form in FORMS]
    assert "| W8A8 | 256 | 1.56 | 0.20 |" in lines  # 100 / (64 x 128 x 256 / 4096)
    assert "| W4A16 g128 | 128 | 1.56 | 0.20 |" in lines


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("M", bench.TOKENS)
def test_every_decode_shape_of_every_form_fills_the_gpu(form, M):
    for K, N in (shape for shapes in bench.SHAPES.values() for shape in shapes):
        t = bench.tuning_of(form, M, K, N)
        assert -(-M // t.tile_m) * (N // tuning.TILE_N) * t.split_k >= tuning.SMS
        in_flight = t.stages * tuning.TILE_N * t.tile_k * form.for_tokens(M).bits // 8
        assert in_flight >= 32 * 1024  # bytes of an SM whose buffers are waited for


@pytest.mark.h100
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_can_draw_the_bandwidth_at_sixteen_tokens(form):
    for M in (1, 16):
        for K, N in bench.SHAPES["Llama-3 8B"]:
            assert bench.predict(form, M, K, N)["roofline"] >= 0.95
