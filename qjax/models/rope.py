"""Rotary position embedding, which rotates a head's halves by the position."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.models.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """The cosines and sines of every token's angles, the same for all heads."""

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]


def divisors(scaling: RopeScaling | None, frequency: np.ndarray) -> np.ndarray:
    """Returns what each frequency is divided by.

    `llama3`, with wavelength λ = 2π / frequency and C = `original_max_position`:

        1 if λ < C / high,  factor if λ > C / low,
        otherwise 1 / ((1 - s) / factor + s),  s = (C / λ - low) / (high - low)
    """
    match scaling:
        case None:
            return np.ones_like(frequency)
        case RopeScaling(kind="linear"):
            return np.full_like(frequency, scaling.factor)
        case RopeScaling(kind="divisors"):
            if len(scaling.divisors) != len(frequency):
                raise ValueError(
                    f"`rope_scaling.divisors` must have head_dim / 2 = {len(frequency)} numbers,"
                    f" got {len(scaling.divisors)}."
                )
            return np.asarray(scaling.divisors, frequency.dtype)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    periods = scaling.original_max_position * frequency / (2 * np.pi)  # C / λ
    s = np.clip((periods - low) / (high - low), 0, 1)  # The clip yields both outer cases.
    return 1 / ((1 - s) / scaling.factor + s)


def frequencies(config: ModelConfig) -> np.ndarray:
    """Returns `theta^(-2i / head_dim)` over the divisors, radians per token, `[head_dim/2]`."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequency = float(config.rope_theta) ** -exponent
    return (frequency / divisors(config.rope_scaling, frequency)).astype(np.float32)


def rotation(config: ModelConfig, positions: Int[Array, "B T"]) -> Rotation:
    """Returns the angles at `positions`, in float32: bfloat16 cannot tell 256 from 257."""
    angle = positions[..., None, None].astype(jnp.float32) * frequencies(config)
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "B T H Dh"], rotation: Rotation) -> Float[Array, "B T H Dh"]:
    """Rotates the pairs (x[i], x[i + Dh/2]) by their angle."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def interleave_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders q or k rows `[H * Dh, ...]` from half-split pairs (i, i + Dh/2) to neighbours.

    GGUF's llama graph rotates the neighbours (2i, 2i + 1): out[h, 2i + s] = rows[h, s Dh/2 + i].
    """
    shape = rows.shape
    return rows.reshape(num_heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def split_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Inverse of `interleave_rows`: from neighbouring pairs to halves."""
    shape = rows.shape
    return rows.reshape(num_heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
