"""The example on digits: stopped and resumed it gives the same result, and training helps."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.demo


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_are_split_evenly():
    vision = load_example("qat_vision")
    train, test = vision.digits()
    assert train.images.shape == (4000, 28, 28, 1)
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert train.images.max() == 1


@pytest.mark.usefixtures("compiled_once")
def test_a_stopped_run_goes_on_with_the_same_result(tmp_path):
    vision = load_example("qat_vision")
    train = vision.Data(*(a[::8] for a in vision.digits()[0]))
    model = vision.CNN()
    params = model.init(jax.random.key(0), train.images[:1])
    case = vision.CASES["int4"]
    chosen = vision.policy(case.format)
    used = vision.qjax.usage(model.apply)(params, train.images[:1])
    ranges = vision.qat.init_ranges(params, chosen, usage=used)
    _, ranges = vision.qat.tracked(model.apply, chosen, usage=used)(params, ranges, train.images)
    started = vision.qat.init(params, chosen, usage=used, ranges=ranges)
    fake = vision.qjax.fake_quant(model.apply, chosen, usage=used)
    run = lambda out, **how: vision.fit(
        fake, started, vision.optimizer(2e-3, 10), train, 2, tmp_path / out, **how
    )
    want = run("whole")
    run("parts", stop=1)
    got = run("parts")
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert float(np.abs(got["params"]["Dense_0"]["kernel"].act_scale)) != float(
        started["params"]["Dense_0"]["kernel"].act_scale
    )


@pytest.mark.slow
def test_training_wins_back_what_rounding_lost(tmp_path):
    vision = load_example("qat_vision")
    vision.main(tmp_path, epochs=20, qat_epochs=15, cases="int4,int2")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["int4"]["qat"] >= found["float"] - 0.5
    gap = lambda how: found["float"] - found["int2"][how]
    assert gap("qat") <= gap("ptq") / 2
