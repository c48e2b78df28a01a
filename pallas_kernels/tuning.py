"""The tuning choices of every kernel, as one table and the rule that cuts K for balance.

Both are of measurements on an H100 SXM: README, "Kernels, measured".
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

SMS = 132  # streaming multiprocessors of an H100 SXM; kernels never query a device
TILE_N = 128  # output features of one CTA: two warpgroups with the 64 rows of a wgmma each
TILE_K = 128  # K is a multiple of it, as prepared weights are padded
SMEM_BYTES = 227 * 1024  # that one CTA may have


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How one product is laid out on the GPU.

    Attributes:
      tile_m: tokens of one CTA, the n of its wgmma: 8, 16, 32, 64, 128 or 256.
      tile_k: inputs of one pipeline step, 128 or 256.
      stages: steps whose loads may be in flight.
      scale_on: "accumulator" multiplies the float32 sum of every group, which is exact and costs in
        proportion to the tokens; "weight" multiplies the weight in the activation's type, which
        costs the same for any number of tokens and one more rounding of every weight.
      split_k: pieces into which K of every output tile is cut, a divisor of its steps. All tiles'
        pieces are dealt out evenly; sums of a tile on several CTAs are added by a second kernel.
      sms: CTAs of the persistent grid.
      in_turn: whether the two warpgroups of a CTA hand their products to the tensor core one after
        the other, so that one decodes, scales and adds while the other's are multiplied. With as
        many tokens as keep the tensor core busy. No GPU has timed it yet.
      stored: tokens, or where those are the rows features, that are stored at once, through shared
        memory: 64 or 128.
    """

    tile_m: int
    stages: int
    tile_k: int = TILE_K
    scale_on: str = "accumulator"
    split_k: int = 1
    sms: int = SMS
    in_turn: bool = False
    stored: int = 128


# Most tokens -> tuning. The first row that is large enough is taken; more tokens are tiled by it.
# Longer steps have fewer instructions a weight around the products, but need twice the buffers.
WEIGHT_ONLY = {
    8: Tuning(8, 4, 256),
    16: Tuning(16, 4, 256),
    32: Tuning(32, 4, 256),
    64: Tuning(64, 4, 256),
    math.inf: Tuning(128, 4, scale_on="weight", in_turn=True),
}

# The product with a transposed weight, always with the scale on the weight.
TRANSPOSED = {
    16: Tuning(16, 6, scale_on="weight"),
    64: Tuning(64, 4, scale_on="weight"),
    math.inf: Tuning(128, 4, scale_on="weight", in_turn=True),
}

# Both operands lie in shared memory: 16 KB of weights and 128 bytes a token for each stage.
EIGHT_BIT = {
    8: Tuning(8, 8),
    16: Tuning(16, 8),
    32: Tuning(32, 8),
    64: Tuning(64, 6),
    math.inf: Tuning(128, 4),
}
# With groups there are sums to scale between products; longer steps have less around that. What is
# stored at once is less, for a third buffer.
EIGHT_BIT_GROUPS = Tuning(128, 3, 256, in_turn=True, stored=64)
# int4 times multiples: there is something to decode.
MULTIPLES = {
    8: Tuning(8, 6, 256),
    16: Tuning(16, 6, 256),
    32: Tuning(32, 6, 256),
    64: Tuning(64, 4, 256),
    math.inf: Tuning(128, 3, 256, in_turn=True),
}
# Where a CTA has nothing else to do, it reads a quarter fewer bytes for the same products if it has
# twice the tokens: a tile of 128 asks the L2 cache for 64 bytes a clock. No GPU has timed it yet.
# What decodes has no registers left for so many sums: nvJitLink gives every thread 168.
EIGHT_BIT_WIDE = Tuning(256, 4)


def weight_only(
    M: int,
    K: int,
    N: int,
    group_size: int = 128,
    bits: int = 4,
    out_bits: int = 16,
    *,
    table_bytes: int = 0,
    scale_bits: int = 16,
    zero_points: bool = False,
    experts: int | None = None,
) -> Tuning:
    """Returns the tuning of a weight-only product of M tokens with a [K, N] weight.

    Args:
      bits, out_bits: of a weight and of an output.
      table_bytes: of shared memory that a table takes.
      scale_bits: of a scale. One of 8 times a weight of 4 goes on the weight: exact in bfloat16 for
        e2m1, one more rounding for other levels. So do those of small groups and many tokens.
      zero_points: whether there is a byte beside every scale.
      experts: as many products side by side, of M tokens each; None: there is one weight.

    Example:
      >>> t = weight_only(16, 4096, 4096)
      >>> t.tile_m, t.tile_k, t.split_k
      (16, 256, 8)
    """
    if zero_points:  # in every buffer
        table_bytes += max(
            t.stages * TILE_N * max(1, t.tile_k // group_size) for t in WEIGHT_ONLY.values()
        )
    t = _for_shape(WEIGHT_ONLY, M, K, N, group_size, bits, 16, out_bits, table_bytes, experts)
    # On the accumulator it takes tile_m / group_size instructions a weight, for which memory gives
    # time in proportion to its bits; and a wait for every group, which costs as if of 32 tokens.
    is_dear = 4 * max(t.tile_m, 32) >= bits * group_size
    on_weight = group_size == 16 or (scale_bits == 8 and bits == 4) or is_dear
    return dataclasses.replace(t, scale_on="weight") if on_weight else t


def transposed(
    M: int, N: int, K: int, bits: int = 4, *, table_bytes: int = 0, experts: int | None = None
) -> Tuning:
    """Returns the tuning of a product of M tokens with the transpose of a [K, N] weight."""
    return _for_shape(TRANSPOSED, M, N, K, TILE_K, bits, 16, 32, table_bytes, experts)


def eight_bit(
    M: int,
    K: int,
    N: int,
    bits: int = 8,
    group_size: int | None = None,
    out_bits: int = 32,
    *,
    multiples: bool = False,
) -> Tuning:
    """Returns the tuning of a product of M tokens of 8 bits with a [K, N] weight of 8 or 4.

    Args:
      group_size: inputs with a scale of their own, or with a multiple; None: all of K. Without
        groups there is little to do between products, and no need to take turns.
      out_bits: of an output.
      multiples: whether groups have integer multiples.
    """
    has_groups = group_size not in (None, K)
    row = next(row for most, row in (MULTIPLES if multiples else EIGHT_BIT).items() if most >= M)
    rows = [row]
    if row.tile_m == 128 and not multiples:
        if has_groups:
            rows = [EIGHT_BIT_GROUPS]
        elif bits == 8:
            rows = [EIGHT_BIT_WIDE, row]
    group = group_size if multiples else TILE_K if has_groups else None
    fitted = [_fitted(row, M, K, N, group, bits, 8, out_bits, 0) for row in rows]
    return min(fitted, key=lambda one: one[0])[1]


def most_in_bytes(
    w: str, x: str, group_size: int | None, *, multiples: bool = False, of_both: bool = False
) -> float:
    """Returns for how many tokens codes of activations are multiplied as the bytes that they are.

    With more they are multiplied in 16 bits, for which the tensor core takes twice as long. Bytes
    are for what is issued in half of its time for them, by `bench.py`: kernels above .45 were seen
    to be bound by what they issue. So they are not for groups whose sums leave the tensor core if
    these are converted, too (integers), or scaled twice, or weights are decoded beside them: .7 to
    1.1 with 128 tokens. Up to 64 tokens are bound by memory either way. No GPU has timed both since
    these kernels changed; before, int4 x int8 took 328 µs in bytes where W4A16 took 357.

    Args:
      w, x: of weights and activations, elements as in `qjax.Format`.
      group_size: inputs with a scale, or a multiple; None: all of K.
      multiples: whether scales are what weights are multiplied by as bytes.
      of_both: whether groups have a step of each token and a scale of each feature.

    Example:
      >>> most_in_bytes("int4", "int8", 128), most_in_bytes("int4", "int8", 128, multiples=True)
      (64, inf)
      >>> most_in_bytes("nf4", "int8", 64)
      0
    """
    if multiples:
        has_groups = group_size in (None, 32, 64) or not group_size % TILE_K
        return math.inf if has_groups else 0
    is_known = (w, x) in (("int8", "int8"), ("int4", "int8"), ("int4", "e4m3"), ("e4m3", "e4m3"))
    if not is_known or group_size not in (None, TILE_K):
        return 0
    stays = group_size is None or (w == "e4m3" and not of_both)
    return math.inf if stays else 64


def _for_shape(table: dict[float, Tuning], M: int, *args: Any, **kwargs: Any) -> Tuning:
    """Returns the first row of a table that is large enough, as `_fitted` does."""
    row = next(row for most, row in table.items() if most >= M)
    return _fitted(row, M, *args, **kwargs)[1]


def _fitted(
    row: Tuning,
    M: int,
    K: int,
    N: int,
    group_size: int | None,
    w_bits: int,
    x_bits: int,
    out_bits: int,
    table_bytes: int,
    experts: int | None = None,
) -> tuple[float, Tuning]:
    """Returns a tuning for a shape and shared memory, after the microseconds it is expected.

    Without a `group_size` the loop reads no scales.
    """
    g = group_size or K
    if K % row.tile_k or (g % row.tile_k and row.tile_k % g):
        row = dataclasses.replace(row, tile_k=TILE_K)
    # As many buffers as fit beside the output tile, all scales being float32 at most.
    in_step = max(1, row.tile_k // g)
    scales = 4 * in_step * (TILE_N + max(row.tile_m, 32)) if group_size else 0
    stage = row.tile_k * (TILE_N * w_bits + row.tile_m * x_bits) // 8 + scales
    m_tiles = -(-M // row.tile_m)
    us, pieces = cut(
        m_tiles * (experts or 1) * (N // TILE_N), K // row.tile_k, tile_k=row.tile_k,
        tile_m=row.tile_m, w_bits=w_bits, x_bits=x_bits, shared_by=m_tiles,
        most=8 if experts else None,
    )  # fmt: skip
    out = TILE_N * min(row.tile_m, row.stored) * (out_bits if pieces == 1 else 32) // 8
    fit = (SMEM_BYTES - out - table_bytes - 1024) // stage
    return us, dataclasses.replace(row, stages=min(row.stages, fit), split_k=pieces)


# What an H100 SXM was seen to do in a microsecond: bytes that it reads from memory, and weights
# that an SM multiplies, by the tokens of a tile and the bits of an activation.
BYTES_PER_US = 3.05e6
# For 256 no GPU has timed it: half of that for 128, and a twentieth more for fewer bytes.
WEIGHTS_PER_US = {
    16: {16: 40e3, 8: 100e3},
    64: {16: 32e3, 8: 65e3},
    128: {16: 21e3, 8: 42e3},
    256: {8: 22e3},
}
SUMS_US = 1.0  # of starting the kernel that adds parts


def cut(
    tiles: int, steps: int, *, tile_k: int = 256, tile_m: int = 16, w_bits: int = 4,
    x_bits: int = 16, shared_by: int = 1, most: int | None = None,
) -> tuple[float, int]:  # fmt: skip
    """Returns microseconds, and into how many pieces K of every tile is cut, a divisor of `steps`.

    The fewest that take the least time: of the busiest SM, or of reading all weights if that is
    longer, and of the sums. For tiles of up to 64 tokens there are enough pieces for all SMs.

    Args:
      tiles: of outputs.
      steps: of a tile, of `tile_k` inputs.
      tile_m: tokens of a tile.
      w_bits, x_bits: of a weight and an activation.
      shared_by: tiles that have the same weights, which all but one find in the L2 cache.
      most: pieces, about. Few experts may be used, and each piece of a tile then be a part of it.

    Example:
      >>> cut(tiles=32, steps=16)[1]  # 4096 x 4096
      8
      >>> cut(tiles=1792, steps=32, tile_m=128)[1]
      1
    """
    rates = next(rates for most, rates in WEIGHTS_PER_US.items() if most >= tile_m)
    step = tile_k * TILE_N
    step_us = step / rates[x_bits]
    memory_us = tiles / shared_by * steps * step * w_bits / 8 / BYTES_PER_US

    def us(pieces: int) -> float:
        busiest = -(-tiles * pieces // SMS) * (steps // pieces)
        main = max(memory_us, busiest * step_us)
        if pieces == 1:
            return main
        # A tile's pieces are on as many CTAs, or on those that an even share of all comes to.
        parts = min(pieces, 1 + -(-SMS // tiles))
        return main + SUMS_US + 4 * parts * tiles * TILE_N * tile_m / BYTES_PER_US

    divisors = [d for d in range(1, steps + 1) if steps % d == 0]
    enough = [d for d in divisors if tiles * d >= SMS] or [steps]
    if most is not None:
        few = [d for d in divisors if d <= most]
        enough = [d for d in enough if d <= most] or few[-1:]
        divisors = few
    return min((us(d), d) for d in (enough if tile_m <= 64 else divisors))
