"""Products of 8-bit activations on Hopper: int8 with int8 or int4, FP8 with FP8, int4 or e2m1."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import four_bits, hopper, interleave, shares, zero_points
from pallas_kernels import tuning as tunings
from pallas_kernels.blocks import Blocks, first_of_step, groups_of, in_sixteen_bytes
from pallas_kernels.hopper import Operand
from pallas_kernels.tuning import TILE_K, TILE_N, Tuning

_STEPS = 4  # of a token, in the 16 bytes that TMA loads at least
_FP8 = ("float8_e4m3fn", "float8_e5m2")
# What weights of 4 bits are times their multiples, by the type of those and of activations.
_MULTIPLES = {("int8", "int8"): "int8 of int4", ("uint8", "float8_e4m3fn"): "e4m3 of e2m1"}


def supports(
    w_dtype: Any, x_dtype: Any, K: int, N: int, group_size: int, *, multiples: Any = None
) -> str | None:
    """Returns why the kernel cannot compute a product, or None if it can.

    Args:
      group_size: inputs with a scale of their own, or with a multiple.
      multiples: their type; None: there are none.

    Example:
      >>> supports("int8", "int8", 4096, 4096, 4096)
      >>> supports("int8", "float8_e4m3fn", 4096, 4096, 4096)
      'weights of int8 with activations of float8_e4m3fn: int4 with int8 or e4m3, int8s, or FP8s'
    """
    names = jnp.dtype(w_dtype).name, jnp.dtype(x_dtype).name
    if names[0] == "int4":
        is_known = names[1] in ("int8", "float8_e4m3fn")
    else:
        is_known = names == ("int8", "int8") or all(n in _FP8 for n in names)
    if not is_known:
        return (
            f"weights of {names[0]} with activations of {names[1]}: int4 with int8 or e4m3, int8s,"
            " or FP8s"
        )
    if K % TILE_K or N % TILE_N:
        return f"K={K}, N={N}: both must be multiples of {TILE_K}"
    if multiples is not None:
        if names[0] != "int4" or (jnp.dtype(multiples).name, names[1]) not in _MULTIPLES:
            return (
                f"{jnp.dtype(multiples).name} multiples with {names[0]} and {names[1]}: they make"
                f" {' or '.join(_MULTIPLES.values())}, for activations of that type"
            )
        if group_size not in (32, 64) and (group_size % TILE_K or not group_size):
            return f"groups of {group_size}: it takes 32, 64 and multiples of {TILE_K}"
    elif group_size not in (TILE_K, K):
        return f"groups of {group_size}: it takes {TILE_K}, or one group of all K"
    return None


def ordered(x: Array, w_dtype: Any, *, multiples: Any = None) -> Array:
    """Returns codes x [.., K] in the order in which `matmul` multiplies weights of a type by them.

    Args:
      multiples: their type; None: there are none.
    """
    if jnp.dtype(w_dtype) != jnp.int4:
        return x
    if x.dtype == jnp.int8:
        return interleave.for_int8(x)
    return x if multiples is not None else interleave.for_e4m3(x)


def matmul(
    x: Array,
    w: Array,
    x_scale: Array,
    w_scale: Array | Blocks,
    *,
    multiples: Array | None = None,
    out_dtype: Any = jnp.bfloat16,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> Array:
    """Returns y[m, n] = sum_g x_scale[m, g] * w_scale[g, n] * sum_(k in g) x[m, k] * w[n, k].

    As `reference.eight_bit`. Inner sums are int32 and exact, or float32 in the tensor core. With
    groups of 128 every one is summed on its own there and added in float32 registers, as the tensor
    core's own sum of FP8 products keeps fewer bits (DeepSeek-AI, 2024, section 3.3.2).

    Multiples of a column's scale are scales of groups for which no sum leaves the tensor core, if
    a weight times its multiple is of 8 bits again: an int4 times an integer (Lin et al., 2024,
    QServe, section 4.1), or an e2m1 times some e4m3.

    Args:
      x: [M, K] int8, float8_e4m3fn or float8_e5m2, in the order of `ordered`. With int4 the fusion
        that rounds x may as well write it so.
      w: [N, K] int8, int4 in the order of `interleave`, or one of the FP8 types. As int4 also codes
        of e2m1, if there are multiples: `interleave.signs_apart`.
      x_scale: float32 [M, G], with G = 1 or G = K / 128, or [M, 1]. A scale of the whole tensor is
        repeated.
      w_scale: float32, bfloat16 or float16 [G, N], or `Blocks` of them.
      multiples: None; or by what weights are multiplied, [G', N]: int4 by int8 of -15 .. 16, for
        int8 activations; e2m1 by `e2m1.scales` of uint8, for float8_e4m3fn, of 2^-5 to 64 and 1,
        1.25 or 1.5 times a power of two. Groups have 32, 64 or multiples of 128 inputs. x_scale is
        [M, 1] and w_scale [1, N] then. Sums of integers fit into int32 for K of up to 2^17.
      out_dtype: of y: bfloat16, float16 or float32.
      tuning: default: `tuning.eight_bit`.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU.

    Raises:
      ValueError: for shapes or types that `supports` refuses.
    """
    if isinstance(w_scale, Blocks) and groups_of(w_scale) == 1:
        w_scale = w_scale.decoded()
    of_blocks, w_scale = w_scale, w_scale.values if isinstance(w_scale, Blocks) else w_scale
    (M, K), N, G = x.shape, w.shape[0], groups_of(of_blocks)
    in_blocks, has_groups = isinstance(of_blocks, Blocks), G > 1
    own = (N // TILE_N, G) if in_blocks else (G, N)
    if w.shape[1] != K or w_scale.shape != own or x_scale.shape not in ((M, G), (M, 1)):
        raise ValueError(
            f"x {x.shape}, w {w.shape}, x_scale {x_scale.shape} and w_scale {w_scale.shape} must be"
            " [M, K], [N, K], [M, G] or [M, 1], and [G, N] or `Blocks` of [N / 128, G]."
        )
    rows = G if multiples is None else len(multiples)
    group = K // rows if K % rows == 0 else 0
    if multiples is not None and (multiples.shape[1] != N or w_scale.shape != (1, N)):
        raise ValueError(
            f"multiples {multiples.shape} and w_scale {w_scale.shape} must be [G', N] and [1, N]."
        )
    has_multiples = multiples is not None
    kind = None if multiples is None else multiples.dtype
    if reason := supports(w.dtype, x.dtype, K, N, group, multiples=kind):
        raise ValueError(f"pallas_kernels.eight_bit: {reason}.")
    out_dtype = jnp.dtype(out_dtype)
    tuning = tuning or tunings.eight_bit(
        M, K, N, hopper.bits(w.dtype), group, hopper.bits(out_dtype), multiples=has_multiples
    )
    tile_m = tuning.tile_m
    total_dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    is_packed = w.dtype == jnp.int4
    # int4 is decoded as 16 times what it is for int8, unless it is multiplied.
    unit = 1 / 16 if is_packed and x.dtype == jnp.int8 and not has_multiples else 1.0
    of_tokens = x_scale.shape[1] == 1
    shape = (hopper.ROWS, tile_m)
    per_step = max(1, tuning.tile_k // group)
    shared: Any = of_blocks.shared(per_step, 1) if isinstance(of_blocks, Blocks) else None
    columns_of_groups = [pl.ds(g * TILE_K, TILE_K) for g in range(per_step)]

    def weight(w_smem, multiples=()):
        return four_bits.load_bytes(w_smem, x.dtype, multiples) if is_packed else w_smem

    def step(w_smem, x_smem, *rest):
        *multiples, turn, _, rows, total = rest
        loaded = [zero_points.load(ref.at[g, rows]) for ref in multiples for g in range(per_step)]
        w = weight(w_smem.at[rows], loaded)
        turn.begin()
        plgpu.wgmma(total, w, x_smem.T)
        turn.end()
        if is_packed:
            hopper.loaded()
        plgpu.wgmma_wait(0)  # before the stage is released
        return total

    def step_in_groups(w_smem, x_smem, sw_smem, *rest):
        *sx_smem, turn, k, rows, total = rest
        # There are too many scales to hold them during the products.
        is_late = bool(sx_smem) and tile_m > 64
        for g, columns in enumerate(columns_of_groups):
            w = weight(w_smem.at[rows, columns])

            def scale(g=g):
                # One for the whole tile is a factor of a token's, and not of every sum.
                if in_blocks:
                    (s,) = shared.read(sw_smem, k, g)
                else:
                    s = hopper.by_row(sw_smem.at[g, rows], shape)
                for ref in sx_smem:
                    own = steps_of(ref, k, g, plgpu.Layout.WGMMA.reduce(0))
                    own = own * s if in_blocks else own
                    own = lax.broadcast_in_dim(own, shape, (1,))
                    s = own if in_blocks else own * s
                return s

            s = None if is_late else scale()
            is_last = g == per_step - 1
            right = x_smem.at[:, columns]
            d = summed(g, w, right, turn, shape, is_loaded=is_last and not is_late)
            total += d * (scale() if s is None else s)
        if is_late:
            hopper.loaded()
        return total

    def step_by_token(w_smem, x_smem, sw_smem, sx_smem, turn, k, rows, total):
        for g, columns in enumerate(columns_of_groups):
            s = steps_of(sx_smem.at[rows], k, g, plgpu.Layout.WGMMA.reduce(1))
            s *= shared.read(sw_smem, k, g)[0]
            left, right = x_smem.at[rows, columns], w_smem.at[:, columns]
            is_last = g == per_step - 1
            d = summed(g, left, right, turn, (hopper.ROWS, TILE_N), is_loaded=is_last)
            total += d * lax.broadcast_in_dim(s, d.shape, (0,))
        return total

    def steps_of(sx_smem, k, g, layout):
        at = first_of_step(k, _STEPS, per_step) + g
        return hopper.load_column(sx_smem, at, layout)

    def summed(g, left, right, turn, shape, is_loaded):
        """Returns the sums of a group's products, in float32."""

        def product(d):
            plgpu.wgmma(d, left, right.T)
            turn.end()
            if is_loaded:
                hopper.loaded()

        turn.begin()
        d = hopper.from_zero(product, shape, total_dtype, g)
        return d.astype(jnp.float32)

    def scaled(total, features, tokens, sx, *sw):
        scale = hopper.by_column(sx.at[0, tokens], shape, unit)
        for ref in sw:
            scale = hopper.by_row(ref.at[0, features], shape) * scale
        return total.astype(jnp.float32) * scale

    operands = [Operand(w, "n", columns=TILE_K), Operand(x, "m", columns=TILE_K)]
    if multiples is not None:
        steps = max(1, group // tuning.tile_k)
        multiples = lax.bitcast_convert_type(multiples, jnp.int8)
        operands.append(Operand(multiples, "n", is_row=True, rows=per_step, steps_per_row=steps))
    if in_blocks:
        operands.append(shared.operand())
    elif has_groups:
        operands.append(Operand(w_scale, "n", is_row=True, rows=per_step))
    in_steps = has_groups and not of_tokens  # are scales of x; else they are of sums over all of K
    if in_steps:
        operands.append(
            Operand(
                in_sixteen_bytes(x_scale.astype(jnp.float32)),
                "m",
                width=_STEPS,
                steps_per_row=_STEPS // per_step,
            )
        )
    # A thread has two rows and 32 columns. Where blocks of weights have one factor, tokens have all
    # the others: then they had better be the rows.
    by_token = in_steps and in_blocks and not is_packed and tile_m == 2 * hopper.ROWS
    sizes = M, K, N
    rows_of_x = [] if in_steps else [hopper.in_whole_tiles(x_scale, tile_m)]
    late = rows_of_x if has_groups else [*rows_of_x, w_scale]
    # They multiply sums that are complete: parts of integers are added exactly.
    in_epilogue = bool(late) and shares.most_parts(tuning, sizes) == 1
    sum_dtype = jnp.float32 if has_groups else total_dtype
    y = hopper.product(
        operands,
        step_by_token if by_token else step_in_groups if has_groups else step,
        scaled if in_epilogue else lambda total, *_: total * unit if in_steps else total,
        whole=late if in_epilogue else (),
        in_tensor_core=None if has_groups else total_dtype,
        rows_of="m" if by_token else "n",
        sum_dtype=sum_dtype,
        out_dtype=sum_dtype if late and not in_epilogue else out_dtype,
        sizes=sizes,
        tuning=tuning,
        interpret=interpret,
    )
    if late and not in_epilogue:
        y = y.astype(jnp.float32) * (x_scale.astype(jnp.float32) * unit)
        y = y if has_groups else y * w_scale
    return y.astype(out_dtype)
