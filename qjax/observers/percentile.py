"""Percentiles of the magnitudes, from a histogram over logarithmic bins."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# 16 bins an octave from 2^-24 to 2^24: bounds that no data can move make streaming exact, and a
# percentile is right to a factor of 2^(1/16), 4.4 %. Zeros and what is smaller fall into bin 0.
_PER_OCTAVE = 16
_LOW = -24
_BINS = _PER_OCTAVE * 48


class State(NamedTuple):
    counts: Float[Array, "*lead bins"]
    absmax: Float[Array, "*lead"]


def init(lead: tuple[int, ...], K: int) -> State:
    del K
    return State(jnp.zeros((*lead, _BINS), jnp.float32), jnp.zeros(lead, jnp.float32))


def _histogram(x: Array, mask: Array) -> Array:
    exponent = jnp.log2(jnp.maximum(jnp.abs(x), 2.0**_LOW))
    index = jnp.clip(jnp.floor((exponent - _LOW) * _PER_OCTAVE), 0, _BINS - 1).astype(jnp.int32)
    weight = jnp.broadcast_to(mask[:, None], x.shape).astype(jnp.float32)
    return jnp.zeros(_BINS, jnp.float32).at[index.reshape(-1)].add(weight.reshape(-1))


def update(state: State, x: Float[Array, "*lead M K"], mask: Bool[Array, "*lead M"]) -> State:
    x = jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)
    histogram = _histogram
    for _ in x.shape[:-2]:
        histogram = jax.vmap(histogram)
    absmax = jnp.max(jnp.abs(x), (-2, -1)) + jnp.sum(x * 0.0, (-2, -1))
    return State(state.counts + histogram(x, mask), jnp.maximum(state.absmax, absmax))


def merge(a: State, b: State) -> State:
    return State(a.counts + b.counts, jnp.maximum(a.absmax, b.absmax))


def finalize(state: State, percent: float = 99.9) -> Float[Array, "*lead"]:
    """Returns the magnitude below which `percent` % of all values lie, at most the maximum."""
    share = jnp.cumsum(state.counts, -1) / jnp.maximum(jnp.sum(state.counts, -1, keepdims=True), 1)
    index = jnp.argmax(share >= percent / 100 * (1 - 1e-6), -1)
    upper = jnp.exp2((index + 1) / _PER_OCTAVE + _LOW)
    return jnp.minimum(upper, state.absmax)
