"""Activations rounded to 8 bits on Hopper in one pass, with a scale for each token or its blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128  # of a warpgroup
BLOCK = 128  # values of a row with one scale, as groups of weights have
_LEAST = 8  # blocks that a warpgroup loads at once, 16 threads each
_MOST = {"int8": 127, "float8_e4m3fn": 448}  # in magnitude


def supports(K: int, x_dtype: Any, dtype: Any, *, in_blocks: bool = False) -> str | None:
    """Returns why a kernel cannot round rows of K values, or None if it can.

    Example:
      >>> supports(4096, "bfloat16", "int8")
      >>> supports(4000, "bfloat16", "int8")
      'rows of 4000 values: it takes multiples of 128 up to 16384'
      >>> supports(28672, "bfloat16", "float8_e4m3fn", in_blocks=True)
    """
    if jnp.dtype(dtype).name not in _MOST:
        return f"codes of {jnp.dtype(dtype).name}: it makes {', '.join(_MOST)}"
    if jnp.dtype(x_dtype).name not in ("bfloat16", "float16", "float32"):
        return f"activations of {jnp.dtype(x_dtype).name}: it takes bfloat16, float16 and float32"
    if in_blocks and K % BLOCK:
        return f"rows of {K} values: it takes blocks of {BLOCK}"
    if not in_blocks and (K % THREADS or K > 16384):  # which are all in registers
        return f"rows of {K} values: it takes multiples of {THREADS} up to 16384"
    return None


def by_token(x: Array, dtype: Any, *, interpret: Any = None) -> tuple[Array, Array]:
    """Returns codes and scales of each row, as `reference.by_token` under `jit`, bit for bit.

    s = max |x| / qmax, NaN for a row with a NaN or an infinity; codes = round(x / s), 0 for s = 0.
    On a GPU that holds as far as x / s does: the kernel divides by `div.full.f32`, which is within
    2 units in the last place; what XLA divides by there has not been compared.

    Args:
      x: [M, K] bfloat16, float16 or float32.
      dtype: of the codes: int8 or float8_e4m3fn.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU.

    Returns:
      [M, K], and float32 [M, 1].

    Raises:
      ValueError: for rows or types that `supports` refuses.
    """
    M, K = x.shape
    if reason := supports(K, x.dtype, dtype):
        raise ValueError(f"pallas_kernels.quantize_rows: {reason}.")
    together = next(n for n in (8, 4, 2, 1) if K % (n * THREADS) == 0)
    layout = plgpu.Layout.WG_STRIDED((K,), vec_size=together)
    at = lambda m: m
    codes, scale = _kernel(x, dtype, M, at, layout, None, interpret)
    return codes, scale[:, None]


def by_block(x: Array, dtype: Any, *, interpret: Any = None) -> tuple[Array, Array]:
    """Returns codes and scales of each block of 128 values of a row, as `reference.by_block`.

    s = max |x| / qmax over a block (DeepSeek-AI, 2024, DeepSeek-V3, section 3.3.2); all else is as
    for `by_token`, with a block in place of a row.

    Args:
      x: [M, K] bfloat16, float16 or float32.
      dtype: of the codes: int8 or float8_e4m3fn.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU.

    Returns:
      [M, K], and float32 [M, K / 128], as `eight_bit.matmul` takes them.

    Raises:
      ValueError: for rows or types that `supports` refuses.
    """
    M, K = x.shape
    if reason := supports(K, x.dtype, dtype, in_blocks=True):
        raise ValueError(f"pallas_kernels.quantize_rows: {reason}.")
    blocks = x.reshape(-1, BLOCK)
    blocks = jnp.pad(blocks, ((0, -len(blocks) % _LEAST), (0, 0)))  # no copy for K = 1024 i
    together = 16 // x.dtype.itemsize  # 128 bits, the most that a thread loads at once
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((_LEAST, BLOCK), (2, 16 * together), (together,))),
        warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1,
    )  # fmt: skip
    # As many of a CTA as fill every SM once, or 64 bytes for each thread.
    most = 64 * THREADS // (BLOCK * x.dtype.itemsize)
    ...
