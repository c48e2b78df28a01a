"""Tests of qjax/summary.py: the numbers in the table are right, and it reads well."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.format import Format
from qjax.policy import Policy, Rule
from qjax.summary import sqnr_db


def tree():
    random = np.random.default_rng(0)
    kernels = random.normal(size=(3, 64, 32)).astype(np.float32)
    layers = [{"kernel": jnp.asarray(k), "bias": jnp.zeros(32)} for k in kernels]
    return {"layers": layers, "head": jnp.ones((64, 8), jnp.bfloat16)}


POLICY = Policy([Rule("*/kernel", Format("int4", 32, scale="bfloat16"))])


@pytest.fixture(scope="module")
def params():
    return tree()


@pytest.fixture(scope="module")
def report(params):
    return qjax.quantize(params, POLICY, return_report=True)[1]


def test_rows_and_totals(report):
    assert [r.path for r in report.rows] == [
        "head", "layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel",
        "layers/2/bias", "layers/2/kernel",
    ]  # fmt: skip
    kernel_bytes = 64 * 32 // 2 + 2 * 32 * 2
    t = report.totals
    assert t["leaves"], t["quantized_leaves"] == (7, 3)
    assert t["parameters"] == 3 * (64 * 32 + 32) + 64 * 8
    assert t["nbytes"] == 3 * (kernel_bytes + 32 * 4) + 64 * 8 * 2
    assert t["quantized_bits_per_weight"] == 4.5
    assert t["bits_per_weight"] == 8 * t["nbytes"] / t["parameters"]


def test_sqnr_is_that_of_the_definition(params, report):
    deq = qjax.dequantize(qjax.quantize(params, POLICY))
    for i, layer in enumerate(params["layers"]):
        w = np.asarray(layer["kernel"], np.float64)
        noise = np.asarray(deq["layers"][i]["kernel"]) - w
        want = 10 * math.log10((w**2).sum() / (noise**2).sum())
        assert report.rows[2 + 2 * i].sqnr_db == pytest.approx(want, abs=1e-3)


def test_sqnr_of_a_known_case():
    # 1 and 7 are levels of absmax / 7; 3.5 is half a step from one.
    w = jnp.array([[1.0], [7.0], [3.5]])
    report = qjax.quantize({"w": w}, Format("int4"), return_report=True)[1]
    assert report.rows[0].sqnr_db == pytest.approx(10 * math.log10((1 + 49 + 12.25) / 0.25))
    assert report.totals["min_sqnr_db"] == report.rows[0].sqnr_db


@pytest.mark.parametrize(
    ("signal", "noise", "db"), [(4, 0, math.inf), (0, 0, math.inf), (0, 1, -math.inf), (10, 1, 10)]
)
def test_sqnr_db(signal, noise, db):
    assert sqnr_db(signal, noise) == db


def test_lossless_is_infinite_and_valid_json():
    report = qjax.quantize({"w": 127 * jnp.eye(4)}, Format("int8"), return_report=True)[1]
    assert report.rows[0].sqnr_db == math.inf
    data = json.loads(report.to_json())
    assert data["rows"][0]["sqnr_db"] == "inf"
    assert data["totals"]["min_sqnr_db"] == "inf"


def test_json_holds_every_row(report):
    data = json.loads(report.to_json())
    assert [r["path"] for r in data["rows"]] == [r.path for r in report.rows]
    assert data["rows"][2]["shape"] == [64, 32]
    assert data["rows"][2]["format"] == "int4 g32 bf16"
    assert data["totals"] == report.totals


def test_layers_share_a_line_with_the_worst_of_their_errors(report):
    lines = str(report).splitlines()
    kernel = next(line for line in lines if line.startswith("layers/*/kernel"))
    worst = min(r.sqnr_db for r in report.rows if r.sqnr_db is not None)
    assert kernel.split() == [
        "layers/*/kernel", "3", "64x32", "int4", "g32", "bf16", "4.500", f"{worst:.1f}", "0.00",
    ]  # fmt: skip
    assert lines[-1].startswith("total")
    assert "4.500 bits/w where quantized" in lines[-1]
    assert "layers/1/kernel" in report.table(collapse=False)
    assert max(map(len, lines)) < 120


def test_without_a_reference_there_is_no_sqnr(params):
    q = qjax.quantize(params, POLICY)
    assert all(r.sqnr_db is None for r in qjax.summary(q).rows)
    assert qjax.summary(q).totals["min_sqnr_db"] is None
    assert qjax.summary(q, params) == qjax.quantize(params, POLICY, return_report=True)[1]


def test_a_plan_has_the_same_summary(params):
    q = qjax.quantize(params, POLICY)
    plan = jax.eval_shape(lambda p: qjax.quantize(p, POLICY), params)
    assert qjax.summary(plan) == qjax.summary(q)


def test_a_foreign_reference_is_refused(params):
    q = qjax.quantize(params, POLICY)
    with pytest.raises(ValueError, match=r"differ in \['head'\]"):
        qjax.summary(q, {"layers": params["layers"]})
    renamed = {"layers": params["layers"], "tail": params["head"]}
    with pytest.raises(ValueError, match=r"differ in \['head', 'tail'\]"):
        qjax.summary(q, renamed)


def test_notes_say_what_is_unusual():
    fmt = Format("int3", 32, remainder="ragged")
    rows = qjax.summary(qjax.quantize({"w": jnp.ones((76, 2))}, fmt)).rows
    assert rows[0].note == "last group 12, 4 padding codes"
