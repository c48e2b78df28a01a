"""GPTQ, and coordinate descent past it: the codes and scales that minimize a layer's output error.

The objective, for a weight W [K, N], its quantized values Q and D = W - Q, is

  J(Q) = tr(Dᵀ H D),   H = XᵀX / n + λ diag(XᵀX / n)   [K, K]

Both algorithms visit the rows k of W (columns of the paper's matrix, which is our transpose) and
round each to its best value given the others:

  GPTQ     q_k = round(w_k + sum_{j>k} L_jk d_j / L_kk),   H = L Lᵀ, from the last row upwards
  descent  q_k = round(w_k + sum_{j≠k} H_kj d_j / H_kk)

The first is Frantar et al., 2022 (arXiv:2210.17323), eq. 2-3, written as Babai's nearest plane: the
columns of L carry the error of the rows already rounded to those that can still absorb it, no
inverse of H is formed, and J is known as it goes, for J = ‖LᵀD‖². The second minimizes J exactly
in one row, so no step can raise it; nor can the refit of a scale, taken only where it lowers J.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from qjax import numerics, packing, qtensor, scales
from qjax.format import Format
from qjax.layout import Layout
from qjax.ptq import descent, tiles
from qjax.ptq.grid import (
    Grid,
    Stored,
    codes_of,
    first_grid,
    in_floats,
    is_by_column,
    is_stepped,
    nearest,
    probe_format,
    select,
    store,
    stored_again,
    with_steps,
)  # fmt: skip
from qjax.qtensor import QTensor

# Output columns on which the diagnostics are measured, and on which dampings are compared. Columns
# are exchangeable: their errors have the same law.
_MEASURED = 512
_PROBE = 96
# Elements of H or W that are solved at once; larger stacks go through in turns.
_AT_ONCE = 2**22


class Options(NamedTuple):
    """How hard to try. Static.

    Attributes:
      act_order: visit rows by decreasing H_kk. Groups stay where they are, so the format does too.
      sweeps: at most so many rounds of coordinate descent, each refitting all scales; 0: plain
        GPTQ. Each takes as long as two thirds of all before the first. The first takes 7 to 17 %
        off the squared error, the second 3 %, all others together 2 %.
      refit: whether to refit scales, and offsets with them.
      tolerance: sweeps end when one lowers J by less than this part of it.
    """

    act_order: bool = True
    sweeps: int = 1
    refit: bool = True
    tolerance: float = 1e-3


class Diagnostics(NamedTuple):
    """What happened, as arrays of the weight's leading shape.

    Attributes:
      rtn, gptq, final: J(Q) / J(0) after rounding to nearest, after GPTQ, at the end, without
        damping: the squared output error relative to the squared output, on the calibration data.
        Of a weight with more than 512 output columns, on 512 of them.
      damping: λ that was used.
      dead: number of inputs that were zero in all calibration data.
      sweeps: number of sweeps that were made.
    """

    rtn: Array
    gptq: Array
    final: Array
    damping: Array
    dead: Array
    sweeps: Array


# ---- GPTQ ----------------------------------------------------------------------------------------


def _damped(H: Float[Array, "K K"], damping: Array) -> Float[Array, "K K"]:
    return H + damping * jnp.diag(jnp.diagonal(H))


def _factor(H: Float[Array, "K K"], damping: Array) -> tuple[Array, Array]:
    """Returns lower triangular L with L Lᵀ = H + λ diag(H), and λ."""

    def attempt(fraction: Array) -> tuple[Array, Array]:
        return fraction, jnp.linalg.cholesky(_damped(H, fraction), symmetrize_input=False)

    def failed(state: tuple[Array, Array]) -> Array:
        fraction, L = state
        return ~jnp.isfinite(jnp.sum(L)) & (fraction < 1e3)

    start = attempt(jnp.maximum(damping, 1e-7))
    fraction, L = lax.while_loop(failed, lambda state: attempt(state[0] * 10), start)
    return L, fraction


def _transposed_rows(L: Array, D: Array, start: Array, B: int) -> Float[Array, "B N"]:
    """Returns rows start:start+B of LᵀD. Lengths are multiples of B; only tiles below count."""

    def tile(j, total):
        piece = lax.dynamic_slice(L, (j * B, start), (B, B))
        rows = lax.dynamic_slice_in_dim(D, j * B, B)
        return total + tiles.dot(piece.T, rows)

    zeros = jnp.zeros((B, D.shape[1]), D.dtype)
    return lax.fori_loop(start // B, D.shape[0] // B, tile, zeros)


def _energy(
    L: Float[Array, "K K"], D: Float[Array, "K N"], enough: Array | float = jnp.inf
) -> Float[Array, " N"]:
    """Returns ‖LᵀD‖² of every column, or a lower bound if all columns reach `enough` before."""
    K, N = D.shape
    B = min(2 * descent.BLOCK, K)
    blocks = -(-K // B)
    L, D = tiles.pad_square(L, blocks * B), tiles.pad(D, blocks * B)

    def unsure(state):
        b, total = state
        return (b < blocks) & jnp.any(total < enough)

    def more(state):
        b, total = state
        E = _transposed_rows(L, D, b * B, B)
        return b + 1, total + tiles.total(E * E)

    # Correlated inputs put most of it in the first rows, so that few blocks say enough.
    return lax.while_loop(unsure, more, (0, jnp.zeros(N, D.dtype)))[1]


def _gptq(
    W: Float[Array, "K N"],
    L: Float[Array, "K K"],
    grid: Grid,
    group: Int[Array, " K"],
    fmt: Format,
) -> tuple[Float[Array, "K N"], Float[Array, " N"]]:
    """Rounds every row once, from the last to the first; returns D and J of every column.

    t_k = w_k + sum_{j>k} L_jk d_j / L_kk,   d_k = w_k - round(t_k),   J = sum_k (L_kk (t_k - q_k))²
    """
    K, N = W.shape
    B = min(descent.BLOCK, K)
    blocks = -(-K // B)
    W, group = tiles.pad(W, blocks * B), tiles.pad(group, blocks * B)
    # A padded row has pivot 0 and a column of zeros: it costs nothing, and nobody takes from it.
    L = tiles.pad_square(L, blocks * B)
    pivots = jnp.diagonal(L)

    def block(i, state):
        D, J = state
        start = (blocks - 1 - i) * B
        Wb = lax.dynamic_slice_in_dim(W, start, B)
        pivot = lax.dynamic_slice_in_dim(pivots, start, B)
        inside = jnp.triu(lax.dynamic_slice(L, (start, start), (B, B)).T, 1)
        inside = scales.safe_divide(inside, pivot[:, None])
        T = Wb + scales.safe_divide(_transposed_rows(L, D, start, B), pivot[:, None])
        grids = grid.at(lax.dynamic_slice_in_dim(group, start, B))

        def row(i, state):
            Db, J = state
            k = B - 1 - i
            t = T[k] + tiles.dot(inside[k], Db)
            q = nearest(t, grids.at(k), fmt)
            return Db.at[k].set(Wb[k] - q), J + jnp.square(pivot[k] * (t - q))

        Db, J = lax.fori_loop(0, B, row, (jnp.zeros_like(Wb), J))
        return lax.dynamic_update_slice_in_dim(D, Db, start, axis=0), J

    D, J = lax.fori_loop(0, blocks, block, (jnp.zeros_like(W), jnp.zeros(N, W.dtype)))
    return D[:K], J


# ---- one weight ----------------------------------------------------------------------------------


def objective(D: Float[Array, "K N"], H: Float[Array, "K K"]) -> Float[Array, ""]:
    """Returns tr(Dᵀ H D)."""
    return jnp.sum(D * tiles.dot(H, D))


def _columns(N: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, N - 1, min(N, count)).astype(int))


def _solve(
    W: Float[Array, "K N"], H: Float[Array, "K K"], damping: Array, fmt: Format, options: Options
) -> tuple[Float[Array, "K N"], Stored, Array, Diagnostics]:
    """One canonical weight: errors D, scales as they are stored, codes, diagnostics."""
    K, N = W.shape
    diagonal = jnp.diagonal(H)
    dead = diagonal <= 0
    # An input that never fired says nothing; alone on the diagonal its row is rounded to nearest.
    H = H + jnp.diag(jnp.where(dead, jnp.mean(diagonal) + (jnp.sum(diagonal) <= 0), 0.0))
    diagonal = jnp.diagonal(H)
    # GPTQ goes from the last row to the first, so the one with the largest H_kk comes last.
    order = jnp.argsort(diagonal) if options.act_order else jnp.arange(K)[::-1]
    back = jnp.argsort(order)
    L, damping = _factor(H[order][:, order], damping)
    group = jnp.arange(K) // (fmt.group_size or K)

    def gptq(grid: Grid) -> tuple[Array, Array, Array]:
        """Returns D and J of GPTQ, of rounding to nearest in columns where that is better."""
        D_rtn = W - nearest(W, grid.at(group), fmt)
        D, J = _gptq(W[order], L, grid, group[order], fmt)
        J_rtn = _energy(L, D_rtn[order], J)
        return jnp.where(J_rtn >= J, D[back], D_rtn), jnp.minimum(J, J_rtn), D_rtn

    stored, grid = first_grid(W, fmt, diagonal)
    grid = with_steps(grid, stored, fmt)
    D, J, D_rtn = gptq(grid)

    columns = _columns(N, _MEASURED)

    def undamped(D: Array, J: Array) -> Array:
        squares = jnp.sum(jnp.square(D[:, columns]), 1)
        return jnp.sum(J[columns]) - damping * tiles.dot(diagonal, squares)

    def measured(D: Array) -> Array:
        J = jnp.zeros(N, D.dtype).at[columns].set(_energy(L, D[:, columns][order]))
        return undamped(D, J)

    total, rtn, after_gptq = measured(W), measured(D_rtn), undamped(D, J)

    Hd = _damped(H, damping)
    floats = in_floats(fmt)
    again = floats != fmt  # scales are quantized again: all of them together
    nested = [f for f in (fmt.scale, fmt.offset) if isinstance(f, Format)]
    stepped = bool(nested) and all(map(is_stepped, nested))
    wide = (fmt.group_size or K) > descent.WIDE
    if options.refit and options.sweeps and (again or wide):
        refit = descent.refit_wide if wide else functools.partial(descent.sweep, refit=True)
        free = grid._replace(step=None, zero_step=None)
        refit_D, refit_grid, gain = refit(W, D, Hd, free, floats)
        if again:
            refit_stored, refit_grid = store(refit_grid, fmt)
            refit_grid = with_steps(refit_grid, refit_stored, fmt)
            refit_D, refit_J, _ = gptq(refit_grid)
            old = (D, J, stored, grid)
            new = (refit_D, refit_J, refit_stored, refit_grid)
            better = refit_J < J if is_by_column(fmt) else jnp.sum(refit_J) < jnp.sum(J)
            D, J, stored, grid = select(better, new, old)
        else:
            D, grid, J = refit_D, refit_grid, J + gain

    def unfinished(state):
        sweep, _, _, J, gain = state
        return (sweep < options.sweeps) & (gain > options.tolerance * jnp.nansum(J))

    def descend(state):
        sweep, D, grid, J, _ = state
        D, grid, gain = descent.sweep(W, D, Hd, grid, fmt, options.refit and (stepped or not again))
        return sweep + 1, D, grid, J + gain, -jnp.nansum(gain)

    start = (0, D, grid, J, jnp.asarray(jnp.inf, W.dtype))
    sweeps, D, grid, J, _ = lax.while_loop(unfinished, descend, start)
    if not again:
        stored, grid = store(grid, fmt)
    elif stepped:
        stored = stored_again(stored, grid, fmt)

    element = numerics.get_element(fmt.element)
    codes = codes_of(W - D, grid.at(group), fmt, element)
    relative = functools.partial(scales.safe_divide, scale=total)
    final = relative(undamped(D, J))
    what = Diagnostics(
        relative(rtn), relative(after_gptq), final, damping, jnp.sum(dead), jnp.asarray(sweeps)
    )
    return D, stored, codes, what


def _each(run: Callable[..., Any], lead: tuple[int, ...], size: int, *arrays: Array) -> Any:
    """Maps `run` over leading axes: as many indices at once as have `_AT_ONCE` elements."""
    if not lead:
        return run(*arrays)
    count = math.prod(lead)
    at_once = max(1, _AT_ONCE // size)
    batch = max(d for d in range(1, count + 1) if count % d == 0 and d <= at_once)
    flat = tuple(a.reshape(count, *a.shape[len(lead) :]) for a in arrays)
    out = lax.map(lambda a: run(*a), flat, batch_size=batch if batch > 1 else None)
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), out)


@functools.partial(jax.jit, static_argnames=("fmt", "layout", "options"))
def solve(
    w: Float[Array, "*shape"],
    H: Float[Array, "*lead K K"],
    fmt: Format,
    layout: Layout,
    options: Options | None = None,
    *,
    damping: float | Float[Array, "*lead"] = 0.03,
) -> tuple[QTensor, Diagnostics]:
    """Quantizes a weight by GPTQ and coordinate descent on its second moments.

    Args:
      w: the weight; leading (stacked, expert) axes are solved independently.
      H: second moments of its input, sum xᵀx / n, in canonical order of K.
      fmt: any Format; group scales come from its own rule, weighted with diag(H) if that is "mse".
      layout: which axes are contracted.
      options: see `Options`. Static.
      damping: λ, by which every input's own second moment grows: how far correlations between
        inputs are disbelieved; see `choose_damping`. Not a multiple of mean(diag H) as in the
        paper: where a few inputs are a thousand times the others, that would drown the others.
        Raised tenfold while the Cholesky factorization fails.

    Returns:
      The QTensor, in the same storage as rounding to nearest would give, and `Diagnostics`.
    """
    dtype = jnp.dtype(w.dtype).name
    W = layout.to_canonical(w).astype(jnp.float32)
    *lead, K, N = W.shape
    fmt = fmt.fit(K)

    def run(W: Array, H: Array, damping: Array):
        return _solve(W, H, damping, fmt, options or Options())[1:]

    dampings = jnp.broadcast_to(jnp.asarray(damping, jnp.float32), lead)
    size = K * max(K, N)
    stored, codes, what = _each(run, tuple(lead), size, W, H.astype(jnp.float32), dampings)
    element = numerics.get_element(fmt.element)
    pad = packing.padding(K, element.bits) if element.is_packed else 0
    data = qtensor.pack_codes(codes, element)
    return QTensor(data, stored.scale, stored.zero, fmt, layout, dtype, pad), what


@functools.partial(jax.jit, static_argnames=("fmt", "options"))
def choose_damping(
    w: Float[Array, "*lead K N"],
    H: Float[Array, "*lead K K"],
    H_held_out: Float[Array, "*lead K K"],
    fmt: Format,
    dampings: Float[Array, " n"],
    options: Options | None = None,
) -> Float[Array, "*lead"]:
    """Returns the damping whose solution has the least error on held-out second moments.

    How much of H to believe depends on how many independent rows it was made of, which no formula
    knows: text is correlated. So it is measured, on some of the columns.

    Args:
      w: canonical weight.
      H, H_held_out: second moments of disjoint data.
      fmt: of the whole weight.
      dampings: candidates for λ.
      options: of the trials. Static.
    """
    *lead, K, N = w.shape
    fmt = probe_format(fmt.fit(K))
    probe = w[..., _columns(N, _PROBE)].astype(jnp.float32)

    def run(W: Array, H: Array, H_held_out: Array) -> Array:
        def error(damping: Array) -> Array:
            D = _solve(W, H, damping, fmt, options or Options())[0]
            return objective(D, H_held_out)

        errors = lax.map(error, dampings)
        return dampings[jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))]

    moments = (H.astype(jnp.float32), H_held_out.astype(jnp.float32))
    return _each(run, tuple(lead), K * K, probe, *moments)
