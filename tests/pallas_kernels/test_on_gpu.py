"""Products of whole layers on a GPU, as they are tuned: the sizes that an interpreter cannot do."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench, lookup, timing
from pallas_kernels.interleave import interleaved_pairs

pytestmark = pytest.mark.gpu

TOKENS = (1, 16, 64, 300)
SHAPES = ((4096, 4096), (4096, 28672))
RUNS = 20


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", bench.FORMS, ids=lambda form: form.name)
def test_every_form_agrees_with_float32_for_any_tokens_and_repeats_its_bits(form, shape):
    capability = timing.capability_of(jax.devices()[0])
    assert capability == 90, "the kernels are for an H100 or an H200"
    kernels = [c for c in timing.contenders(form, capability) if c.name.startswith("Mosaic")]
    is_same = jax.jit(lambda a, b: jnp.all((a == b) | jnp.isnan(a) & jnp.isnan(b)))
    for kernel, M in itertools.product(kernels, TOKENS):
        prepare, product = jax.jit(kernel.prepare), jax.jit(kernel.run)
        args = timing.operands(form, M, *shape, seed=M)
        kept = prepare(args["w"], *timing.beside_codes(args))
        run = functools.partial(product, args["x"], args["x_scale"], *kept)
        first = run()
        # The result is bfloat16, and weights are rounded to it where scales are on the weight.
        assert timing.error_of(np.asarray(first), args) <= 2.0**-8, M
        assert all(is_same(run(), first) for _ in range(RUNS)), M  # else a race


def test_rows_beyond_two_gigabytes_are_looked_up():
    V, D = 655360, 4096
    bytes = jax.random.bits(jax.random.key(0), (V, D), jnp.uint8)
    w = jax.lax.bitcast_convert_type(bytes, jnp.int8)
    scale = jax.random.uniform(jax.random.key(1), (1, V))
    at = jnp.array([0, V - 1, 524289, 524287, 3, V, -1], jnp.int32)
    got = lookup.rows(at, w, scale)
    in_order = interleaved_pairs(w[jnp.clip(at, 0, V - 1)])
    wanted = (in_order * scale[0, jnp.clip(at, 0, V - 1)][:, None]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(got[:5]), np.float32(wanted[:5]))
    assert np.isnan(np.float32(got[5:])).all()
