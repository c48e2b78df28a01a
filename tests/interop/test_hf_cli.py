"""`qjax convert` to every target, verified, and `qjax inspect` of what it wrote."""

import json

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import qjax
from qjax import Format, export
from qjax.interop.gguf import open_gguf
from qjax.models import Decoder, store
from qjax.models.load import LoadedModel
from qjax.models.store import save_model
from tests.interop.hf_models import CONFIG, EXPERTS, quantized, tree, write_gpt_oss


def command(*args, code=0):
    from qjax.cli.app import app

    done = CliRunner().invoke(app, [str(a) for a in args])
    assert done.exit_code == code, done.output
    return done.output


def test_convert_keeps_codes_and_inspect_shows_formats(tmp_path):
    written, ct, back = tmp_path / "gptq", tmp_path / "ct", tmp_path / "back"
    params = tree(quantized(Format("int4", 32, scale="float16")))
    export.hf(written, params, CONFIG, format="gptq")
    command("convert", written, ct, "--to", "hf:compressed-tensors", "--verify")
    command("convert", ct, back, "--to", "hf:gptq", "--verify")
    for file in written.iterdir():
        assert file.read_bytes() == (back / file.name).read_bytes(), file.name
    contents = json.loads(command("inspect", ct, "--json"))
    assert contents["kind"] == "Hugging Face model (compressed-tensors)"
    rows = {row["path"]: row for row in contents["tensors"]}
    row = rows["model.layers.1.mlp.up_proj.weight"]
    assert (row["shape"], row["format"], row["quantized"]) == ([128, 256], "int4 g32 f16", True)
    assert rows["model.norm.weight"]["format"] == "F32"
    said = command("convert", written, tmp_path / "x", "--to", "hf:bnb", code=2)
    assert "cannot hold" in said
    assert "say how a directory" in command(
        "convert", written, tmp_path / "x", "--to", "hf", code=2
    )
    assert not (tmp_path / "x").exists()


FORMATS = {
    "int4": Format("int4", 32, scale="float16"),
    "nf4": Format("nf4", 64),
    "llm-int8": Format("int8", activation="int8", outliers=6.0),
    "fp8": Format("e4m3", 128, 128),
    "Q4_1": qjax.kquants.FORMATS["Q4_1"],
}
# Which targets hold which format; all others refuse it.
HELD = {
    "gguf": ("int4", "Q4_1"),
    "hf:gptq": ("int4",),
    "hf:awq": ("int4",),
    "hf:compressed-tensors": ("int4", "fp8"),
    "hf:bnb": ("nf4", "llm-int8"),
    "hf:fp8": ("fp8",),
    "hf:mxfp4": (),
    "hf:float": (),
    "orbax": tuple(FORMATS),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Returns the path of a qjax checkpoint whose kernels have a format; made when asked for."""
    root = tmp_path_factory.mktemp("checkpoints")

    def of(name):
        path = root / name
        if not path.exists():
            model = LoadedModel(CONFIG, Decoder(CONFIG), tree(quantized(FORMATS[name])), None)
            save_model(path, model)
        return path

    return of


def quantized_rows(path):
    rows = json.loads(command("inspect", path, "--json"))["tensors"]
    return {row["format"] for row in rows if row["quantized"]}, sum(r["quantized"] for r in rows)


@pytest.mark.parametrize(("target", "fmt"), [(t, f) for t, held in HELD.items() for f in held])
def test_every_target_is_verified_and_inspected(checkpoints, tmp_path, target, fmt):
    out = tmp_path / ("m.gguf" if target == "gguf" else "m")
    said = command("convert", checkpoints(fmt), out, "--to", target, "--verify")
    assert said.strip().endswith("verified")
    formats, count = quantized_rows(out)
    assert count == 7 * CONFIG.num_layers
    if target == "gguf":
        assert formats == {{"int4": "Q4_0"}.get(fmt, fmt)}
        assert open_gguf(out).metadata["general.architecture"] == "llama"
    else:
        assert formats == quantized_rows(checkpoints(fmt))[0]


@pytest.mark.parametrize(
    ("target", "fmt"), [(t, f) for t, held in HELD.items() for f in FORMATS if f not in held]
)
def test_other_targets_refuse_and_name_the_parameter_and_all_that_hold_it(
    checkpoints, tmp_path, target, fmt
):
    said = command("convert", checkpoints(fmt), tmp_path / "m", "--to", target, code=2)
    said = " ".join(said.split())
    path, _, able = said.partition("held by ")
    assert "layers_0/attn/" in path
    assert "/kernel: " in path
    for other, held in HELD.items():
        name = {"hf:bnb": "hf:bitsandbytes", "gguf": "gguf (", "orbax": "orbax ("}.get(other, other)
        assert (name in able) == (fmt in held), other
    assert list(tmp_path.iterdir()) == []


def test_float_weights_go_to_a_directory_and_a_file(tmp_path):
    params = tree({p: qjax.dequantize(leaf) for p, leaf in quantized(FORMATS["int4"]).items()})
    save_model(tmp_path / "c", LoadedModel(CONFIG, Decoder(CONFIG), params, None))
    for target, out in {"hf:float": "d", "gguf": "m.gguf", "gguf:Q8_0": "q.gguf"}.items():
        command("convert", tmp_path / "c", tmp_path / out, "--to", target, "--verify")
        assert quantized_rows(tmp_path / out)[1] == (16 if target == "gguf:Q8_0" else 0)


def test_what_a_checkpoint_does_not_hold_is_noticed(checkpoints, tmp_path, monkeypatch):
    source, read = checkpoints("int4"), store.load_model

    def wrong(path):
        loaded = read(path)
        change = lambda a: a ^ 1 if a.dtype == np.uint8 else a
        return loaded._replace(params=jax.tree.map(change, loaded.params))

    monkeypatch.setattr(store, "load_model", wrong)  # not that by which the source is opened
    said = command("convert", source, tmp_path / "m", "--to", "orbax", "--verify", code=2)
    assert "differed" in said
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_the_experts_of_gpt_oss(tmp_path):
    write_gpt_oss(tmp_path / "m")
    contents = json.loads(command("inspect", tmp_path / "m", "--json"))
    assert contents["kind"] == "Hugging Face model (mxfp4)"
    rows = {row["path"].rpartition(".")[2]: row for row in contents["tensors"]}
    for name, shape in EXPERTS.items():
        row = rows[name]
        assert (tuple(row["shape"]), row["quantized"]) == (shape, True)
        assert row["format"].startswith("e2m1 g32")
        assert row["bits_per_weight"] == 4.25
