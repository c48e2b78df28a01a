"""The rule "ggml" chooses what ggml's reference quantizer chooses."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import Format, QuantizationError, quantize
from qjax.interop.gguf import BY_NAME, decode, from_qtensor
from qjax.kquants import FORMATS
from qjax.qtensor import dequantize_array, quantize_array

GOLDEN = np.load(Path(__file__).parent / "golden" / "ggml_blocks.npz")
KEYS = {key.lower(): key for key in GOLDEN}
run = jax.jit(quantize_array, static_argnums=(1, 2))

# Squared relative error of N(0, 1), that of ggml's C code on 4096 rows of 4096.
REFERENCE = {
    "Q2_K": 0.087935, "Q3_K": 0.022769, "Q4_K": 0.005090, "Q5_K": 0.001304, "Q6_K": 0.000314,
}  # fmt: skip


def encoded(x, name, importance=None):
    """Returns the blocks of one row."""
    q = None if importance is None else jnp.asarray(importance)
    return from_qtensor(run(jnp.asarray(x)[:, None], FORMATS[name], "kn", importance=q))[0].ravel()


def golden(name):
    return GOLDEN[KEYS[name.lower()]]


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_ggml(name):
    if not name.endswith("_K"):
        np.testing.assert_array_equal(encoded(GOLDEN["x"], name), golden(f"{name}_bytes"))
        return
    # Super-blocks know nothing of each other: two golden rows in one.
    got = encoded(np.concatenate([GOLDEN["x"], GOLDEN["rand_x"]]), name)
    expected = np.concatenate([golden(f"{name}_bytes"), golden(f"rand_{name}")])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.endswith("_K")])
def test_bytes_with_importance_are_those_of_ggml(name):
    got = encoded(GOLDEN["rand_x"], name, GOLDEN["rand_imatrix"])
    np.testing.assert_array_equal(got, golden(f"rand_{name}_imatrix"))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "Q8_0"])
def test_the_weighted_error_is_that_of_ggml(name):
    # Blocks 2 and 3 are full of exact ties, which are decided by the rounding of sums.
    x, q, kind = GOLDEN["x"], GOLDEN["imatrix"], BY_NAME[name]

    def errors(raw):
        return np.sum((q * np.square(decode(raw, kind) - x)).reshape(4, -1), 1)

    ours, theirs = errors(encoded(x, name, q)), errors(golden(f"{name}_imatrix_bytes"))
    np.testing.assert_allclose(ours[:2], theirs[:2], rtol=1e-5)
    assert np.all(ours <= 1.2 * theirs + 1e-12)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_gaussian_error_is_no_worse_than_the_reference(name):
    w = jax.random.normal(jax.random.key(0), (512, 512))
    error = jnp.sum(jnp.square(w - dequantize_array(run(w, FORMATS[name])))) / jnp.sum(w * w)
    assert error <= REFERENCE[name] * 1.01  # 1 % is three deviations of so many values


@pytest.mark.parametrize("name", ["Q4_K"])
def test_stacks_and_columns_are_quantized_alone(name):
    w = jax.random.normal(jax.random.key(1), (2, 256, 96))  # three blocks of columns
    q = jnp.exp(jax.random.normal(jax.random.key(2), (2, 256)))
    whole = run(w, FORMATS[name], "kn", importance=q)
    for i in range(2):
        one = run(w[i], FORMATS[name], "kn", importance=q[i])
        part = jax.tree.map(lambda a, i=i: a[i], whole)
        jax.tree.map(np.testing.assert_array_equal, one, part)
    few = run(w[0, :, 60:65], FORMATS[name], "kn", importance=q[0])
    np.testing.assert_array_equal(dequantize_array(few), dequantize_array(whole)[0, :, 60:65])


@pytest.mark.parametrize("name", FORMATS)
def test_a_nan_shows(name):
    w = jnp.ones((256, 2)).at[5, 0].set(jnp.nan)
    back = dequantize_array(run(w, FORMATS[name]))
    assert bool(jnp.isnan(back[5, 0]))
    assert bool(jnp.all(jnp.isfinite(back[:, 1])))


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
    assert not jnp.any(dequantize_array(run(jnp.zeros((256, 2)), FORMATS[name])))


def test_what_blocks_do_not_divide_is_named_with_a_way_out():
    with pytest.raises(QuantizationError, match=r"^w: Q4_K is made of blocks of 256.*576.*Q5_0"):
        quantize({"w": jnp.ones((576, 4))}, FORMATS["Q4_K"])
    with pytest.raises(QuantizationError, match=r"^w: .*group_size"):
        quantize({"w": jnp.ones((40, 4))}, FORMATS["Q4_0"])


def test_the_rule_is_for_ggmls_own_formats():
    fmt = Format("int4", group_size=64, scale="float16", rule="ggml")
    with pytest.raises(QuantizationError, match="w: rule='ggml' is ggml's own search"):
        quantize({"w": jnp.ones((64, 4))}, fmt)


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K"])
def test_inputs_that_were_never_seen_keep_their_weights(name):
    w = jax.random.normal(jax.random.key(3), (512, 4))
    seen = jnp.where(jnp.arange(512) < 256, 1.0, 0.0)
    for importance in (seen, jnp.zeros(512)):
        back = dequantize_array(run(w, FORMATS[name], "kn", importance=importance))
        assert jnp.sum(jnp.square(back - w)[256:]) < 0.15 * jnp.sum(jnp.square(w)[256:])
