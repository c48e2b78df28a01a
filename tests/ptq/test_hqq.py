"""Laws of half-quadratic quantization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.ptq import hqq
from qjax.qtensor import dequantize_canonical, quantize_array

K, N, P = 96, 24, 0.7
FORMATS = [
    qjax.Format("int4", group_size=32),
    qjax.Format("int3", group_size=32, zero_point=True, scale="bfloat16"),
    qjax.Format("uint4", group_size=32, offset="float16"),
    qjax.Format("uint2", group_size=16, offset="float32"),
    qjax.Format("nf4", group_size=32),
    qjax.Format("e2m1", group_size=32, scale="e8m0"),
    qjax.Format("ternary"),
    qjax.Format("int4", group_size=36, group_columns=10, remainder="ragged"),
]
FLAT = qjax.Format("dynamic8", 64, flatten=True, remainder="ragged")
NESTED = [
    qjax.Format("nf4", group_size=16, scale=qjax.Format("uint8", group_size=1, group_columns=24)),
    qjax.Format("e2m1", group_size=16, scale=qjax.Format("e4m3", group_columns=None)),
    # bitsandbytes: all scales of a weight in one row
    qjax.Format("nf4", group_size=32, scale=FLAT),
]


def weight(*lead):
    """Heavy tails, which the p-norm cares less about than the range does."""
    w = np.random.default_rng(0).standard_t(3, (*lead, K, N))
    return jnp.asarray(w, jnp.float32)


def losses(w, qt):
    """sum |w - q|^p of every group."""
    error = np.abs(np.asarray(w - dequantize_canonical(qt), np.float64)) ** P
    g, c = qt.format.group_size or K, qt.format.group_columns
    rows = np.add.reduceat(error, np.arange(0, K, g), -2)
    return np.add.reduceat(rows, np.arange(0, N, c), -1)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_group_is_above_rounding_to_nearest(fmt):
    w = weight(2)
    before, after = losses(w, quantize_array(w, fmt)), losses(w, hqq.solve(w, fmt, p=P))
    assert (after <= before * (1 + 1e-5)).all()
    # A zero point or an offset gives it more to choose.
    movable = fmt.zero_point or fmt.offset is not None
    assert after.sum() < (0.95 if movable else 1.0) * before.sum()


@pytest.mark.parametrize("fmt", NESTED, ids=str)
def test_no_weight_with_quantized_scales_is_above_it(fmt):
    w = weight(2)
    before, after = losses(w, quantize_array(w, fmt)), losses(w, hqq.solve(w, fmt, p=P))
    assert (after.sum((1, 2)) <= before.sum((1, 2)) * (1 + 1e-5)).all()


@pytest.mark.parametrize("fmt", FORMATS + NESTED, ids=str)
def test_storage_is_that_of_rounding_to_nearest(fmt):
    w = weight(2)
    rtn, qt = (jax.eval_shape(lambda w, f=f: f(w, fmt), w) for f in (quantize_array, hqq.solve))
    assert jax.tree.structure(qt) == jax.tree.structure(rtn)
    assert jax.tree.leaves(qt) == jax.tree.leaves(rtn)


def test_the_layout_says_which_axes_are_contracted():
    fmt = qjax.Format("int4", group_size=32)
    w = weight()
    transposed = hqq.solve(w.T, fmt, "nk")
    assert transposed.shape == (N, K)
    np.testing.assert_array_equal(transposed.data, hqq.solve(w, fmt).data)


def test_zeros_and_nans_stay_what_they_are():
    fmt = qjax.Format("uint4", group_size=32, offset="float32")
    w = weight().at[:, 0].set(0.0).at[5, 1].set(jnp.nan)
    back = np.asarray(dequantize_canonical(hqq.solve(w, fmt)))
    assert (back[:, 0] == 0).all()
    assert np.isnan(back[:32, 1]).all()
    assert np.isfinite(back[32:, 1]).all()
