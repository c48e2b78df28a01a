"""The smallest and largest value of every input channel."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class State(NamedTuple):
    low: Float[Array, "*lead K"]
    high: Float[Array, "*lead K"]


def init(lead: tuple[int, ...], K: int) -> State:
    return State(jnp.full((*lead, K), jnp.inf), jnp.full((*lead, K), -jnp.inf))


def update(state: State, x: Float[Array, "*lead M K"], mask: Bool[Array, "*lead M"]) -> State:
    x = x.astype(jnp.float32)
    kept = mask[..., None]
    nan = jnp.sum(jnp.where(kept, x, 0.0) * 0.0, -2)  # a min or max can drop NaN
    low = jnp.minimum(state.low, jnp.min(jnp.where(kept, x, jnp.inf), -2)) + nan
    high = jnp.maximum(state.high, jnp.max(jnp.where(kept, x, -jnp.inf), -2)) + nan
    return State(low, high)


def merge(a: State, b: State) -> State:
    return State(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))


def finalize(state: State) -> tuple[Float[Array, "*lead K"], Float[Array, "*lead K"]]:
    """Returns (min, max) over all rows; (inf, -inf) if there were none."""
    return state.low, state.high
