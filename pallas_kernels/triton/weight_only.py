"""Weight-only products on Ampere and Ada: 4- or 8-bit weights, dequantized in registers, times x.

Tiles of bytes come to shared memory by cp.async, several steps ahead, and from there to registers
as an mma reads its left operand, where codes become 16-bit floats. The product is transposed,
yᵀ = W xᵀ, so that every warp decodes rows of its own. Codes of 4 bits lie so that the lower halves
of 16 bytes are 16 consecutive inputs and the upper halves the 16 after them: both multiply
contiguous columns of x, and nothing is shuffled.
"""

# `triton` is optional, and the type checker takes it for this folder.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false, reportPossiblyUnboundVariable=false

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from pallas_kernels.triton import decode, versions
from pallas_kernels.triton import tuning as tunings
from pallas_kernels.triton.tuning import TILE_K, TILE_N, Tuning

ACTIVATIONS = ("bfloat16", "float16")


@triton.jit
def kernel(
    x,
    w,
    scale,
    zero,
    M,
    N,
    K,
    steps,  # of one part of K
    out,
    TM: tl.constexpr,
    TN: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,  # inputs of one product with one scale, at most STEP
    STEPS_PER_ROW: tl.constexpr,  # steps that share a row of scales; 0: all do
    SCALE_ON: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
    BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """out[part, m, n] = sum of x[m, k] * (q[n, k] - zero[g, n]) * scale[g, n] over a part of K."""
    dtype: tl.constexpr = x.dtype.element_ty
    PER_BYTE: tl.constexpr = 1 if KIND == "int8" else 2
    ROWS: tl.constexpr = GROUP // PER_BYTE
    PARTS: tl.constexpr = STEP // GROUP
    n = tl.program_id(0) * TN + tl.arange(0, TN)
    m = tl.program_id(1) * TM + tl.arange(0, TM)
    part = tl.program_id(2)
    j = tl.arange(0, ROWS)
    if KIND == "int8":
        k = j
    else:
        k = (j // 16) * 32 + j % 16
    first = part * steps
    is_token = m[None, :] < M
    codes = w + n[:, None] * (K // PER_BYTE) + (first * (STEP // PER_BYTE) + j)[None, :]
    tokens = x + m[None, :] * K + (first * STEP + k)[:, None]
    total = tl.full((TN, TM), 0.0, tl.float32)
    for i in range(steps):
        for g in tl.static_range(PARTS):
            if STEPS_PER_ROW == 0:
                row = 0
            else:
                row = ((first + i) // STEPS_PER_ROW) * PARTS + g
            bytes = tl.load(codes + g * ROWS)
            x0 = tl.load(tokens + g * GROUP, mask=is_token, other=0.0)
            if KIND == "int8":
                q0 = decode.whole(bytes, dtype, BIAS, ASSEMBLY)
            else:
                x1 = tl.load(tokens + g * GROUP + 16, mask=is_token, other=0.0)
                q0, q1 = decode.halves(bytes, dtype, KIND, LEVELS, BIAS, ASSEMBLY)
            if HAS_ZERO or BIAS + ZERO != 0.0:
                if HAS_ZERO:
                    shift = (tl.load(zero + row * N + n).to(dtype) + BIAS)[:, None].to(dtype)
                else:
                    shift = tl.full((1, 1), BIAS + ZERO, dtype)
                q0 = (q0 - shift).to(dtype)
                if KIND != "int8":
                    q1 = (q1 - shift).to(dtype)
            if SCALE_ON == "weight" and STEPS_PER_ROW != 0:
                s = tl.load(scale + row * N + n).to(dtype)[:, None]
                q0 = (q0 * s).to(dtype)
                if KIND != "int8":
                    q1 = (q1 * s).to(dtype)
            if SCALE_ON == "weight" or STEPS_PER_ROW == 0:
                total = tl.dot(q0, x0, total)
                if KIND != "int8":
                    total = tl.dot(q1, x1, total)
            else:
                product = tl.dot(q0, x0)
                if KIND != "int8":
                    product = tl.dot(q1, x1, product)
                total += product * tl.load(scale + row * N + n).to(tl.float32)[:, None]
        codes += STEP // PER_BYTE
        tokens += STEP
    if STEPS_PER_ROW == 0:
        total *= tl.load(scale + n).to(tl.float32)[:, None]
    at = out + part * M * N + m[None, :] * N + n[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=is_token)


def supports(x_dtype: Any, K: int, N: int, group_size: int) -> str | None:
    """Returns why the kernel cannot compute a product, or None if it can.

    Args:
      K, N: of the weight as it is stored, padded.
    """
    name = jnp.dtype(x_dtype).name
    if name not in ACTIVATIONS:
        return f"activations of {name}: it takes {', '.join(ACTIVATIONS)}"
    if K % TILE_K or N % TILE_N:
        return f"K={K}, N={N}: both must be multiples of {TILE_K}"
    if (group_size not in (32, 64) and group_size % TILE_K) or K % group_size:
        return f"groups of {group_size}: it takes 32, 64 and multiples of {TILE_K}"
    return None


def constants(
    K: int,
    G: int,
    x_dtype: Any,
    codes: str | Sequence[float],
    zero: float | None,
    tuning: Tuning,
    *,
    assembly: bool = True,
) -> dict[str, Any]:
    """Returns the constexpr parameters of `kernel`.

    Args:
      codes: "uint4", "int8" or 16 levels.
      zero: zero point of all weights; None: they are in an array.
      assembly: whether codes are decoded in PTX, or in Triton.
    """
    kind = codes if isinstance(codes, str) else "table"
    levels = () if isinstance(codes, str) else tuple(map(float, codes))
    dtype = jnp.dtype(x_dtype).name
    g = K // G
    return {
        "TM": tuning.tile_m,
        "TN": tuning.tile_n,
        "STEP": TILE_K,
        "GROUP": min(g, TILE_K),
        "STEPS_PER_ROW": 0 if G == 1 else max(1, g // TILE_K),
        "SCALE_ON": tuning.scale_on,
        "HAS_ZERO": zero is None,
        "ZERO": zero or 0.0,
        "KIND": kind,
        "LEVELS": levels,
        "BIAS": decode.bias(kind, dtype),
        "ASSEMBLY": decode.assembly(kind, dtype, levels) if assembly else None,
    }


def matmul(
    x: Array,
    w: Array,
    scale: Array,
    zero: Array | float = 0.0,
    *,
    codes: str | Sequence[float],
    out_dtype: Any = None,
    capability: int | None = None,
    tuning: Tuning | None = None,
) -> Array:
    """Returns y[m, n] = sum_k x[m, k] * (q[n, k] - zero[g, n]) * scale[g, n], g = k // (K / G).

    Sums are float32. With `scale_on="accumulator"` products are exact, if 16-bit floats hold the
    levels; with "weight" every weight is first rounded to x's type once more.

    Args:
      x: [M, K] bfloat16 or float16.
      w: bytes [N, K * b / 8], int8. Codes of 4 bits as `packing.pack` lays them out.
      scale: [G, N] bfloat16, float16 or float32; K / G is 32, 64 or a multiple of 128.
      zero: [G, N], integers that 8 bits can hold, or one number; 0 with levels.
      codes: "uint4", "int8" or the 16 levels of a code of 4 bits.
      out_dtype: of y; default: x's.
      capability: what to compile for, such as 80; default: the GPU at hand.
      tuning: default: `tuning.weight_only`.

    Raises:
      ValueError: for shapes or types that `supports` refuses.
      RuntimeError: if Triton or jax-triton is missing or too old.
    """
    (M, K), (N, columns), (G, _) = x.shape, w.shape, scale.shape
    bits = 8 if codes == "int8" else 4
    if columns * 8 != K * bits or scale.shape[1] != N or K % G:
        raise ValueError(
            f"x {x.shape}, w {w.shape} and scale {scale.shape} must be [M, K], [N, K * {bits} / 8]"
            " and [G, N]."
        )
    if reason := supports(x.dtype, K, N, K // G):
        raise ValueError(f"pallas_kernels.triton.weight_only: {reason}.")
    has_zeros = isinstance(zero, jax.Array)
    if not isinstance(codes, str) and (has_zeros or zero):
        raise ValueError("levels have no zero point: shift the levels.")
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    tuning = tuning or tunings.weight_only(codes, M, K, N, capability)
    split = tuning.split_k
    parts = versions.call(
        kernel,
        x,
        w.astype(jnp.int8),
        scale,
        zero if has_zeros else scale,  # not read
        M,
        N,
        K,
        K // TILE_K // split,
        out=jax.ShapeDtypeStruct((split, M, N), jnp.float32 if split > 1 else out_dtype),
        grid=(N // tuning.tile_n, -(-M // tuning.tile_m), split),
        warps=tuning.warps,
        stages=tuning.stages,
        capability=capability,
        **constants(K, G, x.dtype, codes, None if has_zeros else float(zero), tuning),
    )
    return jnp.sum(parts, axis=0, dtype=jnp.float32).astype(out_dtype)
