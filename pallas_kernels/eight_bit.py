"""Products of 8-bit activations with 8-bit weights on Hopper: int8 or FP8."""

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

_FP8 = ("float8_e4m3fn", "float8_e5m2")


def supports(w_dtype: Any, x_dtype: Any, K: int, N: int, group_size: int) -> str | None:
    """Returns why the kernel cannot compute a product, or None if it can.

    Example:
      >>> supports("int8", "int8", 4096, 4096, 4096)
      >>> supports("int8", "float8_e4m3fn", 4096, 4096, 4096)
      'weights of int8 with activations of float8_e4m3fn: both must be int8, or both FP8'
    """
    names = jnp.dtype(w_dtype).name, jnp.dtype(x_dtype).name
    if names != ("int8", "int8") and not all(n in _FP8 for n in names):
        return (
            f"weights of {names[0]} with activations of {names[1]}: both must be int8, or both FP8"
        )
    if K % TILE_K or N % TILE_N:
        return f"K={K}, N={N}: both must be multiples of {TILE_K}"
    if group_size not in (TILE_K, K):
        return f"groups of {group_size}: it takes {TILE_K}, or one group of all K"
    return None


def matmul(
    x: Array,
    w: Array,
    x_scale: Array,
    w_scale: Array,
    *,
    out_dtype: Any = jnp.bfloat16,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> Array:
    """Returns y[m, n] = sum_g x_scale[m, g] * w_scale[g, n] * sum_(k in g) x[m, k] * w[n, k].

    As `reference.eight_bit`. Inner sums are int32 and exact, or float32 in the tensor core. With
    groups of 128 every one is summed on its own there and added in float32 registers, as the tensor
    core's own sum of FP8 products keeps fewer bits (DeepSeek-AI, 2024, section 3.3.2).

    Args:
      x: [M, K] int8, float8_e4m3fn or float8_e5m2.
      w: [N, K] int8, or one of the FP8 types.
      x_scale: float32 [M, G], with G = 1 or G = K / 128. A scale of the whole tensor is repeated.
      w_scale: float32 [G, N]; a scale of a block of 128 x 128 is repeated.
      out_dtype: of y: bfloat16, float16 or float32.
      tuning: default: `tuning.eight_bit`.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU.

    Raises:
      ValueError: for shapes or types that `supports` refuses.
    """
    (M, K), N, G = x.shape, w.shape[0], w_scale.shape[0]
    if w.shape[1] != K or w_scale.shape[1] != N or x_scale.shape != (M, G) or K % G:
        raise ValueError(
            f"x {x.shape}, w {w.shape}, x_scale {x_scale.shape} and w_scale {w_scale.shape} must be"
            " [M, K], [N, K], [M, G] and [G, N]."
        )
    if reason := supports(w.dtype, x.dtype, K, N, K // G):
        raise ValueError(f"pallas_kernels.eight_bit: {reason}.")
    out_dtype = jnp.dtype(out_dtype)
    tuning = tuning or tunings.eight_bit(M, K, N)
    tile_m = tuning.tile_m
    total_dtype = jnp.int32 if w.dtype == jnp.int8 else jnp.float32
    x = hopper.padded_tokens(x, tile_m)
    rows_of_x = hopper.padded_tokens(x_scale.astype(jnp.float32), tile_m).T  # [G, M]
    w_scale = w_scale.astype(jnp.float32)
    has_groups = G > 1

    def outer(s_w, s_x):
        shape = (hopper.ROWS, tile_m)
        return lax.broadcast_in_dim(s_w, shape, (0,)) * lax.broadcast_in_dim(s_x, shape, (1,))

    def by_row(ref):
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def by_column(ref):
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

    def step(w_smem, x_smem, rows, total):
        plgpu.wgmma(total, w_smem.at[rows], x_smem.T)
        plgpu.wgmma_wait(0)  # before the stage is released
        return total

    def step_in_groups(w_smem, x_smem, sw_smem, sx_smem, rows, total):
        def product(d):
            plgpu.wgmma(d, w_smem.at[rows], x_smem.T)
            return d[...]  # waits

        d = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((hopper.ROWS, tile_m), total_dtype))
        scale = outer(by_row(sw_smem.at[0, rows]), by_column(sx_smem.at[0]))
        return total + d.astype(jnp.float32) * scale

    def scaled(total, features, tokens, sw, sx):
        return total.astype(jnp.float32) * outer(
            by_row(sw.at[0, features]), by_column(sx.at[0, tokens])
        )

    operands = [Operand(w, "n", columns=TILE_K), Operand(x, "m", columns=TILE_K)]
    if has_groups:
        operands += [Operand(w_scale, "n", is_row=True), Operand(rows_of_x, "m", is_row=True)]
    in_epilogue = not has_groups and tuning.split_k == 1
    if has_groups or in_epilogue:
        part_dtype = jnp.float32 if tuning.split_k > 1 else out_dtype
    else:
        part_dtype = total_dtype  # parts of integers are added exactly
    parts = hopper.product(
        operands,
        step_in_groups if has_groups else step,
        scaled if in_epilogue else lambda total, *_: total,
        whole=(w_scale, rows_of_x) if in_epilogue else (),
        in_tensor_core=None if has_groups else total_dtype,
        loads_blocks=has_groups,
        out_dtype=part_dtype,
        sizes=(x.shape[0], K, N),
        tuning=tuning,
        interpret=interpret,
    )
    if has_groups or in_epilogue:
        return jnp.sum(parts, axis=0, dtype=jnp.float32).astype(out_dtype)[:M]
    y = jnp.sum(parts, axis=0).astype(jnp.float32) * w_scale * rows_of_x.T
    return y.astype(out_dtype)[:M]
