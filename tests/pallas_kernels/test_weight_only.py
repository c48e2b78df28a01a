"""Weight-only products agree with float64, and mutants of the kernel do not."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, reference, weight_only
from pallas_kernels.testing import ONE_ITEM, Laws
from pallas_kernels.tuning import Tuning

_ON_WEIGHT = Tuning(8, 2, scale_on="weight", sms=2)


class TestWeightOnly(Laws):
    formats: ClassVar = {
        "int4 groups of 128": {"w": "int4", "group": 128},
        "int4 groups of 64": {"w": "int4", "group": 64},
        "int4 groups of 32": {"w": "int4", "group": 32},
        "int4 groups of 256": {"w": "int4", "group": 256},
        "int8 channels": {"w": "int8", "group": 256},
        "fp8 weights": {"w": "float8_e4m3fn", "group": 128},
        "fp8 weights, fp16 activations": {"w": "float8_e4m3fn", "group": 128, "x": "float16"},
    }

    def make(self, M, K, N, seed=0, *, w, group, x="bfloat16"):
        keys = jax.random.split(jax.random.key(seed), 3)
        low, high = (-8, 8) if w == "int4" else (-128, 128)
        return {
            "x": jax.random.normal(keys[0], (M, K), x),
            "w": jax.random.randint(keys[1], (N, K), low, high).astype(w),
            "scale": jax.random.uniform(keys[2], (K // group, N), jnp.bfloat16, 0.5, 1.5),
        }

    def run(self, arrays, *, tuning, interpret):
        return weight_only.matmul(
            **arrays, out_dtype=jnp.float32, tuning=tuning, interpret=interpret
        )

    def exact(self, arrays):
        x, w, scale = (np.asarray(arrays[n]).astype(np.float64) for n in ("x", "w", "scale"))
        return x @ (w.T * np.repeat(scale, x.shape[1] // scale.shape[0], axis=0))

    def test_the_reference_agrees_with_float64(self):
        arrays = self.make(3, 64, 5, w="int4", group=32)
        np.testing.assert_allclose(reference.weight_only(**arrays), self.exact(arrays), rtol=1e-5)

    @pytest.mark.parametrize("group", [128, 32])
    def test_scales_on_the_weight_cost_one_rounding(self, group):
        error, races = self.error(self.make(8, 256, 256, w="int4", group=group), _ON_WEIGHT)
        assert error <= 2.0**-9  # half a unit in the last of bfloat16's 8 places
        assert not races

    def test_zero_scales_and_extreme_codes_are_exact(self):
        arrays = self.make(1, 128, 128, w="int4", group=128)
        arrays["w"] = (
            jnp.where(jnp.arange(128) % 2 == 0, -8, 7).astype(jnp.int4)[None].repeat(128, 0)
        )
        arrays["scale"] = arrays["scale"].at[:, ::2].set(0)
        error, _ = self.error(arrays, dataclasses.replace(ONE_ITEM["decode"], sms=1))
        assert error <= self.budget

    # ---- mutants ----

    def _mutant(self):
        return self.error(self.make(8, 256, 256, w="int4", group=128), ONE_ITEM["decode"])

    def test_a_missing_commit_is_a_race(self, monkeypatch):
        monkeypatch.setattr(hopper.plgpu, "commit_smem", lambda: None)
        assert self._mutant()[1]

    def test_the_scale_of_another_group_is_an_error(self, monkeypatch):
        original = hopper.Operand.block_spec

        def first_row(self, size, tile_k, first):
            if self.is_row:  # that of the first group, for all of them
                self = dataclasses.replace(self, steps_per_row=1000)
            return original(self, size, tile_k, first)

        monkeypatch.setattr(hopper.Operand, "block_spec", first_row)
        assert not self._mutant()[0] <= 0.01

    def test_a_skipped_tile_is_an_error(self, monkeypatch):
        original = hopper.plgpu.nd_loop
        fewer = lambda grid, **k: original((grid[0] - 1, *grid[1:]), **k)
        monkeypatch.setattr(hopper.plgpu, "nd_loop", fewer)
        assert not self._mutant()[0] <= 0.01  # NaN: what is not written is poisoned

    def test_refuses_what_it_cannot_compute(self):
        arrays = self.make(8, 256, 256, w="int4", group=128)
        with pytest.raises(ValueError, match="activations of float32"):
            weight_only.matmul(**(arrays | {"x": arrays["x"].astype(jnp.float32)}))
        with pytest.raises(ValueError, match="must be"):
            weight_only.matmul(**(arrays | {"w": arrays["w"][:128]}))
