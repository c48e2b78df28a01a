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

import dataclasses
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
from qjax.format import Format, holds_sign
from qjax.layout import Layout
from qjax.ptq import tiles
from qjax.qtensor import QTensor

# Rows rounded one by one before their errors go to all others in one matmul.
_BLOCK = 128
# Groups up to this many rows are refit inside a sweep, from products that it has anyway.
_WIDE = 512
# Output columns on which the diagnostics are measured, and on which dampings are compared. Columns
# are exchangeable: their errors have the same law.
_MEASURED = 512
_PROBE = 96
# Elements of H or W that are solved at once; larger stacks go through in turns.
_AT_ONCE = 2**22
_HIGHEST = lax.Precision.HIGHEST


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


class _Grid(NamedTuple):
    """Scales and zero points (or offsets) by group, float32 [G, N] as they are stored.

    Attributes:
      scale, zero: what a group's codes are multiplied by, and what is subtracted or added.
      step, zero_step: of scales and offsets that are integers under a scale of their own, that
        scale: a refit moves them by whole steps.
    """

    scale: Array
    zero: Array | None
    step: Array | None = None
    zero_step: Array | None = None

    def at(self, i: Any) -> _Grid:
        """Returns those of one group, or of many."""
        return jax.tree.map(lambda a: a[i], self)

    def replace(self, i: Any, new: _Grid) -> _Grid:
        zero = None if self.zero is None else self.zero.at[i].set(new.zero)
        return self._replace(scale=self.scale.at[i].set(new.scale), zero=zero)


_dot = tiles.dot


def _select(take: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(take, a, b), a, b)


def _pad(a: Array, rows: int) -> Array:
    """Appends rows of zeros."""
    extra = rows - a.shape[0]
    return jnp.pad(a, [(0, extra)] + [(0, 0)] * (a.ndim - 1)) if extra else a


def _pad_square(a: Array, rows: int) -> Array:
    extra = rows - a.shape[0]
    return jnp.pad(a, ((0, extra), (0, extra))) if extra else a


def _nearest(t: Array, grid: _Grid, fmt: Format) -> Array:
    """Returns the stored values nearest to `t`; the grid's arrays broadcast to it."""
    element = numerics.get_element(fmt.element)
    scale, zero, *_ = grid
    if zero is None:
        return numerics.round_to_level(scales.safe_divide(t, scale), element) * scale
    if fmt.offset is not None:
        q = numerics.round_to_level(scales.safe_divide(t - zero, scale), element)
        return q * scale + zero
    q = jnp.round(scales.safe_divide(t, scale)) + zero
    return (jnp.clip(q, element.qmin, element.qmax) - zero) * scale


# ---- scales --------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """Scales and zero points (or offsets) as leaves of a QTensor."""

    scale: Any
    zero: Any


def _store(grid: _Grid, fmt: Format) -> tuple[_Stored, _Grid]:
    """Stores a grid; returns the leaves, and the grid that they read back as."""
    N = grid.scale.shape[1]
    columns = fmt.group_columns or N
    element = numerics.get_element(fmt.element)

    def store(a: Array, fmt: str | Format) -> tuple[Any, Array]:
        a = a[:, ::columns]
        if not isinstance(fmt, Format):
            stored = numerics.round_scale(a, fmt)
            read = numerics.read_scale(stored, fmt)
        else:
            stored = qtensor.quantize_array(a, fmt)
            read = qtensor.dequantize_array(stored)
        return stored, _widen(read, columns, N)

    scale, scale_read = store(grid.scale, fmt.scale)
    if grid.zero is None:
        return _Stored(scale, None), _Grid(scale_read, None)
    if fmt.offset is not None:
        offset, offset_read = store(grid.zero, fmt.offset)
        return _Stored(scale, offset), _Grid(scale_read, offset_read)
    codes = qtensor.pack_codes(numerics.encode(grid.zero[:, ::columns], element), element)
    return _Stored(scale, codes), _Grid(scale_read, grid.zero)


def _is_stepped(fmt: str | Format | None) -> bool:
    """Whether scales are integers under plain scales, each of a column of its own: k-quants."""
    if not isinstance(fmt, Format):
        return False
    plain = isinstance(fmt.scale, str) and not fmt.zero_point and fmt.offset is None
    return plain and is_by_column(fmt) and numerics.get_element(fmt.element).kind == "int"


def _with_steps(grid: _Grid, stored: _Stored, fmt: Format) -> _Grid:
    """Returns the grid with the scales that its scales are integers of, where they are."""
    G = grid.scale.shape[0]

    def step(part: Any, fmt: str | Format | None) -> Array | None:
        if not _is_stepped(fmt):
            return None
        assert isinstance(fmt, Format)
        wide = scales.spread(qtensor.read_scales(part)[0], fmt, G, 1)
        return jnp.broadcast_to(wide, grid.scale.shape)

    return grid._replace(
        step=step(stored.scale, fmt.scale), zero_step=step(stored.zero, fmt.offset)
    )


def _as_kept(value: Array, fmt: str | Format, step: Array | None) -> Array:
    """Returns a scale as it will be read back, its own scale staying as it is."""
    if step is None:
        return scales.stored(value, fmt)
    assert isinstance(fmt, Format)
    element = numerics.get_element(fmt.element)
    return numerics.round_to_level(scales.safe_divide(value, step), element) * step


def _stored_again(stored: _Stored, grid: _Grid, fmt: Format) -> _Stored:
    """Returns the leaves of a grid that refits moved by whole steps."""

    def part(old: Any, value: Array | None, step: Array | None, fmt: str | Format | None) -> Any:
        if value is None or fmt is None:
            return old
        if step is None:
            assert isinstance(fmt, str)
            return numerics.round_scale(value, fmt)
        codes = numerics.encode(scales.safe_divide(value, step), old.element)
        return dataclasses.replace(old, data=qtensor.pack_codes(codes, old.element))

    return _Stored(
        part(stored.scale, grid.scale, grid.step, fmt.scale),
        part(stored.zero, grid.zero, grid.zero_step, fmt.offset),
    )


def _widen(a: Float[Array, "G C"], columns: int, N: int) -> Float[Array, "G N"]:
    return a if columns == 1 else jnp.repeat(a, columns, axis=1)[:, :N]


def is_by_column(fmt: Format) -> bool:
    """Whether columns of a weight of this format know nothing of each other, nor their scales."""
    nested = [f for f in (fmt.scale, fmt.offset) if isinstance(f, Format)]
    return fmt.group_columns == 1 and not fmt.flatten and all(map(is_by_column, nested))


def _in_floats(fmt: Format) -> Format:
    """Returns the format whose scales and offsets are not quantized again."""
    offset = "float32" if isinstance(fmt.offset, Format) else fmt.offset
    if not isinstance(fmt.scale, Format):
        return dataclasses.replace(fmt, offset=offset)
    # ggml's search is for its own formats, of which none has these scales.
    rule = "mse" if fmt.rule == "ggml" else fmt.rule
    return dataclasses.replace(fmt, scale="float32", offset=offset, rule=rule)


def probe_format(fmt: Format) -> Format:
    """Returns the format for trials on a part of the columns.

    Scales shared by columns, or quantized again, mean something else there.
    """
    return dataclasses.replace(_in_floats(fmt), group_columns=1)


def _first_grid(
    W: Float[Array, "K N"], fmt: Format, importance: Float[Array, " K"]
) -> tuple[_Stored, _Grid]:
    """Returns the grid of the format's own rule."""
    if fmt.rule == "mse" and fmt.group_columns == 1:
        return _store(_search(W, fmt, importance), fmt)
    qt = qtensor.quantize_array(W, fmt, importance=importance)
    scale, zero = qtensor.read_scales(qt)
    N = W.shape[1]
    columns = fmt.group_columns or N
    grid = _Grid(_widen(scale, columns, N), None if zero is None else _widen(zero, columns, N))
    return _Stored(qt.scale, qt.zero), grid


# Fractions of a group's range that the search tries.
_FRACTIONS = (0.4, 1.0, 12)


def _search(W: Float[Array, "K N"], fmt: Format, importance: Float[Array, " K"]) -> _Grid:
    """Returns the scales, among clipped ranges, that minimize sum_k h_k (w_k - q_k)².

    As rule "mse" of `qjax.scales`, with fewer candidates: they are refit on all of H later.
    """
    K, N = W.shape
    element = numerics.get_element(fmt.element)
    G, g = fmt.groups(K, N)[0], fmt.group_size or K
    floats = _in_floats(fmt)
    start = qtensor.quantize_array(W, dataclasses.replace(floats, rule=None))
    first = _Grid(*qtensor.read_scales(start))
    v = jnp.pad(W, ((0, G * g - K), (0, 0)), mode="edge").reshape(G, g, N)
    h = _pad(importance, G * g).reshape(G, g)
    fractions = jnp.linspace(*_FRACTIONS, dtype=W.dtype)
    if fmt.scale == "e8m0":
        fractions = jnp.asarray([0.5, 2.0], W.dtype)
    elif element.qmin < -element.qmax and not fmt.zero_point and holds_sign(fmt.scale):
        # The side with one more level may be the positive one: the scale is then negative.
        fractions *= element.qmax / -element.qmin
        fractions = jnp.concatenate([fractions, -fractions])

    def group(v: Array, h: Array, first: _Grid) -> _Grid:
        low, high = jnp.min(v, 0), jnp.max(v, 0)
        if fmt.zero_point:
            low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)

        def better(best: tuple[_Grid, Array], grid: _Grid) -> tuple[_Grid, Array]:
            residual = v - _nearest(v, grid, fmt)
            # A dot, since XLA's sum over the first of two axes is slow on CPUs.
            error = _dot(h, residual * residual)
            return _select(error < best[1], grid, best[0]), jnp.minimum(error, best[1])

        def step(best: tuple[_Grid, Array], fraction: Array):
            if first.zero is None:
                grid = _Grid(scales.stored(fraction * first.scale, floats.scale), None)
            else:
                # Both ends are clipped alike.
                scale = fraction * (high - low) / (element.qmax - element.qmin)
                grid = _Grid(*scales.stored_pair(scale, fraction * low, floats, element))
            return better(best, grid), None

        # The NaN scale of a group with a NaN stays: its error is NaN, and no other is below.
        error = _dot(h, jnp.square(v - _nearest(v, first, fmt)))
        (grid, _), _ = lax.scan(step, (first, error), fractions)
        ones = jnp.ones_like(v[:, :1])

        def refit(_, grid: _Grid) -> _Grid:
            Q = _nearest(v, grid, fmt)
            return _refit(Q, h[:, None] * (v - Q), jnp.diag(h), ones, grid, floats)[0]

        return lax.fori_loop(0, 2, refit, grid)

    return lax.map(lambda a: group(*a), (v, h, first))


def _refit(
    Q: Float[Array, "g N"],
    HD: Float[Array, "g N"],
    H: Float[Array, "g g"],
    ones: Float[Array, "g 1"],
    grid: _Grid,
    fmt: Format,
) -> tuple[_Grid, Float[Array, "g N"], Float[Array, " N"]]:
    """Refits one group's scale (and offset), where that lowers J: returns them, ΔQ and ΔJ.

    With v the group's values in units of the scale and H its diagonal block, a change of scale and
    offset by s and o changes Q by ΔQ = v s + o, and J, which is quadratic in them, by

      ΔJ = ΔQᵀ H ΔQ - 2 ΔQᵀ (HD)

    Least squares gives the best change; it is rounded to what is stored before it is judged.

    Args:
      Q: stored values.
      HD: these rows of H D, D all errors.
      ones: 0 for padding.
      grid: of this group, [N].
    """
    N = Q.shape[1]
    columns = fmt.group_columns or N

    def total(a: Array) -> Array:
        """Sums over the rows, and over the columns that share a scale."""
        a = tiles.total(a)
        if columns == 1:
            return a
        C = -(-N // columns)
        a = jnp.sum(jnp.pad(a, (0, C * columns - N)).reshape(C, columns), 1)
        return jnp.repeat(a, columns)[:N]

    scale, zero, step, zero_step = grid
    if fmt.offset is None or zero is None:
        v = scales.safe_divide(Q, scale)
        vHD, vHv = total(v * HD), total(v * _dot(H, v))
        s = _as_kept(scale + scales.safe_divide(vHD, vHv), fmt.scale, step) - scale
        change = s * s * vHv - 2 * s * vHD
        # Also false for NaN.
        s = jnp.where(change < 0, s, 0.0)
        return grid._replace(scale=scale + s), s * v, jnp.where(change < 0, change, 0.0)
    v = scales.safe_divide(Q - zero * ones, scale)
    H1 = _dot(H, ones)
    vHD, vHv, vH1 = total(v * HD), total(v * _dot(H, v)), total(v * H1)
    oHD, oH1 = total(ones * HD), total(jnp.broadcast_to(ones * H1, Q.shape))
    # The offset's part is eliminated first, then solved for with the scale that can be stored.
    rest = vHv - scales.safe_divide(vH1 * vH1, oH1)
    s = scales.safe_divide(vHD - scales.safe_divide(vH1 * oHD, oH1), rest)
    s = _as_kept(scale + s, fmt.scale, step) - scale
    o = scales.safe_divide(oHD - s * vH1, oH1)
    o = _as_kept(zero + o, fmt.offset, zero_step) - zero
    change = s * s * vHv + 2 * s * o * vH1 + o * o * oH1 - 2 * s * vHD - 2 * o * oHD
    s, o = jnp.where(change < 0, s, 0.0), jnp.where(change < 0, o, 0.0)
    return (
        grid._replace(scale=scale + s, zero=zero + o),
        s * v + o * ones,
        jnp.where(change < 0, change, 0.0),
    )


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
        return total + _dot(piece.T, rows)

    zeros = jnp.zeros((B, D.shape[1]), D.dtype)
    return lax.fori_loop(start // B, D.shape[0] // B, tile, zeros)


def _energy(
    L: Float[Array, "K K"], D: Float[Array, "K N"], enough: Array | float = jnp.inf
) -> Float[Array, " N"]:
    """Returns ‖LᵀD‖² of every column, or a lower bound if all columns reach `enough` before."""
    K, N = D.shape
    B = min(2 * _BLOCK, K)
    blocks = -(-K // B)
    L, D = _pad_square(L, blocks * B), _pad(D, blocks * B)

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
    grid: _Grid,
    group: Int[Array, " K"],
    fmt: Format,
) -> tuple[Float[Array, "K N"], Float[Array, " N"]]:
    """Rounds every row once, from the last to the first; returns D and J of every column.

    t_k = w_k + sum_{j>k} L_jk d_j / L_kk,   d_k = w_k - round(t_k),   J = sum_k (L_kk (t_k - q_k))²
    """
    K, N = W.shape
    B = min(_BLOCK, K)
    blocks = -(-K // B)
    W, group = _pad(W, blocks * B), _pad(group, blocks * B)
    # A padded row has pivot 0 and a column of zeros: it costs nothing, and nobody takes from it.
    L = _pad_square(L, blocks * B)
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
            t = T[k] + _dot(inside[k], Db)
            q = _nearest(t, grids.at(k), fmt)
            return Db.at[k].set(Wb[k] - q), J + jnp.square(pivot[k] * (t - q))

        Db, J = lax.fori_loop(0, B, row, (jnp.zeros_like(Wb), J))
        return lax.dynamic_update_slice_in_dim(D, Db, start, axis=0), J

    D, J = lax.fori_loop(0, blocks, block, (jnp.zeros_like(W), jnp.zeros(N, W.dtype)))
    return D[:K], J


# ---- coordinate descent --------------------------------------------------------------------------


def _sweep(
    W: Float[Array, "K N"],
    D: Float[Array, "K N"],
    H: Float[Array, "K K"],
    grid: _Grid,
    fmt: Format,
    refit: bool,
) -> tuple[Float[Array, "K N"], _Grid, Float[Array, " N"]]:
    """Refits every group and rounds every row once, given all others; returns D, grid and ΔJ.

    t_k = q_k + (HD)_k / H_kk,   ΔJ = H_kk ((t_k - q_k')² - (t_k - q_k)²) for q_k' = round(t_k)
    """
    K = W.shape[0]
    G, g = grid.scale.shape[0], fmt.group_size or K
    # Blocks of whole groups, so that a group's rows of HD are at hand together.
    per_block = max(1, _BLOCK // g) if g <= _WIDE else 0
    B = min(per_block * g, G * g) if per_block else min(_BLOCK, K)
    blocks = -(-K // B)
    group = jnp.minimum(jnp.arange(blocks * B) // g, G - 1)
    real = (jnp.arange(blocks * B) < K).astype(W.dtype)[:, None]
    W, D, H = _pad(W, blocks * B), _pad(D, blocks * B), _pad_square(H, blocks * B)
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
            new, dQ, change = _refit(Q, part(HD), part(Hg), part(ones), grid.at(index), fmt)
            Db = lax.dynamic_update_slice_in_dim(Db, Dg - dQ, i * g, axis=0)
            gain = gain + _sum_once(change, fmt)
            return Db, HD - _dot(Hg, dQ), grid.replace(index, new), gain

        HD = _dot(rows, D)
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
            t = T[k] + _dot(inside[k], delta)
            q = _nearest(t, grids.at(k), fmt)
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


def _refit_wide(
    W: Array, D: Array, H: Array, grid: _Grid, fmt: Format
) -> tuple[Float[Array, "K N"], _Grid, Float[Array, " N"]]:
    """Refits groups of any size, which takes two products with H; returns D, grid and ΔJ."""
    K, N = W.shape
    G, g = grid.scale.shape[0], fmt.group_size or K
    W, D, H = _pad(W, G * g), _pad(D, G * g), _pad_square(H, G * g)
    real = (jnp.arange(G * g) < K).astype(W.dtype)[:, None]

    def one_group(i, state):
        D, grid, gain = state
        part = lambda a: lax.dynamic_slice_in_dim(a, i * g, g)
        rows, Dg, ones = part(H), part(D), part(real)
        Hg = lax.dynamic_slice_in_dim(rows, i * g, g, axis=1)
        Q = (part(W) - Dg) * ones
        new, dQ, change = _refit(Q, _dot(rows, D), Hg, ones, grid.at(i), fmt)
        D = lax.dynamic_update_slice_in_dim(D, Dg - dQ, i * g, axis=0)
        return D, grid.replace(i, new), gain + _sum_once(change, fmt)

    start = (D, grid, jnp.zeros(N, W.dtype))
    D, grid, gain = lax.fori_loop(0, G, one_group, start)
    return D[:K], grid, gain


# ---- one weight ----------------------------------------------------------------------------------


def objective(D: Float[Array, "K N"], H: Float[Array, "K K"]) -> Float[Array, ""]:
    """Returns tr(Dᵀ H D)."""
    return jnp.sum(D * _dot(H, D))


def _columns(N: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, N - 1, min(N, count)).astype(int))


def _solve(
    W: Float[Array, "K N"], H: Float[Array, "K K"], damping: Array, fmt: Format, options: Options
) -> tuple[Float[Array, "K N"], _Stored, Array, Diagnostics]:
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

    def gptq(grid: _Grid) -> tuple[Array, Array, Array]:
        """Returns D and J of GPTQ, of rounding to nearest in columns where that is better."""
        D_rtn = W - _nearest(W, grid.at(group), fmt)
        D, J = _gptq(W[order], L, grid, group[order], fmt)
        J_rtn = _energy(L, D_rtn[order], J)
        return jnp.where(J_rtn >= J, D[back], D_rtn), jnp.minimum(J, J_rtn), D_rtn

    stored, grid = _first_grid(W, fmt, diagonal)
    grid = _with_steps(grid, stored, fmt)
    D, J, D_rtn = gptq(grid)

    columns = _columns(N, _MEASURED)

    def undamped(D: Array, J: Array) -> Array:
        squares = jnp.sum(jnp.square(D[:, columns]), 1)
        return jnp.sum(J[columns]) - damping * _dot(diagonal, squares)

    def measured(D: Array) -> Array:
        J = jnp.zeros(N, D.dtype).at[columns].set(_energy(L, D[:, columns][order]))
        return undamped(D, J)

    total, rtn, after_gptq = measured(W), measured(D_rtn), undamped(D, J)

    Hd = _damped(H, damping)
    floats = _in_floats(fmt)
    again = floats != fmt  # scales are quantized again: all of them together
    nested = [f for f in (fmt.scale, fmt.offset) if isinstance(f, Format)]
    stepped = bool(nested) and all(map(_is_stepped, nested))
    wide = (fmt.group_size or K) > _WIDE
    if options.refit and options.sweeps and (again or wide):
        refit = _refit_wide if wide else functools.partial(_sweep, refit=True)
        free = grid._replace(step=None, zero_step=None)
        refit_D, refit_grid, gain = refit(W, D, Hd, free, floats)
        if again:
            refit_stored, refit_grid = _store(refit_grid, fmt)
            refit_grid = _with_steps(refit_grid, refit_stored, fmt)
            refit_D, refit_J, _ = gptq(refit_grid)
            old = (D, J, stored, grid)
            new = (refit_D, refit_J, refit_stored, refit_grid)
            better = refit_J < J if is_by_column(fmt) else jnp.sum(refit_J) < jnp.sum(J)
            D, J, stored, grid = _select(better, new, old)
        else:
            D, grid, J = refit_D, refit_grid, J + gain

    def unfinished(state):
        sweep, _, _, J, gain = state
        return (sweep < options.sweeps) & (gain > options.tolerance * jnp.nansum(J))

    def descend(state):
        sweep, D, grid, J, _ = state
        D, grid, gain = _sweep(W, D, Hd, grid, fmt, options.refit and (stepped or not again))
        return sweep + 1, D, grid, J + gain, -jnp.nansum(gain)

    start = (0, D, grid, J, jnp.asarray(jnp.inf, W.dtype))
    sweeps, D, grid, J, _ = lax.while_loop(unfinished, descend, start)
    if not again:
        stored, grid = _store(grid, fmt)
    elif stepped:
        stored = _stored_again(stored, grid, fmt)

    element = numerics.get_element(fmt.element)
    codes = _codes(W - D, grid.at(group), fmt, element)
    relative = functools.partial(scales.safe_divide, scale=total)
    final = relative(undamped(D, J))
    what = Diagnostics(
        relative(rtn), relative(after_gptq), final, damping, jnp.sum(dead), jnp.asarray(sweeps)
    )
    return D, stored, codes, what


def _codes(Q: Array, grid: _Grid, fmt: Format, element: numerics.Element) -> Array:
    scale, zero, *_ = grid
    if zero is None:
        return numerics.encode(scales.safe_divide(Q, scale), element)
    if fmt.offset is not None:
        return numerics.encode(scales.safe_divide(Q - zero, scale), element)
    return numerics.encode(jnp.round(scales.safe_divide(Q, scale)) + zero, element)


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
