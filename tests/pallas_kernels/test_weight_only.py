"""Weight-only products agree with float64."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels import four_bits, interpreter, planes, reference, weight_only, zero_points
from pallas_kernels.blocks import Blocks, Shared
from pallas_kernels.interleave import interleaved_pairs, of_int4
from pallas_kernels.nested import Nested
from pallas_kernels.testing import TUNINGS, Laws
from pallas_kernels.tuning import Tuning

_ON_WEIGHT = Tuning(8, 2, scale_on="weight", sms=1)
# No order, no symmetry, values that bfloat16 rounds.
LEVELS = tuple(float(v) for v in np.random.default_rng(0).standard_normal(16))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _scales(key, shape, dtype):
    if dtype == "uint8":
        return jax.random.randint(key, shape, 120, 134).astype(jnp.uint8)
    if dtype.startswith("nested"):
        codes, outer = jax.random.split(key)
        G, N = shape
        floats = G if dtype.endswith("no offsets") else 2 * G
        outer = jax.random.uniform(outer, (-(-N // 128), floats), jnp.float32, 0.5, 1.5)
        return Nested(jax.random.randint(codes, shape, 0, 256).astype(jnp.uint8), outer, 128)
    return jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5).astype(dtype)


def in_order(w, *, bits=None, natural=False, codebook=None, **_):
    """Returns w [N, K] as the kernel reads it; with `bits` it is integers of so many."""
    if bits is not None:
        return planes.packed((w + 2 ** (bits - 1)).astype(jnp.uint8), bits)
    if w.dtype == jnp.int4:
        return of_int4(w, looked_up=codebook is not None)
    return w if natural else interleaved_pairs(w)


class TestWeightOnly(Laws):
    formats: ClassVar = {
        "int4 groups of 128": {"w": "int4", "group": 128},
        "int4 groups of 64": {"w": "int4", "group": 64},
        "int4 groups of 32": {"w": "int4", "group": 32},
        "int4 groups of 256": {"w": "int4", "group": 256},
        "int4, float16": {"w": "int4", "group": 128, "x": "float16"},
        "a codebook": {"w": "int4", "group": 64, "codebook": LEVELS},
        "a codebook, float16": {"w": "int4", "group": 64, "codebook": LEVELS, "x": "float16"},
        "powers of two": {"w": "int4", "group": 32, "codebook": E2M1, "scale": "uint8"},
        "scales of e4m3": {"w": "int4", "group": 16, "codebook": E2M1, "scale": "float8_e4m3fn"},
        "nested scales": {"w": "int4", "group": 64, "codebook": LEVELS, "scale": "nested"},
        "nested scales without offsets": {
            "w": "int4",
            "group": 64,
            "codebook": LEVELS,
            "scale": "nested, no offsets",
        },
        "nested scales of channels": {"w": "int8", "group": 256, "scale": "nested"},
        "zero points": {"w": "int4", "group": 128, "zero": True},
        "zero points of groups of 32, float16": {
            "w": "int4",
            "group": 32,
            "zero": True,
            "x": "float16",
        },
        "zero points of channels": {"w": "int4", "group": 256, "zero": True},
        "zero points of groups of 16": {
            "w": "int4",
            "group": 16,
            "zero": True,
            "scale": "float8_e4m3fn",
        },
        "zero points, nested scales": {"w": "int4", "group": 128, "zero": True, "scale": "nested"},
        "int4 less one zero point": {"w": "int4", "group": 128, "zero": 3},
        "int3 groups of 128": {"w": "int8", "group": 128, "bits": 3},
        "int3 groups of 32, float16": {"w": "int8", "group": 32, "bits": 3, "x": "float16"},
        "int3 channels": {"w": "int8", "group": 256, "bits": 3},
        "int2 groups of 64": {"w": "int8", "group": 64, "bits": 2},
        "int2 groups of 32, float16": {"w": "int8", "group": 32, "bits": 2, "x": "float16"},
        "int3 zero points of groups of 64": {"w": "int8", "group": 64, "bits": 3, "zero": True},
        "int3 zero points of channels, float16": {
            "w": "int8",
            "group": 256,
            "bits": 3,
            "zero": True,
            "x": "float16",
        },
        "int2 zero points of groups of 32": {"w": "int8", "group": 32, "bits": 2, "zero": True},
        "int2 zero points of groups of 128, float16": {
            "w": "int8",
            "group": 128,
            "bits": 2,
            "zero": True,
            "x": "float16",
        },
        "int8 channels": {"w": "int8", "group": 256},
        "int8 zero points of groups of 64": {"w": "int8", "group": 64, "zero": True},
        "int8 zero points of channels, float16": {
            "w": "int8",
            "group": 256,
            "zero": True,
            "x": "float16",
        },
        "int8 less one zero point": {"w": "int8", "group": 256, "zero": 3},
        "int8 in its natural order": {"w": "int8", "group": 256, "natural": True},
        "fp8 weights": {"w": "float8_e4m3fn", "group": 128},
        "fp8 weights in blocks": {"w": "float8_e4m3fn", "group": 128, "blocks": True},
        "int4 in long blocks, float16": {
            "w": "int4",
            "group": 256,
            "blocks": True,
            "x": "float16",
            "scale": "float32",
        },
        "fp8 weights, fp16 activations": {"w": "float8_e4m3fn", "group": 128, "x": "float16"},
        "codes in steps of tokens": {"w": "int4", "group": 128, "steps": True},
        "codes, channels": {"w": "int8", "group": 256, "steps": True, "natural": True},
    }

    mutated: ClassVar = (
        (None, Tuning(8, 2, sms=1)),
        ("a codebook", _ON_WEIGHT),
        ("zero points", Tuning(8, 2, sms=1)),
    )

    def make(
        self, M, K, N, seed=0, *, w, group, x="bfloat16", codebook=None, scale="bfloat16",
        bits=None, zero=None, natural=False, steps=False, blocks=False,
    ) -> dict[str, Any]:  # fmt: skip
        keys = jax.random.split(jax.random.key(seed), 3)
        low, high = (-8, 8) if w == "int4" else (-128, 128)
        if bits is not None:
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        arrays = (
            {
                "x": jax.random.normal(keys[0], (M, K), x),
                "w": jax.random.randint(keys[1], (N, K), low, high).astype(w),
                "scale": Blocks(_scales(keys[2], (N // 128, K // group), scale))
                if blocks
                else _scales(keys[2], (K // group, N), scale),
                "codebook": codebook,
            }
            | ({} if bits is None else {"bits": bits})
            | ({"natural": True} if natural else {})
        )
        if steps:
            of_tokens, of_codes = jax.random.split(jax.random.key(seed + 2000))
            arrays["x"] = jax.random.randint(of_codes, (M, K), -127, 128).astype(x)
            arrays["x_scale"] = jax.random.uniform(of_tokens, (M, 1), minval=0.5, maxval=1.5)
        if zero is True:
            key, largest = jax.random.key(seed + 1000), -2 * low
            zero = jax.random.randint(key, (K // group, N), 0, largest).astype(jnp.uint8)
        return arrays if zero is None else arrays | {"zero": zero}

    def run(self, arrays, *, tuning, interpret):
        scale = arrays["scale"]
        # Exact on the weight, as it is chosen.
        if isinstance(scale, Array) and scale.dtype.itemsize == 1:
            tuning = dataclasses.replace(tuning, scale_on="weight")
        w = in_order(**arrays)
        arrays = arrays | {"w": w}
        arrays.pop("bits", None)
        if arrays.pop("natural", False):
            arrays["x"] = weight_only.ordered(arrays["x"])
        return weight_only.matmul(
            **arrays, out_dtype=jnp.float32, tuning=tuning, interpret=interpret
        )

    def exact(self, arrays):
        scale = arrays["scale"]
        if is_decoded := isinstance(scale, Nested | Blocks):
            scale = scale.decoded()
        x, w, scale = (np.asarray(a).astype(np.float64) for a in (arrays["x"], arrays["w"], scale))
        if not is_decoded and arrays["scale"].dtype == jnp.uint8:
            scale = 2.0 ** (scale - 127)
        if arrays["codebook"] is not None:
            levels = np.asarray(jnp.asarray(arrays["codebook"], arrays["x"].dtype), np.float64)
            w = levels[w.astype(int) & 15]
        of_inputs = lambda a: np.repeat(a, x.shape[1] // len(a), axis=0)
        w = w.T
        if (zero := arrays.get("zero")) is not None:
            bits = arrays.get("bits") or (4 if arrays["w"].dtype == jnp.int4 else 8)
            zero = np.broadcast_to(np.asarray(zero, np.float64), scale.shape)
            w = w + 2 ** (bits - 1) - of_inputs(zero)
        return x @ (w * of_inputs(scale)) * np.asarray(arrays.get("x_scale", 1.0), np.float64)

    def test_nested_scales_are_code_times_factor_plus_offset_of_their_block(self):
        scale = _scales(jax.random.key(0), (3, 300), "nested")
        codes, outer = np.asarray(scale.codes, np.float64), np.asarray(scale.outer, np.float64)
        plain = dataclasses.replace(scale, outer=scale.outer[:, ::2])
        for g, n in ((0, 0), (1, 127), (2, 128), (1, 299)):
            factor, offset = outer[n // 128, 2 * g], outer[n // 128, 2 * g + 1]
            wanted = codes[g, n] * factor + offset
            np.testing.assert_allclose(scale.decoded()[g, n], wanted, rtol=1e-6)
            np.testing.assert_allclose(plain.decoded()[g, n], codes[g, n] * factor, rtol=1e-6)

    @pytest.mark.parametrize(
        "name",
        [
            "int4 groups of 32",
            "powers of two",
            "nested scales",
            "zero points of channels",
            "codes in steps of tokens",
        ],
    )
    def test_the_reference_agrees_with_float64(self, name):
        arrays = self.make(3, 256, 5, **self.formats[name])
        wanted = self.exact(arrays)
        atol = 1e-6 * np.linalg.norm(wanted)
        np.testing.assert_allclose(reference.weight_only(**arrays), wanted, rtol=1e-5, atol=atol)

    @pytest.mark.parametrize("weight", [
        {"w": "int4", "group": 256}, {"w": "int4", "group": 32},
        {"w": "int8", "bits": 3, "group": 64}, {"w": "int8", "bits": 2, "group": 32},
        {"w": "int4", "group": 256, "zero": True}, {"w": "int4", "group": 32, "zero": True},
        {"w": "int8", "bits": 3, "group": 256, "zero": True},
    ])  # fmt: skip
    def test_scales_on_the_weight_cost_one_rounding(self, weight):
        tuning = dataclasses.replace(_ON_WEIGHT, tile_k=256)  # two parts of a step
        error, races = self.error(self.make(8, 512, 256, **weight), tuning)
        assert error <= 2.0**-9  # half a unit in the last of bfloat16's 8 places
        assert not races

    @pytest.mark.parametrize(
        ("name", "budget"), [("codes in steps of tokens", 2.0**-9), ("codes, channels", 2.0**-22)]
    )
    def test_many_codes_as_they_are_tuned_cost_what_scales_on_the_weight_do(self, name, budget):
        """One rounding of weights with scales of groups; else that of steps and scales alone."""
        arrays = self.make(130, 256, 128, seed=5, **self.formats[name])
        error, races = self.error(arrays, None)
        assert error <= budget, error
        assert not races

    def test_zero_scales_and_extreme_codes_are_exact(self):
        arrays = self.make(1, 128, 128, w="int4", group=128)
        arrays["w"] = (
            jnp.where(jnp.arange(128) % 2 == 0, -8, 7).astype(jnp.int4)[None].repeat(128, 0)
        )
        arrays["scale"] = arrays["scale"].at[:, ::2].set(0)
        error, _ = self.error(arrays, dataclasses.replace(TUNINGS["decode"], sms=1))
        assert error <= self.budget

    def test_scales_that_are_no_numbers_poison_their_outputs_alone(self):
        for name, bad in (("powers of two", 255), ("scales of e4m3", jnp.nan)):
            arrays = self.make(8, 128, 128, **self.formats[name])
            # Small, but normal in float32 as it is decoded: XLA flushes the others on a CPU.
            smallest = 9 if name == "powers of two" else 2.0**-6
            arrays["scale"] = arrays["scale"].at[1, 5].set(bad).at[0, 7].set(smallest)
            with interpreter.interpreting():
                y = self.run(arrays, tuning=_ON_WEIGHT, interpret=interpreter.params())
                y = np.asarray(y, np.float64)
            wanted = self.exact(arrays | {"scale": arrays["scale"].at[:, 5].set(0)})
            assert np.isnan(y[:, 5]).all()
            np.testing.assert_allclose(
                np.delete(y, 5, 1), np.delete(wanted, 5, 1), rtol=1e-4, atol=1e-4
            )

    @pytest.mark.parametrize("bits", [2, 3])
    def test_codes_of_few_bits_are_less_any_zero(self, bits):
        arrays = self.make(1, 128, 128, w="int8", group=128, bits=bits)
        tuning = dataclasses.replace(TUNINGS["decode"], sms=1)
        with interpreter.interpreting():
            packed = in_order(arrays["w"], bits=bits)
            y = np.asarray(weight_only.matmul(
                arrays["x"], packed, arrays["scale"], zero=1, out_dtype=jnp.float32, tuning=tuning,
                interpret=interpreter.params(),
            ))  # fmt: skip
        wanted = self.exact(arrays | {"w": arrays["w"] + 2 ** (bits - 1) - 1})
        np.testing.assert_allclose(y, wanted, atol=self.budget * np.linalg.norm(wanted))

    def test_a_word_of_the_table_in_another_place_is_an_error(self, monkeypatch):
        original = four_bits.table
        monkeypatch.setattr(four_bits, "table", lambda *a: jnp.roll(original(*a), 1, axis=0))
        arrays = self.make(8, 256, 256, **self.formats["a codebook"])
        assert not self.error(arrays, TUNINGS["decode"])[0] <= 0.01

    @pytest.mark.parametrize("name", ["split_k", "long steps"])
    @pytest.mark.parametrize("format", ["nested scales", "fp8 weights in blocks"])
    def test_shared_scales_agree_with_float64_for_every_tuning(self, format, name):
        arrays = self.make(8, 512, 256, seed=1, **self.formats[format])
        error, races = self.error(arrays, TUNINGS[name])
        assert error <= self.budget
        assert not races

    def test_the_factors_of_another_group_are_an_error(self, monkeypatch):
        original = Shared.read
        monkeypatch.setattr(
            Shared, "read", lambda self, block, k, g: original(self, block, k, 1 - g)
        )
        arrays = self.make(8, 256, 256, **self.formats["nested scales"])
        assert not self.error(arrays, TUNINGS["one buffer"])[0] <= 0.01

    def test_codes_in_another_order_are_an_error(self, monkeypatch):
        if interpreter.on_gpu():
            pytest.skip("of the function that is interpreted")
        shifted = lambda *a: jnp.roll(original(*a), 1, axis=-1)
        original = planes.codes
        monkeypatch.setattr(planes, "codes", shifted)
        arrays = self.make(8, 256, 256, **self.formats["int3 groups of 128"])
        assert not self.error(arrays, TUNINGS["decode"])[0] <= 0.01

    def test_the_zero_points_of_another_group_are_an_error(self, monkeypatch):
        if interpreter.on_gpu():
            pytest.skip("of the function that is interpreted")
        arrays = self.make(8, 128, 128, w="int4", group=32, zero=True)
        assert self.error(arrays, _ON_WEIGHT)[0] <= 2.0**-9
        original = zero_points.spread
        of_the_next = lambda zeros, shape: original((*zeros[1:], zeros[0]), shape)
        monkeypatch.setattr(zero_points, "spread", of_the_next)
        assert not self.error(arrays, _ON_WEIGHT)[0] <= 0.01

    def test_refuses_what_it_cannot_compute(self):
        arrays = self.make(8, 256, 256, w="int4", group=128)
        with pytest.raises(ValueError, match="a codebook of 3 values"):
            weight_only.matmul(**(arrays | {"codebook": (1.0, 2.0, 3.0)}))
        with pytest.raises(ValueError, match="scales of int32"):
            weight_only.matmul(**(arrays | {"scale": arrays["scale"].astype(jnp.int32)}))
        with pytest.raises(ValueError, match="activations of float32"):
            weight_only.matmul(**(arrays | {"x": arrays["x"].astype(jnp.float32)}))
        with pytest.raises(ValueError, match=r"x_scale \(8,\) must be \[M, 1\] = \(8, 1\)"):
            weight_only.matmul(**(arrays | {"x_scale": jnp.ones(8)}))
        with pytest.raises(ValueError, match="codes of 4 bits"):
            weight_only.matmul(**(arrays | {"w": jnp.zeros((256, 128), jnp.uint8)}))
        zeros = jnp.zeros((2, 256), jnp.uint8)
        for bad in (zeros[:1], zeros.astype(jnp.float32)):
            with pytest.raises(ValueError, match=r"must be uint8 \(2, 256\)"):
                weight_only.matmul(**arrays, zero=bad)
        with pytest.raises(ValueError, match="zero point of 16 must be a code, 0 to 15"):
            weight_only.matmul(**arrays, zero=16)
        with pytest.raises(ValueError, match="zero points of a codebook"):
            weight_only.matmul(**(arrays | {"codebook": LEVELS}), zero=zeros)
        with pytest.raises(ValueError, match="zero points of float8_e4m3fn"):
            weight_only.matmul(**(arrays | {"w": arrays["w"].astype("float8_e4m3fn")}), zero=zeros)
        with pytest.raises(ValueError, match="must be"):
            weight_only.matmul(**(arrays | {"w": arrays["w"][:128]}))
