"""Products of whole layers on a GPU, as they are tuned: the sizes that an interpreter cannot do."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pallas_kernels import bench, interpreter, timing

pytestmark = pytest.mark.gpu

TOKENS = (1, 5, 16, 33, 64, 300)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 28672))
RUNS = 20


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", bench.FORMS, ids=lambda form: form.name)
def test_every_form_agrees_with_float32_for_any_tokens_and_repeats_its_bits(form, shape):
    capability = timing.capability_of(jax.devices()[0])
    assert capability == 90
    assert interpreter.on_gpu()
    kernel, *_ = timing.contenders(form, capability)
    for M in TOKENS:
        args = timing.operands(form, M, *shape, seed=M)
        kept = jax.jit(kernel.prepare)(args["w"], args["scale"])
        run = jax.jit(lambda x, x_scale, kept: kernel.run(x, x_scale, *kept))
        first = np.asarray(run(args["x"], args["x_scale"], kept))
        # The result is bfloat16, and weights are rounded to it where scales are on the weight.
        assert timing.error_of(first, args) <= 2.0**-8, M
        for _ in range(RUNS):
            again = np.asarray(run(args["x"], args["x_scale"], kept))
            np.testing.assert_array_equal(again, first)  # else a race
