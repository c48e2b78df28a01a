"""Weight-only products on Hopper: 4- or 8-bit weights, dequantized in registers, times 16-bit x."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels import tuning as tunings
from pallas_kernels.hopper import Operand
from pallas_kernels.tuning import TILE_K, TILE_N, Tuning

# Registers are loaded so that upcasting needs few shuffles between lanes. The layout depends on the
# bits of the stored type; the wrong one is many narrow loads (int4) or an error.
_LAYOUTS = {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_UPCAST_2X}
_ACTIVATIONS = {
    "int4": ("bfloat16", "float16"),
    "int8": ("bfloat16", "float16"),
    "float8_e4m3fn": ("bfloat16", "float16"),
}


def supports(w_dtype: Any, x_dtype: Any, K: int, N: int, group_size: int) -> str | None:
    """Returns why the kernel cannot compute a product, or None if it can.

    Example:
      >>> supports("int4", "bfloat16", 4096, 4096, 128)
      >>> supports("uint4", "bfloat16", 4096, 4096, 128)
      'weights of uint4: it takes int4, int8, float8_e4m3fn'
      >>> supports("int4", "bfloat16", 4096, 4096, 16)
      'groups of 16: it takes 32, 64 and multiples of 128'
    """
    w_name, x_name = jnp.dtype(w_dtype).name, jnp.dtype(x_dtype).name
    if w_name not in _ACTIVATIONS:
        return f"weights of {w_name}: it takes {', '.join(_ACTIVATIONS)}"
    if x_name not in _ACTIVATIONS[w_name]:
        return f"activations of {x_name}: with {w_name} it takes {', '.join(_ACTIVATIONS[w_name])}"
    if K % TILE_K or N % TILE_N:
        return f"K={K}, N={N}: both must be multiples of {TILE_K}"
    if (group_size not in (32, 64) and group_size % TILE_K) or K % group_size:
        return f"groups of {group_size}: it takes 32, 64 and multiples of {TILE_K}"
    return None


def matmul(
    x: Array,
    w: Array,
    scale: Array,
    *,
    out_dtype: Any = None,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> Array:
    """Returns y[m, n] = sum_k x[m, k] * w[n, k] * scale[k // g, n], as `reference.weight_only`.

    Sums are float32. With `scale_on="accumulator"` products are exact; with "weight" every weight
    is first rounded to x's type once more.

    Args:
      x: [M, K] bfloat16 or float16.
      w: [N, K] int4, int8 or float8_e4m3fn.
      scale: [G, N] bfloat16, float16 or float32; K / G is 32, 64 or a multiple of 128.
      out_dtype: of y, bfloat16, float16 or float32; default: x's.
      tuning: default: `tuning.weight_only`.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU.

    Raises:
      ValueError: for shapes or types that `supports` refuses.
    """
    (M, K), (N, _), (G, _) = x.shape, w.shape, scale.shape
    if w.shape[1] != K or scale.shape[1] != N or K % G:
        raise ValueError(
            f"x {x.shape}, w {w.shape} and scale {scale.shape} must be [M, K], [N, K] and [G, N]."
        )
    if reason := supports(w.dtype, x.dtype, K, N, K // G):
        raise ValueError(f"pallas_kernels.weight_only: {reason}.")
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    tuning = tuning or tunings.weight_only(
        M, K, N, K // G, hopper.bits(w.dtype), hopper.bits(out_dtype)
    )
    x = hopper.padded_tokens(x, tuning.tile_m)
    group = min(K // G, tuning.tile_k)  # inputs of one step with one scale
    layout = _LAYOUTS[hopper.bits(w.dtype)]
    is_exact = tuning.scale_on == "accumulator"

    def step(w_smem, x_smem, s_smem, rows, total):
        for g in range(tuning.tile_k // group):
            columns = pl.ds(g * group, group)
            s = plgpu.load(s_smem.at[g, rows], layout=plgpu.Layout.WGMMA.reduce(1))
            q = plgpu.load(w_smem.at[rows, columns], layout=layout)
            q = plgpu.layout_cast(q, plgpu.Layout.WGMMA)
            if w.dtype == jnp.float8_e4m3fn and x.dtype != jnp.float16:
                q = q.astype(jnp.float16).astype(jnp.float32)  # Hopper knows no other way
            q = q.astype(x.dtype)
            xt = x_smem.at[:, columns].T
            if is_exact:
                total += scaled_product(q, xt, s)
            else:
                q = q * lax.broadcast_in_dim(s.astype(x.dtype), q.shape, (0,))
                plgpu.wgmma(total, q, xt)
                plgpu.wgmma_wait(0)  # before the stage is released
        return total

    def scaled_product(q, xt, s):
        def product(d):
            plgpu.wgmma(d, q, xt)
            return d[...]  # waits

        d = pl.run_scoped(
            product, plgpu.WGMMAAccumulatorRef((hopper.ROWS, tuning.tile_m), jnp.float32)
        )
        return d * lax.broadcast_in_dim(s.astype(jnp.float32), d.shape, (0,))

    parts = hopper.product(
        [
            Operand(w, "n", columns=group),
            Operand(x, "m", columns=min(group, 64)),
            Operand(scale, "n", is_row=True, rows=tuning.tile_k // group,
                    steps_per_row=K // G // group),
        ],
        step,
        lambda total, *_: total,
        in_tensor_core=None if is_exact else jnp.float32,
        out_dtype=jnp.float32 if tuning.split_k > 1 else out_dtype,
        sizes=(x.shape[0], K, N),
        tuning=tuning,
        interpret=interpret,
    )  # fmt: skip
    return jnp.sum(parts, axis=0, dtype=jnp.float32).astype(out_dtype)[:M]
