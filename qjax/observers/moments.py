"""The mean magnitude of every input channel."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class State(NamedTuple):
    total: Float[Array, "*lead K"]
    rows: Float[Array, "*lead"]


def init(lead: tuple[int, ...], K: int) -> State:
    return State(jnp.zeros((*lead, K), jnp.float32), jnp.zeros(lead, jnp.float32))


def update(state: State, x: Float[Array, "*lead M K"], mask: Bool[Array, "*lead M"]) -> State:
    a = jnp.where(mask[..., None], jnp.abs(x.astype(jnp.float32)), 0.0)
    rows = jnp.sum(mask, -1, dtype=jnp.float32)
    return State(state.total + jnp.sum(a, -2), state.rows + rows)


def merge(a: State, b: State) -> State:
    return State(a.total + b.total, a.rows + b.rows)


def finalize(state: State) -> Float[Array, "*lead K"]:
    """Returns mean |x_k| (Lin et al., 2023, AWQ, section 3.2), 0 if there were no rows."""
    return state.total / jnp.maximum(state.rows, 1.0)[..., None]
