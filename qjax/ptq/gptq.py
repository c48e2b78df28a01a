"""GPTQ, and coordinate descent past it: the codes and scales that minimize a layer's output error.

The objective, for a weight W [K, N], its quantized values Q and D = W - Q, is

  J(Q) = tr(Dᵀ H D),   H = XᵀX / n + λ diag(XᵀX / n)   [K, K]

Both algorithms visit the rows k of W (columns of the paper's matrix, which is our transpose) and
round each to its best value given the others:

  GPTQ     q_k = round(w_k + sum_{j<k} R_jk d_j / R_kk),     H = R Rᵀ, R upper triangular
  descent  q_k = round(w_k + sum_{j≠k} H_kj d_j / H_kk)

The first is Frantar et al., 2022 (arXiv:2210.17323), eq. 2-3, written as Babai's nearest plane:
the rows of R carry the error of the rows already rounded to those that can still absorb it, and no
inverse of H is formed. The second minimizes J exactly in one row, so no step can raise it; nor can
the refit of a scale, which is taken only where it lowers J.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax import numerics, packing, qtensor, scales
from qjax.format import Format
from qjax.layout import Layout
from qjax.qtensor import QTensor

# Rows rounded one by one before their errors go to all others in one matmul.
_BLOCK = 128
_HIGHEST = lax.Precision.HIGHEST


class Options(NamedTuple):
    """How hard to try. Static.

    Attributes:
      damping: λ, by which every input's own second moment grows: how far correlations between
        inputs are disbelieved. Not a multiple of mean(diag H) as in the paper: where a few inputs
        are a thousand times the others, that would drown the others. Raised tenfold while the
        Cholesky factorization fails.
      act_order: visit rows by decreasing H_kk. Groups stay where they are, so the format does too.
      sweeps: rounds of coordinate descent, each followed by a refit of all scales; 0: plain GPTQ.
      refit: whether to refit scales.
    """

    damping: float = 0.01
    act_order: bool = True
    sweeps: int = 4
    refit: bool = True


class Diagnostics(NamedTuple):
    """What happened, as arrays of the weight's leading shape.

    Attributes:
      rtn, gptq, final: J(Q) / J(0) after rounding to nearest, after GPTQ, at the end: the squared
        output error relative to the squared output, on the calibration data.
      damping: λ that was used.
      dead: number of inputs that were zero in all calibration data.
    """

    rtn: Array
    gptq: Array
    final: Array
    damping: Array
    dead: Array


class _Grid(NamedTuple):
    """Scales and zero points (or offsets) by group, float32 [G, N] as they are stored."""

    scale: Array
    zero: Array | None


def _nearest(t: Array, scale: Array, zero: Array | None, fmt: Format) -> Array:
    """Returns the stored values nearest to `t`; all arguments broadcast."""
    element = numerics.get_element(fmt.element)
    if zero is None:
        return numerics.round_to_level(scales.safe_divide(t, scale), element) * scale
    if fmt.offset is not None:
        q = numerics.round_to_level(scales.safe_divide(t - zero, scale), element)
        return q * scale + zero
    q = jnp.round(scales.safe_divide(t, scale)) + zero
    return (jnp.clip(q, element.qmin, element.qmax) - zero) * scale


def _sweep(
    W: Float[Array, "K N"],
    D: Float[Array, "K N"],
    M: Float[Array, "K K"],
    grid: _Grid,
    group: Int[Array, " K"],
    fmt: Format,
) -> Float[Array, "K N"]:
    """Rounds every row once: d_k = w_k - round(w_k + sum_j M_kj d_j); returns the new D.

    Args:
      D: the errors so far; those of rows not yet visited count too.
      M: what each row's target takes from every row's error; its diagonal is 0.
      group: the group whose scale each row has.
    """
    K = W.shape[0]
    B = min(_BLOCK, K)
    n_blocks = -(-K // B)
    # Padding rows touch nothing; overlapping blocks would visit rows twice.
    extra = n_blocks * B - K
    W, D = (jnp.pad(a, ((0, extra), (0, 0))) for a in (W, D))
    M = jnp.pad(M, ((0, extra), (0, extra)))
    group = jnp.pad(group, (0, extra))

    def block(b, D):
        start = b * B
        rows = lax.dynamic_slice_in_dim(M, start, B)  # [B, K]
        inside = lax.dynamic_slice_in_dim(rows, start, B, axis=1)  # [B, B]
        Db = lax.dynamic_slice_in_dim(D, start, B)
        Wb = lax.dynamic_slice_in_dim(W, start, B)
        # What the rows of the block take from all rows, less what they take from each other.
        target = Wb + jnp.dot(rows, D, precision=_HIGHEST) - jnp.dot(inside, Db, precision=_HIGHEST)
        gb = lax.dynamic_slice_in_dim(group, start, B)
        s = grid.scale[gb]
        z = None if grid.zero is None else grid.zero[gb]

        def row(i, Db):
            t = target[i] + jnp.dot(inside[i], Db, precision=_HIGHEST)
            q = _nearest(t, s[i], None if z is None else z[i], fmt)
            return Db.at[i].set(Wb[i] - q)

        Db = lax.fori_loop(0, B, row, Db)
        return lax.dynamic_update_slice_in_dim(D, Db, start, axis=0)

    return lax.fori_loop(0, n_blocks, block, D)[:K]


def _factor(H: Float[Array, "K K"], damping: float) -> tuple[Array, Array]:
    """Returns upper triangular R with R Rᵀ = H + λ diag(H), and λ."""
    diagonal = jnp.diag(jnp.diagonal(H))

    def reversed_cholesky(fraction):
        # R is the Cholesky factor of the matrix with rows and columns reversed, reversed back.
        L = jnp.linalg.cholesky((H + fraction * diagonal)[::-1, ::-1])
        return L[::-1, ::-1]

    def failed(state):
        fraction, R = state
        return ~jnp.isfinite(jnp.sum(R)) & (fraction < 1e3)

    def again(state):
        fraction = state[0] * 10
        return fraction, reversed_cholesky(fraction)

    start = jnp.asarray(max(damping, 1e-7), H.dtype)
    fraction, R = lax.while_loop(failed, again, (start, reversed_cholesky(start)))
    return R, fraction


def _refit(
    W: Array, D: Array, H: Array, grid: _Grid, fmt: Format, K: int, N: int
) -> tuple[_Grid, Array]:
    """Refits the scale of every group and column, where that lowers J; returns grid and D.

    With v the values of a group in units of its scale (q - zero_point), J is quadratic in the
    scale: the best change is  v·(HD) / v·(H_gg v), rounded to the scale's stored type.
    """
    G = grid.scale.shape[0]
    g = fmt.group_size or K
    pad = G * g - K
    Hp = jnp.pad(H, ((0, pad), (0, pad)))
    Dp = jnp.pad(D, ((0, pad), (0, 0)))
    Wp = jnp.pad(W, ((0, pad), (0, 0)))
    offset = grid.zero if fmt.offset is not None else None

    def one(i, state):
        scale, D = state
        start = i * g
        s = scale[i]
        Q = lax.dynamic_slice_in_dim(Wp - D, start, g)
        v = scales.safe_divide(Q if offset is None else Q - offset[i], s)  # [g, N]
        rows = lax.dynamic_slice_in_dim(Hp, start, g)  # [g, K]
        HD = jnp.dot(rows, D, precision=_HIGHEST)
        Hv = jnp.dot(
            lax.dynamic_slice_in_dim(rows, start, g, axis=1), v, precision=_HIGHEST
        )  # [g, N]
        linear, quadratic = jnp.sum(v * HD, 0), jnp.sum(v * Hv, 0)
        new = scales.stored(s + scales.safe_divide(linear, quadratic), fmt.scale)
        change = new - s
        # J(s + change) - J(s)
        gain = change * change * quadratic - 2 * change * linear
        change = jnp.where(gain < 0, change, 0.0)
        Dg = lax.dynamic_slice_in_dim(D, start, g) - v * change
        return (
            scale.at[i].set(jnp.where(gain < 0, new, s)),
            lax.dynamic_update_slice_in_dim(D, Dg, start, axis=0),
        )

    scale, Dp = lax.fori_loop(0, G, one, (grid.scale, Dp))
    return grid._replace(scale=scale), Dp[:K]


def objective(D: Float[Array, "K N"], H: Float[Array, "K K"]) -> Float[Array, ""]:
    """Returns tr(Dᵀ H D)."""
    return jnp.sum(D * jnp.dot(H, D, precision=_HIGHEST))


def _solve(W, H, fmt: Format, options: Options):
    """One canonical weight [K, N]: stored scale and zero, codes, diagnostics."""
    K, N = W.shape
    element = numerics.get_element(fmt.element)
    diagonal = jnp.diagonal(H)
    dead = diagonal <= 0
    # An input that never fired says nothing; alone on the diagonal its row is rounded to nearest.
    H = H + jnp.diag(jnp.where(dead, jnp.mean(diagonal) + (jnp.sum(diagonal) <= 0), 0.0))
    diagonal = jnp.diagonal(H)

    start = qtensor.quantize_array(W, fmt, importance=diagonal)
    scale, zero = qtensor.read_scales(start)
    wide = functools.partial(jnp.broadcast_to, shape=(scale.shape[0], N))
    columns = fmt.group_columns or N

    def spread(a):
        return a if columns == 1 else wide(jnp.repeat(a, columns, axis=-1)[:, :N])

    grid = _Grid(spread(scale), None if zero is None else spread(zero))
    group = jnp.arange(K) // (fmt.group_size or K)

    order = jnp.argsort(-diagonal) if options.act_order else jnp.arange(K)
    Hp = H[order][:, order]
    R, damping = _factor(Hp, options.damping)
    Hd = H + damping * jnp.diag(diagonal)
    M = (jnp.triu(R, 1) / jnp.diagonal(R)).T
    Wp, gp = W[order], group[order]
    Dp = _sweep(Wp, jnp.zeros_like(Wp), M, grid, gp, fmt)

    D_rtn = W - qtensor.dequantize_canonical(start)
    back = jnp.argsort(order)
    D = Dp[back]
    gptq = objective(D, H)
    rtn = objective(D_rtn, H)

    # Never above rounding to nearest, column by column.
    def column(D):
        return jnp.sum(D * jnp.dot(Hd, D, precision=_HIGHEST), 0)

    D = jnp.where(column(D) <= column(D_rtn), D, D_rtn)

    plain = None if isinstance(fmt.scale, Format) else fmt.scale
    can_refit = options.refit and columns == 1 and plain is not None
    if options.sweeps:
        Hpd = Hd[order][:, order]
        Mp = Hpd / jnp.diagonal(Hpd)[:, None]
        Mp = Mp - jnp.diag(jnp.diagonal(Mp))

        def descend(_, state):
            grid, D = state
            if can_refit:
                grid, D = _refit(W, D, Hd, grid, fmt, K, N)
            D = _sweep(Wp, D[order], Mp, grid, gp, fmt)[back]
            return grid, D

        grid, D = lax.fori_loop(0, options.sweeps, descend, (grid, D))

    total = objective(W, H)
    Q = W - D
    final_scale = start.scale
    if can_refit and options.sweeps and plain is not None:
        final_scale = numerics.round_scale(grid.scale, plain)
    final = objective(D, H)
    codes = _codes(Q, grid, group, fmt, element)
    rtn, gptq, final = (scales.safe_divide(j, total) for j in (rtn, gptq, final))
    diagnostics = Diagnostics(rtn, gptq, final, damping, jnp.sum(dead))
    return codes, final_scale, start.zero, diagnostics


def _codes(Q, grid: _Grid, group, fmt: Format, element: numerics.Element):
    s = grid.scale[group]
    if grid.zero is None:
        return numerics.encode(scales.safe_divide(Q, s), element)
    z = grid.zero[group]
    if fmt.offset is not None:
        return numerics.encode(scales.safe_divide(Q - z, s), element)
    return numerics.encode(jnp.round(scales.safe_divide(Q, s)) + z, element)


@functools.partial(jax.jit, static_argnames=("fmt", "layout", "options"))
def solve(
    w: Float[Array, "*shape"],
    H: Float[Array, "*b K K"],
    fmt: Format,
    layout: Layout,
    options: Options | None = None,
) -> tuple[QTensor, Diagnostics]:
    """Quantizes a weight by GPTQ and coordinate descent on its second moments.

    Args:
      w: the weight; leading (stacked, expert) axes are solved in parallel.
      H: second moments of its input, sum xᵀx / n, in canonical order of K.
      fmt: any Format; group scales come from its own rule, weighted with diag(H) if that is "mse".
      layout: which axes are contracted.
      options: see `Options`. Static.

    Returns:
      The QTensor, in the same storage as rounding to nearest would give, and `Diagnostics`.
    """
    dtype = jnp.dtype(w.dtype).name
    W = layout.to_canonical(w).astype(jnp.float32)
    K = W.shape[-2]
    fmt = fmt.fit(K)
    run = functools.partial(_solve, fmt=fmt, options=options or Options())
    lead = W.shape[:-2]
    for _ in lead:
        run = jax.vmap(run)
    codes, scale, zero, diagnostics = run(W, H.astype(jnp.float32))
    element = numerics.get_element(fmt.element)
    pad = packing.padding(K, element.bits) if element.is_packed else 0
    data = packing.pack(codes, element.bits) if element.is_packed else codes
    return QTensor(data, scale, zero, fmt, layout, dtype, pad), diagnostics
