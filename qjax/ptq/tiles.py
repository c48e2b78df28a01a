"""Products with columns whose values do not depend on how many columns there are.

On CPUs, XLA chooses among kernels by the width of a matrix, and each adds in an order of its own. A
part of a weight's columns would then get other last bits than all of them together. So products are
made in tiles of one width there, the last filled up with zeros. That takes no longer.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_WIDTH = 128


def each(
    fn: Callable[[Float[Array, "K n"]], Float[Array, "M n"]], b: Float[Array, "K N"]
) -> Float[Array, "M N"]:
    """Returns fn(b), for an fn that knows nothing of other columns."""

    def tiled(b: Array) -> Array:
        N = b.shape[1]
        count = -(-N // _WIDTH)
        b = jnp.pad(b, ((0, 0), (0, count * _WIDTH - N)))
        part = lambda i: fn(lax.dynamic_slice_in_dim(b, i * _WIDTH, _WIDTH, axis=1))
        tiles = lax.map(part, jnp.arange(count))  # [count, M, width]
        return tiles.swapaxes(0, 1).reshape(tiles.shape[1], -1)[:, :N]

    return lax.platform_dependent(b, cpu=tiled, default=fn)


def dot(a: Array, b: Array) -> Array:
    """Returns a @ b, of matrices or vectors, in full precision."""
    plain = lambda b: jnp.dot(a, b, precision=lax.Precision.HIGHEST)
    # A row's product is the same at every width.
    return each(plain, b) if a.ndim == b.ndim == 2 else plain(b)


def total(a: Float[Array, "K N"]) -> Float[Array, " N"]:
    """Returns the sum over rows."""
    return dot(jnp.ones(a.shape[0], a.dtype), a)


def pad(a: Array, rows: int) -> Array:
    """Appends rows of zeros."""
    extra = rows - a.shape[0]
    return jnp.pad(a, [(0, extra)] + [(0, 0)] * (a.ndim - 1)) if extra else a


def pad_square(a: Array, rows: int) -> Array:
    """Appends rows and columns of zeros."""
    extra = rows - a.shape[0]
    return jnp.pad(a, ((0, extra), (0, extra))) if extra else a
