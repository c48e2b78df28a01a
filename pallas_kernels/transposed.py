"""Products with transposed weights on Hopper, as in derivatives: dx = dy Wᵀ of y = x W."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import few_bits, four_bits, hopper, planes, weight_only, zero_points
from pallas_kernels import tuning as tunings
from pallas_kernels.hopper import Operand
from pallas_kernels.tuning import TILE_K, TILE_N, Tuning


def matmul(
    dy: Array,
    w: Array,
    scale: Array,
    *,
    codebook: Sequence[float] | None = None,
    zero: int | Array | None = None,
    bits: int | None = None,
    experts: Array | None = None,
    out_dtype: Any = None,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> Array:
    """Returns dx[m, k] = sum_n dy[m, n] * w[n, k] * scale[k // g, n], as `reference.transposed`.

    The weight is that of `weight_only.matmul`, which the forward product reads; here its inputs are
    the features and its features are contracted. A wgmma reads registers along the contraction, but
    codes lie side by side across it: weights times scales are rounded to dy's type, written to
    shared memory, and read from there as the transpose. Sums are float32.

    Args:
      dy: [M, N] bfloat16 or float16.
      w, scale, codebook, zero, experts: as for `weight_only.matmul`, groups of 32, 64 or a multiple
        of 128.
      bits: of codes in bytes, which do not tell by themselves: 2 or 3; or None for all other types.
      out_dtype: of dx, bfloat16, float16 or float32; default: dy's.
      tuning: default: `tuning.transposed`.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU.

    Raises:
      ValueError: for shapes or types that it does not take.
    """
    (M, N), (_, columns), (G, _) = dy.shape, w.shape[-2:], scale.shape[-2:]
    stack = () if experts is None else w.shape[:1]
    K = inputs_of(w, bits)
    if w.shape != (*stack, N, columns) or scale.shape != (*stack, G, N) or K % G:
        raise ValueError(
            f"dy {dy.shape}, w {w.shape} and scale {scale.shape} must be [M, N], [N, K] and [G, N],"
            " the latter two stacked for experts."
        )
    if reason := supports(w.dtype, dy.dtype, K, N, K // G, scale.dtype):
        raise ValueError(f"pallas_kernels.transposed: {reason}.")
    weight_only.check_zero(zero, w, bits or hopper.bits(w.dtype), scale, codebook)
    if bits not in ((2, 3) if w.dtype == jnp.uint8 else (None,)):
        raise ValueError(
            f"pallas_kernels.transposed: bits={bits} with {w.dtype.name}: it takes 2 and 3 with"
            " uint8, None with all others."
        )
    out_dtype = jnp.dtype(dy.dtype if out_dtype is None else out_dtype)
    tuning = tuning or tunings.transposed(
        M, N, K, bits or hopper.bits(w.dtype),
        table_bytes=0 if codebook is None else four_bits.TABLE_BYTES,
    )  # fmt: skip
    group = min(K // G, hopper.ROWS)  # features of one warpgroup with one scale
    groups = range(hopper.ROWS // group)
    rows_of_scales = max(1, TILE_N * G // K)
    zeros = None if zero is None or isinstance(zero, int) else zero

    def step(w_smem, dy_smem, s_smem, *rest):
        z_smem, rest = (None, rest) if zeros is None else (rest[0], rest[1:])
        *table, tile, turn, features, total = rest
        first = lax.axis_index("wg") * hopper.ROWS * rows_of_scales // TILE_N
        less = zero if z_smem is None else [zero_points.load(z_smem.at[first + i]) for i in groups]
        if bits is None:
            q = weight_only.upcast(w_smem.at[:, features], dy.dtype, *table, zero=less)
        else:
            q = few_bits.load(w_smem, bits, dy.dtype, less, half=lax.axis_index("wg"))
        parts = []
        for i in groups:
            s = weight_only.read_scale(s_smem.at[first + i], scale.dtype).astype(dy.dtype)
            columns = q[:, i * group : (i + 1) * group]
            parts.append(columns * lax.broadcast_in_dim(s, columns.shape, (0,)))
        tile[...] = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        plgpu.commit_smem()
        turn.begin()
        plgpu.wgmma(total, tile.T, dy_smem.T)
        turn.end()
        plgpu.wgmma_wait(0)  # before the stage is released and the tile overwritten
        return total

    return hopper.product(
        [
            Operand(
                w,
                "n",
                is_row=True,
                rows=tuning.tile_k,
                columns=hopper.ROWS if bits is None else planes.CHUNK,  # that a warpgroup reads
                width=TILE_N * columns // K,
            ),
            Operand(dy, "m", columns=64),
            Operand(weight_only.as_bits(scale), "n", shared_by=K // G),
            *([] if zeros is None else [Operand(zeros, "n", shared_by=K // G)]),
        ],
        step,
        lambda total, *_: total,
        table=None if codebook is None else four_bits.table(codebook, dy.dtype),
        scratch=plgpu.SMEM(
            (2, tuning.tile_k, hopper.ROWS),
            dy.dtype,
            transforms=hopper.transforms(hopper.ROWS, dy.dtype),
        ),
        in_tensor_core=jnp.float32,
        experts=experts,
        loads_blocks=False,  # it commits after its loads
        out_dtype=out_dtype,
        sizes=(M, N, K),
        tuning=tuning,
        interpret=interpret,
    )


def inputs_of(w: Array, bits: int | None) -> int:
    """Returns the inputs K of a weight [.., N, K], or of codes of so many bits in bytes."""
    return w.shape[-1] if bits is None else w.shape[-1] * 8 // bits


def supports(
    w_dtype: Any, dy_dtype: Any, K: int, N: int, group_size: int, scale_dtype: Any = jnp.bfloat16
) -> str | None:
    """Returns why the kernel cannot compute a product, or None if it can.

    Example:
      >>> supports("int4", "bfloat16", 4096, 4096, 128)
      >>> supports("int4", "bfloat16", 4096, 4096, 16)
      'groups of 16: it takes 32, 64 and multiples of 128'
    """
    if group_size == 16:
        return f"groups of 16: it takes 32, 64 and multiples of {TILE_K}"
    return weight_only.supports(w_dtype, dy_dtype, K, N, group_size, scale_dtype)
