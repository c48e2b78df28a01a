"""Moments: the sums over calibration rows that a solver works on."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Moments(NamedTuple):
    """Sums over the rows that a weight read.

    Attributes:
      total: sum of x̂ x̂ᵀ, x̂ the input in the model as it runs.
      cross: sum of x̂ xᵀ, x the input in the float model; None if both are the same.
      rows: how many.
    """

    total: Float[Array, "*lead K K"]
    cross: Float[Array, "*lead K K"] | None
    rows: Float[Array, "*lead"]

    def __add__(self, other: Moments) -> Moments:  # pyright: ignore[reportIncompatibleMethodOverride]
        cross = None
        if self.cross is not None and other.cross is not None:
            cross = self.cross + other.cross
        return Moments(self.total + other.total, cross, self.rows + other.rows)

    @property
    def hessian(self) -> Float[Array, "*lead K K"]:
        """H, the mean of x̂ x̂ᵀ."""
        return self.total / self._count

    @property
    def shift(self) -> Float[Array, "*lead K K"] | None:
        """C - H, the mean of x̂ (x - x̂)ᵀ; None where both models read the same."""
        return None if self.cross is None else (self.cross - self.total) / self._count

    @property
    def _count(self) -> Array:
        return jnp.maximum(self.rows, 1.0)[..., None, None]

    def scaled(self, s: Float[Array, "*lead K"]) -> Moments:
        """Returns the moments of inputs multiplied by s."""
        by = s[..., :, None] * s[..., None, :]
        cross = None if self.cross is None else self.cross * by
        return Moments(self.total * by, cross, self.rows)
