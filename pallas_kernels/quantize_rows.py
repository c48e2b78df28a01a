"""Activations rounded to 8 bits on Hopper in one pass: a scale for each token or block of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.tuning import SMS

THREADS = 128  # of the warpgroup that has a row, or several blocks
BLOCK = 128  # values of a row with one scale
_LEAST = 8  # blocks that a warpgroup loads at once, by 16 threads each
_MOST = {"int8": 127, "float8_e4m3fn": 448}  # in magnitude


def supports(K: int, x_dtype: Any, dtype: Any, *, in_blocks: bool = False) -> str | None:
    """Returns why the kernel cannot round rows of K values, or None if it can.

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
    if in_blocks:
        return f"rows of {K} values: it takes multiples of {BLOCK}" if K % BLOCK else None
    if K % THREADS or K > 16384:  # which are all in registers
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
    K = x.shape[1]
    if reason := supports(K, x.dtype, dtype):
        raise ValueError(f"pallas_kernels.quantize_rows: {reason}.")
    together = next(n for n in (8, 4, 2, 1) if K % (n * THREADS) == 0)
    layout = plgpu.Layout.WG_STRIDED((K,), vec_size=together)
    codes, scale = _rounded(x, dtype, None, layout, interpret)
    return codes, scale[:, None]


def by_block(x: Array, dtype: Any, *, interpret: Any = None) -> tuple[Array, Array]:
    """Returns codes and scales of each block of 128 values of a row, as `reference.by_block`.

    As `by_token`, with a block in place of a row (DeepSeek-AI, 2024, DeepSeek-V3, section 3.3.2).

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
    n = M * K // BLOCK
    # Where 8 does not divide it, as it does for every K that 1024 divides, blocks of zeros follow.
    blocks = jnp.pad(x.reshape(n, BLOCK), ((0, -n % _LEAST), (0, 0)))
    together = 16 // x.dtype.itemsize  # a load of 128 bits
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((_LEAST, BLOCK), (2, 16 * together), (together,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )
    rows = 8 * together  # which every thread loads at once; fewer where that leaves SMs idle
    while rows > _LEAST and (len(blocks) % rows or len(blocks) < rows * SMS):
        rows //= 2
    codes, scale = _rounded(blocks, dtype, rows, layout, interpret)
    return codes[:n].reshape(M, K), scale[:n].reshape(M, K // BLOCK)


def _rounded(
    x: Array, dtype: Any, rows: int | None, layout: Any, interpret: Any
) -> tuple[Array, Array]:
    """Returns codes and the scale of each row.

    Args:
      rows: of a CTA, [rows, K] in registers; None: one, [K].
      layout: of them.
    """
    dtype = jnp.dtype(dtype)
    most = float(_MOST[dtype.name])

    def kernel(x_ref, codes_ref, scale_ref):
        i = lax.axis_index("m")
        own = i if rows is None else pl.ds(i * rows, rows)
        x = plgpu.load(x_ref.at[own], layout=layout, optimized=False).astype(jnp.float32)
        size = jnp.abs(x)
        # An infinity where there is none or a NaN, which a maximum may drop.
        largest = jnp.max(jnp.where(size < jnp.inf, size, jnp.inf), axis=-1)
        # As XLA divides by a constant.
        scale = jnp.where(largest < jnp.inf, largest * jnp.float32(1 / most), jnp.nan)
        step = jnp.where(scale == 0, 1.0, scale)
        q = x / lax.broadcast_in_dim(step, x.shape, tuple(range(step.ndim)))
        if dtype == jnp.int8:
            q = lax.round(q, lax.RoundingMethod.TO_NEAREST_EVEN)
        q = jnp.minimum(jnp.maximum(q, -most), most)
        codes_ref.at[own][...] = q.astype(dtype)
        hopper.put(scale_ref.at[own], scale)  # too few to fill sectors

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, dtype),
            jax.ShapeDtypeStruct(x.shape[:1], jnp.float32),
        ),
        grid=(len(x) // (rows or 1),),
        grid_names=("m",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(x)
