"""W8A8 products on Ampere and Ada: int8 x int8, summed exactly in int32."""

# `triton` is optional, and the type checker takes it for this folder.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from pallas_kernels.triton import tuning as tunings
from pallas_kernels.triton import versions
from pallas_kernels.triton.tuning import TILE_K, TILE_N, Tuning


@triton.jit
def kernel(
    x,
    w,
    x_scale,
    w_scale,
    M,
    N,
    K,
    steps,  # of one part of K
    out,
    TM: tl.constexpr,
    TN: tl.constexpr,
    STEP: tl.constexpr,
    IS_SCALED: tl.constexpr,
):
    """out[part, m, n] = x_scale[m] * w_scale[n] * sum of x[m, k] * w[n, k] over a part of K."""
    n = tl.program_id(0) * TN + tl.arange(0, TN)
    m = tl.program_id(1) * TM + tl.arange(0, TM)
    part = tl.program_id(2)
    k = part * steps * STEP + tl.arange(0, STEP)
    is_token = m[None, :] < M
    codes = w + n[:, None] * K + k[None, :]
    tokens = x + m[None, :] * K + k[:, None]
    total = tl.full((TN, TM), 0, tl.int32)
    for _ in range(steps):
        total = tl.dot(tl.load(codes), tl.load(tokens, mask=is_token, other=0), total)
        codes += STEP
        tokens += STEP
    at = out + part * M * N + m[None, :] * N + n[:, None]
    if IS_SCALED:
        sx = tl.load(x_scale + m, mask=m < M, other=0.0).to(tl.float32)
        scaled = total.to(tl.float32) * sx[None, :] * tl.load(w_scale + n).to(tl.float32)[:, None]
        tl.store(at, scaled.to(out.dtype.element_ty), mask=is_token)
    else:  # parts of K are added as integers
        tl.store(at, total, mask=is_token)


def supports(K: int, N: int) -> str | None:
    """Returns why the kernel cannot compute a product, or None if it can."""
    if K % TILE_K or N % TILE_N:
        return f"K={K}, N={N}: both must be multiples of {TILE_K}"
    return None


def constants(tuning: Tuning) -> dict[str, Any]:
    """Returns the constexpr parameters of `kernel`."""
    return {
        "TM": tuning.tile_m,
        "TN": tuning.tile_n,
        "STEP": TILE_K,
        "IS_SCALED": tuning.split_k == 1,
    }


def matmul(
    x: Array,
    w: Array,
    x_scale: Array,
    w_scale: Array,
    *,
    out_dtype: Any = jnp.float32,
    capability: int | None = None,
    tuning: Tuning | None = None,
) -> Array:
    """Returns y[m, n] = x_scale[m] * w_scale[n] * sum_k x[m, k] * w[n, k].

    Args:
      x: [M, K] int8.
      w: [N, K] int8.
      x_scale: [M] float32.
      w_scale: [N] float32, bfloat16 or float16.
      out_dtype: of y.
      capability: what to compile for, such as 80; default: the GPU at hand.
      tuning: default: `tuning.EIGHT_BIT`.

    Raises:
      ValueError: for shapes that `supports` refuses.
      RuntimeError: if Triton or jax-triton is missing or too old.
    """
    (M, K), (N, _) = x.shape, w.shape
    if w.shape[1] != K or x_scale.shape != (M,) or w_scale.shape != (N,):
        raise ValueError(
            f"x {x.shape}, w {w.shape}, x_scale {x_scale.shape} and w_scale {w_scale.shape} must"
            " be [M, K], [N, K], [M] and [N]."
        )
    if reason := supports(K, N):
        raise ValueError(f"pallas_kernels.triton.eight_bit: {reason}.")
    tuning = tuning or tunings.for_shape(tunings.EIGHT_BIT, M, K, N, capability)
    split = tuning.split_k
    parts = versions.call(
        kernel,
        x,
        w,
        x_scale,
        w_scale,
        M,
        N,
        K,
        K // TILE_K // split,
        out=jax.ShapeDtypeStruct((split, M, N), jnp.int32 if split > 1 else out_dtype),
        grid=(N // tuning.tile_n, -(-M // tuning.tile_m), split),
        warps=tuning.warps,
        stages=tuning.stages,
        capability=capability,
        **constants(tuning),
    )
    if split == 1:
        return parts[0]
    y = jnp.sum(parts, axis=0, dtype=jnp.int32).astype(jnp.float32)
    return (y * x_scale[:, None] * w_scale[None].astype(jnp.float32)).astype(out_dtype)
