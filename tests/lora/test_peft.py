"""Adapters in the format of peft: what it wrote is read, what is written it reads."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import qjax
from qjax import lora
from qjax.lora.peft import CONFIG, WEIGHTS
from qjax.models import load_hf

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["all", "patterns"]
MAX_DELTA = 2e-3  # as promised for float32 logits of the decoder


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def llama(request):
    return load_hf(GOLDEN / "hf" / "llama", scan_layers=request.param)


@pytest.fixture(scope="module")
def tokens():
    return np.load(GOLDEN / "hf" / "llama" / "expected.npz")["tokens"]


def logits_of(llama, adapters, tokens):
    fn = lambda params, tokens: llama.model.apply({"params": params}, tokens)
    return jax.jit(lora.apply(fn))(llama.params, adapters, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_adapters_agree_with_peft(llama, tokens, name):
    adapters = lora.load_peft(GOLDEN / "peft" / name, llama.params)
    want = np.load(GOLDEN / "peft" / name / "expected.npz")["logits"]
    assert np.abs(logits_of(llama, adapters, tokens) - want).max() < MAX_DELTA
    without = np.load(GOLDEN / "hf" / "llama" / "expected.npz")["logits"]
    assert np.abs(want - without).max() > 50 * MAX_DELTA


@pytest.mark.parametrize("name", NAMES)
def test_what_peft_wrote_is_written_again(llama, tmp_path, name):
    source = GOLDEN / "peft" / name
    lora.save_peft(tmp_path, lora.load_peft(source, llama.params), base_model="tiny")
    want, got = load_file(source / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert np.array_equal(got[key], value)
    config = json.loads((tmp_path / CONFIG).read_text())
    theirs = json.loads((source / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "tiny"
    for key in ("peft_type", "task_type", "use_rslora", "bias", "fan_in_fan_out"):
        assert config[key] == theirs[key]
    last = {name.rpartition(".")[2] for name in theirs["target_modules"]}
    assert config["target_modules"] == sorted(last)
    assert config.keys() <= theirs.keys()


def test_a_save_that_fails_leaves_what_was_there(llama, tmp_path, monkeypatch):
    adapters = lora.init(jax.random.key(0), llama.params, "*_proj/kernel", rank=3, alpha=5)
    lora.save_peft(tmp_path, adapters)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {WEIGHTS, CONFIG}
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora.save_peft(tmp_path, jax.tree.map(lambda a: a + 1, adapters))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bfloat16_adapters_come_back_bit_for_bit(llama, tmp_path):
    fresh = lora.init(jax.random.key(0), llama.params, "*_proj/kernel", rank=3, alpha=5)
    lora.save_peft(tmp_path, fresh)
    back = lora.load_peft(tmp_path, llama.params)
    assert jax.tree.structure(back) == jax.tree.structure(fresh)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(fresh), strict=True):
        assert got.dtype == want.dtype
        assert np.array_equal(got, want)
    wide = lora.load_peft(tmp_path, llama.params, dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    packed = qjax.quantize(llama.params, "nf4-dq")  # a packed base has the same weights
    assert lora.load_peft(tmp_path, {"params": packed}).keys() == {f"params/{k}" for k in fresh}


def _judge():
    """Returns a Python that has peft: this one, or the one that QJAX_PEFT_PYTHON names."""
    if python := os.environ.get("QJAX_PEFT_PYTHON"):
        return python
    return sys.executable if find_spec("peft") and find_spec("torch") else None


@pytest.mark.judge
@pytest.mark.skipif(_judge() is None, reason="needs peft, here or at QJAX_PEFT_PYTHON")
def test_peft_computes_what_the_adapters_compute(llama, tokens, tmp_path):
    adapters = lora.init(jax.random.key(0), llama.params, "*attn/*/kernel", rank=3, alpha=5)
    adapters |= lora.init(
        jax.random.key(0), llama.params, "*down_proj/kernel", rank=2, alpha=8.0, dtype=jnp.bfloat16
    )
    draw = lambda x: (0.3 * jax.random.normal(jax.random.key(x.size), x.shape)).astype(x.dtype)
    adapters = {path: dataclasses.replace(ad, b=draw(ad.b)) for path, ad in adapters.items()}
    lora.save_peft(tmp_path, adapters)
    script = GOLDEN / "make_peft_golden.py"
    subprocess.run([_judge(), str(script), str(tmp_path)], check=True)
    want = np.load(tmp_path / "judged.npz")["logits"]
    assert np.abs(logits_of(llama, adapters, tokens) - want).max() < MAX_DELTA


# ---- errors --------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path):
    directory = tmp_path / "peft"
    shutil.copytree(GOLDEN / "peft" / "patterns", directory)
    return directory


def edit(directory, **changes):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_plain_lora_is_refused(copied, changes):
    edit(copied, **changes)
    ((_, value),) = changes.items()
    with pytest.raises(NotImplementedError, match=str(value).replace("[", r"\[")):
        lora.load_peft(copied, {})


def test_other_models_and_damaged_files_are_refused(llama, copied):
    some = {k: v for k, v in llama.params.items() if not k.startswith("layers")}
    with pytest.raises(ValueError, match=r"modules that the base does not have.*q_proj"):
        lora.load_peft(copied, some)
    wrong = jax.tree.map(lambda x: x[..., :8], llama.params)
    with pytest.raises(ValueError, match=r"q_proj.*do not fit a weight"):
        lora.load_peft(copied, wrong)
    (copied / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"cannot be read .*Copy it again"):
        lora.load_peft(copied, llama.params)
    (copied / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS}"):
        lora.load_peft(copied, llama.params)


def test_layers_without_adapters_do_not_go_into_a_stack(tmp_path):
    unrolled = load_hf(GOLDEN / "hf" / "llama").params
    adapters = lora.init(jax.random.key(0), unrolled, "layers_1/attn/q_proj/kernel", rank=2)
    lora.save_peft(tmp_path, adapters)
    assert lora.load_peft(tmp_path, unrolled).keys() == adapters.keys()
    targets = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert targets == ["model.layers.1.self_attn.q_proj"]  # "q_proj" would be that of layer 0, too
    stacked = load_hf(GOLDEN / "hf" / "llama", scan_layers=True).params
    with pytest.raises(ValueError, match=r"1 of 2 layers, none for model\.layers\.0\.self_attn"):
        lora.load_peft(tmp_path, stacked)


def test_what_has_no_place_in_the_format_is_refused(tmp_path):
    save = lambda params, **options: lora.save_peft(
        tmp_path, lora.init(jax.random.key(0), params, "*", rank=2), **options
    )
    with pytest.raises(ValueError, match=r"up: is no weight of `qjax\.models`.*Pass `names`"):
        save({"up": jnp.ones((4, 4))})
    save({"up": jnp.ones((4, 4))}, names=lambda path: path)
    with pytest.raises(NotImplementedError, match=r"experts: is a stack of 3, but not of layers"):
        save({"experts": jnp.ones((3, 4, 4))}, names=lambda path: path)
    with pytest.raises(ValueError, match="nothing to write"):
        lora.save_peft(tmp_path, {})
