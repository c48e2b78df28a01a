"""The second moments of the inputs: the Hessian of the squared output error."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


class State(NamedTuple):
    total: Float[Array, "*lead K K"]
    rows: Float[Array, "*lead"]


def init(lead: tuple[int, ...], K: int) -> State:
    return State(jnp.zeros((*lead, K, K), jnp.float32), jnp.zeros(lead, jnp.float32))


def update(state: State, x: Float[Array, "*lead M K"], mask: Bool[Array, "*lead M"]) -> State:
    x = jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)
    # Full float32 products: the Cholesky factorization needs the small eigenvalues.
    products = jnp.einsum("...mk,...ml->...kl", x, x, precision=lax.Precision.HIGHEST)
    rows = jnp.sum(mask, -1, dtype=jnp.float32)
    return State(state.total + products, state.rows + rows)


def merge(a: State, b: State) -> State:
    return State(a.total + b.total, a.rows + b.rows)


def finalize(state: State) -> Float[Array, "*lead K K"]:
    """Returns H = sum_m x_m x_mᵀ / M.

    2H is the Hessian of the mean squared output error with respect to a column of W (Frantar et
    al., 2022, section 3.1); the factor 2 changes no argmin and is left out.
    """
    return state.total / jnp.maximum(state.rows, 1.0)[..., None, None]
