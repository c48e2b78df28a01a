"""The harness that times products: on a CPU, with tiny shapes; no time is judged."""

from __future__ import annotations

import functools
import json

import jax.numpy as jnp
import pytest

from pallas_kernels import timing
from pallas_kernels.timing import FORMS, Contender, contenders

BY_NAME = {f.name: f for f in FORMS}
measure = functools.partial(timing.measure, enough_us=0)  # each weight once


@pytest.mark.parametrize("name", BY_NAME)
def test_every_form_of_xla_computes_the_product(name):
    form = BY_NAME[name]
    rows = list(measure(form, 4, 256, 128, entries=contenders(form, None), rounds=2, l2_bytes=1e5))
    assert len(rows) == len(contenders(form, None))
    for row in rows:
        assert "failed" not in row
        assert 0 < row["us_25"] <= row["us"] <= row["us_75"]
        # Results are bfloat16; weights that are dequantized first are rounded once more, or twice.
        assert row["error"] is None or row["error"] <= 3 * 2.0**-9
        assert row["weights"] >= 2
    assert any(row["error"] is not None for row in rows)


def test_weights_are_rotated_through_twice_the_cache():
    form = BY_NAME["W8A16"]
    for row in measure(form, 1, 256, 64, entries=contenders(form, None), rounds=1, l2_bytes=1e5):
        per_weight = 2 if row["contender"] == "bfloat16 dot" else 1
        assert row["weights"] * 256 * 64 * per_weight >= 2 * 1e5 * 0.99


def test_one_that_fails_is_a_row_and_the_others_go_on():
    def fail(*_):
        raise RuntimeError("no such instruction")

    form = BY_NAME["W8A16"]
    broken = Contender("broken", lambda w, s: (w, s), fail)
    rows = list(measure(form, 2, 128, 32, entries=[broken, *contenders(form, None)], rounds=1))
    assert rows[0]["failed"] == "RuntimeError: no such instruction"
    assert [("us" in row) for row in rows] == [False, True, True, True]


def test_a_wrong_product_has_an_error():
    form = BY_NAME["W8A16"]
    wrong = Contender("wrong", lambda w, s: (w,), lambda x, _, w: jnp.dot(x, w.T.astype(x.dtype)))
    (row,) = measure(form, 2, 128, 32, entries=[wrong], rounds=1)
    assert row["error"] > 0.1


def test_times_of_kernels_are_those_of_a_product(monkeypatch):
    def measured(run, *, aggregate):
        assert not aggregate

        def call(*args):
            launched = [(f"product_{i}", 0.002) for i in range(len(run(*args)))]
            return None, [*launched, ("pad.1", 0.003), ("pad.7", 0.003)]

        return call

    monkeypatch.setattr(timing.profiler, "measure", measured)
    form = BY_NAME["W8A16"]
    (entry,) = [e for e in contenders(form, None) if e.name == "bfloat16 dot"]
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    (row,) = measure(form, 2, 128, 32, entries=[entry], rounds=1, l2_bytes=1e4)
    products = 0.006 / (row["kernels"]["pad"] / 1e3)
    assert row["kernels"]["product"] == pytest.approx(2.0)
    assert row["kernel_us"] == pytest.approx(2.0 + 6.0 / products)
    assert products >= row["weights"] >= 2


def test_gpus_get_their_kernel_and_others_none():
    first = lambda form, capability: contenders(BY_NAME[form], capability)[0].name
    assert first("W4A16 g128", 90) == first("FP8", 90) == "Mosaic kernel"
    assert first("FP8", 80) == first("W4A16 g128", None) == "bfloat16 dot"


def test_the_program_writes_lines_of_json(tmp_path, capsys, monkeypatch):
    out = tmp_path / "t.jsonl"
    args = ["--out", str(out), "--forms", "W8A8", "--tokens", "1", "2", "--shapes", "128x32"]
    with pytest.raises(SystemExit):
        timing.main(args)
    assert "no GPU" in capsys.readouterr().err
    monkeypatch.setattr(timing, "measure", measure)
    timing.main([*args, "--any-device", "--rounds", "1", "--l2-bytes", "1e4"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["M"], row["contender"]) for row in rows] == [
        (M, name) for M in (1, 2) for name in ("bfloat16 dot", "XLA, int8 dot")
    ]
    assert all(row["device"] == "cpu" and row["capability"] is None for row in rows)
