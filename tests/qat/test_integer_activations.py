"""Activations of few bits and without a sign: exact integer products, and 0 below 0."""

import jax
import numpy as np
import pytest

import qjax
from qjax import Format, numerics
from qjax.ops import activation


@pytest.mark.parametrize("element", ["int8", "int4", "uint8", "uint4"])
def test_the_product_is_that_of_the_integers(element):
    """y = s_x s_w sum_k code_x code_w, the sum exact: K q_max^2 < 2^24."""
    x = jax.random.normal(jax.random.key(0), (5, 64))
    w = jax.random.normal(jax.random.key(1), (64, 8))
    qt = qjax.quantize(w, Format("int4", activation=element))
    got = jax.jit(qjax.apply(lambda w, x: x @ w))(qt, x)
    qmin, qmax = (numerics.get_element(element).qmin, numerics.get_element(element).qmax)
    largest = np.maximum(x, 0).max(1) if qmin == 0 else np.abs(x).max(1)
    step = (largest / qmax)[:, None].astype(np.float32)
    codes = np.clip(np.round(np.asarray(x) / step), qmin, qmax).astype(np.int64)
    values = np.asarray(qjax.dequantize(qt) / qt.scale).round().astype(np.int64)
    want = step * (codes @ values) * np.asarray(qt.scale)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(activation.rounded(x, qt).codes, codes)
