"""A loop that is stopped goes on after its last checkpoint as if it had never been."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoint import CheckpointError, Resumable


def run(directory, stop=None, setting=None):
    """A loop of 7 steps, saved after every third; returns state, record and where it began."""
    state = {"x": jnp.zeros(3, jnp.bfloat16), "key": jax.random.key(0)}
    with Resumable(directory, setting, steps=7, every=3) as saved:
        start, state, record = saved.latest(state, [])
        for i in range(start, 7 if stop is None else stop):
            draw = jax.random.normal(jax.random.fold_in(state["key"], i), 3, jnp.bfloat16)
            state = {**state, "x": state["x"] * 0.5 + draw}
            record.append(float(state["x"][0]))
            saved.save(i + 1, state, record)
    return state, record, start


@pytest.mark.parametrize(("stop", "start"), [(2, 0), (3, 3), (5, 3), (6, 6), (7, 7)])
def test_it_goes_on_from_the_last_checkpoint_with_the_same_result(tmp_path, stop, start):
    want, record, _ = run(tmp_path / "whole")
    run(tmp_path / "parts", stop)
    got, again, began = run(tmp_path / "parts")
    assert began == start
    assert again == record
    np.testing.assert_array_equal(got["x"], want["x"])
    assert got["x"].dtype == jnp.bfloat16
    assert got["key"] == want["key"]


def test_a_run_of_another_setting_is_refused(tmp_path):
    run(tmp_path, 3, {"rate": 0.1, "pair": (1, 2)})
    assert run(tmp_path, 3, {"rate": 0.1, "pair": (1, 2)})[2] == 3
    with pytest.raises(CheckpointError, match=r"another setting: rate 0\.1, not 0\.2"):
        run(tmp_path, 3, {"rate": 0.2, "pair": (1, 2)})


def test_what_could_not_go_on_is_refused_before_the_first_step(tmp_path):
    for wrong in ({"steps": 0}, {"steps": 4, "every": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            Resumable(tmp_path, **wrong)
    with pytest.raises(NotImplementedError, match="a name with a bracket"):
        Resumable(tmp_path / "lr[0.1]", steps=4)
