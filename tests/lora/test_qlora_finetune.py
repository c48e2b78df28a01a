"""The example at small size: it learns, leaves the base alone, and goes on where it was stopped."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama of two layers with a tokenizer of one token a character, and a text."""
    directory = tmp_path_factory.mktemp("hf") / "tiny"
    shutil.copytree(ROOT / "tests" / "golden" / "hf" / "llama", directory)
    backend = Tokenizer(models.BPE({chr(i): i for i in range(128)}, []))
    backend.decoder = decoders.Fuse()
    backend.save(str(directory / "tokenizer.json"))
    text = directory / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return {"model": str(directory), "text": str(text)}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    main = runpy.run_path(str(ROOT / "examples" / "qlora_finetune.py"))["main"]
    small = {"steps": 8, "every": 2, "length": 16, "rank": 4, "judged": 4, "learning_rate": 1e-2}
    directory = tmp_path_factory.mktemp("runs")

    def run(name, **options):
        main(out=directory / name, **small, **tiny, **options)
        path = directory / name / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    return run


@pytest.fixture(scope="module")
def whole(run):
    return run("whole")


def test_it_learns_and_leaves_the_base_alone(whole):
    nll = whole["held_out_nll"]
    assert nll["base + adapters"] < nll["base"] - 0.1
    assert abs(nll["merged"] - nll["base + adapters"]) < 1e-3
    assert whole["base_unchanged"]
    assert whole["reloaded_adapters_identical"]


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(run, whole):
    # Stopped after a step that no checkpoint has, and with the optimizer's state on the host.
    assert run("stopped", stop_after=5, host=True) is None
    resumed = run("stopped", host=True)
    assert resumed["train_loss"] == whole["train_loss"]
    assert resumed["held_out_nll"] == whole["held_out_nll"]
