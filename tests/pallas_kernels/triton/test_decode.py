"""The PTX that decodes bytes computes what is written beside it in Triton, for all bytes."""

from __future__ import annotations

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from qjax import numerics

pytest.importorskip("triton", reason="needs the wheels of `--extra h100`")

from pallas_kernels.triton import decode

# ---- PTX on words of four bytes, as its manual says ----


def _prmt(a, b, selector):
    pair = (b.astype(np.uint64) << 32) | a
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & 15
        byte = (pair >> (8 * (nibble & 7)).astype(np.uint64)).astype(np.uint32) & 0xFF
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _lop3(a, b, c, table):
    out = np.zeros_like(a)
    for bit in range(8):
        if table >> bit & 1:
            term = [v if bit >> shift & 1 else ~v for v, shift in ((a, 2), (b, 1), (c, 0))]
            out |= term[0] & term[1] & term[2]
    return out


def _sub(a, b):
    return (a.view(np.float32) - b.view(np.float32)).view(np.uint32)


def _pack(high, low):
    half = lambda a: a.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
    return half(high) << np.uint32(16) | half(low)


_OPERATIONS: dict[str, Callable] = {
    "prmt.b32": _prmt,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.b32": lambda a, b: a >> b,
    "sub.f32": _sub,
    "cvt.rn.bf16x2.f32": _pack,
}


def run(text: str, register: str, words: np.ndarray) -> dict[str, np.ndarray]:
    """Returns all registers after the PTX."""
    values = {register: words}

    def value(source):
        if source in values:
            return values[source]
        number = int(source[2:], 16) if source.startswith("0f") else int(source, 0)
        return np.full_like(words, number)

    for operation, operands in re.findall(r"^([a-z][\w.]*) (.*);$", text, re.M):
        target, *sources = operands.split(", ")
        if operation == "lop3.b32":
            *sources, table = sources
            values[target] = _lop3(*map(value, sources), int(table, 0))
        else:
            values[target] = _OPERATIONS[operation](*map(value, sources))
    return values


def _words(byte: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(byte, np.uint8).view(np.uint32).ravel()


def _halves(registers: list[np.ndarray], dtype: str) -> np.ndarray:
    """Returns the four values of each word from two registers with two each."""
    return np.stack(registers, axis=1).view(DTYPES[dtype]).astype(np.float64)


DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# Every byte in every place of a word, among random ones.
BYTES = np.random.default_rng(0).integers(0, 256, (4, 256, 4), np.uint8)
for place in range(4):
    BYTES[place, :, place] = np.arange(256)
BYTES = BYTES.reshape(-1, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["uint4", "nf4", "fp4", "e2m1", "iq4_nl"])
def test_half_bytes(kind, dtype):
    levels = () if kind == "uint4" else numerics.get_element(kind).levels
    name = "uint4" if kind == "uint4" else "table"
    values = run(decode.assembly(name, dtype, levels), "$4", _words(BYTES))
    wanted = np.arange(16.0) + decode.bias("uint4", dtype)
    if levels:
        wanted = np.array(levels, np.float32).astype(DTYPES[dtype]).astype(np.float64)
    np.testing.assert_array_equal(_halves([values["$0"], values["$1"]], dtype), wanted[BYTES & 15])
    np.testing.assert_array_equal(_halves([values["$2"], values["$3"]], dtype), wanted[BYTES >> 4])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_whole_bytes(dtype):
    values = run(decode.assembly("int8", dtype), "$2", _words(BYTES))
    wanted = BYTES.view(np.int8).astype(np.float64) + decode.bias("int8", dtype)
    np.testing.assert_array_equal(_halves([values["$0"], values["$1"]], dtype), wanted)


def test_a_wrong_selector_is_seen():
    text = decode.assembly("uint4", "bfloat16").replace("0x4342", "0x4341")
    values = run(text, "$4", _words(BYTES))
    assert (_halves([values["$0"], values["$1"]], "bfloat16") != 128.0 + (BYTES & 15)).any()
