"""The law that the tests of the transform share: packed equals dequantized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Format, Policy, Rule

K = 64  # every contraction of these tests is at most this long, if not said otherwise


def _quantize(params, layouts=None, fmt=None):
    """Quantizes all arrays but biases and scales; `layouts` maps patterns to layout letters."""
    fmt = fmt or Format("int4", 16, scale="bfloat16")
    rules = [Rule(("*bias*", "*scale*"), optional=True)]
    rules += [Rule(pattern, fmt, layout=letters) for pattern, letters in (layouts or {}).items()]
    return qjax.quantize(params, Policy((*rules, Rule("*", fmt, optional=True))))


def _assert_close(got, want, *, depth=1, k=K):
    """Compares trees up to the order in which `depth` dots of length k accumulate.

    Each of the two sums is off by at most k * eps * sum_k |x w|; the packed one has terms of up to
    three times that size, as a code's zero point is added apart. For terms of random sign the
    largest of many |y| is at least sum_k |x w| / sqrt(k).
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if not isinstance(b, jax.Array) or not jnp.issubdtype(b.dtype, jnp.floating):
            assert np.array_equal(a, b)
            continue
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        eps = float(jnp.finfo(b.dtype).eps)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        bound = (
            4 * k**0.5 * (k if eps < 1e-4 else 1) * depth * eps * np.nanmax(np.abs(b), initial=0)
        )
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        assert np.nanmax(np.abs(a - b), initial=0) <= bound


def _assert_agrees(fn, qparams, *args, dequantized=(), depth=1, k=K):
    """Asserts that `fn` runs packed and as on the dequantized weights; returns the explanation.

    Args:
      dequantized: operations that are known to need the float weight.
    """
    explanation = qjax.explain(fn)(qparams, *args)
    assert sorted(use.op for use in explanation.dequantized) == sorted(dequantized)
    assert len(explanation)
    want = jax.jit(fn)(qjax.dequantize(qparams), *args)
    _assert_close(jax.jit(qjax.apply(fn))(qparams, *args), want, depth=depth, k=k)
    return explanation


def _normal(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(7), seed), shape)


@pytest.fixture
def quantize():
    return _quantize


@pytest.fixture
def assert_close():
    return _assert_close


@pytest.fixture
def assert_agrees():
    return _assert_agrees


@pytest.fixture
def normal():
    return _normal
