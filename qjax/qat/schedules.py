"""Schedules: when quantization begins, with how many bits, and when ranges stop moving."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qjax.transform.straight_through import FLOAT_BITS


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bits", "on", "frozen"],
    meta_fields=["is_gradual"],
)
@dataclasses.dataclass(frozen=True)
class Phase:
    """What holds at one step of training; traced scalars, so that one compilation has them all.

    Attributes:
      bits: of the weights, if more than their format has; from `FLOAT_BITS` on they stay float.
      on: whether anything is quantized yet.
      frozen: whether ranges and learned steps stay as they are.
      is_gradual: static; whether the schedule has numbers of bits between float and the format's.
    """

    bits: Any
    on: Any
    frozen: Any
    is_gradual: bool = False


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Phases by training step: `phase = schedule(step)`, for `fake_quant(..., phase=phase)`.

    Attributes:
      start: step at which quantization begins (Jacob et al., 2018, delay it until ranges settle).
      bits: gradual bit width of the weights: pairs (from step, bits) in rising order of steps, in
        force from `start` on until the last pair's successor `full`; fewer bits than the format's
        count as the format's.
      full: step from which weights have their format's own bits; required with `bits`.
      freeze: step from which ranges and learned steps stay; None: never.

    Example:
      >>> schedule = Schedule(start=100, bits=((100, 8), (200, 6)), full=300, freeze=900)
      >>> [float(schedule(step).bits) for step in (0, 100, 250, 300)]
      [32.0, 8.0, 6.0, 0.0]
    """

    start: int = 0
    bits: tuple[tuple[int, int], ...] = ()
    full: int | None = None
    freeze: int | None = None

    def __post_init__(self):
        steps = [self.start, *(s for s, _ in self.bits)]
        if bool(self.bits) != (self.full is not None):
            raise ValueError(
                f"`bits` and `full` go together, got bits={self.bits} and full={self.full}:"
                " `full` is the step from which the format's own bits hold."
            )
        if self.full is not None:
            steps.append(self.full)
        if steps != sorted(steps) or steps[0] < 0:
            raise ValueError(f"steps must rise from `start` over `bits` to `full`, got {steps}.")
        if any(not 2 <= bits < FLOAT_BITS for _, bits in self.bits):
            raise ValueError(f"bits must be from 2 to {FLOAT_BITS - 1:g}, got {self.bits}.")

    def __call__(self, step: Any) -> Phase:
        """Returns the phase of a step, an integer or a traced one."""
        step = jnp.asarray(step)
        bits = jnp.asarray(FLOAT_BITS)
        bits = jnp.where(step >= self.start, FLOAT_BITS if self.bits else 0.0, bits)
        for first, b in self.bits:
            bits = jnp.where(step >= first, float(b), bits)
        if self.full is not None:
            bits = jnp.where(step >= self.full, 0.0, bits)
        frozen = jnp.asarray(False) if self.freeze is None else step >= self.freeze
        return Phase(bits, step >= self.start, frozen, bool(self.bits))
