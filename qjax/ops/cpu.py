"""What the CPU at hand multiplies fast, and XLA with it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.cache
def _features() -> frozenset[str]:
    """Returns the words of /proc/cpuinfo, instruction sets among them; elsewhere nothing."""
    try:
        with open("/proc/cpuinfo") as f:
            return frozenset(f.read().split())
    except OSError:
        return frozenset()


def has_bf16_dot() -> bool:
    """Whether bfloat16 is multiplied as it is; elsewhere XLA would widen both operands again."""
    return not _features().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def has_int8_dot() -> bool:
    """Whether bytes are multiplied as they are."""
    if _features().isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8"}):
        return False
    # Without its library of dots (from 0.12 on, a flag turns it off) XLA widens bytes to integers.
    row, square = (jax.ShapeDtypeStruct(s, jnp.int8) for s in ((16, 256), (256, 256)))
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.int32)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return "ynn" in (jax.jit(dot).lower(row, square).compile().as_text() or "")
