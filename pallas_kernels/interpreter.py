"""Runs Mosaic GPU kernels on the CPU, with race detection."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
from jax._src import state
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    jaxpr_interpret,
)
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

    interpreter = jaxpr_interpret.JaxprInterpreter
    try:
        with (
            mock.patch.object(gpu_callbacks, "wgmma", wgmma),
            mock.patch.object(interpreter, "_interpret_inline_mgpu_p", _by_its_reference),
        ):
            yield races
        races.found = interpret_pallas_call.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


def _by_its_reference(self, eqn, token, get_invals):
    """Evaluates inlined GPU code by the jnp function that it has as `reference`."""
    function, n = eqn.params["mgpu_fn"], eqn.params["pytree_args"].num_leaves
    operands = get_invals()
    all_transforms = eqn.params["pytree_ref_transforms"].unflatten(operands[n:])
    values = []
    for var, value, transforms in zip(eqn.invars[:n], operands[:n], all_transforms, strict=True):
        if isinstance(var.aval, state.AbstractRef):
            assert not transforms
            token, value = gpu_callbacks.call_get(
                token=token,
                result_shape_and_dtype=var.aval.inner_aval,
                mesh_location=self.mesh_location,
                thread=self.thread,
                allocation_key_as_array=value,
                transforms=(),
                source_info=eqn.source_info,
            )
        values.append(value)
    return token, [function.reference(*values)]


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
