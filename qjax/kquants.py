"""The formats of ggml's block types, and its search for their scales: the rule "ggml".

Rounding a weight is the smaller part of quantizing it: among all scales (and minima) of a group of
n values, those are to be found that minimize sum_i w_i (x_i - x̂_i)². ggml's reference quantizer
looks for them in a few dozen candidates, each refit by least squares, then quantizes the scales of
a super-block of 256 values once more. What is here follows it step by step, in its order of sums,
so that equal inputs give equal bytes; `w` is a function of the values themselves, or comes from
the second moments of the inputs ("importance").

Every column of a weight has groups of its own, so all of it is elementwise along N: groups of n
values are arrays [n, J, N], J groups of each column, and sums run over the first axis in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qjax import numerics
from qjax.format import Format


def _nested(element: str, count: int) -> Format:
    """`count` scales under one float16."""
    return Format(element, group_size=count, scale="float16")


def _legacy(element: str, *, offset: bool = False) -> Format:
    return Format(
        element, group_size=32, scale="float16", offset="float16" if offset else None, rule="ggml"
    )


def _k_quant(element: str, group_size: int, scale: str, *, offset: bool = False) -> Format:
    nested = _nested(scale, 256 // group_size)
    return Format(
        element, group_size=group_size, scale=nested, offset=nested if offset else None, rule="ggml"
    )


FORMATS: Mapping[str, Format] = {
    "Q4_0": _legacy("int4"),
    "Q4_1": _legacy("uint4", offset=True),
    "Q5_0": _legacy("int5"),
    "Q5_1": _legacy("uint5", offset=True),
    "Q8_0": _legacy("int8"),
    "Q2_K": _k_quant("uint2", 16, "uint4", offset=True),
    "Q3_K": _k_quant("int3", 16, "int6"),
    "Q4_K": _k_quant("uint4", 32, "uint6", offset=True),
    "Q5_K": _k_quant("uint5", 32, "uint6", offset=True),
    "Q6_K": _k_quant("int6", 16, "int8"),
}

# Scales below count as zero.
_TINY = 1e-15
# Least importance of an input, as a part of the mean.
_LEAST = 1e-7
# Rows and columns that are searched together, at most: what is live then fits in a core's cache.
_TILE = 256
_COLUMNS = 512
# Fewer columns than these are not worth a turn of their own.
_FEWEST = 32
# Rows that are added up in one expression: more take XLA long to compile.
_CHUNK = 8
# Sweeps of coordinate descent over a group's codes.
_SWEEPS = 5


class Search(NamedTuple):
    """Candidates (first + step t + n) / range for an inverse scale, t = 0 .. last."""

    first: float
    step: float
    last: int
    absolute: bool = False


# Without importance, and with it.
_SEARCHES = {
    "Q2_K": Search(-0.5, 0.1, 15, absolute=True),
    "Q4_K": Search(-1.0, 0.1, 20),
    "Q5_K": Search(-0.5, 0.1, 15),
}
_WEIGHTED = Search(-0.9, 0.05, 36)


class Found(NamedTuple):
    """What the search found, as a QTensor stores it: codes not yet packed.

    Attributes:
      codes: [*b, K, N], in the storage type of the element.
      scale: float16 [*b, G, N], or codes [*b, G, N] and float16 [*b, G / J, N] of J scales each.
      offset: None, or the same.
    """

    codes: Array
    scale: Array | tuple[Array, Array]
    offset: Array | tuple[Array, Array] | None


def name_of(fmt: Format) -> str:
    """Returns what ggml calls a Format with the rule "ggml".

    Raises:
      ValueError: if it is none of ggml's.
    """
    for name, known in FORMATS.items():
        same = (known.element, known.group_size, known.group_columns, known.scale, known.offset)
        if same == (fmt.element, fmt.group_size, fmt.group_columns, fmt.scale, fmt.offset):
            return name
    raise ValueError(
        f"rule='ggml' is ggml's own search, for its own formats; ({fmt}) is none of them:"
        f" {', '.join(f'{name} ({f})' for name, f in FORMATS.items())}. Use another rule."
    )


def search(
    w: Float[Array, "*b K N"], fmt: Format, importance: Float[Array, "*b K"] | None = None
) -> Found:
    """Returns the codes and scales that ggml's reference quantizer chooses.

    Args:
      w: canonical weight, float32; a row of ggml is a column here.
      fmt: one of `FORMATS`.
      importance: mean of the squares of every input; None: ggml's guess from the weight itself.

    Raises:
      ValueError: if K is no multiple of the block, or `fmt` is no format of ggml.
    """
    name = name_of(fmt)
    *lead, K, N = w.shape
    block = 256 if isinstance(fmt.scale, Format) else 32
    if K % block:
        smaller = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
        remedy = f" {smaller[name]}, as llama.cpp does," if name in smaller and K % 32 == 0 else ""
        raise ValueError(
            f"{name} is made of blocks of {block}, which do not divide the contraction length {K}."
            f" Use{remedy or ' another format'} for this weight."
        )
    tile = next(t for t in (_TILE, 128, 64, 32) if K % t == 0)
    # Legacy types weigh by the mean square of the whole row.
    variance = jnp.mean(w * w, -2)  # [*b, N]
    if importance is not None:
        q = jnp.broadcast_to(importance.astype(jnp.float32), (*lead, K))
        # Groups of inputs that were never seen would lose their weights altogether.
        mean = jnp.mean(q, -1, keepdims=True)
        importance = jnp.where(mean > 0, jnp.maximum(q, _LEAST * mean), 1.0)

    n = fmt.group_size or 1
    # Every B-th column together, C of them: if the columns lie on several devices, C is what is
    # split, and each device walks over its own.
    C = math.gcd(N, _COLUMNS)
    C = C if C >= _FEWEST else N
    B = N // C

    def one(x: Array, variance: Array, q: Array | None) -> Found:
        rows = x.reshape(-1, n, C).swapaxes(0, 1)
        return _tile(name, rows, variance, None if q is None else q.reshape(-1, n).T[..., None])

    def split(a: Float[Array, "T *rows N"]) -> Array:
        blocks = jnp.moveaxis(a.reshape(*a.shape[:-1], C, B), -1, 1)
        return blocks.reshape(-1, *blocks.shape[2:])

    def join(a: Array) -> Array:
        blocks = jnp.moveaxis(a.reshape(-1, B, *a.shape[1:]), 1, -1)
        return blocks.reshape(*lead, -1, N)

    x = split(w.reshape(-1, tile, N))
    spread = split(jnp.repeat(variance.reshape(-1, N), K // tile, axis=0))
    q = None if importance is None else jnp.repeat(importance.reshape(-1, tile), B, axis=0)
    return jax.tree.map(join, lax.map(lambda a: one(*a), (x, spread, q)))


def _tile(name: str, x: Float[Array, "n J N"], variance: Array, q: Array | None) -> Found:
    """Searches the groups of one tile; for k-quants, of one super-block.

    Args:
      x: values of J groups of every column.
      variance: mean of the squares of the whole column, [N].
      q: importance, [n, J, 1].
    """
    fmt = FORMATS[name]
    if not isinstance(fmt.scale, Format):
        found = _legacy_tile(name, x, variance, q)
    else:
        if q is not None and name != "Q6_K":
            energy = _total(_sum(lambda x: (x * x,), x)[0]) / (x.shape[0] * x.shape[1])
            q = q * jnp.sqrt((1.0 if name == "Q2_K" else 2.0) * energy + x * x)
        found = _signed_tile(name, x, q) if fmt.offset is None else _range_tile(name, x, q)
    # A max drops NaN, and a search never picks it; 0 * x is NaN for NaN and Inf.
    bad = jnp.sum(x * 0.0, 0)
    if isinstance(found.scale, tuple):
        sc, d = found.scale
        return found._replace(scale=(sc, _poisoned(d, jnp.sum(bad, 0, keepdims=True))))
    return found._replace(scale=_poisoned(found.scale, bad))


def _poisoned(scale: Array, bad: Array) -> Array:
    return jnp.where(bad == 0, scale, jnp.asarray(jnp.nan, scale.dtype))


# ---- folds over the values of a group ------------------------------------------------------------


def _fold(step: Callable[..., Any], start: Any, *arrays: Array) -> Any:
    """Returns step(... step(step(start, a[0], ..), a[1], ..), a[n - 1], ..)."""
    n = max(a.shape[0] for a in arrays)

    def chunk(i: Array, state: Any) -> Any:
        parts = [lax.dynamic_slice_in_dim(a, i * _CHUNK, _CHUNK) for a in arrays]
        for rows in zip(*parts, strict=True):
            state = step(state, *rows)
        return state

    if n % _CHUNK:
        return lax.fori_loop(0, n, lambda i, state: step(state, *(a[i] for a in arrays)), start)
    return lax.fori_loop(0, n // _CHUNK, chunk, start)


def _sum(terms: Callable[..., tuple[Array, ...]], *arrays: Array) -> tuple[Array, ...]:
    """Returns the sums over the first axis, in order, of functions of the rows."""
    like = jax.eval_shape(lambda rows: terms(*rows), [a[0] for a in arrays])
    zeros = tuple(jnp.zeros(t.shape, t.dtype) for t in like)

    def step(state: tuple[Array, ...], *rows: Array) -> tuple[Array, ...]:
        return tuple(a + b for a, b in zip(state, terms(*rows), strict=True))

    return _fold(step, zeros, *arrays)


def _total(a: Array) -> Array:
    return _sum(lambda a: (a,), a)[0]


def _largest(x: Array) -> Array:
    """Returns the value of largest magnitude, with its sign; the first of equals."""
    return _fold(
        lambda v, r: jnp.where(jnp.abs(r) > jnp.abs(v), r, v), jnp.zeros(x.shape[1:], x.dtype), x
    )


def _ratio(a: Array, b: Array) -> Array:
    """Returns a / b, and 0 where b is 0."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def _inverse(x: Array) -> Array:
    """Returns 1 / x, and 0 for 0."""
    return _ratio(jnp.ones_like(x), x)


def _half(x: Array) -> tuple[Array, Array]:
    """Returns a scale as float16, and as it is read back."""
    stored = numerics.round_scale(x, "float16")
    return stored, stored.astype(jnp.float32)


def _exactly(value: float) -> Array:
    """Returns a divisor that XLA does not replace by its rounded inverse."""
    return lax.optimization_barrier(jnp.float32(value))


# ---- searches ------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """x̂ = scale l + low with l = clip(round(inverse (x - start)), 0, n)."""

    scale: Array
    low: Array
    inverse: Array
    start: Array

    def codes(self, x: Array, n: int) -> Array:
        return jnp.clip(jnp.round(self.inverse * (x - self.start)), 0, n)


def _search_line(x: Array, w: Array, n: int, how: Search) -> _Line:
    """Returns scale and minimum of groups whose codes are 0 .. n (ggml's qkx2 and qkx3).

    Every candidate is an inverse scale u: l = round(u (x - low)), then scale and low by weighted
    least squares given l, low at most 0. The best so far also gives the next its `low`.
    """
    low, high = jnp.minimum(jnp.min(x, 0), 0.0), jnp.max(x, 0)
    W, X = _sum(lambda x, w: (w + jnp.zeros_like(x), w * x), x, w)

    def error(scale: Array, low: Array, line: _Line) -> Array:
        def term(x: Array, w: Array) -> tuple[Array]:
            d = scale * line.codes(x, n) + low - x
            return (w * (jnp.abs(d) if how.absolute else d * d),)

        return _sum(term, x, w)[0]

    flat = high <= low
    inverse = n * _inverse(high - low)
    line = _Line(_inverse(inverse), low, inverse, low)
    first = error(line.scale, low, line)
    factors = np.float32(how.first) + np.float32(how.step) * np.arange(how.last + 1, dtype="f4")
    factors = jnp.asarray(factors + np.float32(n))

    def candidate(t: Array, state: tuple[_Line, Array]) -> tuple[_Line, Array]:
        best, least = state
        trial = best._replace(inverse=factors[t] * _inverse(high - best.low), start=best.low)

        def terms(x: Array, w: Array) -> tuple[Array, Array, Array]:
            l = trial.codes(x, n)
            return w * l, w * l * l, w * l * x

        L, LL, XL = _sum(terms, x, w)
        D = W * LL - L * L
        scale, low = _ratio(W * XL - X * L, D), _ratio(LL * X - L * XL, D)
        scale = jnp.where(low > 0, _ratio(XL, LL), scale)
        low = jnp.minimum(low, 0.0)
        e = error(scale, low, trial)
        better = (D > 0) & (e < least)
        return _select(better, (trial._replace(scale=scale, low=low), e), state)

    line, _ = lax.fori_loop(0, how.last + 1, candidate, (line, first))
    zero = jnp.zeros_like(low)
    return _select(flat, _Line(zero, low, zero, zero), line)


def _select(take: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(take, a, b), a, b)


def _search_signed(x: Array, w: Array, n: int) -> tuple[Array, Array]:
    """Returns scales of groups whose codes are -n .. n - 1, and the codes (ggml's qx).

    Candidates are scales at which the value of largest magnitude is -(n + s / 10), s = -9 .. 9;
    each is refit by least squares.
    """
    peak = _largest(x)
    steps = np.asarray([0, *range(-9, 0), *range(1, 10)], np.float32)
    factors = jnp.asarray(-(np.float32(n) + np.float32(0.1) * steps))

    def codes(inverse: Array, x: Array) -> Array:
        return jnp.clip(jnp.round(inverse * x), -n, n - 1)

    def sums(inverse: Array) -> tuple[Array, ...]:
        def terms(x: Array, w: Array) -> tuple[Array, Array]:
            l = codes(inverse, x)
            return w * x * l, w * l * l

        return _sum(terms, x, w)

    inverse = factors[0] * _inverse(peak)
    A, B = sums(inverse)
    scale = _ratio(A, B)

    def candidate(t: Array, state: tuple[Array, Array, Array]):
        trial = factors[t] * _inverse(peak)
        A, B = sums(trial)
        scale = _ratio(A, B)
        better = (B > 0) & (state[2] * B < A * A)
        return _select(better, (trial, scale, scale * A), state)

    start = (inverse, scale, scale * A)
    inverse, scale, _ = lax.fori_loop(1, len(steps), candidate, start)
    tiny = jnp.abs(peak) < _TINY
    return jnp.where(tiny, 0.0, scale), jnp.where(tiny, -n, codes(inverse, x))


def _descend(
    x: Array, w: Array, l: Array, low: int, high: int, *, positive_squares: bool
) -> tuple[Array, Array]:
    """Coordinate descent on codes l, the scale (sum w x l) / (sum w l²) following: A² / B grows."""
    w = jnp.broadcast_to(w, x.shape)
    A, B = _sum(lambda x, w, l: (w * x * l, w * l * l), x, w, l)

    def one(i: Array, state: tuple[Array, Array, Array]):
        l, A, B = state
        xi, wi, old = x[i], w[i], l[i]
        a, b = A - wi * xi * old, B - wi * old * old
        can = (a > 0) & (b > 0) if positive_squares else a > 0
        new = jnp.clip(jnp.round(xi * b / jnp.where(a == 0, 1.0, a)), low, high)
        a, b = a + wi * xi * new, b + wi * new * new
        take = can & (new != old) & (b > 0) & (a * a * B > A * A * b)
        new, A, B = _select(take, (new, a, b), (old, A, B))
        return l.at[i].set(new), A, B

    # A group that a sweep leaves as it is stays so: ggml stops there.
    n = x.shape[0]
    l, A, B = lax.fori_loop(0, _SWEEPS * n, lambda i, s: one(i % n, s), (l, A, B))
    return _ratio(A, B), l


def _search_positive(v: Array, w: Array, n: int) -> tuple[Array, Array]:
    """Returns the scale under values v >= 0 whose codes are 0 .. n, and the codes (ggml's qp)."""
    peak = jnp.max(v, 0)

    def codes(inverse: Array, v: Array) -> Array:
        return jnp.minimum(jnp.round(inverse * v), n)

    def error(inverse: Array) -> Array:
        scale = _inverse(inverse)

        def term(v: Array, w: Array) -> tuple[Array]:
            d = v - scale * codes(inverse, v)
            return (w * d * d,)

        return _sum(term, v, w)[0]

    inverse = n * _inverse(peak)
    steps = np.asarray([*range(-4, 0), *range(1, 5)], np.float32)
    factors = jnp.asarray(np.float32(0.1) * steps + np.float32(n))

    def candidate(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        trial = factors[t] * _inverse(peak)
        e = error(trial)
        return _select(e < state[1], (trial, e), state)

    inverse, _ = lax.fori_loop(0, len(steps), candidate, (inverse, error(inverse)))
    scale, l = _descend(v, w, codes(inverse, v), 0, n, positive_squares=True)
    tiny = peak < _TINY
    return jnp.where(tiny, 0.0, scale), jnp.where(tiny, 0.0, l)


# ---- types of one level --------------------------------------------------------------------------


def _legacy_tile(name: str, x: Array, variance: Array, q: Array | None) -> Found:
    fmt = FORMATS[name]
    element = numerics.get_element(fmt.element)
    w = None if q is None else q * jnp.sqrt(variance + x * x)
    offset = None
    if name == "Q8_0":
        scale = jnp.max(jnp.abs(x), 0) / _exactly(127)
        # Half away from zero, which is what C's round does.
        units = x * _inverse(scale)
        codes = jnp.trunc(units + jnp.copysign(0.5, units))
    elif fmt.offset is None:
        n = -int(element.qmin)
        if w is None:
            scale = _largest(x) / -n
            codes = jnp.minimum(jnp.trunc(x * _inverse(scale) + (n + 0.5)), 2 * n - 1)
        else:
            scale, codes = _search_signed(x, w, n)
            codes = codes + n
    else:
        n = int(element.qmax)
        if w is None:
            offset = jnp.min(x, 0)
            scale = (jnp.max(x, 0) - offset) / _exactly(n)
            codes = jnp.minimum(jnp.trunc((x - offset) * _inverse(scale) + 0.5), n)
        else:
            line = _search_line(x, w, n, _WEIGHTED)
            scale, offset, codes = line.scale, line.low, line.codes(x, n)
        offset = _half(offset)[0]
    return Found(_flat(codes, element), _half(scale)[0], offset)


def _flat(codes: Float[Array, "n J N"], element: numerics.Element) -> Array:
    """Returns the codes of groups as rows of the weight [J n, N], in their storage type."""
    rows = codes.swapaxes(0, 1).reshape(-1, codes.shape[-1])
    return rows.astype(jnp.uint8 if element.is_packed else element.dtype)


# ---- types of two levels -------------------------------------------------------------------------


def _range_tile(name: str, x: Array, w: Array | None) -> Found:
    """Q2_K, Q4_K, Q5_K: x̂ = d sc q - dmin m."""
    fmt = FORMATS[name]
    assert isinstance(fmt.scale, Format)
    element = numerics.get_element(fmt.element)
    n, most = int(element.qmax), int(numerics.get_element(fmt.scale.element).qmax)
    if w is None:
        how = _SEARCHES[name]
        size = 0.0 if how.absolute else jnp.sqrt(_total(x * x) / len(x))
        line = _search_line(x, size + jnp.abs(x), n, how)
        d, sc = _under_maximum(line.scale, most)
        dmin, m = _under_maximum(-line.low, most)
    else:
        line = _search_line(x, w, n, _WEIGHTED)
        total = _total(w)
        d, sc = _search_positive(line.scale, total, most)
        dmin, m = _search_positive(-line.low, total, most)
    d, read = _half(d)
    dmin, read_min = _half(dmin)
    scale, low = read * sc, read_min * m
    codes = jnp.clip(jnp.round(_ratio(x + low, scale)), 0, n)
    codes = jnp.where(scale == 0, line.codes(x, n), codes)
    byte = lambda a: a.astype(jnp.uint8)
    return Found(_flat(codes, element), (byte(sc), d[None]), (byte(m), -dmin[None]))


def _under_maximum(values: Float[Array, "J N"], most: int) -> tuple[Array, Array]:
    """Returns the scale under which the largest value has the code `most`, and all codes."""
    peak = jnp.maximum(jnp.max(values, 0), 0.0)
    codes = jnp.clip(jnp.round(most * _inverse(peak) * values), 0, most)
    return peak / _exactly(most), codes


def _signed_tile(name: str, x: Array, w: Array | None) -> Found:
    """Q3_K, Q6_K: x̂ = d sc q with signed codes and scales."""
    fmt = FORMATS[name]
    assert isinstance(fmt.scale, Format)
    element, inner = (numerics.get_element(f.element) for f in (fmt, fmt.scale))
    n, most = -int(element.qmin), -int(inner.qmin)
    if name == "Q3_K" and w is None:
        peak = _largest(x)
        start = jnp.clip(jnp.round(-n * _inverse(peak) * x), -n, n - 1)
        scale, codes = _descend(x, x * x, start, -n, n - 1, positive_squares=False)
        tiny = jnp.abs(peak) < _TINY
        scale, codes = jnp.where(tiny, 0.0, scale), jnp.where(tiny, -n, codes)
    else:
        scale, codes = _search_signed(x, x * x if w is None else w, n)
    if name == "Q3_K" and w is not None:
        d, sc = _search_signed(scale, _total(w), most)
    else:
        peak = _largest(scale)
        # ggml writes zeros as zero bytes: the code of 0 in Q6_K's scales, the lowest in Q3_K's.
        zero = jnp.abs(peak) < (_TINY if name == "Q6_K" else 1e-38)
        inverse = jnp.where(zero, 0.0, -most * _inverse(peak))
        sc = jnp.clip(jnp.round(inverse * scale), -most, most - 1)
        sc = jnp.where(zero, 0.0 if name == "Q6_K" else -most, sc)
        codes = jnp.where(zero, -n, codes) if name == "Q6_K" else codes
        d = _inverse(inverse)
    d, read = _half(d)
    scale = read * sc
    requantized = jnp.clip(jnp.round(_ratio(x, scale)), -n, n - 1)
    codes = jnp.where(scale == 0, codes, requantized) + n
    if inner.is_packed:
        sc = (sc + most).astype(jnp.uint8)
    return Found(_flat(codes, element), (sc.astype(inner.dtype), d[None]), None)
