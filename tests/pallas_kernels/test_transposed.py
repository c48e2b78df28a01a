"""Products with transposed weights agree with float64."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference, transposed
from pallas_kernels.testing import Laws
from pallas_kernels.tuning import Tuning
from tests.pallas_kernels import test_weight_only as forward


class TestTransposed(Laws):
    formats: ClassVar = {
        "int4 groups of 128": {"w": "int4", "group": 128},
        "int4 groups of 32": {"w": "int4", "group": 32},
        "int4 groups of 256": {"w": "int4", "group": 256},
        "zero points": {"w": "int4", "group": 128, "zero": True},
        "zero points of groups of 32, float16": {
            "w": "int4",
            "group": 32,
            "zero": True,
            "x": "float16",
        },
        "int4 less one zero point": {"w": "int4", "group": 128, "zero": 7},
        "int8 zero points of groups of 64": {"w": "int8", "group": 64, "zero": True},
        "int8 zero points of channels, float16": {
            "w": "int8",
            "group": 256,
            "zero": True,
            "x": "float16",
        },
        "int3 zero points of groups of 32": {"w": "int8", "group": 32, "bits": 3, "zero": True},
        "int2 zero points of channels": {"w": "int8", "group": 256, "bits": 2, "zero": True},
        "a codebook": {"w": "int4", "group": 64, "codebook": forward.LEVELS},
        "powers of two": {"w": "int4", "group": 32, "codebook": forward.E2M1, "scale": "uint8"},
        "int8 channels": {"w": "int8", "group": 256},
        "int8 in its natural order": {"w": "int8", "group": 256, "natural": True},
        "fp8 weights": {"w": "float8_e4m3fn", "group": 128},
        "int2 groups of 64": {"w": "int8", "group": 64, "bits": 2},
        "int2 groups of 32, float16": {"w": "int8", "group": 32, "bits": 2, "x": "float16"},
        "int2 channels": {"w": "int8", "group": 256, "bits": 2},
        "int3 groups of 128": {"w": "int8", "group": 128, "bits": 3},
        "int3 groups of 32, float16": {"w": "int8", "group": 32, "bits": 3, "x": "float16"},
    }
    mutated: ClassVar = (
        (None, Tuning(8, 2, sms=1)),
        ("zero points of groups of 32, float16", Tuning(8, 2, sms=1)),
    )
    budget = 2.0**-9  # weights times scales are rounded to bfloat16, of 8 places

    def make(self, M, K, N, seed=0, **format):
        # `K` is contracted: the features of the weight.
        arrays = forward.TestWeightOnly().make(M, N, K, seed, **format)
        return arrays | {"x": jax.random.normal(jax.random.key(9), (M, K), arrays["x"].dtype)}

    def run(self, arrays, *, tuning, interpret):
        tuning = dataclasses.replace(tuning, tile_k=128, scale_on="weight")
        arrays = dict(arrays)
        w = forward.in_order(**arrays)
        del arrays["w"]
        return transposed.matmul(
            arrays.pop("x"),
            w,
            **arrays,
            out_dtype=jnp.float32,
            tuning=tuning,
            interpret=interpret,
        )

    def exact(self, arrays):
        n_inputs = arrays["w"].shape[1]
        one = arrays | {"x": jnp.eye(n_inputs, dtype=arrays["x"].dtype)}
        return np.asarray(arrays["x"], np.float64) @ forward.TestWeightOnly().exact(one).T

    @pytest.mark.parametrize("name", ["int4 groups of 32", "int8 zero points of groups of 64"])
    def test_the_reference_agrees_with_float64(self, name):
        arrays = self.make(3, 5, 64, **self.formats[name])
        dx = reference.transposed(
            arrays["x"], arrays["w"], arrays["scale"], zero=arrays.get("zero")
        )
        np.testing.assert_allclose(dx, self.exact(arrays), rtol=1e-4, atol=1e-4)

    def test_refuses_what_it_cannot_compute(self):
        arrays = self.make(8, 256, 256, w="int4", group=16)
        with pytest.raises(ValueError, match="groups of 16"):
            transposed.matmul(arrays["x"], arrays["w"], arrays["scale"])
        arrays = self.make(8, 256, 256, w="int8", group=128, bits=2)
        codes = forward.in_order(arrays["w"], bits=2)
        with pytest.raises(ValueError, match="bits=4 with uint8: it takes 2 and 3"):
            transposed.matmul(arrays["x"], jnp.tile(codes, (1, 2)), arrays["scale"], bits=4)
