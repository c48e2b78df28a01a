"""The example at small size: FP8 follows bfloat16, and a stopped run goes on bit for bit."""

import json
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "recipes", ["delayed", pytest.param("bf16,current,block,block-e5m2", marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("compiled_once")
def test_it_learns_and_resumes_bit_for_bit(tmp_path, recipes):
    main = runpy.run_path(str(ROOT / "examples" / "fp8_pretrain.py"))["main"]
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    small = {
        "text": str(text), "hidden": 32, "layers": 1, "steps": 10, "batch": 4, "length": 33,
        "learning_rate": 1e-2, "judged": 4, "every": 4, "plotted": bool(find_spec("matplotlib")),
    }  # fmt: skip

    def run(name, recipes, **options):
        main(out=tmp_path / name, recipes=recipes, **{**small, **options})
        path = tmp_path / name / "result.json"
        return json.loads(path.read_text())["runs"] if path.exists() else None

    whole = run("whole", recipes)
    for record in whole.values():
        assert record["loss"][-1] < record["loss"][0] - 1
        if "bf16" in whole:
            assert abs(record["against_bf16"]["final_held_out"]) < 0.1
    assert (tmp_path / "whole" / "result.png").is_file() == small["plotted"]

    for recipe in recipes.split(","):  # stopped after a step that no checkpoint has
        assert run(recipe, recipe, stop_after=6) is None
        resumed = run(recipe, recipe)[recipe]
        assert resumed["loss"] == whole[recipe]["loss"]
        assert resumed["held_out"] == whole[recipe]["held_out"]
