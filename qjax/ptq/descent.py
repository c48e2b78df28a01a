"""Coordinate descent: every row of a weight rounded once more, given all others, scales refit.

  q_k = round(w_k + sum_{j≠k} H_kj d_j / H_kk)

minimizes tr(Dᵀ H D), D = W - Q, exactly in row k, so that no step can raise it; a refit is taken
only where it lowers it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax import scales
from qjax.format import Format
from qjax.ptq import tiles
from qjax.ptq.grid import Grid, nearest, refit_group

# Rows rounded one by one before their errors go to all others in one matmul.
BLOCK = 128
# Groups up to this many rows are refit inside a sweep, from products that it has anyway.
WIDE = 512


def sweep(
    W: Float[Array, "K N"],
    D: Float[Array, "K N"],
    H: Float[Array, "K K"],
    grid: Grid,
    fmt: Format,
    refit: bool,
) -> tuple[Float[Array, "K N"], Grid, Float[Array, " N"]]:
    """Refits every group and rounds every row once, given all others; returns D, grid and ΔJ.

    t_k = q_k + (HD)_k / H_kk,   ΔJ = H_kk ((t_k - q_k')² - (t_k - q_k)²) for q_k' = round(t_k)
    """
    K = W.shape[0]
    G, g = grid.scale.shape[0], fmt.group_size or K
    # Blocks of whole groups, so that a group's rows of HD are at hand together.
    per_block = max(1, BLOCK // g) if g <= WIDE else 0
    B = min(per_block * g, G * g) if per_block else min(BLOCK, K)
    blocks = -(-K // B)
    group = jnp.minimum(jnp.arange(blocks * B) // g, G - 1)
    real = (jnp.arange(blocks * B) < K).astype(W.dtype)[:, None]
    W, D, H = tiles.pad(W, blocks * B), tiles.pad(D, blocks * B), tiles.pad_square(H, blocks * B)
    diagonal = jnp.diagonal(H)

    def block(b, state):
        D, grid, gain = state
        start = b * B
        rows = lax.dynamic_slice_in_dim(H, start, B)
        Hb = lax.dynamic_slice_in_dim(rows, start, B, axis=1)
        Wb, Db = (lax.dynamic_slice_in_dim(a, start, B) for a in (W, D))
        ones = lax.dynamic_slice_in_dim(real, start, B)

        def one_group(i, state):
            Db, HD, grid, gain = state
            # The last block may have room for groups that are not there: their H is 0.
            index = jnp.minimum(b * per_block + i, G - 1)
            part = lambda a: lax.dynamic_slice_in_dim(a, i * g, g)
            Hg = lax.dynamic_slice_in_dim(Hb, i * g, g, axis=1)
            Dg = part(Db)
            Q = (part(Wb) - Dg) * part(ones)
            new, dQ, change = refit_group(Q, part(HD), part(Hg), part(ones), grid.at(index), fmt)
            Db = lax.dynamic_update_slice_in_dim(Db, Dg - dQ, i * g, axis=0)
            gain = gain + _sum_once(change, fmt)
            return Db, HD - tiles.dot(Hg, dQ), grid.replace(index, new), gain

        HD = tiles.dot(rows, D)
        if refit and per_block:
            state = lax.fori_loop(0, B // g, one_group, (Db, HD, grid, gain))
            Db, HD, grid, gain = state

        h = lax.dynamic_slice_in_dim(diagonal, start, B)
        T = Wb - Db + scales.safe_divide(HD, h[:, None])
        inside = scales.safe_divide(Hb, h[:, None])
        grids = grid.at(lax.dynamic_slice_in_dim(group, start, B))

        def row(k, state):
            delta, gain = state
            old = Wb[k] - Db[k]
            t = T[k] + tiles.dot(inside[k], delta)
            q = nearest(t, grids.at(k), fmt)
            change = h[k] * (jnp.square(t - q) - jnp.square(t - old))
            q = jnp.where(change < 0, q, old)
            return delta.at[k].set(old - q), gain + jnp.minimum(change, 0.0)

        zero = (jnp.zeros_like(Db), jnp.zeros(W.shape[1], W.dtype))
        delta, gains = lax.fori_loop(0, B, row, zero)
        D = lax.dynamic_update_slice_in_dim(D, Db + delta, start, axis=0)
        return D, grid, gain + gains

    start = (D, grid, jnp.zeros(W.shape[1], W.dtype))
    D, grid, gain = lax.fori_loop(0, blocks, block, start)
    return D[:K], grid, gain


def _sum_once(change: Float[Array, " N"], fmt: Format) -> Float[Array, " N"]:
    """Shares a change of J among the columns that made it together."""
    N = change.shape[0]
    columns = fmt.group_columns or N
    if columns == 1:
        return change
    return change / jnp.minimum(columns, N - jnp.arange(N) // columns * columns)


def refit_wide(
    W: Array, D: Array, H: Array, grid: Grid, fmt: Format
) -> tuple[Float[Array, "K N"], Grid, Float[Array, " N"]]:
    """Refits groups of any size, which takes two products with H; returns D, grid and ΔJ."""
    K, N = W.shape
    G, g = grid.scale.shape[0], fmt.group_size or K
    W, D, H = tiles.pad(W, G * g), tiles.pad(D, G * g), tiles.pad_square(H, G * g)
    real = (jnp.arange(G * g) < K).astype(W.dtype)[:, None]

    def one_group(i, state):
        D, grid, gain = state
        part = lambda a: lax.dynamic_slice_in_dim(a, i * g, g)
        rows, Dg, ones = part(H), part(D), part(real)
        Hg = lax.dynamic_slice_in_dim(rows, i * g, g, axis=1)
        Q = (part(W) - Dg) * ones
        new, dQ, change = refit_group(Q, tiles.dot(rows, D), Hg, ones, grid.at(i), fmt)
        D = lax.dynamic_update_slice_in_dim(D, Dg - dQ, i * g, axis=0)
        return D, grid.replace(i, new), gain + _sum_once(change, fmt)

    start = (D, grid, jnp.zeros(N, W.dtype))
    D, grid, gain = lax.fori_loop(0, G, one_group, start)
    return D[:K], grid, gain
