"""The largest magnitude of every input channel."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class State(NamedTuple):
    absmax: Float[Array, "*lead K"]


def init(lead: tuple[int, ...], K: int) -> State:
    return State(jnp.zeros((*lead, K), jnp.float32))


def update(state: State, x: Float[Array, "*lead M K"], mask: Bool[Array, "*lead M"]) -> State:
    a = jnp.abs(x.astype(jnp.float32))
    a = jnp.where(mask[..., None], a, 0.0)
    # A max can drop NaN; 0 * x cannot.
    return State(jnp.maximum(state.absmax, jnp.max(a, -2)) + jnp.sum(a * 0.0, -2))


def merge(a: State, b: State) -> State:
    return State(jnp.maximum(a.absmax, b.absmax))


def finalize(state: State) -> Float[Array, "*lead K"]:
    """Returns max |x_k| over all rows, 0 if there were none."""
    return state.absmax
