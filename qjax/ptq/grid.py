"""Grids: the scales, zero points and offsets of a weight under solution, and their least squares.

A solver moves scales while it rounds. Between the float arrays that it moves and the leaves of a
QTensor lies what storing does to them: a narrow dtype, or scales quantized again.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax import numerics, qtensor, scales
from qjax.format import Format, holds_sign
from qjax.ptq import tiles


class Grid(NamedTuple):
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

    def at(self, i: Any) -> Grid:
        """Returns those of one group, or of many."""
        return jax.tree.map(lambda a: a[i], self)

    def replace(self, i: Any, new: Grid) -> Grid:
        zero = None if self.zero is None else self.zero.at[i].set(new.zero)
        return self._replace(scale=self.scale.at[i].set(new.scale), zero=zero)


class Stored(NamedTuple):
    """Scales and zero points (or offsets) as leaves of a QTensor."""

    scale: Any
    zero: Any


def nearest(t: Array, grid: Grid, fmt: Format) -> Array:
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


def codes_of(Q: Array, grid: Grid, fmt: Format, element: numerics.Element) -> Array:
    scale, zero, *_ = grid
    if zero is None:
        return numerics.encode(scales.safe_divide(Q, scale), element)
    if fmt.offset is not None:
        return numerics.encode(scales.safe_divide(Q - zero, scale), element)
    return numerics.encode(jnp.round(scales.safe_divide(Q, scale)) + zero, element)


def store(grid: Grid, fmt: Format) -> tuple[Stored, Grid]:
    """Stores a grid [G, N]; returns the leaves, and the grid that they read back as."""
    N = grid.scale.shape[1]
    columns = fmt.group_columns or N
    stored, read = store_shared(jax.tree.map(lambda a: a[:, ::columns], grid), fmt)
    return stored, jax.tree.map(lambda a: _widen(a, columns, N), read)


def store_shared(grid: Grid, fmt: Format) -> tuple[Stored, Grid]:
    """As `store`, of scales [*b, G, C] that stand for all columns of a group."""
    scale = qtensor.store_scales(grid.scale, fmt.scale)
    read = Grid(qtensor.restore_scales(scale, fmt.scale), None)
    if grid.zero is None:
        return Stored(scale, None), read
    if fmt.offset is not None:
        zero = qtensor.store_offsets(grid.zero, fmt.offset)
        return Stored(scale, zero), read._replace(zero=qtensor.restore_scales(zero, fmt.offset))
    element = numerics.get_element(fmt.element)
    codes = qtensor.pack_codes(numerics.encode(grid.zero, element), element)
    return Stored(scale, codes), read._replace(zero=grid.zero)


def is_stepped(fmt: str | Format | None) -> bool:
    """Whether scales are integers under plain scales, each of a column of its own: k-quants."""
    if not isinstance(fmt, Format):
        return False
    plain = isinstance(fmt.scale, str) and not fmt.zero_point and fmt.offset is None
    return plain and is_by_column(fmt) and numerics.get_element(fmt.element).kind == "int"


def with_steps(grid: Grid, stored: Stored, fmt: Format) -> Grid:
    """Returns the grid with the scales that its scales are integers of, where they are."""
    G = grid.scale.shape[0]

    def step(part: Any, fmt: str | Format | None) -> Array | None:
        if not is_stepped(fmt):
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


def stored_again(stored: Stored, grid: Grid, fmt: Format) -> Stored:
    """Returns the leaves of a grid that refits moved by whole steps."""

    def part(old: Any, value: Array | None, step: Array | None, fmt: str | Format | None) -> Any:
        if value is None or fmt is None:
            return old
        if step is None:
            assert isinstance(fmt, str)
            return numerics.round_scale(value, fmt)
        codes = numerics.encode(scales.safe_divide(value, step), old.element)
        return dataclasses.replace(old, data=qtensor.pack_codes(codes, old.element))

    return Stored(
        part(stored.scale, grid.scale, grid.step, fmt.scale),
        part(stored.zero, grid.zero, grid.zero_step, fmt.offset),
    )


def _widen(a: Float[Array, "G C"], columns: int, N: int) -> Float[Array, "G N"]:
    return a if columns == 1 else jnp.repeat(a, columns, axis=1)[:, :N]


def is_by_column(fmt: Format) -> bool:
    """Whether columns of a weight of this format know nothing of each other, nor their scales."""
    nested = [f for f in (fmt.scale, fmt.offset) if isinstance(f, Format)]
    return fmt.group_columns == 1 and not fmt.flatten and all(map(is_by_column, nested))


def in_floats(fmt: Format) -> Format:
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
    return dataclasses.replace(in_floats(fmt), group_columns=1)


def first_grid(
    W: Float[Array, "K N"], fmt: Format, importance: Float[Array, " K"]
) -> tuple[Stored, Grid]:
    """Returns the grid of the format's own rule."""
    if fmt.rule == "mse" and fmt.group_columns == 1:
        return store(_search(W, fmt, importance), fmt)
    qt = qtensor.quantize_array(W, fmt, importance=importance)
    scale, zero = qtensor.read_scales(qt)
    N = W.shape[1]
    columns = fmt.group_columns or N
    grid = Grid(_widen(scale, columns, N), None if zero is None else _widen(zero, columns, N))
    return Stored(qt.scale, qt.zero), grid


# Fractions of a group's range that the search tries.
_FRACTIONS = (0.4, 1.0, 12)


def _search(W: Float[Array, "K N"], fmt: Format, importance: Float[Array, " K"]) -> Grid:
    """Returns the scales, among clipped ranges, that minimize sum_k h_k (w_k - q_k)².

    As rule "mse" of `qjax.scales`, with fewer candidates: they are refit on all of H later.
    """
    K, N = W.shape
    element = numerics.get_element(fmt.element)
    G, g = fmt.groups(K, N)[0], fmt.group_size or K
    floats = in_floats(fmt)
    start = qtensor.quantize_array(W, dataclasses.replace(floats, rule=None))
    first = Grid(*qtensor.read_scales(start))
    v = jnp.pad(W, ((0, G * g - K), (0, 0)), mode="edge").reshape(G, g, N)
    h = tiles.pad(importance, G * g).reshape(G, g)
    fractions = jnp.linspace(*_FRACTIONS, dtype=W.dtype)
    if fmt.scale == "e8m0":
        fractions = jnp.asarray([0.5, 2.0], W.dtype)
    elif element.qmin < -element.qmax and not fmt.zero_point and holds_sign(fmt.scale):
        # The side with one more level may be the positive one: the scale is then negative.
        fractions *= element.qmax / -element.qmin
        fractions = jnp.concatenate([fractions, -fractions])

    def group(v: Array, h: Array, first: Grid) -> Grid:
        low, high = jnp.min(v, 0), jnp.max(v, 0)
        if fmt.zero_point:
            low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)

        def better(best: tuple[Grid, Array], grid: Grid) -> tuple[Grid, Array]:
            residual = v - nearest(v, grid, fmt)
            # A dot, since XLA's sum over the first of two axes is slow on CPUs.
            error = tiles.dot(h, residual * residual)
            return select(error < best[1], grid, best[0]), jnp.minimum(error, best[1])

        def step(best: tuple[Grid, Array], fraction: Array):
            if first.zero is None:
                grid = Grid(scales.stored(fraction * first.scale, floats.scale), None)
            else:
                # Both ends are clipped alike.
                scale = fraction * (high - low) / (element.qmax - element.qmin)
                grid = Grid(*scales.stored_pair(scale, fraction * low, floats, element))
            return better(best, grid), None

        # The NaN scale of a group with a NaN stays: its error is NaN, and no other is below.
        error = tiles.dot(h, jnp.square(v - nearest(v, first, fmt)))
        (grid, _), _ = lax.scan(step, (first, error), fractions)
        ones = jnp.ones_like(v[:, :1])

        def refit(_, grid: Grid) -> Grid:
            Q = nearest(v, grid, fmt)
            return refit_group(Q, h[:, None] * (v - Q), jnp.diag(h), ones, grid, floats)[0]

        return lax.fori_loop(0, 2, refit, grid)

    return lax.map(lambda a: group(*a), (v, h, first))


def refit_group(
    Q: Float[Array, "g N"],
    HD: Float[Array, "g N"],
    H: Float[Array, "g g"],
    ones: Float[Array, "g 1"],
    grid: Grid,
    fmt: Format,
) -> tuple[Grid, Float[Array, "g N"], Float[Array, " N"]]:
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
        vHD, vHv = total(v * HD), total(v * tiles.dot(H, v))
        s = _as_kept(scale + scales.safe_divide(vHD, vHv), fmt.scale, step) - scale
        change = s * s * vHv - 2 * s * vHD
        # Also false for NaN.
        s = jnp.where(change < 0, s, 0.0)
        return grid._replace(scale=scale + s), s * v, jnp.where(change < 0, change, 0.0)
    v = scales.safe_divide(Q - zero * ones, scale)
    H1 = tiles.dot(H, ones)
    vHD, vHv, vH1 = total(v * HD), total(v * tiles.dot(H, v)), total(v * H1)
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


def select(take: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(take, a, b), a, b)
