"""Rows are rounded by the kernel as by the reference and by qjax itself, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import interpreter, quantize_rows, reference
from qjax.ops import activation

ELEMENTS = {"int8": "int8", "float8_e4m3fn": "e4m3"}
KERNELS = {"by_token": quantize_rows.by_token, "by_block": quantize_rows.by_block}


def _rows(dtype, K=384):
    x = jax.random.normal(jax.random.key(0), (4, K)) * jnp.array([[1e-3], [1], [100], [1]])
    ties = jnp.arange(K) % 255 - 127.5  # steps of 1 and a half, the largest being 127
    return x.at[3].set(ties.at[::128].set(127)).astype(dtype)


def _wanted(x, dtype, how):
    return jax.jit(getattr(reference, how), static_argnums=1)(x, dtype)


def _by_qjax(x, dtype, how):
    rows = x if how == "by_token" else x.reshape(-1, 128)
    round_ = jax.jit(activation.quantize_tokens, static_argnums=1)
    codes, scale = round_(rows, ELEMENTS[dtype])
    return codes.reshape(x.shape), scale.reshape(len(x), -1)


def _run(x, dtype, how):
    with interpreter.interpreting() as races:
        out = KERNELS[how](x, dtype, interpret=interpreter.params())
        out = jax.tree.map(np.asarray, out)
    assert not races.found
    return out


def _same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_array_equal(a.astype(np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
def test_codes_and_scales_are_those_of_the_reference_and_of_qjax(x_dtype, dtype, how):
    x = _rows(x_dtype)
    got = _run(x, dtype, how)
    _same(got, _wanted(x, dtype, how))
    _same(got, _by_qjax(x, dtype, how))


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_zeros_are_exact_and_what_is_no_number_poisons_its_row_alone(dtype, how):
    x = _rows("float32", 128).at[0].set(0).at[1, 5].set(jnp.nan).at[2, 7].set(-jnp.inf)
    x = x if how == "by_token" else x.reshape(2, 256)  # two blocks of a row
    codes, scale = _run(x, dtype, how)
    codes, scale = codes.reshape(4, -1), scale.reshape(4, 1)
    assert not codes[0].astype(np.float32).any()
    assert scale[0] == 0
    assert np.isnan(scale[1:3]).all()
    _same((codes[3:], scale[3:]), _wanted(x.reshape(4, 128)[3:], dtype, how))


@pytest.mark.parametrize("M", [1, 3])
def test_blocks_that_fill_no_warpgroup_are_rounded_as_others(M):
    x = _rows("bfloat16")[:M]
    _same(_run(x, "int8", "by_block"), _wanted(x, "int8", "by_block"))


@pytest.mark.parametrize("sms", [1, 8, 64])
def test_however_many_blocks_a_cta_has_they_are_the_same(monkeypatch, sms):
    x = jax.random.normal(jax.random.key(1), (16, 1024), jnp.bfloat16)
    monkeypatch.setattr(quantize_rows, "SMS", sms)  # of 128 blocks a CTA has 64, 16 or 8
    _same(_run(x, "float8_e4m3fn", "by_block"), _wanted(x, "float8_e4m3fn", "by_block"))


@pytest.mark.parametrize("how", KERNELS)
def test_a_skipped_row_is_an_error(monkeypatch, how):
    original = quantize_rows.lax.axis_index
    monkeypatch.setattr(quantize_rows.lax, "axis_index", lambda name: original(name) // 2)
    x = _rows("float32", 128 if how == "by_token" else 1024)
    scale = _run_unchecked(x, how)[1]
    assert not np.allclose(scale, _wanted(x, "int8", how)[1])


def _run_unchecked(x, how):  # two CTAs that write one row are a race as well
    with interpreter.interpreting():
        out = KERNELS[how](x, "int8", interpret=interpreter.params())
        return jax.tree.map(np.asarray, out)


@pytest.mark.parametrize("how", KERNELS)
def test_refuses_what_it_cannot_round(how):
    with pytest.raises(ValueError, match="rows of 100 values"):
        KERNELS[how](jnp.ones((2, 100)), "int8")
    with pytest.raises(ValueError, match="activations of int8"):
        KERNELS[how](jnp.ones((2, 128), jnp.int8), "int8")
    with pytest.raises(ValueError, match="codes of uint8"):
        KERNELS[how](jnp.ones((2, 128)), "uint8")
