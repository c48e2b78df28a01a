"""Runs Mosaic GPU kernels on the CPU, with race detection."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax.experimental.pallas import mosaic_gpu as plgpu

PARAMS = plgpu.InterpretGPUParams(detect_races=True, on_race="warn")


@dataclasses.dataclass
class Races:
    found: bool = False


def everywhere():
    """Returns a context in which kernels that are traced are interpreted, not lowered."""
    return plgpu.force_gpu_interpret_mode(PARAMS)


@contextlib.contextmanager
def interpreting():
    """Yields an object whose `found` says, after the block, whether a race was seen."""
    races = Races()
    original = gpu_callbacks.wgmma

    @functools.wraps(original)
    def wgmma(**kwargs):
        # Up to JAX 0.12.0.1 the interpreter expects the left operand of a wgmma in shared memory.
        a = kwargs["a_allocation_key_as_array"]
        if np.ndim(a) != 2:
            return original(**kwargs)
        return _wgmma_from_registers(**kwargs)

    try:
        with mock.patch.object(gpu_callbacks, "wgmma", wgmma):
            yield races
        races.found = interpret_pallas_call.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


@gpu_callbacks.fail_on_exception
def _wgmma_from_registers(
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

    def at(key, transforms):
        key = memory.HostAllocationKey.from_array(key)
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        place = shared.access(key, transforms)
        return key, place, shared.get_buffer_content(key, place, thread, logging_info=info)[0]

    _, _, b = at(b_allocation_key_as_array, b_transforms)
    key, place, acc = at(acc_allocation_key_as_array, acc_transforms)
    a = np.asarray(a_allocation_key_as_array).astype(np.float32)
    total = acc + np.matmul(a, np.asarray(b).astype(np.float32))
    shared.store_buffer_content(key, place, total, thread, logging_info=info)
    return token
