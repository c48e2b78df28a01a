"""The PTX that decodes bytes computes what is written beside it in Triton, for all bytes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qjax import numerics
from tests.pallas_kernels.ptx import run

pytest.importorskip("triton", reason="needs the wheels of `--extra h100`")

from pallas_kernels.triton import decode


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
