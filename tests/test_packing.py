"""Tests of qjax/packing.py: the bit order, and that packing loses nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.packing import pack, packed_rows, padding, unpack, unpack_rows

BITS = range(1, 9)


def golden(golden_dir, name):
    return np.load(golden_dir / f"{name}.npz")


@pytest.fixture(scope="module")
def golden_dir(request):
    return request.path.parent / "golden"


def stream(codes, bits):
    """The definition: bit j of a column's stream is bit j mod 8 of byte j div 8."""
    K, N = codes.shape
    planes = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1  # [K, bits, N]
    stream = np.zeros((packed_rows(K, bits) * 8, N), np.uint8)
    stream[: K * bits] = planes.reshape(K * bits, N)
    return np.packbits(stream, axis=0, bitorder="little")


def random_codes(seed, shape, bits):
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


@settings(max_examples=15)
@given(st.sampled_from(BITS), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_pack_is_the_stream_and_unpack_its_inverse(bits, K, N, seed):
    codes = random_codes(seed, (K, N), bits)
    packed = pack(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(packed, stream(codes, bits))
    np.testing.assert_array_equal(unpack(packed, bits, padding(K, bits)), codes)


@pytest.mark.parametrize("bits", BITS)
def test_leading_axes_are_stacked_columns(bits):
    codes = jnp.asarray(random_codes(0, (2, 3, 17, 4), bits))
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, packed_rows(17, bits), 4)
    one_by_one = jax.vmap(jax.vmap(lambda c: pack(c, bits)))(codes)
    np.testing.assert_array_equal(packed, one_by_one)
    np.testing.assert_array_equal(unpack(packed, bits, padding(17, bits)), codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_code_costs_its_bits_and_nothing_more(bits):
    packed = pack(jnp.zeros((64, 16), jnp.uint8), bits)
    assert packed.dtype == jnp.uint8
    assert packed.nbytes * 8 == bits * 64 * 16


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_less_than_a_unit(bits):
    for K in range(1, 30):
        spent = packed_rows(K, bits) * 8 - K * bits
        assert spent == padding(K, bits) * bits
        assert 0 <= padding(K, bits) < 8


@pytest.mark.parametrize("bits", BITS)
def test_unpack_rows_reads_single_codes(bits):
    codes = random_codes(1, (19, 5), bits)
    packed = pack(jnp.asarray(codes), bits)
    rows = jnp.array([[0, 18, 7], [7, 3, 11]])
    np.testing.assert_array_equal(unpack_rows(packed, bits, rows), codes[np.asarray(rows)])
    every = jnp.arange(19)
    np.testing.assert_array_equal(unpack_rows(packed, bits, every), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, np.arange(8), [0x76543210]),
        (3, np.arange(32) % 8, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (8, np.arange(1, 5), [0x04030201]),
        (2, np.arange(16) % 4, [0xE4E4E4E4]),
    ],
)
def test_golden_words(bits, codes, words):
    packed = pack(jnp.asarray(codes, jnp.uint8)[:, None], bits)
    assert np.asarray(packed)[:, 0].view("<u4").tolist() == words


def columns_of_words(words):
    """Bytes [B, N] of little-endian words [W, N], each column a stream of its own."""
    W, N = words.shape
    return np.ascontiguousarray(words.T).view(np.uint8).reshape(N, W * 4).T


@pytest.mark.parametrize("tag", [f"gptq{b}{a}" for b in (2, 3, 4, 8) for a in ("", "_act")])
def test_gptq_qweight_holds_the_same_bytes(golden_dir, tag):
    g, bits = golden(golden_dir, "gptq_awq"), int(tag[4])
    packed = pack(jnp.asarray(g[f"{tag}_q"]), bits)
    np.testing.assert_array_equal(packed, columns_of_words(g[f"{tag}_qweight"]))


@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_rows_are_our_columns(golden_dir, bits):
    g, tag = golden(golden_dir, "compressed_tensors"), f"pack{bits}_sym"
    words, scale = g[f"{tag}_weight_packed"], g[f"{tag}_weight_scale"]
    codes = np.asarray(unpack(jnp.asarray(columns_of_words(words.T)), bits)).T  # [N, K]
    w = (codes.astype(np.float32) - 2.0 ** (bits - 1)) * np.repeat(scale, 32, axis=1)
    np.testing.assert_array_equal(w, g[f"{tag}_decoded"])
