"""Packed matmuls in plain JAX that never hold the dequantized weight: what runs on a CPU.

Every function takes raw arrays in canonical order: `data` uint8 [B, N], codes packed along K as
`qjax.packing` does, or the native 8-bit type [K, N]; scales, zero points and offsets [G, C]; and
computes with

  W[k, n] = (q[k, n] - zero[k // g, n // c]) * scale[k // g, n // c] + offset[k // g, n // c]

in float32. What is fast on XLA's CPU backend decides how:

* One token (M = 1) is a sum over rows. XLA fuses neither a dot nor a reduction with the
  dequantization, but it does fuse elementwise code, so a few rows are multiplied and added by hand;
  the partial sums that remain to be reduced are 1/16 of W.
* More tokens dequantize a block of rows that stays in the cache and multiply it, in a `lax.scan`.
* The codes of a byte are neighbours along K. To interleave them again costs a pass over the block;
  to reorder the columns of x, which is small, costs nothing.
* What is linear stays outside: scales multiply the products of a group, zero points and offsets
  multiply the sums of x over a group.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.numerics import Element
from qjax.packing import unit

# Rows added in one expression for M = 1. Rows whose length is a power of two all fall into the
# same sets of the L1 cache, which has 8 ways; a few more than 8 streams already thrash it.
_ROWS = 8
# Bytes of a block of float32 weights: the L2 caches of two cores hold it.
_BLOCK_BYTES = 1 << 21
# Groups or blocks shorter than this many rows go the irregular way.
_SHORTEST = 16


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
    """
    M, K = x.shape
    N = data.shape[1]
    x, data = x.astype(jnp.float32), _as_bytes(data, element)
    scale, zero, offset = (_per_column(v, N, columns) for v in (scale, zero, offset))
    n = _unit(element)
    g = _uniform_group(K, group_size, n)
    block = _block(K, g, n, N)
    if not block:
        return _irregular(x, data, scale, zero, offset, element, group_size)
    scale, zero, offset = (_regroup(v, group_size, g, K) for v in (scale, zero, offset))
    bias = _bias(scale, zero, offset, element)
    if M == 1:
        return _one_row(x[0], data, scale, bias, element, g)[None]

    # x, columns reordered as the block holds its rows: [nb, Gb, M, gb].
    nb, gb = K // block, min(block, g)
    xb = x.reshape(M, nb, block // gb, gb // n, n).transpose(1, 2, 0, 4, 3)
    xb = xb.reshape(nb, block // gb, M, gb)

    def step(acc, inputs):
        x, data, scale = inputs
        w = _block_values(data, element, block // gb)  # [Gb, gb, N], unscaled
        if scale is not None:
            w = w * scale[:, None]
        return acc + jnp.dot(_flat(x), w.reshape(block, N)), None

    def _flat(x):  # [Gb, M, gb] -> [M, block]
        return x.transpose(1, 0, 2).reshape(M, block)

    blocks = data.reshape(nb, -1, N)
    scales = None if g == K else _per_block(scale, K, g, block)
    acc = jnp.zeros((M, N), jnp.float32)
    if nb == 1:
        acc, _ = step(acc, (xb[0], blocks[0], None if scales is None else scales[0]))
    else:
        acc, _ = lax.scan(step, acc, (xb, blocks, scales))
    if g == K:
        acc = acc * scale
    if bias is not None:
        acc = acc + jnp.dot(x.reshape(M, K // g, g).sum(-1), bias)
    return acc


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
    scale, zero, offset = (_per_column(v, N, columns) for v in (scale, zero, offset))
    n = _unit(element)
    g = _uniform_group(K, group_size, n)
    block = _block(K, g, n, N)
    if not block:
        return _irregular_t(x, data, scale, zero, offset, element, group_size, K)
    scale, zero, offset = (_regroup(v, group_size, g, K) for v in (scale, zero, offset))
    bias = _bias(scale, zero, offset, element)
    nb, gb = K // block, min(block, g)

    def step(_, inputs):
        data, scale = inputs
        w = _block_values(data, element, block // gb)
        xs = x[None] * scale[:, None]  # [Gb, M, N]
        return None, jnp.einsum("gmn,gkn->gmk", xs, w)

    inputs = (data.reshape(nb, -1, N), _per_block(scale, K, g, block))
    if nb == 1:
        y = step(None, (inputs[0][0], inputs[1][0]))[1][None]
    else:
        y = lax.scan(step, None, inputs)[1]
    y = y.reshape(nb, block // gb, M, n, gb // n).transpose(2, 0, 1, 4, 3).reshape(M, K)
    if bias is not None:
        y = y + jnp.repeat(jnp.dot(x, bias.T), g, axis=1)
    return y


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


# ---- one row of x -------------------------------------------------------------------------------


def _one_row(x, data, scale, bias, element: Element, g: int) -> Float[Array, " N"]:
    """y[n] = sum_g (scale[g, n] sum_(k in g) x[k] u[k, n] + bias[g, n] sum_(k in g) x[k])."""
    K, N = x.shape[0], data.shape[1]
    n = _unit(element)
    # Chunks of whole units inside one group: as many bytes as rows, or a divisor of the group.
    units = max(1, _ROWS * K // (data.shape[0] * n))
    units = next(u for u in range(units, 0, -1) if (g // n) % u == 0)
    P = K // (units * n)
    chunks = data.reshape(P, units, -1, N)
    xs = x.reshape(P, units, n)
    total = None
    for u in range(units):
        for i, value in enumerate(_fields(chunks[:, u], element)):
            term = value * xs[:, u, i, None]
            total = term if total is None else total + term
    if g < K:
        repeats = P // (K // g)
        total = (total.reshape(K // g, repeats, N) * scale[:, None]).reshape(P, N)
    # Without the barrier XLA takes the float half of the expression into the reduction, and writes
    # the dequantized weight to memory between the two.
    total = lax.optimization_barrier(total).sum(0)
    if g == K:
        total = total * scale[0]
    if bias is not None:
        total = total + jnp.dot(x.reshape(K // g, g).sum(-1), bias)
    return total


# ---- reading codes ------------------------------------------------------------------------------


def _unit(element: Element) -> int:
    return unit(element.bits) if element.is_packed else 1


def _fields(data: Array, element: Element) -> list[Float[Array, "*u N"]]:
    """Returns the values of the rows of each unit; integers as stored, `element.qmin` not added.

    Args:
      data: [*u, bytes of a unit, N].
      element: if it is not packed, a unit is one row.
    """
    if not element.is_packed:
        return [_to_float(data[..., 0, :], element)]
    bits = element.bits
    out = []
    for i in range(unit(bits)):
        j, shift = divmod(i * bits, 8)
        code = data[..., j, :]
        if shift + bits > 8:  # the code straddles two bytes
            code = (code >> shift) | (data[..., j + 1, :] << (8 - shift))
            shift = 0
        if element.levels:
            out.append(_lookup(code, shift, element.levels))
        else:
            code = code >> shift
            code = code & (2**bits - 1) if shift + bits != 8 else code
            out.append(_to_float(code, element))
    return out


def _lookup(byte: Array, shift: int, levels: tuple[float, ...]) -> Array:
    """Returns levels[(byte >> shift) % len(levels)] as a tree of selects on the bits of the code.

    Selects vectorize. A gather does not, even from 16 entries; it takes twice as long.
    """
    values = [jnp.float32(v) for v in levels]
    for bit in range(len(levels).bit_length() - 1):
        is_set = (byte & (1 << (bit + shift))) != 0
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


def _to_float(x: Array, element: Element) -> Array:
    """Returns the values of stored codes, exactly, in operations that LLVM vectorizes."""
    if element.kind != "float":
        return x.astype(jnp.int32).astype(jnp.float32)  # x86 converts from int32 only
    bits = x.astype(jnp.uint16)
    if element.dtype == "float8_e5m2":  # the upper byte of a float16
        return lax.bitcast_convert_type(bits << 8, jnp.float16).astype(jnp.float32)
    # Sign and exponent in float16's place, whose bias is 8 larger. The all-ones code is NaN.
    half = lax.bitcast_convert_type(((bits & 0x80) << 8) | ((bits & 0x7F) << 7), jnp.float16)
    return jnp.where((bits & 0x7F) == 0x7F, jnp.nan, half.astype(jnp.float32) * 256)


def _as_bytes(data: Array, element: Element) -> Array:
    # XLA's CPU backend keeps no 8-bit float in a loop: it would convert the whole array to float16.
    # This copies it once, a byte per weight (not for one row, where there is no loop).
    return lax.bitcast_convert_type(data, jnp.uint8) if element.kind == "float" else data


def _block_values(data: Array, element: Element, groups: int) -> Float[Array, "G g N"]:
    """Returns the values of a block of packed rows; inside a group, field by field.

    Row i * (g / n) + u of a group is row u * n + i of W, with n rows in a unit.
    """
    n, N = _unit(element), data.shape[1]
    n_bytes = element.bits * n // 8 if element.is_packed else 1
    units = data.reshape(groups, -1, n_bytes, N)
    fields = _fields(units, element)
    return fields[0] if n == 1 else jnp.concatenate(fields, axis=1)


def _interleaved(data: Array, element: Element) -> Float[Array, "K N"]:
    """Returns the values q of packed rows in the order of W."""
    n, N = _unit(element), data.shape[1]
    n_bytes = element.bits * n // 8 if element.is_packed else 1
    q = jnp.stack(_fields(data.reshape(-1, n_bytes, N), element), axis=1).reshape(-1, N)
    return q + _stored_shift(element)


def _stored_shift(element: Element) -> float:
    """What packed integers lack: code 0 stands for `qmin`."""
    return element.qmin if element.is_packed and not element.levels else 0.0


# ---- groups and blocks --------------------------------------------------------------------------


def _per_column(v: Array | None, N: int, columns: int) -> Float[Array, "G N"] | None:
    if v is None:
        return None
    v = v.astype(jnp.float32)
    if v.shape[1] == 1:
        return jnp.broadcast_to(v, (v.shape[0], N))
    return v if v.shape[1] == N else jnp.repeat(v, columns, axis=1)[:, :N]


def _uniform_group(K: int, g: int, n: int) -> int:
    """Returns the largest group size that divides K and `g` (0 if none is long enough).

    A short last group becomes regular when all are cut finer: with K = 576, g = 128 are 9 of 64.
    """
    g = K if g >= K else math.gcd(g, K)
    return g if g % n == 0 and (g >= _SHORTEST or g == K) else 0


def _block(K: int, g: int, n: int, N: int) -> int:
    """Returns the rows to dequantize at a time: a divisor of K that nests with the groups, or 0."""
    if not g:
        return 0
    target = max(64, _BLOCK_BYTES // (4 * N))
    sizes = [b for b in range(n, K + 1, n) if K % b == 0 and (b % g == 0 or g % b == 0)]
    best = min(sizes, key=lambda b: abs(math.log(b / target)), default=0)
    return best if target // 8 <= best <= 4 * target or best == K <= target else 0


def _regroup(v: Array | None, old: int, new: int, K: int) -> Array | None:
    """Repeats the rows of `v` so that each stands for `new` rows of W instead of `old`."""
    if v is None or old == new or v.shape[0] == K // new:
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


def _per_block(v: Array, K: int, g: int, block: int) -> Float[Array, "nb Gb N"]:
    """Returns the scales of every block: several groups a block, or one for several blocks."""
    if block > g:
        return v.reshape(K // block, block // g, -1)
    return jnp.repeat(v, g // block, axis=0)[:, None]


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
