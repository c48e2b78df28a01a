"""`qjax convert` and `qjax inspect` on Hugging Face directories."""

import json

from typer.testing import CliRunner

from qjax import Format, export
from tests.interop.hf_models import CONFIG, quantized, tree


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
