"""The example that times decode steps: its weights are what `quantize` and `prepare` make."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax.models.decoder import Decoder
from qjax.planning import read_config

EXAMPLE = Path(__file__).parents[2] / "examples/decode_llama.py"
SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("decode_llama", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    llama = Path(__file__).parents[2] / "configs/models/llama-3-8b.json"
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(json.loads(llama.read_text()) | SMALL))
    return path


def test_random_weights_are_of_the_types_and_shapes_of_quantized_ones(example, config_file):
    config = read_config(str(config_file))
    decoder = Decoder(config, jnp.bfloat16, jnp.bfloat16, scan_layers=True)

    def quantized(key, tokens):
        return qjax.quantize(decoder.init(key, tokens)["params"], "int4-g128")

    wanted = jax.eval_shape(quantized, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    got = example.random_params(decoder, "int4-g128")
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    codes = jax.tree.leaves(got["layers"])[0]
    assert len(jnp.unique(codes.astype(jnp.int32))) > 2


def test_every_combination_is_a_row(example, config_file, capsys, monkeypatch):
    options = ["--policy", "int4-g128", "--policy", "bfloat16", "--batch", "2"]
    options += ["--context", "8", "--steps", "2", "--json"]
    monkeypatch.setattr(sys, "argv", ["decode_llama.py", str(config_file), *options])
    with pytest.raises(SystemExit) as stopped:
        example.typer.run(example.main)
    assert not stopped.value.code
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["policy"], r["batch"]) for r in rows] == [("int4-g128", 2), ("bfloat16", 2)]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
    assert rows[0]["parameters_gb"] < rows[1]["parameters_gb"]
