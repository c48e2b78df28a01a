"""The benchmark of solvers, on a small layer."""

import json

import numpy as np
import pytest

from qjax.ptq import bench

METHODS = ("RTN", "GPTQ, act-order", "ours")


def test_it_measures_and_compares(tmp_path, capsys):
    out = tmp_path / "solvers.json"
    bench.main(
        ["--sizes", "128", "--inputs", "outliers", "--formats", "int4-zp", "--repeats", "1",
         "--methods", *METHODS, "--out", str(out)]
    )  # fmt: skip
    report = json.loads(out.read_text())
    results = {r["method"]: r for r in report["results"]}
    assert tuple(results) == METHODS
    ours = results["ours"]
    assert ours["held_out"] < 0.85 * results["GPTQ, act-order"]["held_out"]
    assert ours["held_out"] < 0.3 * results["RTN"]["held_out"]
    assert 0 < ours["cpu_s_warm"] < ours["cpu_s_first"]
    assert report["gains"][0]["less_held_out_error"] > 0.15
    assert "ours" in capsys.readouterr().out


@pytest.mark.parametrize("inputs", bench.INPUTS)
def test_layers_are_seeded(inputs):
    one, two = (bench.make(inputs, 64, heavy_tails=True) for _ in range(2))
    np.testing.assert_array_equal(one.w, two.w)
    np.testing.assert_array_equal(one.H, two.H)
    # All rows are the parts together.
    np.testing.assert_allclose(
        one.H, (102 * one.H_fit + 26 * one.H_judge) / 128, rtol=1e-4, atol=1e-3
    )


def test_names_are_checked():
    with pytest.raises(ValueError, match="unknown format 'int5'"):
        bench.solvers(formats=["int5"])
