"""GGUF containers are read whole, and damaged ones end in GGUFError."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.interop.gguf import BY_NAME, GGUFError, decode, open_gguf

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "tiny.gguf"


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def info(name="w", dims=(32,), kind=0, offset=0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def container(kv=(), infos=(), data=b"", *, version=3, n_kv=None, n_tensors=None) -> bytes:
    n_kv = len(kv) if n_kv is None else n_kv
    n_tensors = len(infos) if n_tensors is None else n_tensors
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kv) + b"".join([*kv, *infos])
    return head + b"\0" * (-len(head) % 32) + data


@pytest.fixture
def open_bytes(tmp_path):
    def open_it(raw: bytes):
        path = tmp_path / "f.gguf"
        path.write_bytes(raw)
        return open_gguf(path)

    return open_it


def test_floats_decode_exactly():
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    half = x.astype(np.float16)
    brain = (x.view(np.uint32) >> 16).astype(np.uint16)  # Truncation gives a valid bfloat16.
    np.testing.assert_array_equal(decode(x.view(np.uint8), BY_NAME["F32"]), x)
    np.testing.assert_array_equal(decode(half.view(np.uint8), BY_NAME["F16"]), half.astype("f4"))
    np.testing.assert_array_equal(
        decode(brain.view(np.uint8), BY_NAME["BF16"]),
        (brain.astype(np.uint32) << 16).view(np.float32),
    )


def test_every_value_type_and_tensor_of_a_file_is_read():
    expected = json.loads((GOLDEN / "tiny_gguf.json").read_text())
    file = open_gguf(TINY)
    assert file.version == expected["version"]
    assert list(file.metadata) == list(expected["kv_type_and_value"])
    for key, (value_type, value) in expected["kv_type_and_value"].items():
        assert file.metadata_types[key] == value_type
        got = file.metadata[key]
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == value
    for name, dims, kind, offset in expected["tensors_name_dims_type_offset"]:
        tensor = file.tensors[name]
        assert tensor.shape == tuple(reversed(dims))
        assert tensor.kind.id == kind
        assert tensor.offset == expected["data_start"] + offset


def test_tensors_are_read_lazily_and_decoded():
    golden = np.load(GOLDEN / "ggml_blocks.npz")
    file = open_gguf(TINY)
    assert not file.raw("q8.weight").flags.owndata
    np.testing.assert_array_equal(file.read("q8.weight").ravel(), golden["q8_0_dequant"][:64])
    assert file.raw("exps.weight").shape == (2, 2, 210)


def test_a_type_that_is_not_supported_is_named(open_bytes):
    file = open_bytes(container(infos=[info(dims=(256,), kind=16)], data=bytes(96)))
    with pytest.raises(GGUFError, match=r"'w'.*IQ2_XXS.*Supported are F32"):
        file.read("w")
    with pytest.raises(GGUFError, match=r"'w'.*IQ2_XXS is not a quantized type"):
        file.qtensor("w")


def test_an_unknown_tensor_is_named():
    with pytest.raises(GGUFError, match=r"no tensor 'nope'.*'f32.weight'"):
        open_gguf(TINY).read("nope")


U32 = struct.Struct("<I").pack
KV = string("k")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "too short"),
        (b"PK" + bytes(40), "not a GGUF file"),
        (container(version=1), "version 1 is not supported"),
        (container(version=0x03000000), "big-endian"),
        (container(n_tensors=2**60), "claims 1152921504606846976 tensors"),
        (container(n_kv=2**60), "claims 1152921504606846976 metadata keys"),
        (container([KV + U32(13) + bytes(16)]), "'k' has unknown value type 13"),
        (container([KV + U32(8) + string(b"\xff\xfe")]), "'k' at byte .* is not UTF-8"),
        (container([KV + U32(8) + struct.pack("<Q", 2**62)]), "'k' at byte .* needs"),
        (container([KV + U32(9) + U32(4) + struct.pack("<Q", 2**62)]), "values in metadata key"),
        (container([KV + U32(9) + U32(8) + struct.pack("<Q", 2**62)]), "strings in metadata key"),
        (container([KV + U32(9) + U32(9) + struct.pack("<Q", 1)]), "array of type 9"),
        (container([KV + U32(4) + U32(1)] * 2), "'k' occurs twice"),
        (container([string("general.alignment") + U32(4) + U32(24)]), "power of two, got 24"),
        (container([string("general.alignment") + U32(4) + U32(0)]), "power of two, got 0"),
        (container([string("general.alignment") + U32(8) + string("x")]), "power of two, got 'x'"),
        (container(infos=[info(kind=99)], data=bytes(128)), "'w' has unknown type 99"),
        (container(infos=[info(dims=())], data=bytes(128)), "'w' has 0 dimensions"),
        (container(infos=[info(dims=(1,) * 5)], data=bytes(128)), "'w' has 5 dimensions"),
        (container(infos=[info(dims=(32, 0))], data=bytes(128)), "empty dimension"),
        (container(infos=[info(dims=(33,), kind=8)], data=bytes(128)), "33 values are not whole"),
        (container(infos=[info(offset=4)], data=bytes(256)), "'w': offset 4 is no multiple"),
        (container(infos=[info(dims=(40,))], data=bytes(128)), "'w' ends at byte .* truncated"),
        (container(infos=[info(dims=(2**40, 2**40))], data=bytes(128)), "'w' .* takes"),
        (container(infos=[info(offset=2**63)], data=bytes(128)), "'w' .* truncated"),
        (container(infos=[info(), info("v", offset=96)], data=bytes(256)), "'w' and 'v' overlap"),
        (container(infos=[info(), info(offset=128)], data=bytes(256)), "'w' occurs twice"),
    ],
)
def test_damage_is_named(open_bytes, raw, message):
    with pytest.raises(GGUFError, match=message):
        open_bytes(raw)


def test_every_truncation_is_noticed(open_bytes):
    raw = TINY.read_bytes()
    end = max(t.offset + t.nbytes for t in open_gguf(TINY).tensors.values())
    for n in range(0, end, 7):
        with pytest.raises(GGUFError):
            open_bytes(raw[:n])


@settings(max_examples=300, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 2015), st.binary(min_size=1, max_size=8))))
def test_a_damaged_file_gives_a_file_or_a_GGUFError(tmp_path_factory, edits):
    raw = bytearray(TINY.read_bytes())
    for at, patch in edits:
        raw[at : at + len(patch)] = patch
    path = tmp_path_factory.mktemp("fuzz") / "f.gguf"
    path.write_bytes(raw)
    try:
        file = open_gguf(path)
        for name in file.tensors:
            file.read(name)
    except GGUFError:
        pass


@settings(max_examples=100, deadline=None)
@given(tail=st.binary(max_size=300))
def test_noise_after_the_magic_gives_a_GGUFError(tmp_path_factory, tail):
    path = tmp_path_factory.mktemp("fuzz") / "f.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\x01" + tail)
    with pytest.raises(GGUFError):
        open_gguf(path)
