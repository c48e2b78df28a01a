"""Activations rounded to 8 bits on Hopper, with a scale for each token: one pass over them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128  # of the warpgroup that has a row
_MOST = {"int8": 127, "float8_e4m3fn": 448}  # in magnitude


def supports(K: int, x_dtype: Any, dtype: Any) -> str | None:
    """Returns why the kernel cannot round rows of K values, or None if it can.

    Example:
      >>> supports(4096, "bfloat16", "int8")
      >>> supports(4000, "bfloat16", "int8")
      'rows of 4000 values: it takes multiples of 128 up to 16384'
    """
    if jnp.dtype(dtype).name not in _MOST:
        return f"codes of {jnp.dtype(dtype).name}: it makes {', '.join(_MOST)}"
    if jnp.dtype(x_dtype).name not in ("bfloat16", "float16", "float32"):
        return f"activations of {jnp.dtype(x_dtype).name}: it takes bfloat16, float16 and float32"
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
    M, K = x.shape
    if reason := supports(K, x.dtype, dtype):
        raise ValueError(f"pallas_kernels.quantize_rows: {reason}.")
    dtype = jnp.dtype(dtype)
    most = float(_MOST[dtype.name])
    together = next(n for n in (8, 4, 2, 1) if K % (n * THREADS) == 0)

    def kernel(x_ref, codes_ref, scale_ref):
        m = lax.axis_index("m")
        layout = plgpu.Layout.WG_STRIDED((K,), vec_size=together)
        x = plgpu.load(x_ref.at[m], layout=layout, optimized=False).astype(jnp.float32)
        size = jnp.abs(x)
        # An infinity where there is none or a NaN, which a maximum may drop.
        largest = jnp.max(jnp.where(size < jnp.inf, size, jnp.inf))
        # As XLA divides by a constant.
        scale = jnp.where(largest < jnp.inf, largest * jnp.float32(1 / most), jnp.nan)
        q = x / jnp.where(scale == 0, 1.0, scale)
        if dtype == jnp.int8:
            q = lax.round(q, lax.RoundingMethod.TO_NEAREST_EVEN)
        q = jnp.minimum(jnp.maximum(q, -most), most)
        codes_ref.at[m][...] = q.astype(dtype)
        scale_ref[m] = scale

    codes, scale = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((M, K), dtype),
            jax.ShapeDtypeStruct((M,), jnp.float32),
        ),
        grid=(M,),
        grid_names=("m",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(x)
    return codes, scale[:, None]
