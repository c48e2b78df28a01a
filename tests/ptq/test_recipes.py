"""Recipes end to end, through the front door, on a small network with outlier channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Format, Policy, Recipe, Rule
from qjax.ptq import statistics

D, H = 32, 48
INT3 = Format("int3", group_size=16)
W8A8 = Format("int8", group_columns=None, activation="int8", activation_scale="tensor")


def fn(params, x):
    """A norm before a gated unit; the gate's input can be folded, the last one's cannot."""
    h = x * params["norm"]
    h = jax.nn.silu(h @ params["gate"]) * (h @ params["up"])
    return jnp.tanh(h @ params["down"]) @ params["out"]


# The paper's GPTQ, quick to compile, where it is not the rounding that is in question.
PLAIN = {"damping": 0.03, "sweeps": 0, "refit": False, "asymmetric": False}


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 5)
    channels = jnp.where(jax.random.uniform(keys[4], (D,)) < 0.1, 30.0, 1.0)
    return {
        "norm": channels,
        "gate": jax.random.normal(keys[0], (D, H)) / channels[:, None] / 4,
        "up": jax.random.normal(keys[1], (D, H)) / channels[:, None] ** 0.5 / 4,
        "down": jax.random.normal(keys[2], (H, D)) / 6,
        "out": jax.random.normal(keys[3], (D, 8)) / 4,
    }


@pytest.fixture(scope="module")
def batches():
    return list(jax.random.normal(jax.random.key(7), (5, 96, D)))


def policy(fmt, **recipe):
    return Policy([Rule(("gate", "up", "down", "out"), fmt)], recipe=Recipe(**recipe))


def error(params, qparams):
    x = jax.random.normal(jax.random.key(11), (256, D))
    exact = fn(params, x)
    return float(jnp.sum((exact - qjax.apply(fn)(qparams, x)) ** 2) / jnp.sum(exact**2))


def quantize(params, batches, chosen):
    return qjax.quantize(params, chosen, fn=fn, calibration=batches, report=None)


def nearest(params, fmt):
    return qjax.quantize(params, Policy([Rule(("gate", "up", "down", "out"), fmt)]))


def test_awq_folds_where_it_can_and_says_where_it_cannot(params, batches):
    out, report = quantize(params, batches, policy(INT3, scaling="awq", rounding="nearest"))
    where = {line.weights: line.where for line in report.smoothed}
    assert where[("gate", "up")] == "folded into norm"
    assert where[("down",)] == "folded into up"
    assert where[("out",)].startswith("kept at the weights: ")
    assert out["out"].pre_scale is not None
    assert out["gate"].pre_scale is None
    assert all(line.after <= line.before for line in report.smoothed)
    assert error(params, out) < error(params, nearest(params, INT3))
    assert "folded into norm" in str(report)


def test_clipping_lowers_the_reported_error(params, batches):
    recipe = {"scaling": "awq", "rounding": "nearest"}
    _, plain = quantize(params, batches, policy(INT3, **recipe))
    _, clipped = quantize(params, batches, policy(INT3, clip=True, **recipe))
    for a, b in zip(clipped.solved, plain.solved, strict=True):
        assert a.final <= b.final * (1 + 1e-5)


def test_gptq_goes_on_from_awq(params, batches):
    smoothed, _ = quantize(params, batches, policy(INT3, scaling="awq", rounding="nearest"))
    solved, report = quantize(params, batches, policy(INT3, scaling="awq"))
    assert error(params, solved) < error(params, smoothed)
    assert solved["out"].pre_scale is not None
    assert len(report.smoothed) == 3
    assert len(report.solved) == 4


def test_smoothquant_takes_outliers_out_of_the_activations(params, batches):
    recipe = {"scaling": "smoothquant", "rounding": "nearest"}
    naive = error(params, nearest(params, W8A8))
    half, _ = quantize(params, batches, policy(W8A8, alpha=0.5, **recipe))
    found, report = quantize(params, batches, policy(W8A8, alpha=None, **recipe))
    assert error(params, half) < 0.5 * naive
    assert error(params, found) < 0.5 * naive
    assert all(line.after <= line.before for line in report.smoothed)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_static_steps_are_measured(params, batches, mode):
    static = Format("int8", activation="int8", activation_scale="static")
    rounding = {"sequential": "gptq", "parallel": "nearest"}[mode]
    out, _ = quantize(params, batches, policy(static, rounding=rounding, mode=mode, **PLAIN))
    # The input of gate and up: the largest magnitude of all calibration batches that do not judge.
    seen = jnp.concatenate([b for i, b in enumerate(batches) if i != 1]) * params["norm"]
    step = float(jnp.max(jnp.abs(seen))) / 127
    np.testing.assert_allclose(float(out["gate"].act_scale), step, rtol=1e-6)
    np.testing.assert_array_equal(out["gate"].act_scale, out["up"].act_scale)
    dynamic = Format("int8", activation="int8", activation_scale="tensor")
    assert error(params, out) < 1.5 * error(params, nearest(params, dynamic))


def test_a_percentile_is_a_smaller_step(params, batches):
    static = Format("int8", activation="int8", activation_scale="static")
    steps = [
        quantize(params, batches, policy(static, rounding="nearest", static=s))[0]["out"].act_scale
        for s in ("percentile", "absmax")
    ]
    assert 0 < float(steps[0]) <= float(steps[1])


def test_folded_parameters_come_back_in_the_tree(params, batches):
    out, _ = quantize(params, batches, policy(INT3, scaling="awq", rounding="nearest"))
    assert not np.array_equal(out["norm"], params["norm"])
    assert out["norm"].shape == params["norm"].shape
    # In floats nothing has changed: only rounding tells the two apart.
    fine = Format("int8", group_size=8)
    out, _ = quantize(params, batches, policy(fine, scaling="awq", rounding="nearest"))
    assert error(params, out) < 1e-3


def test_a_recipe_needs_its_data(params):
    with pytest.raises(qjax.QuantizationError, match="needs calibration data"):
        qjax.quantize(params, policy(INT3))


@pytest.mark.parametrize(
    "recipe",
    [
        {"scaling": "awq", "rounding": "nearest", "clip": True},
        {"scaling": "smoothquant", "rounding": "nearest"},
        {"mode": "parallel", **PLAIN},
    ],
)
def test_passes_that_fit_in_memory_give_what_one_gives(params, batches, recipe, monkeypatch):
    fmt = Format("int3", group_size=16, activation="int8", activation_scale="static")
    if recipe.get("scaling") != "smoothquant":
        fmt = INT3
    whole, report = quantize(params, batches, policy(fmt, **recipe))
    gathered = []
    calibrate = statistics.calibrate

    def counting(*args, **kwargs):
        gathered.append(sorted(kwargs["paths"]))
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(statistics, "calibrate", counting)
    monkeypatch.setattr(statistics, "BYTES", 1)
    parts, by_parts = quantize(params, batches, policy(fmt, **recipe))
    assert max(len(paths) for paths in gathered) < 4  # an activation at a time
    assert {path for paths in gathered for path in paths} == {"gate", "up", "down", "out"}
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert [s.path for s in report.solved] == [s.path for s in by_parts.solved]
