"""Rows are rounded by the kernel as by the reference and by qjax itself, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import interpreter, quantize_rows, reference
from qjax.ops import activation

ELEMENTS = {"int8": "int8", "float8_e4m3fn": "e4m3"}


def _rows(dtype, K=384):
    x = jax.random.normal(jax.random.key(0), (4, K)) * jnp.array([[1e-3], [1], [100], [1]])
    ties = jnp.arange(K) % 255 - 127.5  # steps of 1 and a half, the largest being 127
    return x.at[3].set(ties.at[0].set(127)).astype(dtype)


_wanted = jax.jit(reference.by_token, static_argnums=1)


def _run(x, dtype):
    with interpreter.interpreting() as races:
        out = quantize_rows.by_token(x, dtype, interpret=interpreter.params())
        out = jax.tree.map(np.asarray, out)
    assert not races.found
    return out


def _same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_array_equal(a.astype(np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
def test_codes_and_scales_are_those_of_the_reference_and_of_qjax(x_dtype, dtype):
    x = _rows(x_dtype)
    got = _run(x, dtype)
    _same(got, _wanted(x, dtype))
    _same(got, jax.jit(activation.quantize_tokens, static_argnums=1)(x, ELEMENTS[dtype]))


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_zeros_are_exact_and_what_is_no_number_poisons_its_row_alone(dtype):
    x = _rows("float32", 128).at[0].set(0).at[1, 5].set(jnp.nan).at[2, 7].set(-jnp.inf)
    codes, scale = _run(x, dtype)
    assert not codes[0].astype(np.float32).any()
    assert scale[0] == 0
    assert np.isnan(scale[1:3]).all()
    _same((codes[3:], scale[3:]), _wanted(x[3:], dtype))


def test_a_skipped_row_is_an_error(monkeypatch):
    original = quantize_rows.lax.axis_index
    monkeypatch.setattr(quantize_rows.lax, "axis_index", lambda name: original(name) // 2)
    x = _rows("float32", 128)
    scale = _run_unchecked(x)[1]
    assert not np.allclose(scale, _wanted(x, "int8")[1])


def _run_unchecked(x):  # two CTAs that write one row are a race as well
    with interpreter.interpreting():
        out = quantize_rows.by_token(x, "int8", interpret=interpreter.params())
        return jax.tree.map(np.asarray, out)


def test_refuses_what_it_cannot_round():
    with pytest.raises(ValueError, match="rows of 100 values"):
        quantize_rows.by_token(jnp.ones((2, 100)), "int8")
    with pytest.raises(ValueError, match="activations of int8"):
        quantize_rows.by_token(jnp.ones((2, 128), jnp.int8), "int8")
    with pytest.raises(ValueError, match="codes of uint8"):
        quantize_rows.by_token(jnp.ones((2, 128)), "uint8")
