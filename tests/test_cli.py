"""The command line: every command on a tiny model, its JSON, exit codes and error lines."""

import gc
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from typer.testing import CliRunner

from qjax.cli import app
from qjax.cli.terminal import interruptible

GOLDEN = Path(__file__).parent / "golden"
TEXT = "The quick brown fox jumps over the lazy dog. " * 8  # one token a character
pytestmark = pytest.mark.usefixtures("compiled_once")
FEW = ["--window", "16", "--windows", "2"]


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def error(*args, code=2):
    """Returns the one line that a failing command prints."""
    result = run(*args, code=code)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    assert lines[-1].startswith("qjax: error: "), result.stderr
    assert sum(line.startswith("qjax: error") for line in lines) == 1
    return lines[-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama of two layers, with a tokenizer of one token a character."""
    directory = tmp_path_factory.mktemp("hf") / "tiny"
    shutil.copytree(GOLDEN / "hf" / "llama", directory)
    characters = {chr(i): i for i in range(128)}
    backend = Tokenizer(models.BPE(characters, []))
    backend.decoder = decoders.Fuse()
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    """A checkpoint that `qjax quantize` wrote."""
    out = tmp_path_factory.mktemp("out") / "tiny-int8"
    run("quantize", tiny, "--policy", "int8", "--out", out, "--no-eval")
    return out


# ---- quantize ------------------------------------------------------------------------------------


def test_quantize_ends_with_a_table(tiny, text, tmp_path):
    out = tmp_path / "q"
    args = ["quantize", tiny, "-p", "int4-g32", "-o", out, "--text", text, *FEW]
    result = run(*args, "--prompt", "The quick", "--max-tokens", 4)
    for word in (
        "perplexity",
        "ΔNLL",
        "KL",
        "top-1 agreement",
        "bytes in memory",
        "decode",
        "int4",
    ):
        assert word in result.stdout
    assert "The quick|" in result.stdout
    assert "Saving" in result.stderr
    assert "Saving" not in result.stdout
    assert (out / "qjax_manifest.json").exists()


def test_quantize_json_judges_the_reloaded_model(tiny, text, tmp_path):
    out = tmp_path / "q"
    args = ["quantize", tiny, "-p", "int8", "-o", out, "--text", text, *FEW, "--max-tokens", 3]
    d = json.loads(run(*args, "--json").stdout)
    e = d["evaluation"]
    assert (e["windows"], e["targets"]) == (2, 30)
    assert 0 <= e["kl"] < 1e-3  # int8 per channel
    assert e["agreement"] > 0.9
    assert abs(e["delta_nll"]) < 0.01
    assert d["bytes"] < d["source_bytes"]
    assert d["generation"]["decode_tokens_per_s"] > 0
    assert d["summary"]["totals"]["quantized_leaves"] == 7
    # The numbers are those of the files: the saved model, opened anew, has the same loss.
    again = run("eval", out, "--text", text, *FEW, "--json")
    assert json.loads(again.stdout)["nll"] == pytest.approx(e["nll"], rel=1e-6)


def test_quantize_without_eval_says_sizes(tiny, tmp_path):
    result = run("quantize", tiny, "-p", "nf4", "-o", tmp_path / "q", "--no-eval")
    assert "smaller" in result.stdout
    assert "perplexity" not in result.stdout


def test_quantize_by_a_policy_file(tiny, tmp_path):
    policy = tmp_path / "mine.toml"
    policy.write_text(
        '[[rules]]\nmatch = "*mlp*/kernel"\nformat = { element = "int4", group_size = 16 }\n'
    )
    out = tmp_path / "q"
    args = ["quantize", tiny, "-p", policy, "-o", out, "--no-eval"]
    d = json.loads(run(*args, "--json").stdout)
    assert d["policy"] == "mine"
    assert d["summary"]["totals"]["quantized_leaves"] == 3
    info = json.loads(run("inspect", out, "--json").stdout)
    formats = {t["path"]: t["format"] for t in info["tensors"]}
    assert formats["layers/attn/q_proj/kernel"] == "float32"
    assert formats["layers/mlp/up_proj/kernel"].startswith("int4 g16")


def test_quantize_in_bfloat16(tiny, tmp_path):
    out = tmp_path / "q"
    run("quantize", tiny, "-p", "int8", "-o", out, "--dtype", "bfloat16", "--no-eval")
    info = json.loads(run("inspect", out, "--json").stdout)
    formats = {t["path"]: t["format"] for t in info["tensors"]}
    assert formats["embed/embedding"] == "bfloat16"
    assert info["metadata"]["dtype"] == "bfloat16"


CALIBRATED = ["--calibration-windows", "4", "--calibration-window", "16"]


# GPTQ alone, the quickest of recipes to compile.
RECIPE = """
[[rules]]
match = ["*embed*", "*lm_head*", "*norm*"]
skip = true
min_ndim = 0

[[rules]]
match = "*"
format = { element = "int4", group_size = 16 }

[recipe]
rounding = "gptq"
damping = 0.1
sweeps = 0
refit = false
asymmetric = false
"""


@pytest.mark.parametrize(
    "recipe", ["mine.toml", pytest.param("w4a16-gptq", marks=pytest.mark.slow)]
)
def test_a_recipe_with_data_reports_every_weight(tiny, text, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(RECIPE)
    out = tmp_path / "q"
    args = ["quantize", tiny, "--recipe", recipe, "-c", text, *CALIBRATED, "-o", out]
    made = json.loads(run(*args, "--text", text, *FEW, "--json").stdout)
    assert len(made["report"]["solved"]) == 14  # seven weights in each of two layers
    assert all(s["final"] <= s["rtn"] for s in made["report"]["solved"] if s["strength"] == 0)
    assert made["evaluation"]["kl"] > 0
    assert not out.with_name("q.unfinished").exists()
    inspected = json.loads(run("inspect", out, "--json").stdout)
    assert "int4" in json.dumps(inspected)


def test_a_recipe_without_data_asks_for_it(tiny, tmp_path):
    line = error("quantize", tiny, "--recipe", "w4a16-gptq", "-o", tmp_path / "q")
    assert "--calibration" in line


def test_a_short_calibration_text_is_refused(tiny, text, tmp_path):
    args = ["quantize", tiny, "--recipe", "w4a16-gptq", "-c", text, "-o", tmp_path / "q"]
    assert "fills" in error(*args, "--no-eval", "--calibration-window", "100")


def test_a_dry_run_says_what_it_would_take(tiny, text, tmp_path):
    out = tmp_path / "q"
    args = ["quantize", tiny, "--recipe", "w4a16-gptq", "-c", text, *CALIBRATED, "-o", out]
    planned = json.loads(run(*args, "--no-eval", "--dry-run", "--json").stdout)
    assert planned["weights"] == 14
    assert planned["levels"] == 8
    assert not out.exists()
    assert "GB of arrays at the peak" in run(*args, "--no-eval", "--dry-run").stdout


def test_a_dry_run_without_data_writes_nothing(tiny, text, tmp_path):
    args = ["quantize", tiny, "-p", "int8", "-o", tmp_path / "q", "--dry-run", "--text", text, *FEW]
    planned = json.loads(run(*args, "--json").stdout)
    assert "bits/w where quantized" in run(*args).stdout
    assert not any(tmp_path.iterdir())
    made = json.loads(run(*args[:-7], "--no-eval", "--json").stdout)["summary"]
    assert planned["totals"]["nbytes"] == made["totals"]["nbytes"]


def test_what_is_not_ours_stays(tiny, tmp_path):
    """Neither --overwrite nor a name beside the output removes what qjax did not write."""
    mine = [tmp_path / "mine" / "thesis.txt", tmp_path / "q.unfinished" / "thesis.txt"]
    for path in mine:
        path.parent.mkdir()
        path.write_text("Call me Ishmael.")
    out = mine[0].parent
    quantizing = ["quantize", tiny, "-p", "int8", "--no-eval", "-o"]
    assert "is no qjax checkpoint" in error(*quantizing, out, "--overwrite")
    convert = ["convert", tiny, out, "--overwrite", "--to"]
    assert "is no Hugging Face model, so it is not replaced" in error(*convert, "hf:float")
    assert "is no qjax checkpoint, so it is not replaced" in error(*convert, "orbax")
    assert "is a directory" in error(*convert, "gguf")
    assert "no Hugging Face" in error("convert", tiny, mine[0], "--to", "hf:float", "--overwrite")
    assert "thesis.txt is a file" in error(*quantizing, mine[0] / "q")
    run(*quantizing, tmp_path / "q")
    assert all(path.read_text() == "Call me Ishmael." for path in mine)


def test_overwrite_replaces(tiny, quantized, tmp_path):
    out = tmp_path / "q"
    shutil.copytree(quantized, out)
    assert "exists" in error("quantize", tiny, "-p", "int8", "-o", out, "--no-eval")
    run("quantize", tiny, "-p", "nf4", "-o", out, "--no-eval", "--overwrite")
    assert "nf4" in run("inspect", out).stdout


def test_an_interrupt_while_garbage_is_collected_is_not_lost():
    def callback(phase, info):  # JAX has one, in which Python raises what has come meanwhile
        gc.callbacks.remove(callback)
        signal.raise_signal(signal.SIGINT)

    # A shell has interrupts ignored by what it starts in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interruptible():
            gc.callbacks.append(callback)
            gc.collect()
            with pytest.raises(KeyboardInterrupt):
                time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, before)


# ---- the other commands --------------------------------------------------------------------------


def test_eval_against_a_reference(tiny, quantized, text):
    args = ["eval", quantized, "--against", tiny, "--text", text, *FEW]
    out = run(*args).stdout
    assert "perplexity" in out
    assert "top-1 agreement" in out
    d = json.loads(run(*args, "--json").stdout)
    assert d["reference_perplexity"] == pytest.approx(d["perplexity"], rel=1e-2)
    assert d["bytes"] < d["against_bytes"]


def test_eval_full_takes_all_windows(tiny, text):
    d = json.loads(run("eval", tiny, "--text", text, "--window", 32, "--full", "--json").stdout)
    assert d["windows"] == len(TEXT) // 32


def test_generate(quantized):
    out = run("generate", quantized, "The quick", "--max-tokens", 4)
    assert out.stdout.startswith("The quick")
    args = ["generate", quantized, "The quick", "--max-tokens", 4, "--temperature", 1, "--json"]
    first, again, other = (
        json.loads(run(*args, "--seed", seed).stdout)["tokens"] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_no_command_runs_past_the_context_of_a_model(tiny, text, tmp_path):
    many = tmp_path / "many.txt"
    many.write_text(TEXT * 10)
    assert "at most 247 " in error("generate", tiny, "The quick", "--max-tokens", 248)
    assert "--window 256" in error("eval", tiny, "--text", many, "--window", 257)
    out = tmp_path / "q"
    args = ["quantize", tiny, "-o", out, "-p", "int8", "--text", text, *FEW]
    assert "take 257 positions" in error(*args, "--prompt", "a", "--max-tokens", 256)
    args = ["quantize", tiny, "-o", out, "-p", "w4a16-gptq", "-c", many, "--no-eval"]
    assert "--calibration-window 256" in error(*args, "--calibration-window", 257)
    assert not out.exists()


def test_inspect_reads_every_kind(tiny, quantized):
    table = run("inspect", quantized).stdout
    assert "qjax checkpoint" in table
    assert "int8 ch" in table
    assert "source: tiny" in table
    assert "Hugging Face" in run("inspect", tiny).stdout
    assert "model.layers.0.mlp" in run("inspect", tiny, "--all").stdout
    assert "safetensors" in run("inspect", tiny / "model.safetensors").stdout
    d = json.loads(run("inspect", GOLDEN / "tiny.gguf", "--json").stdout)
    assert d["kind"].startswith("GGUF")
    assert d["totals"]["leaves"] == len(d["tensors"]) > 0
    d = json.loads(run("inspect", quantized, "--json").stdout)
    assert {t["path"] for t in d["tensors"] if t["quantized"]} >= {"layers/attn/q_proj/kernel"}
    assert all("sqnr_db" in t for t in d["tensors"])


def test_presets():
    assert "w4a16" in run("presets").stdout
    found = json.loads(run("presets", "--json").stdout)
    assert {"int8", "nf4", "w4a16"} <= {p["name"] for p in found}
    assert all(p["description"] and p["formats"] for p in found)


def test_bench_quick(tmp_path):
    out = tmp_path / "bench.json"
    args = ["bench", "--quick", "--format", "int8", "-M", 1, "--out", out]
    assert "vs float32" in run(*args).stdout
    d = json.loads(out.read_text())
    assert d["products"][0]["format"] == "int8"
    assert d["environment"]["platform"]


def test_bench_of_a_model(tiny):
    d = json.loads(run("bench", "--quick", "--model", tiny, "--policy", "int8", "--json").stdout)
    assert [row["params"] for row in d["decoding"]] == ["float", "int8"]


def test_help_and_version():
    assert "quantize" in run("--help").stdout
    for command in ("quantize", "eval", "generate", "inspect", "bench", "presets"):
        assert "Examples" in run(command, "--help").stdout
        assert "--json" in run(command, "--help").stdout
    assert run("--version").stdout.startswith("qjax ")


# ---- errors --------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_exit_code_2(tiny, quantized, text, tmp_path):
    out = tmp_path / "q"
    line = error("quantize", tiny, "-p", "int5", "-o", out)
    assert "'int5'" in line
    assert "w4a16" in line  # lists the presets
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    assert "latin.toml: is no text" in error(
        "quantize", tiny, "-p", tmp_path / "latin.toml", "-o", out
    )
    args = ["quantize", tiny, "-p", "int8", "-o", out, "--text", text, *FEW, "--prompt", ""]
    assert "the prompt is empty" in error(*args)
    assert "no policy file" in error("quantize", tiny, "-p", "mine.toml", "-o", out)
    line = error("quantize", tmp_path / "none", "-p", "int8", "-o", out, "--no-eval")
    assert "smollm2" in line
    line = error("quantize", quantized, "-p", "int8", "-o", out, "--no-eval")
    assert "quantized already" in line
    assert not out.exists()
    assert "none" in error("eval", tmp_path / "none", "--text", text)
    assert "no text" in error("eval", tiny, "--text", tmp_path / "none.txt")
    assert "nothing at" in error("inspect", tmp_path / "none")
    assert "Use --window 256" in error("eval", tiny, "--text", text)
    (tmp_path / "short.txt").write_text("Call me Ishmael.")
    short = error("eval", tiny, "--text", tmp_path / "short.txt", "--window", "256")
    assert "fewer than one window" in short
    assert "chat template" in error("generate", tiny, "Hi", "--chat")
    assert "--temperature" in error("generate", tiny, "Hi", "--top-k", 3)
    assert "empty" in error("generate", tiny, "")
    assert "KxN" in error("bench", "--shape", "4096")
    assert "int4-g128" in error("bench", "--format", "int5", "--quick")
    assert "--model" in error("bench", "--policy", "int8")


def test_damaged_and_foreign_files(tiny, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert "no text" in error("eval", tiny, "--text", empty)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    assert "config.json" in error("generate", foreign, "Hi")
    assert "safetensors" in error("inspect", foreign)
    (tmp_path / "x.gguf").write_bytes(b"no model at all, but long enough")
    assert "GGUF" in error("inspect", tmp_path / "x.gguf")
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "tokenizer.json").unlink()
    assert "no tokenizer" in error("generate", bare, "Hi")


def test_a_checkpoint_without_a_model_says_so(tmp_path):
    import jax.numpy as jnp

    from qjax import checkpoint

    checkpoint.save(tmp_path / "c", {"w": jnp.ones((2, 2))})
    assert "without a model" in error("generate", tmp_path / "c", "Hi")
    assert "2x2" in run("inspect", tmp_path / "c").stdout


def test_a_failure_is_exit_code_1_and_debug_raises_it(tiny, text, tmp_path):
    import numpy as np
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, broken / "model.safetensors")
    args = ["eval", broken, "--text", text, *FEW]
    assert "window 0 are NaN" in error(*args, code=1)
    result = CliRunner().invoke(app, [*map(str, args), "--debug"])
    assert type(result.exception).__name__ == "EvaluationError"


def test_wrong_usage_is_exit_code_2():
    assert run("quantize", code=2).stdout == ""
    assert "nope" in run("nope", code=2).stderr
    run("eval", "smollm2", "--windows", "0", code=2)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from qjax.cli import app;"
        "assert CliRunner().invoke(app, ['quantize', '--help']).exit_code == 0;"
        "heavy = {'flax', 'orbax', 'tokenizers', 'safetensors', 'optax'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the demo model ------------------------------------------------------------------------------


@pytest.mark.demo
@pytest.mark.slow
def test_the_demo_model_end_to_end(tmp_path):
    args = ["quantize", "smollm2", "-p", "int4-g128", "-o", tmp_path / "q", "--windows", 1]
    d = json.loads(run(*args, "--max-tokens", 8, "--json").stdout)
    e, totals = d["evaluation"], d["summary"]["totals"]
    assert e["targets"] == 1023
    assert 0 < e["delta_nll"] < 0.6  # +0.49 over 8 windows
    assert e["agreement"] > 0.6
    assert totals["quantized_bits_per_weight"] < 4.2
    assert d["bytes_on_disk"] < 1.05 * d["bytes"]
