"""Ranges of activations: running estimates, explicit state beside the parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax import numerics
from qjax.ops import activation


class Range(NamedTuple):
    """What was seen of the input of one weight, for static steps; a pytree of arrays.

    Attributes:
      largest: running mean over batches of max |x|, or of max x for unsigned codes, [*lead].
      mean: running mean over batches of mean |x|, [*lead].
      batches: how many were seen, [*lead].
    """

    largest: Float[Array, " *lead"]
    mean: Float[Array, " *lead"]
    batches: Int[Array, " *lead"]

    def step(self, element: str) -> Float[Array, " *lead"]:
        """Returns the step at which the outermost code is the largest value."""
        return self.largest / numerics.get_element(element).qmax


def init(lead: tuple[int, ...]) -> Range:
    """Returns a range of which nothing was seen."""
    return Range(jnp.zeros(lead), jnp.zeros(lead), jnp.zeros(lead, jnp.int32))


def update(state: Range, x: Float[Array, "*lead *m K"], element: str, decay: float) -> Range:
    """Returns the range after one more batch.

    r_1 = that of batch 1, r_t = decay r_(t-1) + (1 - decay) that of batch t

    (Jacob et al., 2018, section 3.1.)
    """
    x = lax.stop_gradient(x).astype(jnp.float32)
    axes = tuple(range(state.largest.ndim, x.ndim))
    largest = activation.largest(x, element, axes).reshape(state.largest.shape)
    new = Range(largest, jnp.mean(jnp.abs(x), axes), state.batches + 1)
    keep = jnp.where(state.batches == 0, 0.0, decay)
    mix = lambda old, new: keep * old + (1 - keep) * new
    return Range(mix(state.largest, new.largest), mix(state.mean, new.mean), new.batches)


def joined(a: Range, b: Range) -> Range:
    """Returns one range for two uses of a weight in one batch: the wider one covers both."""
    return Range(
        jnp.maximum(a.largest, b.largest), jnp.maximum(a.mean, b.mean), jnp.maximum(a[2], b[2])
    )


def over_steps(stacked: Range) -> Range:
    """Returns one range for the uses of a weight in all steps of a scan."""
    return jax.tree.map(lambda a: jnp.max(a, 0), stacked)


def where(frozen: Any, old: Range, new: Range) -> Range:
    """Returns the old range where ranges are frozen, else the new one."""
    return jax.tree.map(lambda o, n: jnp.where(frozen, o, n), old, new)
