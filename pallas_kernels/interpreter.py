"""Runs Mosaic GPU kernels on the CPU, with race detection.

A race is two accesses, one of them a write, that no barrier and no wait puts in order. On Hopper
that can take more than a barrier: TMA and wgmma reach shared memory through the *async proxy*,
loads and stores of registers through the *generic* one, and what went through the latter comes
before the other only by a fence (PTX ISA, "Async proxy"), `plgpu.commit_smem`. That is so for a
load too, before TMA writes the same buffer anew.

The interpreter of JAX 0.12 knows that much, but of a wgmma neither what it reads nor that it goes
on after its call. Here it reads through the async proxy until `wgmma_wait`, or a read of its
accumulator, has seen its end: a buffer that is overwritten under it is a race.

Where JAX runs on a GPU nothing is interpreted: the same tests then run what was compiled.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import state
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    jaxpr_interpret,
)
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper


def params() -> Any:
    """Returns what a kernel takes as `interpret`; None on a GPU."""
    if on_gpu():
        return None
    # Every copy and every wgmma takes one of the "TMA threads" in turn, a place in the clocks. Two
    # that share one can look ordered, so there are more than a test has of those operations.
    return plgpu.InterpretGPUParams(
        detect_races=True, on_race="warn", num_tma_threads_per_device=1024
    )


def on_gpu() -> bool:
    """Returns whether JAX runs on a GPU."""
    return jax.default_backend() == "gpu"


@dataclasses.dataclass
class Races:
    found: bool = False


def everywhere():
    """Returns a context in which kernels that are traced are interpreted, not lowered."""
    return contextlib.nullcontext() if on_gpu() else plgpu.force_gpu_interpret_mode(params())


@contextlib.contextmanager
def interpreting():
    """Yields an object whose `found` says, after the block, whether a race was seen."""
    races = Races()
    if on_gpu():
        yield races
        return
    wgmma = _Wgmma()
    interpreter = jaxpr_interpret.JaxprInterpreter
    try:
        with (
            mock.patch.object(gpu_callbacks, "wgmma", wgmma),
            mock.patch.object(gpu_callbacks, "wgmma_accumulator_deref", wgmma.deref),
            mock.patch.object(interpreter, "interpret", _with_waits(interpreter.interpret)),
            mock.patch.object(interpreter, "_interpret_commit_smem_p", wgmma.commit_or_wait()),
            mock.patch.object(interpreter, "_interpret_inline_mgpu_p", _by_its_reference),
            mock.patch.object(hopper, "from_zero", _scoped),
        ):
            yield races
        races.found = interpret_pallas_call.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


def _scoped(products, shape, dtype, number):
    """Is `hopper.from_zero` without a value that an accumulator starts from: there is none here."""
    del number

    def run(total):
        products(total)
        return total[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, dtype))


def _by_its_reference(self, eqn, token, get_invals):
    """Evaluates inlined GPU code by the jnp function that it has as `reference`."""
    function, n = eqn.params["mgpu_fn"], eqn.params["pytree_args"].num_leaves
    operands = get_invals()
    all_transforms = eqn.params["pytree_ref_transforms"].unflatten(operands[n:])
    values = []
    for var, value, transforms in zip(eqn.invars[:n], operands[:n], all_transforms, strict=True):
        if isinstance(var.aval, state.AbstractRef):
            token, value = gpu_callbacks.call_get(
                token=token,
                result_shape_and_dtype=state.transform_type(transforms, var.aval.inner_aval),
                mesh_location=self.mesh_location,
                thread=self.thread,
                allocation_key_as_array=value,
                transforms=transforms,
                source_info=eqn.source_info,
            )
        values.append(value)
    return token, [function.reference(*values)]


def _with_waits(interpret):
    """Has the interpreter do something in a `wgmma_wait`, which it skips.

    It dispatches on primitives, so that the wait goes as a `commit_smem` that has the wait's `n`.
    """

    @functools.wraps(interpret)
    def wrapped(self, jaxpr, *args):
        eqns = [
            eqn.replace(primitive=gpu_primitives.commit_smem_p)
            if eqn.primitive is gpu_primitives.wgmma_wait_p
            else eqn
            for eqn in jaxpr.eqns
        ]
        return interpret(self, jaxpr.replace(eqns=eqns), *args)

    return wrapped


class _Wgmma:
    """Products that read shared memory through the async proxy until they are waited for.

    Numbers are there at once, as in the original. Up to JAX 0.12.0.1 that expects the left operand
    in shared memory; here it may be a value, from registers.
    """

    def __init__(self):
        # Of every thread, the clocks of its products in flight, the oldest first.
        self.in_flight = collections.defaultdict(collections.deque)
        self._deref = gpu_callbacks.wgmma_accumulator_deref

    @gpu_callbacks.fail_on_exception
    def __call__(
        self,
        *,
        token,
        mesh_location,
        thread,
        acc_allocation_key_as_array,
        acc_transforms,
        a_allocation_key_as_array,
        a_transforms,
        b_allocation_key_as_array,
        b_transforms,
        source_info=None,
    ):
        shared = gpu_callbacks._get_shared_memory()
        info = memory.GPULoggingInfo(mesh_location, thread, source_info)
        clock = shared.incr_clock(thread)
        clock.inc(shared.get_next_tma_thread_id())

        def at(key, transforms):
            key = memory.HostAllocationKey.from_array(key)
            transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
            place = shared.access(key, transforms)
            value, *_ = shared.get_buffer_content(key, place, thread, logging_info=info)
            assert value is not None
            return key, place, value

        def read(key, transforms):
            if np.ndim(key) != 1:  # a value in registers
                return np.asarray(key)
            key, place, value = at(key, transforms)
            gpu_callbacks.get_races().check_read(
                thread, clock.async_smem_clock.copy(), key, place, source_info=source_info
            )
            return value

        key, place, total = at(acc_allocation_key_as_array, acc_transforms)
        a = read(a_allocation_key_as_array, a_transforms).astype(total.dtype)
        b = read(b_allocation_key_as_array, b_transforms).astype(total.dtype)
        shared.store_buffer_content(key, place, total + a @ b, thread, logging_info=info)
        self.in_flight[thread].append(clock)
        return token

    def wait(self, thread, n: int) -> None:
        """Orders all but the last `n` products of `thread` before what it does next."""
        shared, in_flight = gpu_callbacks._get_shared_memory(), self.in_flight[thread]
        with shared.lock:
            while len(in_flight) > n:
                shared.clocks[thread].update(in_flight.popleft())

    def deref(self, *, thread, wait_n, **kwargs):
        if wait_n is not None:
            self.wait(thread, wait_n)
        return self._deref(thread=thread, wait_n=wait_n, **kwargs)

    def commit_or_wait(self):
        original = jaxpr_interpret.JaxprInterpreter._interpret_commit_smem_p

        def interpret(interpreter, eqn, token, get_invals):
            if "n" not in eqn.params:
                return original(interpreter, eqn, token, get_invals)

            def run(token, thread):
                self.wait(thread, eqn.params["n"])
                return token

            shape = gpu_callbacks.TOKEN_SHAPE_DTYPE
            return io_callback(run, shape, token, interpreter.thread), []

        return interpret
