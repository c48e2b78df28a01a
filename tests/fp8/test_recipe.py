"""Recipes: what they mean, and what they refuse."""

import pytest

from qjax import Format, Policy, Rule
from qjax.fp8 import BLOCK, TENSOR, Fp8Recipe


def test_names_mean_recipes():
    assert Fp8Recipe.of("current") == Fp8Recipe()
    assert Fp8Recipe.of("delayed") == Fp8Recipe(scaling="delayed")
    assert Fp8Recipe.of("block") == Fp8Recipe(Policy.of(BLOCK), gradient="e4m3")
    assert Fp8Recipe.of(BLOCK) == Fp8Recipe(Policy.of(BLOCK))
    assert Fp8Recipe.of(Fp8Recipe(margin=1)) == Fp8Recipe(margin=1)
    assert Fp8Recipe.of("fp8-block").policy == Policy.load("fp8-block")


def test_recipes_are_static():
    assert len({Fp8Recipe(), Fp8Recipe.of("current"), Fp8Recipe(history=4)}) == 2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"scaling": "static"}, "`scaling` must be one of current, delayed"),
        ({"gradient": "e3m4"}, "`gradient` must be one of"),
        ({"history": 0}, "`history` must be a positive integer, got 0"),
        ({"margin": -1}, "`margin` must be an integer from 0 to 8, got -1"),
        ({"power_of_two": 1}, "`power_of_two` must be true or false"),
        ({"policy": Format("int8")}, "FP8 training multiplies e4m3 weights"),
        ({"policy": Format("e4m3")}, "scaled per tensor or in square blocks"),
        ({"policy": Format("e4m3", 64, group_columns=128)}, "square blocks"),
        ({"policy": BLOCK, "scaling": "delayed"}, "blocks are scaled by what is in them"),
    ],
)
def test_a_bad_recipe_is_refused(values, says):
    with pytest.raises(ValueError, match=says):
        Fp8Recipe(**values)


def test_one_policy_may_hold_tensors_blocks_and_what_stays_float():
    rules = [Rule("*lm_head*"), Rule("*down*", BLOCK), Rule("*", TENSOR)]
    assert Fp8Recipe(Policy(rules), scaling="delayed").policy.rule_for("x/down", 2).format == BLOCK
