"""Products with transposed weights on Hopper, as in derivatives: dx = dy Wᵀ of y = x W."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import across, four_bits, hopper, weight_only, zero_points
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
    natural: bool = False,
    experts: Array | None = None,
    out_dtype: Any = None,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> Array:
    """Returns dx[m, k] = sum_n dy[m, n] * w[n, k] * scale[k // g, n], as `reference.transposed`.

    The weight is that of `weight_only.matmul`, which the forward product reads; here its inputs are
    the features and its features are contracted. Weights times scales are rounded to dy's type.
    Sums are float32.

    Args:
      dy: [M, N] bfloat16 or float16.
      w, scale, codebook, zero, experts: as for `weight_only.matmul`, groups of 32, 64 or a
        multiple of 128.
      bits: of codes in bytes, which do not tell by themselves: 2 or 3; or None for all other types.
      natural: whether w of 8 bits lies as `eight_bit.matmul` takes it.
      out_dtype: of dx, bfloat16, float16 or float32; default: dy's.
      tuning: default: `tuning.transposed`.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU.

    Raises:
      ValueError: for shapes or types that it does not take.
    """
    (M, N), (_, columns), (G, _) = dy.shape, w.shape[-2:], scale.shape[-2:]
    stack = () if experts is None else w.shape[:1]
    K = weight_only.inputs_of(w, bits)
    if w.shape != (*stack, N, columns) or scale.shape != (*stack, G, N) or K % G:
        raise ValueError(
            f"dy {dy.shape}, w {w.shape} and scale {scale.shape} must be [M, N], [N, K] and [G, N],"
            " the latter two stacked for experts."
        )
    if reason := supports(w.dtype, dy.dtype, K, N, K // G, scale.dtype):
        raise ValueError(f"pallas_kernels.transposed: {reason}.")
    weight_only.check_codebook(codebook, w)
    weight_only.check_zero(zero, w, bits or hopper.bits(w.dtype), scale.shape, codebook)
    weight_only.check_bits(bits, w)
    out_dtype = jnp.dtype(dy.dtype if out_dtype is None else out_dtype)
    tuning = tuning or tunings.transposed(
        M, N, K, bits or hopper.bits(w.dtype),
        table_bytes=0 if codebook is None else four_bits.TABLE_BYTES,
    )  # fmt: skip
    groups = max(1, hopper.ROWS * G // K)  # of features of a warpgroup, each with its own scales
    zeros = None if zero is None or isinstance(zero, int) else zero
    codes = w.dtype if codebook is None else jnp.uint4
    order = across.order_of(codes, natural=natural)

    def step(w_smem, dy_smem, s_smem, *rest):
        z_smem, rest = (None, rest) if zeros is None else (rest[0], rest[1:])
        *tables, turn, _, _, total = rest
        own = pl.ds(turn.wg * (s_smem.shape[0] // 2), groups)
        less = zero
        if z_smem is not None:
            z = plgpu.load(z_smem.at[own], layout=across.columns(groups, dealt=True))
            less = across.spread(across.less_of(z, codes, dy.dtype), dealt=True)
        table = tables[0] if tables else None
        q = across.load(
            w_smem, turn.wg, codes, dy.dtype, natural=natural, bits=bits, zero=less, table=table
        )
        s = _scale(s_smem.at[own], scale.dtype, dy.dtype)
        turn.begin()
        plgpu.wgmma(total, q * s, dy_smem.T)
        turn.end()
        hopper.loaded()
        plgpu.wgmma_wait(0)  # before the stage is released
        return total

    units = across.units(w)
    return hopper.product(
        [
            Operand(
                units,
                "n",
                is_row=True,
                rows=tuning.tile_k,
                columns=order.units,  # that a warpgroup reads
                width=TILE_N * units.shape[-1] // K,
            ),
            Operand(dy, "m", columns=64),
            Operand(weight_only.as_bits(scale), "n", shared_by=K // G),
            *([] if zeros is None else [Operand(zeros, "n", shared_by=K // G)]),
        ],
        step,
        lambda total, *_: zero_points.in_ones(across.in_order(total, order), codes, dy.dtype),
        table=None if codebook is None else four_bits.table(codebook, dy.dtype),
        in_tensor_core=jnp.float32,
        stored_as=order.sums,
        experts=experts,
        out_dtype=out_dtype,
        sizes=(M, N, K),
        tuning=tuning,
        interpret=interpret,
    )


def _scale(s_smem: Any, stored: Any, dtype: Any) -> Array:
    """Returns scales [groups, rows of W] in shared memory for every weight, `across.load`."""
    dealt = stored != dtype
    layout = across.columns(s_smem.shape[0], dealt=dealt)
    if not dealt:
        s = plgpu.load(s_smem, layout=layout)
    elif stored == jnp.uint8:
        s = across.exponents(plgpu.load(s_smem, layout=layout))
    else:
        s = weight_only.read_scale(s_smem, stored, layout).astype(dtype)
    return across.spread(s, dealt=dealt)


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
