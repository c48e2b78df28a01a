"""The interpreter reports what is a race on Hopper, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpreter

TILE = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)


def runs(body, *arrays, scratch=()):
    """Returns the result of a kernel of one warpgroup and whether there was a race."""
    if interpreter.on_gpu():
        pytest.skip("a GPU does not say what was a race")
    call = plgpu.kernel(
        body, out_type=TILE, scratch_types=[*scratch], num_threads=1, thread_name="wg",
        interpret=interpreter.params(),
    )  # fmt: skip
    with interpreter.interpreting() as races:
        y = np.asarray(call(*arrays), np.float32)
    return y, races.found


def buffers(*, tiles=1, barriers=1):
    return [plgpu.SMEM(TILE.shape, TILE.dtype)] * tiles + [plgpu.Barrier()] * barriers


def load(source, buffer, barrier):
    plgpu.copy_gmem_to_smem(source, buffer, barrier)
    plgpu.barrier_wait(barrier)


def store(out, buffer):
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, out)
    plgpu.wait_smem_to_gmem(0)


X = jax.random.normal(jax.random.key(0), TILE.shape, TILE.dtype)
Y = jax.random.normal(jax.random.key(1), TILE.shape, TILE.dtype)


@pytest.mark.parametrize("has_fence", [True, False])
def test_what_was_loaded_is_overwritten_by_tma_only_after_a_fence(has_fence):
    def body(x, y, out, buffer, out_buffer, barrier):
        load(x, buffer, barrier)
        value = buffer[...]
        if has_fence:
            plgpu.commit_smem()
        load(y, buffer, barrier)
        out_buffer[...] = value
        store(out, out_buffer)

    y, has_race = runs(body, X, Y, scratch=buffers(tiles=2))
    np.testing.assert_array_equal(y, np.asarray(X, np.float32))
    assert has_race is not has_fence


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_what_a_wgmma_reads_is_overwritten_only_after_it_was_waited_for(is_waited_for):
    def body(x, y, out, a, b, out_buffer, barrier):
        load(x, a, barrier)
        load(y, b, barrier)

        def product(total):
            plgpu.wgmma(total, a, b)
            if is_waited_for:
                plgpu.wgmma_wait(0)
            load(x, b, barrier)
            out_buffer[...] = total[...].astype(out_buffer.dtype)

        pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(TILE.shape, jnp.float32))
        store(out, out_buffer)

    y, has_race = runs(body, X, Y, scratch=buffers(tiles=3))
    wanted = np.asarray(X, np.float32) @ np.asarray(Y, np.float32)
    np.testing.assert_allclose(y, wanted, rtol=2**-7, atol=1e-2)
    assert has_race is not is_waited_for


@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_wait_for_all_but_one_leaves_the_last_wgmma_in_flight(in_flight):
    def body(x, y, out, first, second, out_buffer, barrier):
        load(x, first, barrier)
        load(y, second, barrier)

        def products(total):
            plgpu.wgmma(total, first, first)
            plgpu.wgmma(total, second, second)
            plgpu.wgmma_wait(in_flight)
            load(y, first, barrier)
            load(x, second, barrier)
            out_buffer[...] = total[...].astype(out_buffer.dtype)

        pl.run_scoped(products, plgpu.WGMMAAccumulatorRef(TILE.shape, jnp.float32))
        store(out, out_buffer)

    _, has_race = runs(body, X, Y, scratch=buffers(tiles=3))
    assert has_race is (in_flight == 1)


@pytest.mark.parametrize("has_fence", [True, False])
def test_what_was_written_is_read_by_a_wgmma_only_after_a_fence(has_fence):
    def body(x, y, out, a, b, barrier):
        load(x, a, barrier)
        load(y, b, barrier)
        a[...] = a[...] * 2
        if has_fence:
            plgpu.commit_smem()

        def product(total):
            plgpu.wgmma(total, a, b)
            b[...] = total[...].astype(b.dtype)

        pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(TILE.shape, jnp.float32))
        store(out, b)

    assert runs(body, X, Y, scratch=buffers(tiles=2))[1] is not has_fence
