"""Laws of quantizing while executing."""

import dataclasses
import errno
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import qjax
from qjax.layout import Layout
from qjax.ptq import sequential
from qjax.ptq.plan import plan
from qjax.ptq.solve import SolverOptions
from qjax.ptq.store import StoreError

INT3 = qjax.Format("int3", group_size=16)
D, LAYERS, VOCABULARY = 32, 3, 50


def fn(params, tokens):
    """Stacked layers between an embedding and a head."""
    x = params["embed"][tokens]

    def layer(x, w):
        return x + jnp.tanh(nn.silu(x @ w["up"]) @ w["down"]), None

    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["head"]


def unrolled(params, tokens):
    x = params["embed"][tokens]
    for i in range(LAYERS):
        w = params["layers"]
        x = x + jnp.tanh(nn.silu(x @ w["up"][i]) @ w["down"][i])
    return x @ params["head"]


POLICY = qjax.Policy([qjax.Rule(("layers/*", "head"), INT3)])


# The paper's GPTQ: one program to compile for each shape instead of three.
PLAIN = qjax.Recipe(damping=0.03, sweeps=0, refit=False, asymmetric=False)


def with_recipe(**fields):
    return dataclasses.replace(POLICY, recipe=qjax.Recipe(**fields))


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "embed": jax.random.normal(keys[0], (VOCABULARY, D)) * jnp.exp(-jnp.arange(D) / 6),
        "layers": {
            "up": jax.random.normal(keys[1], (LAYERS, D, 64)) / 6,
            "down": jax.random.normal(keys[2], (LAYERS, 64, D)) / 8,
        },
        "head": jax.random.normal(keys[3], (D, VOCABULARY)) / 6,
    }


@pytest.fixture(scope="module")
def batches():
    return [jnp.asarray(t) for t in np.random.default_rng(0).integers(0, VOCABULARY, (6, 4, 16))]


def quantize(params, batches, policy=POLICY, fn=fn, **options):
    return qjax.quantize(params, policy, fn=fn, calibration=batches, report=None, **options)


def error(params, qparams):
    tokens = jnp.asarray(np.random.default_rng(9).integers(0, VOCABULARY, (16, 16)))
    return float(jnp.mean((fn(params, tokens) - qjax.apply(fn)(qparams, tokens)) ** 2))


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_each_step_beyond_rounding_brings_the_outputs_nearer(params, batches):
    nearest = error(params, qjax.quantize(params, POLICY))
    parallel = error(params, quantize(params, batches, with_recipe(mode="parallel"))[0])
    asymmetric = error(params, quantize(params, batches)[0])
    assert asymmetric < parallel < 0.6 * nearest


def test_the_storage_is_that_of_rounding(params, batches):
    qparams, _ = quantize(params, batches[:2])
    rtn = qjax.quantize(params, POLICY)
    assert jax.tree.structure(qparams) == jax.tree.structure(rtn)
    shapes = lambda tree: [a.shape for a in jax.tree.leaves(tree)]
    assert shapes(qparams) == shapes(rtn)


def test_the_first_weight_has_nothing_to_make_up_for(params, batches):
    _, report = quantize(params, batches[:3])
    strengths = {s.path: s.strength for s in report.solved}
    assert strengths["layers/up[0]"] == 0
    assert max(strengths.values()) > 0


def test_activations_may_wait_on_the_host(params, batches):
    formats = {"head": (INT3, Layout.parse("kn", params["head"].shape))}
    run = lambda offload: sequential.quantize(
        fn, params, formats, batches[:2], held_out=[False, True], options=SolverOptions(),
        offload=offload,
    )[0]  # fmt: skip
    assert_identical(run(False), run(True))


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_result_bit_for_bit(params, batches, tmp_path):
    whole, report = quantize(params, batches[:3])
    seen = []

    def stop(line):
        seen.append(line)
        if len(seen) == 4:
            raise Interrupted

    call = {"policy": POLICY, "fn": fn, "calibration": batches[:3], "resume": tmp_path / "run"}
    with pytest.raises(Interrupted):
        qjax.quantize(params, report=stop, **call)
    lines = []
    resumed, again = qjax.quantize(params, report=lines.append, **call)
    assert sum("earlier run" in line for line in lines) >= 3
    assert_identical(whole, resumed)
    assert [s.path for s in again.solved] == [s.path for s in report.solved]


def test_the_directory_of_another_run_is_refused(params, batches, tmp_path):
    quantize(params, batches[:2], resume=tmp_path)
    with pytest.raises(StoreError, match="other parameters, data or policy"):
        quantize(params, batches[1:3], resume=tmp_path)


def test_a_damaged_file_is_named(params, batches, tmp_path):
    quantize(params, batches[:2], resume=tmp_path)
    file = next(tmp_path.glob("*.npz"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"is damaged.*solved again"):
        quantize(params, batches[:2], resume=tmp_path)


def test_a_full_disk_loses_nothing(params, batches, tmp_path, monkeypatch):
    replace, written = os.replace, []

    def full(source, target):
        if str(target).endswith(".npz"):
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"layers/\w+\[\d\]: cannot be kept .*run again"):
        quantize(params, batches[:2], with_recipe(**PLAIN.to_dict()), resume=tmp_path)
    assert sorted(tmp_path.glob("*.npz")) == sorted(map(Path, written))
    assert not list(tmp_path.glob("*.part"))


def test_nan_activations_name_the_weight_and_the_batch(params, batches):
    broken = {**params, "embed": params["embed"].at[3].set(jnp.nan)}
    first = jnp.full_like(batches[0], 1)
    with pytest.raises(qjax.CalibrationError, match=r"layers/up\[0\]: .*NaN or Inf .*batch 2"):
        quantize(broken, [first, jnp.full_like(first, 3)])


def test_batches_of_other_shapes_are_refused(params, batches):
    with pytest.raises(qjax.CalibrationError, match="batch 2 has shapes"):
        quantize(params, [batches[0], batches[1][:, :8]])


def test_masked_tokens_do_not_count(params, batches):
    # Padding with any token gives what the shorter batch gives.
    short = [b[:, :8] for b in batches[:2]]
    padded = [jnp.concatenate([b, jnp.full_like(b, 7)], 1) for b in short]
    mask = lambda b: jnp.broadcast_to(jnp.arange(16) < 8, b.shape)
    expected, _ = quantize(params, short)
    actual, report = quantize(params, padded, mask=mask)
    assert report.solved[0].rows == 4 * 8
    # The sums come in another order, so a near-tie may round the other way.
    nearest = error(params, qjax.quantize(params, POLICY))
    assert abs(error(params, actual) - error(params, expected)) < 0.05 * nearest


def test_slices_of_a_stack_outside_of_a_scan_are_refused_by_name(params, batches):
    with pytest.raises(ValueError, match=r"layers/\w+: .*no product"):
        quantize(params, batches[:2], fn=unrolled)


def test_a_linen_transformer_with_attention(batches):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h)
            h = nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))
            return x + nn.Dense(D)(h)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(VOCABULARY, D)(tokens)
            for _ in range(2):
                x = nn.remat(Block)()(x)
            return nn.Dense(VOCABULARY)(x)

    model = Model()
    variables = model.init(jax.random.key(0), batches[0])
    rules = [qjax.Rule("*kernel", qjax.Format("int4", group_size=8))]
    policy = qjax.Policy(rules, recipe=PLAIN)
    qvariables, report = quantize(variables, batches[:3], policy, fn=model.apply)
    plain = qjax.Policy(rules)
    rtn = qjax.quantize(variables, plain, usage=qjax.usage(model.apply)(variables, batches[0]))
    exact = model.apply(variables, batches[4])
    error = lambda q: float(jnp.mean((exact - qjax.apply(model.apply)(q, batches[4])) ** 2))
    assert error(qvariables) < 0.7 * error(rtn)
    assert len(report.solved) == 2 * 6 + 1
    assert jax.tree.structure(qvariables) == jax.tree.structure(rtn)


def test_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(D, 64, rngs=rngs), nnx.Linear(64, D, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.relu(self.a(x)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    run = lambda state, x: nnx.merge(graph, state)(x)
    x = jax.random.normal(jax.random.key(1), (3, 64, D))
    policy = qjax.Policy([qjax.Rule("*kernel*", INT3)], recipe=PLAIN)
    out, report = qjax.quantize(state, policy, fn=run, calibration=list(x), report=None)
    assert len(report.solved) == 2
    rtn = qjax.quantize(state, qjax.Policy(policy.rules))
    error = lambda q: float(jnp.mean((run(state, x[0]) - qjax.apply(run)(q, x[0])) ** 2))
    assert error(out) < error(rtn)


def test_experts_of_a_ragged_dot():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (4, 16, 24)),
        "down": jax.random.normal(keys[1], (4, 24, 16)),
    }
    sizes = jnp.array([40, 30, 20, 38])

    def moe(p, x):
        return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)

    x = list(jax.random.normal(keys[2], (3, 128, 16)) * jnp.exp(-jnp.arange(16) / 4))
    fmt = qjax.Format("int4", group_size=8)
    policy = qjax.Policy([qjax.Rule("*", fmt)], recipe=PLAIN)
    out, report = qjax.quantize(params, policy, fn=moe, calibration=x, report=None)
    assert {s.path for s in report.solved} == {"up", "down"}
    error = lambda q: float(jnp.mean((moe(params, x[0]) - qjax.apply(moe)(q, x[0])) ** 2))
    assert error(out) < 0.8 * error(qjax.quantize(params, fmt))


def test_an_expert_without_data_may_be_rounded():
    params = {"w": jax.random.normal(jax.random.key(0), (3, 16, 8))}
    sizes = jnp.array([2, 0, 3])
    call = {
        "fn": lambda p, x: lax.ragged_dot(x, p["w"], sizes),
        "calibration": [jax.random.normal(jax.random.key(1), (5, 16))],
        "report": None,
    }
    policy = qjax.Policy([qjax.Rule("*", INT3)], recipe=qjax.Recipe(unseen="nearest"))
    out, report = qjax.quantize(params, policy, **call)
    assert "1 of 3 without data, rounded to nearest" in report.solved[0].note
    rtn = qjax.quantize(params, qjax.Policy(policy.rules))
    np.testing.assert_array_equal(out["w"].data[1], rtn["w"].data[1])


def test_a_plan_of_a_70b_like_stack_computes_nothing():
    layers, width, hidden = 80, 8192, 28672
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    params = {
        "up": shape(layers, width, hidden),
        "gate": shape(layers, width, hidden),
        "down": shape(layers, hidden, width),
    }

    def stack(p, x):
        def layer(x, w):
            return x + (nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

        return lax.scan(layer, x, p)[0]

    fmt = qjax.Format("int4", group_size=128)
    formats = {k: (fmt, Layout.parse("kn", v.shape)) for k, v in params.items()}
    batches = [shape(4, 2048, width)] * 32
    made = plan(stack, params, formats, batches, SolverOptions())
    assert made.weights == 3 * layers
    assert made.levels == 2 * layers
    np.testing.assert_allclose(made.bytes["parameters"], 3 * 2.0 * layers * width * hidden)
    np.testing.assert_allclose(
        made.bytes["packed"], 3 * layers * width * hidden * (4 + 32 / 128) / 8
    )
    # The stream of both models, and what is between up and down: hidden and the product with gate.
    assert made.bytes["activations"] >= 2 * 32 * 4 * 2048 * (width + hidden) * 2
    assert made.seconds > 0
    assert "240 weights in 160 levels" in str(made)
