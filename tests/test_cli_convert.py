"""`qjax convert` on a tiny model: every target, verified, and what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qjax import Policy, Rule, is_qtensor, quantize
from qjax.interop.gguf import MIXES, open_gguf
from qjax.models import load, load_gguf
from qjax.models.catalog import open_model
from qjax.models.gguf import save_gguf
from qjax.models.store import load_model
from tests.test_cli import GOLDEN, TEXT, error, run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama of two layers, with a byte-level tokenizer without merges."""
    directory = tmp_path_factory.mktemp("hf") / "tiny"
    shutil.copytree(GOLDEN / "hf" / "llama", directory)
    printable = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(printable)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def kinds(path):
    return {name: t.kind.name for name, t in open_gguf(path).tensors.items()}


def test_a_mix_is_written_and_verified(tiny, tmp_path):
    out = tmp_path / "new" / "m.gguf"
    said = json.loads(run("convert", tiny, out, "--to", "gguf:Q8_0", "--verify", "--json").stdout)
    assert said["bytes_on_disk"] == out.stat().st_size
    assert kinds(out)["blk.0.attn_q.weight"] == "Q8_0"
    assert open_gguf(out).metadata["general.file_type"] == MIXES["Q8_0"].file_type
    assert "Q8_0" in run("inspect", out).stdout


def test_blocks_go_to_a_checkpoint_and_back_without_a_change(tiny, tmp_path):
    first, kept, again = tmp_path / "a.gguf", tmp_path / "kept", tmp_path / "b.gguf"
    run("convert", tiny, first, "--to", "gguf:Q4_1")
    run("convert", first, kept, "--to", "orbax", "--verify")
    leaves = jax.tree.leaves(load_model(kept).params, is_leaf=is_qtensor)
    assert any(map(is_qtensor, leaves))
    said = run("convert", kept, again, "--to", "gguf", "--verify").stdout
    assert said.strip().endswith("verified")
    a, b = open_gguf(first), open_gguf(again)
    for name, kind in kinds(first).items():
        if kind == "F16":  # a float in between, of the model's own type
            np.testing.assert_array_equal(a.read(name), b.read(name))
        else:
            assert kinds(again)[name] == kind
            np.testing.assert_array_equal(a.raw(name), b.raw(name))


@pytest.mark.parametrize("method", ["importance", pytest.param("gptq", marks=pytest.mark.slow)])
def test_calibration_data_choose_scales_and_codes(tiny, text, tmp_path, method):
    plain, made = tmp_path / "plain.gguf", tmp_path / f"{method}.gguf"
    run("convert", tiny, plain, "--to", "gguf:Q4_0")
    windows = ["--calibration-windows", "4", "--calibration-window", "16"]
    run("convert", tiny, made, "--to", "gguf:Q4_0", "--calibration", text, "--method", method,
        *windows, "--verify")  # fmt: skip
    a, b = open_gguf(plain), open_gguf(made)
    assert kinds(plain) == kinds(made)
    assert np.any(a.raw("blk.1.attn_q.weight") != b.raw("blk.1.attn_q.weight"))
    assert load_gguf(made, packed=True).tokenizer is not None
    assert sorted(tmp_path.iterdir()) == sorted([plain, made])


def test_what_cannot_be_is_said_before_the_model_is_loaded(tiny, text, tmp_path):
    out = tmp_path / "m"
    assert "no target 'onnx'. There are gguf" in error("convert", tiny, out, "--to", "onnx")
    assert "no GGUF file is called 'Q9'" in error("convert", tiny, out, "--to", "gguf:Q9")
    assert "--to orbax, not orbax:x" in error("convert", tiny, out, "--to", "orbax:x")
    line = error("convert", tiny, out, "--to", "orbax", "--calibration", text)
    assert "keeps weights as they are" in line
    line = error("convert", tiny, out, "--to", "gguf", "--calibration", text)
    assert "for example --to gguf:Q4_K_M" in line
    out.write_text("here")
    assert "--overwrite" in error("convert", tiny, out, "--to", "gguf:Q8_0")
    assert out.read_text() == "here"


def test_the_name_of_an_unknown_tokenizer_can_be_given(tiny, tmp_path):
    strange, out = tmp_path / "strange", tmp_path / "m.gguf"
    shutil.copytree(tiny, strange)
    backend = Tokenizer.from_file(str(strange / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("x", "isolated"), backend.pre_tokenizer])  # fmt: skip
    backend.save(str(strange / "tokenizer.json"))
    args = ["convert", strange, out, "--to", "gguf:Q8_0"]
    assert "--pre-tokenizer NAME" in error(*args)
    run(*args, "--pre-tokenizer", "jais")
    assert open_gguf(out).metadata["tokenizer.ggml.pre"] == "jais"
    args = ["convert", strange, tmp_path / "kept", "--to", "orbax", "--pre-tokenizer", "jais"]
    assert "--pre-tokenizer is for GGUF files" in error(*args)


def test_files_run_as_they_are_stored_also_if_their_layers_differ(tiny, text, tmp_path):
    loaded = load(tiny)
    kinds = {"layers_0/attn/*/kernel": "gguf-q8_0", "layers_1/attn/*/kernel": "gguf-q4_0"}
    rules = [Rule(path, Policy.of(kind).rules[-1].format) for path, kind in kinds.items()]
    mixed = quantize(loaded.params, Policy([*rules, Rule("*")]))
    alike = quantize(loaded.params, Policy([Rule("*/attn/*/kernel", rules[0].format), Rule("*")]))
    few = ["--text", text, "--window", "16", "--windows", "2", "--json", "--packed"]
    for params, stacks in ((mixed, False), (alike, True)):
        out = tmp_path / f"{stacks}.gguf"
        save_gguf(out, params, loaded.config, loaded.tokenizer)
        assert ("layers" in open_model(out, scan_layers=None, packed=True).params) == stacks
        said = json.loads(run("eval", out, *few).stdout)
        assert said["bytes"] == sum(a.nbytes for a in jax.tree.leaves(params))
        kept = tmp_path / f"{stacks}-kept"
        run("convert", out, kept, "--to", "orbax")
        again = json.loads(run("eval", kept, *few).stdout)
        assert said["nll"] == pytest.approx(again["nll"], rel=1e-5)
        said = run("generate", out, "The quick", "--max-tokens", 2, "--packed").stdout
        assert said.startswith("The quick")
