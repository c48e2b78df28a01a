"""Weight-only products with stacked weights, each of which has tokens of its own, on Hopper.

One kernel computes all of them: that of `weight_only` or of `transposed`, whose tiles of tokens say
which weight they are for. Which tokens an expert has is data: the table of tiles has room for the
worst case, and CTAs walk over as many as there are. Weights of experts without tokens are not read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels import four_bits, hopper, weight_only
from pallas_kernels import transposed as transposed_kernel
from pallas_kernels import tuning as tunings
from pallas_kernels.blocks import Blocks, groups_of
from pallas_kernels.tuning import Tuning


class Tiles(NamedTuple):
    """Tokens, sorted by expert, in tiles of one expert each.

    Attributes:
      experts: int32 [T + 1]: of every tile its expert; last how many tiles there are.
      tokens: int32 [T * tile_m]: which token is at each place of a tile; any at what is left.
      places: int32 [M]: the place of each token.
      has_expert: bool [M]: whether a token is one of an expert.
    """

    experts: Array
    tokens: Array
    places: Array
    has_expert: Array


def most_tiles(M: int, E: int, tile_m: int) -> int:
    """Returns how many tiles M tokens of E experts take at most.

    Example:
      >>> most_tiles(16, 8, tile_m=8)  # 7 experts with 1 token and one with 9
      9
    """
    some = min(E, M)
    return some + (M - some) // tile_m


def tiles_of(group_sizes: Array, M: int, tile_m: int) -> Tiles:
    """Returns the tiles of M tokens, the first group_sizes[0] of which are for expert 0, and so on.

    Example:
      >>> tiles_of(jnp.array([1, 0, 3]), 5, tile_m=2).places.tolist()[:4]
      [0, 2, 3, 4]
    """
    # Comparisons with all experts are one kernel; a search would be one for each of its steps.
    after = functools.partial(jnp.searchsorted, side="right", method="compare_all")
    E = group_sizes.shape[0]
    T = most_tiles(M, E, tile_m)
    sizes = group_sizes.astype(jnp.int32)
    n_tiles = -(-sizes // tile_m)
    ends, last = jnp.cumsum(sizes), jnp.cumsum(n_tiles)
    start, first = ends - sizes, last - n_tiles
    tile, token = jnp.arange(T, dtype=jnp.int32), jnp.arange(M, dtype=jnp.int32)
    expert = jnp.minimum(after(last, tile), E - 1).astype(jnp.int32)
    at = start[expert] + (tile - first[expert]) * tile_m
    tokens = at[:, None] + jnp.arange(tile_m, dtype=jnp.int32)
    own = jnp.minimum(after(ends, token), E - 1)
    places = first[own] * tile_m + token - start[own]
    return Tiles(
        jnp.append(expert, jnp.minimum(last[-1], T)),
        jnp.clip(tokens.reshape(-1), 0, M - 1),
        jnp.clip(places, 0, T * tile_m - 1),
        token < ends[-1],
    )


def matmul(
    x: Array,
    w: Array,
    scale: Array | Blocks,
    group_sizes: Array,
    *,
    transposed: bool = False,
    codebook: Sequence[float] | None = None,
    zero: int | Array | None = None,
    bits: int | None = None,
    natural: bool = False,
    out_dtype: Any = None,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> Array:
    """Returns y[m] = x[m] @ W[expert of m], as `reference.experts`; 0 for tokens without expert.

    Args:
      x: [M, K], transposed [M, N], bfloat16 or float16, tokens sorted by expert.
      w: [E, N, K], scale: [E, G, N] or `Blocks` of them, codebook, zero: as for
        `weight_only.matmul`.
      group_sizes: [E] integers, how many tokens each expert has.
      transposed: return y[m] = x[m] @ W[expert of m]ᵀ, by the kernel of `transposed`.
      bits: as for it; else x tells.
      natural: whether w of 8 bits lies as `eight_bit.matmul` takes it. x is put in order for it.
      out_dtype: of y, bfloat16, float16 or float32; default: x's.
      tuning: default: that of the kernel for twice as many tokens as an expert has on average.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU.

    Raises:
      ValueError: for shapes or types that the kernel refuses.
    """
    M, E = x.shape[0], w.shape[0]
    if group_sizes.shape != (E,):
        raise ValueError(f"`group_sizes` must be [{E}], one for each expert of w {w.shape}.")
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if not M:
        return jnp.zeros(
            (0, weight_only.inputs_of(w, bits) if transposed else w.shape[1]), out_dtype
        )
    if tuning is None:
        # Some experts have more than others; while memory is the bound, larger tiles are free.
        tuning = _tuning(
            x, w, scale, zero, 2 * -(-M // E), min(E, M), codebook, out_dtype, transposed, bits
        )
    tiles = tiles_of(group_sizes, M, tuning.tile_m)
    y = _kernel(transposed, zero, bits, natural)(
        x[tiles.tokens], w, scale, codebook=codebook, experts=tiles.experts, out_dtype=out_dtype,
        tuning=tuning, interpret=interpret,
    )  # fmt: skip
    return jnp.where(tiles.has_expert[:, None], y[tiles.places], jnp.zeros((), out_dtype))


def batched(
    x: Array,
    w: Array,
    scale: Array | Blocks,
    *,
    transposed: bool = False,
    codebook: Sequence[float] | None = None,
    zero: int | Array | None = None,
    bits: int | None = None,
    natural: bool = False,
    out_dtype: Any = None,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> Array:
    """Returns y[e] = x[e] @ W[e], [E, M, N], for as many tokens of every expert, x [E, M, K].

    All else as for `matmul`.
    """
    E, M, _ = x.shape
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    tuning = tuning or _tuning(x, w, scale, zero, M, E, codebook, out_dtype, transposed, bits)
    of_each = -(-M // tuning.tile_m)
    padded = jnp.pad(x, ((0, 0), (0, -M % tuning.tile_m), (0, 0)))
    expert = jnp.repeat(jnp.arange(E, dtype=jnp.int32), of_each)
    y = _kernel(transposed, zero, bits, natural)(
        padded.reshape(-1, x.shape[-1]), w, scale, codebook=codebook,
        experts=jnp.append(expert, E * of_each), out_dtype=out_dtype, tuning=tuning,
        interpret=interpret,
    )  # fmt: skip
    return y.reshape(*padded.shape[:2], -1)[:, :M]


def _kernel(transposed: bool, zero: int | Array | None, bits: int | None, natural: bool) -> Any:
    if transposed:
        return functools.partial(transposed_kernel.matmul, zero=zero, bits=bits, natural=natural)

    def forward(x: Array, *args: Any, **options: Any) -> Array:
        x = weight_only.ordered(x) if natural else x
        return weight_only.matmul(x, *args, **options, zero=zero)

    return forward


def _tuning(
    x: Array, w: Array, scale: Array | Blocks, zero: int | Array | None, M: int, experts: int,
    codebook: Any, out_dtype: Any, transposed: bool, bits: int | None,
) -> Tuning:  # fmt: skip
    """Returns the tuning for M tokens of each expert."""
    (N, columns), G = w.shape[-2:], groups_of(scale)
    K = weight_only.inputs_of(w, bits) if transposed else x.shape[-1]
    bits = columns * hopper.bits(w.dtype) // K
    table_bytes = 0 if codebook is None else four_bits.TABLE_BYTES
    if transposed:
        return tunings.transposed(M, N, K, bits, table_bytes=table_bytes, experts=experts)
    return tunings.weight_only(
        M, K, N, K // G, bits, hopper.bits(out_dtype), table_bytes=table_bytes,
        scale_bits=8 * scale.dtype.itemsize, experts=experts,
        zero_points=not (zero is None or isinstance(zero, int)),
    )  # fmt: skip
