"""A whole model through a checkpoint, and models opened by what a user calls them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

import qjax
from qjax import checkpoint
from qjax.models import Tokenizer, load
from qjax.models.catalog import is_checkpoint, names, open_model
from qjax.models.store import load_model, read_record, save_model

HF = Path(__file__).parents[1] / "golden" / "hf"


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_packed_model_comes_back_whole(family, scan_layers, tmp_path):
    m = load(HF / family, scan_layers=scan_layers)
    backend = Backend(models.BPE({"a": 0, "b": 1}, []))
    tokenizer = Tokenizer(backend, bos_id=0, eos_ids=(1,), chat_template="{{ messages }}")
    packed = m._replace(params=qjax.quantize(m.params, "nf4-dq"), tokenizer=tokenizer)
    save_model(tmp_path / "c", packed, record={"policy": {"name": "nf4-dq"}, "shape": (2, 3)})
    back = load_model(tmp_path / "c")
    assert back.config == m.config
    assert back.model == m.model
    assert back.tokenizer is not None
    assert back.tokenizer.encode("abba") == [0, 1, 1, 0]
    assert (back.tokenizer.bos_id, back.tokenizer.eos_ids) == (0, (1,))
    assert back.tokenizer.chat_template == "{{ messages }}"
    assert jax.tree.structure(back.params) == jax.tree.structure(packed.params)
    for a, b in zip(jax.tree.leaves(back.params), jax.tree.leaves(packed.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert read_record(tmp_path / "c") == {"policy": {"name": "nf4-dq"}, "shape": [2, 3]}


def test_open_model_knows_checkpoints_directories_and_names(tmp_path):
    m = load(HF / "llama", dtype=jnp.bfloat16)
    save_model(tmp_path / "c", m)
    assert is_checkpoint(tmp_path / "c")
    assert not is_checkpoint(HF / "llama")
    assert open_model(tmp_path / "c").model.dtype == jnp.bfloat16
    assert open_model(tmp_path / "c").tokenizer is None
    assert open_model(HF / "llama", dtype=jnp.float16).model.dtype == jnp.float16
    assert open_model(HF / "llama", scan_layers=True).model.scan_layers
    with pytest.raises(ValueError, match="has its own dtype"):
        open_model(tmp_path / "c", dtype=jnp.float32)
    with pytest.raises(FileNotFoundError, match="smollm2, smollm2-rescaled"):
        open_model(tmp_path / "none")
    assert names() == ["smollm2", "smollm2-rescaled"]


def test_parameters_without_a_model_and_newer_versions_are_refused(tmp_path):
    checkpoint.save(tmp_path / "p", {"w": jnp.ones(3)})
    with pytest.raises(checkpoint.CheckpointError, match="without a model"):
        load_model(tmp_path / "p")
    assert read_record(tmp_path / "p") == {}
    checkpoint.save(tmp_path / "v", {"w": jnp.ones(3)}, metadata={"model": {"version": 99}})
    with pytest.raises(checkpoint.CheckpointError, match="version 99"):
        load_model(tmp_path / "v")
    damaged = {"model": {"version": 1, "config": {"vocab": 3}}}
    checkpoint.save(tmp_path / "d", {"w": jnp.ones(3)}, metadata=damaged)
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        load_model(tmp_path / "d")
