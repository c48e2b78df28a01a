"""Packed matmuls in plain JAX that never hold the dequantized weight.

They run where there is no kernel: on a CPU without a C++ compiler (`qjax.ops.native`), in exported
programs, and as the transposed products of derivatives.

Every function takes raw arrays in canonical order: `data` uint8 [B, N], codes packed along K as
`qjax.packing` does, or the native 8-bit type [K, N]; scales, zero points and offsets [G, C]; and
computes with

  W[k, n] = (q[k, n] - zero[k // g, n // c]) * scale[k // g, n // c] + offset[k // g, n // c]

in float32. What is fast on XLA's CPU backend decides how:

* One token (M = 1) is a sum over rows. XLA fuses neither a dot nor a reduction with the
  dequantization, but it does fuse elementwise code, so a few rows are multiplied and added by hand;
  the partial sums that remain to be reduced are 1/16 of W. (From JAX 0.12 on; before, one token
  takes the general way.)
* A few more tokens with integer codes are products of bytes, where the CPU has them: see `digits`.
* Else a block of rows that stays in the cache is dequantized and multiplied, in a `lax.scan`.
* The codes of a byte are neighbours along K. To interleave them again costs a pass over the block;
  to reorder the columns of x, which is small, costs nothing.
* What is linear stays outside: scales multiply the products of a group, zero points and offsets
  multiply the sums of x over a group.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qjax._compat import FUSES_ROWS
from qjax.numerics import Element
from qjax.ops import cpu, digits
from qjax.packing import unit

# Rows of data added in one expression for M = 1. Packed rows whose length is a power of two fall
# into the same sets of the L1 cache, which has 8 ways: a few more than 8 streams thrash it. Tables
# are bound by arithmetic, and by the time it takes to compile their selects.
_ROWS_PACKED, _ROWS_NATIVE, _ROWS_TABLE = 8, 16, 4
# Those sums, M for every chunk of rows, may take this part of W. More tokens would also dequantize
# it M times: from 3 on that is slower.
_PARTIAL_SUMS = 1 / 8
# Bytes of a block of float32 weights: measured best from 4 to 16 rows of x, and no worse at 128.
_BLOCK_BYTES = 1 << 22
# The transposed product also holds x once for each group of a block.
_BLOCK_BYTES_T = 1 << 21
# Groups or blocks shorter than this many rows go the irregular way.
_SHORTEST = 16


@functools.partial(jax.jit, static_argnames=("element", "group_size", "columns", "in_bytes"))
def matmul(
    x: Float[Array, "M K"],
    data: Array,
    scale: Array,
    zero: Array | None = None,
    offset: Array | None = None,
    *,
    element: Element,
    group_size: int,
    columns: int = 1,
    in_bytes: bool = False,
) -> Float[Array, "M N"]:
    """Returns `x @ W` in float32, W dequantized piecewise and never as a whole.

    Args:
      x: float32, bfloat16 or float16.
      data: packed codes [B, N], or the native type [K, N].
      scale: [G, C], any float dtype; `G = ceil(K / group_size)`, `C = ceil(N / columns)`.
      zero: zero points [G, C] in units of the element, or None.
      offset: float offsets [G, C], or None.
      element: what the codes mean. Static.
      group_size: g, rows that share a scale; the last group may be shorter. Static.
      columns: c, columns that share a scale. Static.
      in_bytes: whether to multiply bytes (`digits`) where that is the faster way on this CPU. The
        result then has no derivative: for callers that bring their own. Static.
    """
    (M, K), N = x.shape, data.shape[1]
    data = _as_bytes(data, element)
    scale = per_column(scale, N, columns)
    zero, offset = (per_column(v, N, columns) if v is not None else None for v in (zero, offset))
    n = _unit(element)
    g = _uniform_group(K, group_size, n)
    block = _block(K, g, n, N, _BLOCK_BYTES)
    if not block:
        return _irregular(x.astype(jnp.float32), data, scale, zero, offset, element, group_size)
    scale = _regroup(scale, group_size, g, K)
    zero, offset = (
        _regroup(v, group_size, g, K) if v is not None else None for v in (zero, offset)
    )
    bias = _bias(scale, zero, offset, element)
    chunk = _chunk(g, element)
    if FUSES_ROWS and _is_at_most(M, max(1, int(chunk * _PARTIAL_SUMS))):
        return _few_rows(x.astype(jnp.float32), data, scale, bias, element, g, chunk)
    if in_bytes and isinstance(M, int) and digits.is_faster(M, K, g, element):
        y = digits.matmul(x, data, scale, element=element, g=g)
        return _finish(y, x, None, bias, g)
    nb, gb = K // block, min(block, g)
    # Codes are exact in bfloat16, and so are their products with a bfloat16 x in the accumulator;
    # scaled weights are not. Blocks of several groups scale weights: short dots are slow.
    is_bf16 = x.dtype == jnp.bfloat16 and not element.levels and block <= g and cpu.has_bf16_dot()
    dtype = jnp.bfloat16 if is_bf16 else jnp.float32
    # The scale belongs on whichever is smaller: the products of a group, or its weights.
    on_products = is_bf16 or (block <= g and _is_at_most(M, block // 8))

    # x, columns reordered as the block holds its rows: [nb, M, block].
    xb = x.astype(dtype).reshape(M, nb, block // gb, gb // n, n)
    xb = xb * _gains(element).astype(dtype).reshape(1, 1, 1, 1, n)
    xb = xb.transpose(1, 0, 2, 4, 3).reshape(nb, M, block)

    def step(acc, inputs):
        i, x, data = inputs
        w = _block_values(data, element, block // gb).astype(dtype)  # [Gb, gb, N]
        s = None if g == K else _block_scales(scale, i, block, g)  # [Gb, N]
        if s is not None and not on_products:
            w = w * s[:, None]
        y = jnp.dot(x, w.reshape(block, N), preferred_element_type=jnp.float32)
        return acc + (y * s if s is not None and on_products else y), None

    inputs = (jnp.arange(nb), xb, data.reshape(nb, -1, N))
    y = jnp.zeros((M, N), jnp.float32)
    if nb == 1:
        y, _ = step(y, jax.tree.map(lambda v: v[0], inputs))
    else:
        y, _ = lax.scan(step, y, inputs)
    return _finish(y, x, scale if g == K else None, bias, g)


def _is_at_most(tokens: Any, most: int) -> bool:
    """Whether there are so many or fewer; of a symbolic number, in `jax.export`, nobody knows."""
    return isinstance(tokens, int) and tokens <= most


@functools.partial(jax.jit, static_argnames=("K", "element", "group_size", "columns"))
def matmul_t(
    x: Float[Array, "M N"],
    data: Array,
    scale: Array,
    zero: Array | None = None,
    offset: Array | None = None,
    *,
    K: int,
    element: Element,
    group_size: int,
    columns: int = 1,
) -> Float[Array, "M K"]:
    """Returns `x @ W.T` in float32: the gradient of `matmul` with respect to its input.

    Also the logits of a tied embedding. Arguments as for `matmul`; `K` drops the padding of `data`.
    """
    M, N = x.shape
    x, data = x.astype(jnp.float32), _as_bytes(data, element)
    scale = per_column(scale, N, columns)
    zero, offset = (per_column(v, N, columns) if v is not None else None for v in (zero, offset))
    n = _unit(element)
    g = _uniform_group(K, group_size, n)
    block = _block(K, g, n, N, _BLOCK_BYTES_T)
    if not block:
        return _irregular_t(x, data, scale, zero, offset, element, group_size, K)
    scale = _regroup(scale, group_size, g, K)
    zero, offset = (
        _regroup(v, group_size, g, K) if v is not None else None for v in (zero, offset)
    )
    bias = _bias(scale, zero, offset, element)
    nb, gb = K // block, min(block, g)

    def step(_, inputs):
        i, data = inputs
        w = _block_values(data, element, block // gb)  # [Gb, gb, N]
        s = _block_scales(scale, i, block, g)[:, None]
        xs = jnp.broadcast_to(x, (block // gb, M, N))
        if _is_at_most(M, gb - 1):
            xs = xs * s
        else:
            w = w * s
        # The large operand first: XLA is up to twice as fast as in the order "gmn,gkn->gmk".
        return None, lax.dot_general(w, xs, (((2,), (2,)), ((0,), (0,))))  # [Gb, gb, M]

    inputs = (jnp.arange(nb), data.reshape(nb, -1, N))
    if nb == 1:
        y = lax.optimization_barrier(step(None, jax.tree.map(lambda v: v[0], inputs))[1])
    else:
        y = lax.scan(step, None, inputs)[1]
    y = y.reshape(K // gb, n, gb // n, M) * _gains(element)[None, :, None, None]
    y = y.transpose(3, 0, 2, 1).reshape(M, K)
    if bias is not None:
        y = y + jnp.repeat(jnp.dot(x, bias.T), g, axis=1)
    return y


@functools.partial(jax.jit, static_argnames=("K", "element", "group_size", "columns"))
def gather(
    index: Array,
    data: Array,
    scale: Array,
    zero: Array | None = None,
    offset: Array | None = None,
    *,
    K: int,
    element: Element,
    group_size: int,
    columns: int = 1,
) -> Float[Array, "*i K"]:
    """Returns the rows `W.T[index]` in float32: an embedding lookup in a table stored as [K, N].

    Reads the columns it needs and no others. Indices are taken as `jnp.take(mode="clip")` does.
    """
    shape, N = index.shape, data.shape[1]
    index = jnp.clip(index.reshape(-1), 0, N - 1)
    column = index // columns
    groups = jnp.arange(K) // group_size
    picked = [
        None if v is None else v[:, jnp.minimum(column, v.shape[1] - 1)].astype(jnp.float32)[groups]
        for v in (scale, zero, offset)
    ]
    q = _interleaved(_as_bytes(data, element)[:, index], element)[:K]
    return _affine(q, *picked).T.reshape(*shape, K)


# ---- a few rows of x ----------------------------------------------------------------------------


def _chunk(g: int, element: Element) -> int:
    """Returns the rows of W to add in one expression: a divisor of the group, in whole units."""
    n, n_bytes = _unit(element), _unit_bytes(element)
    rows = _ROWS_NATIVE if not element.is_packed else _ROWS_PACKED
    units = max(1, (_ROWS_TABLE if element.levels else rows) // n_bytes)
    return n * next(u for u in range(units, 0, -1) if (g // n) % u == 0)


def _few_rows(x, data, scale, bias, element: Element, g: int, chunk: int) -> Float[Array, "M N"]:
    """y[m, n] = sum_G (scale[G, n] sum_(k in G) x[m, k] u[k, n] + bias[G, n] sum_(k in G) x[m, k]).

    u are the stored values. The sum over a chunk of rows of a group is one expression.
    """
    (M, K), N, n = x.shape, data.shape[1], _unit(element)
    P, units = K // chunk, chunk // n
    if element.levels:
        # In a scan over layers XLA would fuse the slice of the stack into every select of the
        # lookup, and do it ten times over.
        data = lax.optimization_barrier(data)
    chunks = data.reshape(P, units, -1, N)
    xs = x.reshape(M, P, units, n).swapaxes(0, 1)[..., None]
    fields = [_fields(chunks[:, u], element) for u in range(units)]
    parts = []
    for i, gain in enumerate(_gains(element)):
        products = (fields[u][i][:, None] * xs[:, :, u, i] for u in range(units))
        parts.append(float(gain) * functools.reduce(jnp.add, products))
    total = functools.reduce(jnp.add, parts)  # [P, M, N]
    if g < K:
        total = total.reshape(K // g, -1, M, N) * scale[:, None, None]
        if bias is not None:
            # The barriers keep XLA from computing the sums again for every n ...
            sums = lax.optimization_barrier(xs.sum((2, 3)).reshape(K // g, -1, M, 1))
            total = total + sums * bias[:, None, None]
    # ... and from moving the float half of `total` into the reduction, which would write the
    # dequantized weight to memory between the two.
    y = lax.optimization_barrier(total).reshape(P, M, N).sum(0)
    return _finish(y, x, scale, bias, g) if g == K else y


def _finish(y, x, scale, bias, g: int) -> Float[Array, "M N"]:
    """Applies a scale per channel, and adds the part of W that is constant in a group."""
    (M, K), x = x.shape, x.astype(jnp.float32)
    if scale is not None:
        y = y * scale
    return y if bias is None else y + jnp.dot(x.reshape(M, K // g, g).sum(-1), bias)


# ---- reading codes ------------------------------------------------------------------------------


def _unit(element: Element) -> int:
    return unit(element.bits) if element.is_packed else 1


def _gains(element: Element) -> np.ndarray:
    """Returns what to multiply the field of each row of a unit with, see `_fields`."""
    if not element.is_packed or element.levels:
        return np.ones(_unit(element), np.float32)
    return np.asarray([2.0**-shift for _, shift in _places(element)], np.float32)


def _places(element: Element) -> list[tuple[int, int]]:
    """Returns the byte in which each code of a unit starts, and the bit in it."""
    return [divmod(i * element.bits, 8) for i in range(_unit(element))]


def _fields(data: Array, element: Element) -> list[Float[Array, "*u N"]]:
    """Returns the stored values of the rows of each unit, divided by their `_gains`.

    Integers are left where they are in their byte: a code at bit s counts 2^s times, exactly, and
    s shifts are saved. `element.qmin` is not added.

    Args:
      data: [*u, bytes of a unit, N].
      element: if it is not packed, a unit is one row.
    """
    if not element.is_packed:
        return [_to_float(data[..., 0, :], element)]
    # x86 converts to float from 32-bit integers only: widen first, and share that between codes.
    data = data.astype(jnp.int32)
    out = []
    for j, shift in _places(element):
        word = data[..., j, :]
        if shift + element.bits > 8:  # the code straddles two bytes
            word = word | (data[..., j + 1, :] << 8)
        if element.levels:
            out.append(_lookup(word, shift, element.levels))
        else:
            out.append((word & ((2**element.bits - 1) << shift)).astype(jnp.float32))
    return out


def _lookup(word: Array, shift: int, levels: tuple[float, ...]) -> Array:
    """Returns levels[(word >> shift) % len(levels)] as a tree of selects on the bits of the code.

    Selects vectorize. A gather does not, even from 16 entries; it takes more than twice as long.
    """
    half = len(levels) // 2
    is_signed = levels[half:] == tuple(-v for v in levels[:half])
    values = [jnp.float32(v) for v in (levels[:half] if is_signed else levels)]
    top = len(levels).bit_length() - 2 + shift  # the code's highest bit
    for bit in range(shift, top + (not is_signed)):
        is_set = (word & (1 << bit)) != 0
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    if not is_signed:
        return values[0]
    sign = (word << (31 - top)) & jnp.int32(-(2**31))
    return lax.bitcast_convert_type(
        lax.bitcast_convert_type(values[0], jnp.int32) ^ sign, jnp.float32
    )


def _to_float(x: Array, element: Element) -> Array:
    """Returns the values of unpacked codes, exactly, in operations that LLVM vectorizes."""
    if element.kind != "float":
        return x.astype(jnp.int32).astype(jnp.float32)
    bits = x.astype(jnp.uint16)
    if element.dtype == "float8_e5m2":  # the upper byte of a float16
        return lax.bitcast_convert_type(bits << 8, jnp.float16).astype(jnp.float32)
    # Sign and exponent in float16's place, whose bias is 8 larger. The all-ones code is NaN.
    half = lax.bitcast_convert_type(((bits & 0x80) << 8) | ((bits & 0x7F) << 7), jnp.float16)
    return jnp.where((bits & 0x7F) == 0x7F, jnp.nan, half.astype(jnp.float32) * 256)


def _as_bytes(data: Array, element: Element) -> Array:
    # XLA's CPU backend keeps no 8-bit float in a loop or a fusion: it would convert the whole array
    # to float16. This costs a copy, a byte per weight, unless the caller holds bytes already.
    if element.kind != "float" or data.dtype == jnp.uint8:
        return data
    return lax.bitcast_convert_type(data, jnp.uint8)


def _block_values(data: Array, element: Element, groups: int) -> Float[Array, "G g N"]:
    """Returns the fields of a block of packed rows; inside a group, one field after the other.

    Row i * (g / n) + u of a group is row u * n + i of W, with n rows in a unit.
    """
    n, N = _unit(element), data.shape[1]
    fields = _fields(data.reshape(groups, -1, _unit_bytes(element), N), element)
    return fields[0] if n == 1 else jnp.concatenate(fields, axis=1)


def _unit_bytes(element: Element) -> int:
    return element.bits * _unit(element) // 8 if element.is_packed else 1


def _interleaved(data: Array, element: Element) -> Float[Array, "K N"]:
    """Returns the values q of packed rows in the order of W."""
    fields = _fields(data.reshape(-1, _unit_bytes(element), data.shape[1]), element)
    q = jnp.stack(fields, axis=1) * _gains(element)[:, None]
    return q.reshape(-1, data.shape[1]) + _stored_shift(element)


def _stored_shift(element: Element) -> float:
    """What packed integers lack: code 0 stands for `qmin`."""
    return element.qmin if element.is_packed and not element.levels else 0.0


# ---- groups and blocks --------------------------------------------------------------------------


def per_column(v: Float[Array, "*b G C"], N: int, columns: int) -> Float[Array, "*b G N"]:
    """Returns values of blocks of columns as float32 values of every column."""
    v = v.astype(jnp.float32)
    if v.shape[-1] == 1:
        return jnp.broadcast_to(v, (*v.shape[:-1], N))
    return v if v.shape[-1] == N else jnp.repeat(v, columns, axis=-1)[..., :N]


def _uniform_group(K: int, g: int, n: int) -> int:
    """Returns the largest group size that divides K and `g` (0 if none is long enough).

    A short last group becomes regular when all are cut finer: with K = 576, g = 128 are 9 of 64.
    """
    g = K if g >= K else math.gcd(g, K)
    return g if g % n == 0 and (g >= _SHORTEST or g == K) else 0


def _block(K: int, g: int, n: int, N: int, n_bytes: int) -> int:
    """Returns the rows to dequantize at a time: a divisor of K that nests with the groups, or 0."""
    if not g:
        return 0
    target = max(64, n_bytes // (4 * N))
    sizes = [b for b in range(n, K + 1, n) if K % b == 0 and (b % g == 0 or g % b == 0)]
    best = min(sizes, key=lambda b: abs(math.log(b / target)), default=0)
    return best if target // 8 <= best <= 4 * target or best == K <= target else 0


def _regroup(v: Array, old: int, new: int, K: int) -> Array:
    """Repeats the rows of `v` so that each stands for `new` rows of W instead of `old`."""
    if old == new or v.shape[0] == K // new:
        return v
    return jnp.repeat(v, old // new, axis=0)[: K // new]


def _bias(scale, zero, offset, element: Element) -> Float[Array, "G N"] | None:
    """Returns what every weight of a group has besides its code times its scale."""
    shift = _stored_shift(element)
    bias = None
    if zero is not None:
        bias = (shift - zero) * scale
    elif shift:
        bias = shift * scale
    if offset is None:
        return bias
    return offset if bias is None else bias + offset


def _block_scales(scale: Array, i: Array, block: int, g: int) -> Float[Array, "Gb N"]:
    """Returns the scales of block i: of its groups, or of the one group it is part of."""
    first = i * (block // g) if block > g else i // (g // block)
    return lax.dynamic_slice_in_dim(scale, first, max(1, block // g))


# ---- shapes that do not nest --------------------------------------------------------------------


def _affine(q, scale, zero, offset):
    w = (q if zero is None else q - zero) * scale
    return w if offset is None else w + offset


def _row_blocks(K, data, scale, zero, offset, element, g):
    """Returns a function from a block's number to its weights [block, N], and the block count.

    Rows beyond K come out as zeros.
    """
    n, (B, N) = _unit(element), data.shape
    block = -(-max(_SHORTEST, _BLOCK_BYTES // (4 * N)) // n) * n
    n_bytes = block * (element.bits if element.is_packed else 8) // 8
    nb = -(-B // n_bytes)
    data = jnp.pad(data, ((0, nb * n_bytes - B), (0, 0))).reshape(nb, n_bytes, N)

    def weights(i):
        k = i * block + jnp.arange(block)
        rows = jnp.minimum(k // g, scale.shape[0] - 1)
        picked = (None if v is None else v[rows] for v in (scale, zero, offset))
        w = _affine(_interleaved(data[i], element), *picked)
        return jnp.where(k[:, None] < K, w, 0.0)

    return weights, nb, block


def _irregular(x, data, scale, zero, offset, element: Element, g: int) -> Array:
    M, K = x.shape
    weights, nb, block = _row_blocks(K, data, scale, zero, offset, element, g)
    xb = jnp.pad(x, ((0, 0), (0, nb * block - K))).reshape(M, nb, block).swapaxes(0, 1)

    def step(i, acc):
        return acc + jnp.dot(xb[i], weights(i))

    return lax.fori_loop(0, nb, step, jnp.zeros((M, data.shape[1]), jnp.float32))


def _irregular_t(x, data, scale, zero, offset, element: Element, g: int, K: int) -> Array:
    weights, nb, _ = _row_blocks(K, data, scale, zero, offset, element, g)
    y = lax.map(lambda i: jnp.dot(x, weights(i).T), jnp.arange(nb))
    return y.swapaxes(0, 1).reshape(x.shape[0], -1)[:, :K]
