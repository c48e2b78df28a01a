"""Recipes: read from text, checked, carried by policies."""

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax import Policy, Recipe


def test_dict_round_trip_leaves_defaults_out():
    recipe = Recipe(scaling="awq", damping=None, sweeps=2)
    assert recipe.to_dict() == {"scaling": "awq", "sweeps": 2}
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_null_is_search_in_text():
    recipe = Recipe(alpha=None)
    assert recipe.to_dict() == {"alpha": "search"}
    assert Recipe.from_dict({"alpha": "search"}) == recipe


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rounding": "best"}, "recipe: `rounding` must be one of nearest, gptq, hqq, got 'best'"),
        ({"sweep": 3}, "recipe: unknown key 'sweep'. Known: act_order"),
        ({"sweeps": -1}, "from 0 on, got -1"),
        ({"damping": 0.0}, "positive or None, got 0.0"),
        ({"damping": float("inf")}, "positive or None, got inf"),
        ({"clip": True}, "`clip` is for rounding to nearest; 'gptq' chooses its own scales"),
        ({"alpha": 2}, "from 0 to 1"),
        (3, "expected a table"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(ValueError, match="recipe") as e:
        Recipe.from_dict(spec)
    assert message in str(e.value)


def test_a_policy_carries_its_recipe():
    policy = Policy.load("w4a16-gptq")
    assert policy.recipe == Recipe(rounding="gptq")
    assert policy.needs_data
    assert Policy.from_dict(policy.to_dict()).recipe == policy.recipe
    assert not Policy.load("int8").needs_data


def test_hqq_needs_no_data_and_differs_from_rounding():
    policy = Policy.load("w4a16-hqq")
    assert not policy.needs_data
    w = {"kernel": jax.random.t(jax.random.key(0), 3.0, (128, 64))}
    fitted = qjax.dequantize(qjax.quantize(w, policy))["kernel"]
    nearest = qjax.dequantize(qjax.quantize(w, Policy(policy.rules)))["kernel"]
    norm = lambda d: float(jnp.sum(jnp.abs(d - w["kernel"]) ** 0.7))
    assert norm(fitted) < norm(nearest)


def test_a_static_activation_needs_data():
    assert Policy.load("fp8-static").needs_data
