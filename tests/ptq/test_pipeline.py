"""Laws of quantization with data, through the front door."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax

INT4 = qjax.Format("int4", group_size=16)
D, LAYERS = 32, 2


def fn(params, tokens):
    """A tied embedding around stacked layers."""
    x = params["embed"][tokens]

    def layer(x, w):
        return x + jnp.tanh(nn.silu(x @ w["up"]) @ w["down"]), None

    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["embed"].T


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        # Few directions carry most of the input: what GPTQ exploits.
        "embed": jax.random.normal(keys[0], (50, D)) * jnp.exp(-jnp.arange(D) / 6),
        "layers": {
            "up": jax.random.normal(keys[1], (LAYERS, D, 64)) / 6,
            "down": jax.random.normal(keys[2], (LAYERS, 64, D)) / 8,
        },
    }


@pytest.fixture(scope="module")
def batches():
    tokens = np.random.default_rng(0).integers(0, 50, (6, 4, 16))
    return [jnp.asarray(t) for t in tokens]


@pytest.fixture(scope="module")
def solved(params, batches):
    policy = qjax.Policy([qjax.Rule("layers/*", INT4)])
    return policy, *qjax.quantize(params, policy, fn=fn, calibration=batches, report=None)


def error(params, qparams, tokens):
    exact, quantized = fn(params, tokens), qjax.apply(fn)(qparams, tokens)
    return float(jnp.sum((exact - quantized) ** 2))


def test_the_outputs_are_nearer_than_those_of_rounding(params, solved):
    policy, qparams, _ = solved
    rtn = qjax.quantize(params, policy, usage=qjax.usage(fn)(params, jnp.zeros((1, 2), int)))
    unseen = jnp.asarray(np.random.default_rng(9).integers(0, 50, (8, 16)))
    assert error(params, qparams, unseen) < 0.8 * error(params, rtn, unseen)


def test_the_storage_is_that_of_rounding(params, solved):
    policy, qparams, _ = solved
    rtn = qjax.quantize(params, policy)
    assert jax.tree.structure(qparams) == jax.tree.structure(rtn)
    assert qparams["embed"] is params["embed"]


def test_the_report_says_what_happened(solved):
    _, _, report = solved
    rows = {s.path: s for s in report.solved}
    assert set(rows) == {f"layers/{name}[{i}]" for name in ("up", "down") for i in range(LAYERS)}
    for row in rows.values():
        assert row.final <= row.gptq
        assert row.held_out < row.held_out_rtn
        assert row.rows == 5 * 4 * 16  # one batch of six is held out
    assert len(json.loads(report.to_json())["solved"]) == 4
    assert "layers/up[0]" in str(report)


def test_the_report_explains_an_error_below_zero(solved):
    report = solved[-1]
    below = dataclasses.replace(report.solved[0], held_out=-0.1)
    said = "makes up for errors of the weights before it"
    assert said in str(dataclasses.replace(report, solved=(below,)))
    above = dataclasses.replace(below, final=0.1, held_out=0.1)
    assert said not in str(dataclasses.replace(report, solved=(above,)))


def test_a_tied_table_is_solved_on_its_product(params, batches):
    policy = qjax.Policy([qjax.Rule("embed", INT4)])
    qparams, report = qjax.quantize(params, policy, fn=fn, calibration=batches[:1], report=None)
    assert qparams["embed"].layout.letters == "nk"
    assert report.solved[0].held_out is None  # a single batch leaves nothing to hold out


def test_few_rows_are_said_to_be_few(params, batches):
    policy = qjax.Policy([qjax.Rule("layers/down", INT4)])
    few = [batches[0][:1]]
    _, report = qjax.quantize(params, policy, fn=fn, calibration=few, report=None)
    assert "rank at most 16 of 64" in report.solved[0].note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": []}, "no batches"),
        ({"fn": None}, "needs `fn`"),
        ({"donate": True}, "does not go with"),
    ],
)
def test_bad_calls_are_refused(params, batches, change, message):
    arguments = {"fn": fn, "calibration": batches, "report": None} | change
    with pytest.raises(ValueError, match=message):
        qjax.quantize(params, INT4, **arguments)


def test_what_stays_in_float_is_reported(params, batches):
    given = params | {"unused": jnp.ones((D, D)), "gain": jnp.ones((D, D))}
    scaled = lambda p, tokens: fn(p, tokens) * jnp.sum(p["gain"])
    _, report = qjax.quantize(
        given, qjax.Policy([qjax.Rule("*", INT4)], recipe=qjax.Recipe(rounding="nearest")),
        fn=scaled, calibration=batches, report=None,
    )  # fmt: skip
    assert report.in_float == {
        "gain": "no weight of a product: used by reduce_sum",
        "unused": "not used by the traced function",
    }
    assert "Left in float:\ngain    no weight" in str(report)
    with pytest.raises(qjax.QuantizationError, match="would quantize nothing: gain is not used"):
        qjax.quantize({"gain": given["gain"]}, INT4, fn=lambda p, x: x, calibration=batches)


def test_data_are_for_arrays_outside_of_jit(params, batches):
    run = lambda params: qjax.quantize(params, INT4, fn=fn, calibration=batches)
    with pytest.raises(NotImplementedError, match="outside of `jit`"):
        jax.eval_shape(run, params)
    with pytest.raises(NotImplementedError, match="not with shapes"):
        run(jax.eval_shape(lambda: params))


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_inputs_of_nothing_but_zeros_give_no_static_step(rounding):
    fmt = qjax.Format("int8", activation="int8", activation_scale="static")
    policy = qjax.Policy([qjax.Rule("w", fmt)], recipe=qjax.Recipe(rounding=rounding))
    x = jnp.ones((2, 4, 16)).at[1].set(0.0)  # an expert that gets nothing but padding
    with pytest.raises(qjax.QuantizationError, match=r"w\[1\]: its input was 0 wherever"):
        qjax.quantize(
            {"w": jnp.ones((2, 16, 8))}, policy, fn=lambda p, x: x @ p["w"], calibration=[x],
            report=None,
        )  # fmt: skip


GPTQ = {"sweeps": 0, "refit": False, "asymmetric": False, "damping": 0.1}


@pytest.mark.parametrize(
    "recipe",
    [
        {"rounding": "nearest"},
        {"rounding": "nearest", "clip": True},
        {"rounding": "nearest", "scaling": "awq"},
        {"rounding": "hqq"},
        GPTQ,
        GPTQ | {"mode": "parallel"},
    ],
    ids=["nearest", "clip", "awq", "hqq", "sequential", "parallel"],
)
def test_scales_that_their_type_cannot_hold_are_refused_by_every_solver(recipe):
    x = jax.random.normal(jax.random.key(0), (8, 16))
    w = jax.random.normal(jax.random.key(1), (16, 8)) * 1e7
    fmt = qjax.Format("uint4", group_size=16, scale="float16", offset="float16")
    policy = qjax.Policy([qjax.Rule("a/w", fmt)], recipe=qjax.Recipe(**recipe))
    with pytest.raises(qjax.QuantizationError, match=r"a/w: its .* do not fit into float16"):
        qjax.quantize(
            {"a": {"w": w}}, policy, fn=lambda p, x: x @ p["a"]["w"], calibration=[x], report=None
        )


def test_an_expert_without_data_is_an_error():
    params = {"w": jnp.ones((3, 16, 8))}
    sizes = jnp.array([2, 0, 3])
    with pytest.raises(qjax.CalibrationError, match=r"w\[1\]: no calibration token"):
        qjax.quantize(
            params, INT4, fn=lambda p, x: lax.ragged_dot(x, p["w"], sizes),
            calibration=[jnp.ones((5, 16))], report=None,
        )  # fmt: skip
