"""The example on a language model, at a tiny size: it resumes exactly, and learns."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Format, Policy, Rule, is_qtensor, qat, qtensor
from qjax.models import Decoder, LoadedModel, ModelConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "qat_lm.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("qat_lm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def loaded():
    config = ModelConfig("llama", 61, 16, 24, 2, 4, 2, 8)
    model = Decoder(config, scan_layers=True)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda a: a * 2, params)  # so that rounding them shows
    return LoadedModel(config, model, params, None)


@pytest.mark.parametrize("weight_rate", [0.0, pytest.param(0.05, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_with_the_same_result(example, loaded, weight_rate, tmp_path):
    policy = Policy(
        [Rule(("*embed*", "*norm*", "*lm_head*"), min_ndim=0), Rule("*", Format("int2", 8))]
    )
    pieces = np.random.default_rng(0).integers(0, 61, (16, 12))
    setting = example.Setting(steps=6, batch=4, length=12, step_rate=2e-2, weight_rate=weight_rate)
    floats = loaded.params if weight_rate else None
    rounded = qjax.quantize(loaded.params, policy)
    first = qat.in_steps(qat.from_quantized(rounded, floats), policy)
    program = example.trainer(loaded, policy, setting)
    run = lambda out, **how: example.train(
        program, loaded, setting, first, pieces, tmp_path / out, every=2, **how
    )
    want, losses = run("whole")
    run("parts", stop=3)  # the last checkpoint is that of step 2
    got, again = run("parts")
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert again == losses
    assert losses[-1] < losses[0]
    packed = qjax.quantize(qat.from_steps(got, policy), policy)
    codes = lambda tree: [qtensor.read_codes(a) for a in jax.tree.leaves(tree, is_leaf=is_qtensor)
                          if is_qtensor(a)]  # fmt: skip
    same = [bool((a == b).all()) for a, b in zip(codes(packed), codes(rounded), strict=True)]
    assert all(same) if weight_rate == 0 else not any(same)
    np.testing.assert_array_equal(packed["embed"]["embedding"], loaded.params["embed"]["embedding"])
