"""The first rows of the input, as they are."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ROWS = 256


class State(NamedTuple):
    """The rows seen first, then zeros; `seen` counts those that are kept."""

    rows: Float[Array, "*lead R K"]
    seen: Int[Array, "*lead"]


def init(lead: tuple[int, ...], K: int, R: int = ROWS) -> State:
    return State(jnp.zeros((*lead, R, K), jnp.float32), jnp.zeros(lead, jnp.int32))


def _appended(rows: Array, seen: Array, x: Array, mask: Array) -> tuple[Array, Array]:
    R = rows.shape[0]
    at = jnp.where(mask, seen + jnp.cumsum(mask) - 1, R)
    new = jnp.minimum(seen + jnp.sum(mask), R)
    return rows.at[at].set(x, mode="drop"), new.astype(seen.dtype)


def update(state: State, x: Float[Array, "*lead M K"], mask: Bool[Array, "*lead M"]) -> State:
    append = _appended
    for _ in state.seen.shape:
        append = jax.vmap(append)
    return State(*append(state.rows, state.seen, x.astype(jnp.float32), mask))


def merge(a: State, b: State) -> State:
    """Returns the state of a's data followed by b's: alone of all merges it does not commute."""
    kept = jnp.arange(b.rows.shape[-2]) < b.seen[..., None]
    return update(a, b.rows, kept)


def finalize(state: State) -> Float[Array, "*lead R K"]:
    """Returns the first R rows; zeros where there were fewer."""
    return state.rows
