"""The tuning choices of every kernel in Triton, as one table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

TILE_N = 128  # N is a multiple of it, as prepared weights are padded
TILE_K = 128  # inputs of one step of the loop
# Streaming multiprocessors: of an A100, RTX A6000, RTX 4090 and H100. Kernels query no device.
SMS = {80: 108, 86: 84, 89: 128, 90: 132}
# Bytes of shared memory of one program.
SMEM_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How one product is laid out on the GPU.

    Attributes:
      tile_m, tile_n: tokens and output features of one program.
      warps: of it.
      stages: steps whose loads may be in flight, one of them being computed.
      scale_on: "accumulator" multiplies the float32 sum of every group, which is exact and costs in
        proportion to the tokens; "weight" multiplies the weight in the activation's type, at one
        more rounding of it.
      split_k: programs that share one output tile; XLA adds their float32 sums.
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    scale_on: str = "accumulator"
    split_k: int = 1


# Most tokens -> tuning. The first row that is large enough is taken; more tokens are tiled by it.
WEIGHT_ONLY = {
    16: Tuning(16, 128, 4, 4),
    32: Tuning(32, 128, 8, 4),
    64: Tuning(64, 128, 8, 3),
    math.inf: Tuning(128, 128, 8, 3, "weight"),
}
# With codes of 8 bits a third stage spills registers on sm_80.
WEIGHT_ONLY_INT8 = WEIGHT_ONLY | {math.inf: Tuning(128, 128, 8, 2, "weight")}
EIGHT_BIT = {
    16: Tuning(16, 128, 4, 4),
    32: Tuning(32, 128, 4, 4),
    64: Tuning(64, 128, 8, 3),
    math.inf: Tuning(128, 128, 8, 3),
}


def weight_only(codes: str | Sequence[float], *shape: Any) -> Tuning:
    """Returns the tuning for `codes`, those of `weight_only.matmul`; *shape as for `for_shape`."""
    return for_shape(WEIGHT_ONLY_INT8 if codes == "int8" else WEIGHT_ONLY, *shape)


def for_shape(table: dict[float, Tuning], M: int, K: int, N: int, capability: int | None) -> Tuning:
    """Returns the tuning of a product of M tokens with a [K, N] weight.

    Args:
      capability: of the GPU; None counts the processors of an A100.

    Example:
      >>> for_shape(WEIGHT_ONLY, 1, 4096, 4096, 80).split_k
      8
    """
    row = next(row for most, row in table.items() if most >= M)
    tiles = -(-M // row.tile_m) * (N // row.tile_n)
    parts = split_k(tiles, K // TILE_K, SMS.get(capability or 80, 108))
    return dataclasses.replace(row, split_k=parts)


def split_k(tiles: int, steps: int, sms: int) -> int:
    """Returns into how many parts the contraction is split, a divisor of its `steps`.

    One if there are tiles for all processors. Else enough parts for them first; then the shortest
    schedule, in steps of the busiest one with another for every part; then the fewest parts.

    Example:
      >>> split_k(tiles=32, steps=32, sms=108)
      8
      >>> split_k(tiles=224, steps=64, sms=108)
      1
    """
    if tiles >= sms:
        return 1
    divisors = [d for d in range(1, steps + 1) if steps % d == 0]
    enough = [d for d in divisors if tiles * d >= sms] or [steps]
    return min(enough, key=lambda d: (-(-tiles * d // sms) * (steps // d + 1), d))
