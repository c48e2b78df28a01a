"""What the CPU at hand multiplies fast, and XLA with it."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp

_INSTRUCTIONS = ("flags", "Features")  # as x86 and ARM name them in /proc/cpuinfo


@functools.cache
def features() -> frozenset[str]:
    """Returns the instruction sets in Linux's words, from /proc/cpuinfo; elsewhere nothing."""
    try:
        with open("/proc/cpuinfo") as f:
            fields = (line.partition(":") for line in f)
            words = (value.split() for name, _, value in fields if name.strip() in _INSTRUCTIONS)
            return frozenset(itertools.chain.from_iterable(words))
    except OSError:
        return frozenset()


def has_bf16_dot() -> bool:
    """Whether bfloat16 is multiplied as it is; elsewhere XLA would widen both operands again."""
    return not features().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def has_int8_dot() -> bool:
    """Whether bytes are multiplied as they are."""
    if features().isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8"}):
        return False
    # Without its library of dots (from 0.12 on, a flag turns it off) XLA widens bytes to integers.
    row, square = (jax.ShapeDtypeStruct(s, jnp.int8) for s in ((16, 256), (256, 256)))
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.int32)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return "ynn" in (jax.jit(dot).lower(row, square).compile().as_text() or "")
