"""Damaged and hostile files end in an error that names them: no crash, no memory of their choosing.

Damaged GGUF containers are in test_gguf.py; here are directories of every method, configs, and the
models that files claim to hold.
"""

import importlib
import json
import struct
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.interop.gguf import BY_NAME, Tensor, open_gguf, typed_metadata, write_gguf
from qjax.interop.hf import open_hf
from qjax.interop.hf.safetensors import Writer, read_header
from qjax.models import load, load_gguf
from qjax.models.gguf import save_gguf
from tests.interop.test_hf_golden import bnb_parts, ct_parts, golden, gptq_config, gptq_parts

GOLDEN = Path(__file__).parents[1] / "golden"
loader = importlib.import_module("qjax.models.load")  # the package has a function of that name
Q8_0 = BY_NAME["Q8_0"]
NAMED = (ValueError, NotImplementedError)


def methods():
    """Returns, by method, a small weight as some tool wrote it: its tensors and its config."""
    g = golden("gptq_awq")
    awq = {part: g[f"awq_{part}"] for part in ("qweight", "qzeros", "scales")}
    f = golden("fp8_fp4")
    experts = {f"mlp.experts.x_{part}": f[f"gptoss_{part}"] for part in ("blocks", "scales")}
    deepseek = {
        "weight": np.zeros((256, 256), np.uint8).view(jnp.float8_e4m3fn),
        "weight_scale_inv": f["ds_scale_inv"],
    }
    out = {
        "gptq": (gptq_parts("gptq4", 1)[0], {"quant_method": "gptq", **gptq_config(4, 1)}),
        "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
        "fp8": (deepseek, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        "mxfp4": (experts, {"quant_method": "mxfp4"}),
        "bitsandbytes": (
            bnb_parts("nf4", double=True)[0],
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
        ),
    }
    for tag in ("pack4_asym", "fp8_block", "nvfp4"):
        parts, config, _ = ct_parts(tag)
        out[f"compressed-tensors-{tag}"] = parts, {"quant_method": "compressed-tensors", **config}
    return out


METHODS = methods()


@pytest.fixture(scope="module", params=METHODS)
def directory(request, tmp_path_factory):
    """A directory of each method: (path, its config)."""
    path = tmp_path_factory.mktemp(request.param)
    parts, quantization = METHODS[request.param]
    with Writer(path, 4096, 2**30) as writer:
        for name, values in parts.items():
            writer.add(f"m.{name}", np.asarray(values))
        writer.add("norm.weight", np.ones(4, np.float32))
    config = {"model_type": "llama", "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    read_all(path)
    return path, config


def read_all(path):
    opened = open_hf(path)
    for name in sorted(opened.names):
        opened.read(name)


def refusal(function, *args):
    """Returns the message of the error that names what is wrong; None if nothing is."""
    try:
        function(*args)
    except NAMED as e:
        return str(e)
    return None


def copy(path, to, **changed):
    """Copies a directory with other content in some of its files."""
    for file in path.iterdir():
        (to / file.name).write_bytes(changed.get(file.stem, file.read_bytes()))
    return to


# ---- safetensors ---------------------------------------------------------------------------------


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_bytes_of_the_weights_may_be_any(directory, tmp_path, data):
    raw = bytearray((directory[0] / "model.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, data.draw(st.sampled_from([8, 400, header, len(raw)])) - 1))
        raw[at : at + 1] = data.draw(st.binary(min_size=0, max_size=3))
    message = refusal(read_all, copy(directory[0], tmp_path, model=bytes(raw)))
    assert message is None or str(tmp_path) in message


def test_every_truncation_is_noticed(directory, tmp_path):
    raw = (directory[0] / "model.safetensors").read_bytes()
    for n in [*range(0, 300, 29), *range(300, len(raw), len(raw) // 15)]:
        with pytest.raises(NAMED, match=r"model\.safetensors: not a valid"):
            read_all(copy(directory[0], tmp_path, model=raw[:n]))


def header(entries, data=64):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "hold no header"),
        (struct.pack("<Q", 2**60) + b"{}", "hold no header of 1152921504606846976 bytes"),
        (header(b"{" * 100_000), "no JSON"),
        (header(b'{"a": \xff}'), "no JSON"),
        (header(b"[]"), "no table"),
        (header({"w": entry(shape=[2**60], offsets=[0, 2**62])}), "'w'.* does not fit"),
        (header({"w": entry(shape=[2**60, 2**60])}), "'w'.* does not fit"),
        (header({"w": entry(offsets=[0, 64], shape=[32])}), "'w'.* does not fit"),
        (header({"w": entry(offsets=[64, 80])}), "'w'.* does not fit"),
        (header({"w": entry(offsets=[16, 32])}), "'w' begins at byte 16, .* ends at 0"),
        (header({"v": entry(), "w": entry(offsets=[8, 24])}), "'w' begins at byte 8, .* at 16"),
        (header({"w": entry(shape=[-4], offsets=[0, -16])}), "'w' is damaged"),
        (header({"w": entry(shape=[True])}), "'w' is damaged"),
        (header({"w": entry(shape="x")}), "'w' is damaged"),
        (header({"w": entry(shape=[1e30])}), "'w' is damaged"),
        (header({"w": []}), "'w' is damaged"),
        (header({"w": entry(dtype="I128")}), "'w' has type 'I128'"),
    ],
)
def test_what_is_wrong_in_a_header_is_named(tmp_path, raw, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_header(path)


@pytest.mark.parametrize(
    "index",
    [b"", b"[" * 100_000, b"[]", b'{"weight_map": 3}', b'{"weight_map": {"w": 3}}',
     b'{"weight_map": {"w": ["a"]}}', b'{"weight_map": {"w": "../secret"}}', b"\xff"],
)  # fmt: skip
def test_a_damaged_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: (not a valid|names the shard)"):
        open_hf(tmp_path)


# ---- configs -------------------------------------------------------------------------------------

ABSURD = [None, True, 0, -1, 3, 2**63, 10**400, 1e308, -0.5, "", "x", "re:(", "\x00", [], [[]], {},
          {"": {"": ""}}, ["re:("]]  # fmt: skip


def places(value, at=()):
    """Yields the path of every value in nested tables and lists."""
    yield at
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*at, key))


def changed(value, at, new):
    if not at:
        return new
    out = value.copy()
    out[at[0]] = changed(value[at[0]], at[1:], new)
    return out


@pytest.mark.filterwarnings("ignore:compressed-tensors. its readers quantize", "ignore:GPTQ")
def test_any_value_of_a_quantization_config_may_be_absurd(directory, tmp_path):
    path, config = directory
    for at in places(config):
        for new in ABSURD:
            text = json.dumps(changed(config, at, new)).encode()
            message = refusal(read_all, copy(path, tmp_path, config=text))
            assert message is None or str(tmp_path) in message


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{" * 100_000, b"\xff\xfe", b'{"a": 1'])
def test_a_config_that_is_no_table_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json: (not valid JSON|holds no table)"):
        open_hf(tmp_path)


LLAMA = GOLDEN / "hf" / "llama"
KEYS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
        "max_position_embeddings", "rope_parameters", "rope_scaling", "eos_token_id"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_model_of_an_absurd_config_is_refused_or_no_larger_than_its_file(
    tmp_path, key, monkeypatch
):
    built = []
    monkeypatch.setattr(loader, "assemble", lambda model, *_: built.append(model.config))
    config = json.loads((LLAMA / "config.json").read_text())
    true = load(LLAMA).config
    for new in ABSURD:
        text = json.dumps(config | {key: new}).encode()
        message = refusal(load, copy(LLAMA, tmp_path, config=text))
        assert message is None or str(tmp_path) in message
    nbytes = (LLAMA / "model.safetensors").stat().st_size
    for made in [true, *built]:
        assert made.vocab_size * made.hidden_size < 8 * nbytes
        assert made.num_layers * made.head_dim < 8 * nbytes


# ---- models in GGUF ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    loaded = load(LLAMA)
    save_gguf(path, loaded.params, loaded.config, mix="Q4_0")
    return path


GGUF_ABSURD = [True, 0, -1, 2**63, 1e30, float("nan"), "", "x", np.zeros(3, np.int32), ["a", "a"]]


def test_any_value_of_the_metadata_may_be_absurd(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "assemble", lambda *_: {})
    file, path = open_gguf(tiny_gguf), tmp_path / "m.gguf"
    tensors = [
        Tensor(t.name, t.shape, t.kind, lambda t=t: file.raw(t.name)) for t in file.tensors.values()
    ]
    words = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
             "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.pre": "gpt-2",
             "tokenizer.ggml.token_type": np.ones(3, np.int32),
             "tokenizer.ggml.eos_token_id": 1}  # fmt: skip
    keys = typed_metadata(file) | words
    write_gguf(path, keys, tensors)
    assert load_gguf(path).tokenizer is not None
    for key in keys:
        for new in GGUF_ABSURD:
            if key == "general.alignment":
                continue
            write_gguf(path, keys | {key: new}, tensors, overwrite=True)
            message = refusal(load_gguf, path)
            assert message is None or str(path) in message


def test_blocks_of_noise_become_tensors(tiny_gguf, tmp_path):
    raw, path = bytearray(tiny_gguf.read_bytes()), tmp_path / "m.gguf"
    start = min(t.offset for t in open_gguf(tiny_gguf).tensors.values())
    raw[start:] = np.random.default_rng(0).bytes(len(raw) - start)
    path.write_bytes(raw)
    for leaf in jax.tree.leaves(load_gguf(path, packed=True).params):
        assert leaf.size


# ---- memory --------------------------------------------------------------------------------------


def small_gguf(**fields):
    """A file below 1 KB with the metadata of a model, and one tensor."""
    keys = {
        "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
        "attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": 4,
    } | fields  # fmt: skip

    def write(path):
        metadata = {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in keys.items()}
        row = np.zeros((1, 34), np.uint8)
        write_gguf(path, metadata, [Tensor("token_embd.weight", (1, 32), Q8_0, lambda: row)])

    return write


def gguf_tensor(dims):
    info = struct.pack("<Q", 1) + b"w" + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 8, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info
    return lambda path: path.write_bytes(head + bytes(-len(head) % 32 + 64))


def gguf_array(kind):
    value = struct.pack("<IIQ", 9, kind, 2**60)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + value
    return lambda path: path.write_bytes(head + bytes(900))


def hf_directory(raw=None, **fields):
    config = json.loads((LLAMA / "config.json").read_text()) | fields
    raw = raw or header({"model.norm.weight": entry()})

    def write(path):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        (path / "model.safetensors").write_bytes(raw)

    return write


CLAIMS = {
    "gguf tensor": gguf_tensor([2**60]),
    "gguf tensor of two axes": gguf_tensor([2**60, 2**60]),
    "gguf array": gguf_array(4),
    "gguf strings": gguf_array(8),
    "gguf layers": small_gguf(block_count=2**31 - 1),
    "gguf vocabulary": small_gguf(vocab_size=2**60),
    "gguf heads": small_gguf(**{"attention.key_length": 2**31 - 2}),
    "safetensors shape": hf_directory(header({"w": entry(shape=[2**60], offsets=[0, 2**62])})),
    "safetensors header": hf_directory(struct.pack("<Q", 2**60) + bytes(500)),
    "layers": hf_directory(num_hidden_layers=2**60),
    "vocabulary": hf_directory(vocab_size=2**60),
    "width": hf_directory(hidden_size=2**60),
    "heads": hf_directory(head_dim=2**60),
    "bits": hf_directory(quantization_config={"quant_method": "gptq", "bits": 2**60}),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_kilobyte_that_claims_2_to_the_60_values_allocates_next_to_nothing(tmp_path, claim):
    path = tmp_path / "m"
    CLAIMS[claim](path)
    size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
    assert size < 2048
    with pytest.raises(NAMED):  # once before, for what is made on first use
        load(path)
    tracemalloc.start()
    try:
        with pytest.raises(NAMED) as error:
            load(path)
        peak = tracemalloc.get_traced_memory()[1]  # numpy's arrays are in it
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert peak < 2**18
