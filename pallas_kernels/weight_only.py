"""Weight-only products on Hopper: 2- to 8-bit weights, dequantized in registers, times 16-bit x."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3, few_bits, four_bits, hopper, whole_bytes, zero_points
from pallas_kernels import tuning as tunings
from pallas_kernels.blocks import Blocks, groups_of
from pallas_kernels.hopper import Operand
from pallas_kernels.interleave import interleaved_pairs
from pallas_kernels.nested import Nested, as_float
from pallas_kernels.tuning import TILE_K, TILE_N, Tuning

_WEIGHTS = ("int4", "int8", "float8_e4m3fn", "uint8")
_ACTIVATIONS = ("bfloat16", "float16")
_SCALES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "uint8")


def upcast(w_smem: Any, dtype: Any, *table: Any, zero: int | Sequence[Array] | None) -> Array:
    """Returns weights in shared memory as 16-bit floats, in the layout of wgmma, in a kernel.

    Integers are times `zero_points.unit`.

    Args:
      table: of the values of int4.
      zero: what unsigned integers are less, see `four_bits.load`; None: the middle.
    """
    if w_smem.dtype == jnp.int4:
        return four_bits.load(w_smem, dtype, *table, zero=8 if zero is None else zero)
    return whole_bytes.load(w_smem, dtype, whole_bytes.MIDDLE if zero is None else zero)


def read_scale(s_smem: Any, dtype: Any, layout: Any = zero_points.ROWS) -> Array:
    """Returns scales in shared memory, one for every row of weights, as float32, in a kernel.

    Args:
      dtype: what they are: as stored; float8_e4m3fn for its bits in int8.
      layout: in which a lane has them.
    """
    return float_scale(plgpu.load(s_smem, layout=layout), dtype, layout)


def float_scale(s: Array, dtype: Any, layout: Any = zero_points.ROWS) -> Array:
    """Returns scales that are loaded as `as_bits` has them as float32, in a kernel.

    Args:
      dtype, layout: as for `read_scale`.
    """
    if dtype == jnp.float8_e4m3fn:
        return e4m3.floats(s, layout)
    if dtype == jnp.uint8:  # the exponent of a float32; 2^-127 is subnormal
        bits = jnp.maximum(s.astype(jnp.int32) << 23, 1 << 22)
        s = lax.bitcast_convert_type(bits, jnp.float32)
        return s + (s - s)  # infinity is NaN here
    return s.astype(jnp.float32)


def as_bits(scale: Array) -> Array:
    """Returns scales as a kernel loads them: e4m3 as int8."""
    is_e4m3 = scale.dtype == jnp.float8_e4m3fn
    return lax.bitcast_convert_type(scale, jnp.int8) if is_e4m3 else scale


def supports(
    w_dtype: Any, x_dtype: Any, K: int, N: int, group_size: int, scale_dtype: Any = jnp.bfloat16
) -> str | None:
    """Returns why the kernel cannot compute a product, or None if it can.

    Example:
      >>> supports("int4", "bfloat16", 4096, 4096, 128)
      >>> supports("uint4", "bfloat16", 4096, 4096, 128)
      'weights of uint4: it takes int4, int8, float8_e4m3fn, uint8, the last of 2 or 3 bits'
      >>> supports("int4", "bfloat16", 4096, 4096, 8)
      'groups of 8: it takes 16, 32, 64 and multiples of 128'
    """
    w_name, x_name = jnp.dtype(w_dtype).name, jnp.dtype(x_dtype).name
    if w_name not in _WEIGHTS:
        return f"weights of {w_name}: it takes {', '.join(_WEIGHTS)}, the last of 2 or 3 bits"
    if x_name not in _ACTIVATIONS:
        return f"activations of {x_name}: it takes {', '.join(_ACTIVATIONS)}"
    if K % TILE_K or N % TILE_N:
        return f"K={K}, N={N}: both must be multiples of {TILE_K}"
    if (group_size not in (16, 32, 64) and group_size % TILE_K) or K % group_size:
        return f"groups of {group_size}: it takes 16, 32, 64 and multiples of {TILE_K}"
    s_name = jnp.dtype(scale_dtype).name
    if s_name not in _SCALES or (s_name == "uint8" and x_name != "bfloat16"):
        return (
            f"scales of {s_name} with activations of {x_name}: it takes {', '.join(_SCALES)}, the"
            " last with bfloat16 alone"
        )
    return None


def check_zero(
    zero: int | Array | None,
    w: Array,
    bits: int,
    shape: tuple[int, ...],
    codebook: Sequence[float] | None,
) -> None:
    """Refuses zero points that a kernel cannot subtract from codes of so many bits.

    Args:
      shape: that they must have, one for each group.

    Raises:
      ValueError: for them.
    """
    if zero is None:
        return
    if isinstance(zero, int) and not 0 <= zero < 2**bits:
        raise ValueError(f"a zero point of {zero} must be a code, 0 to {2**bits - 1}.")
    if codebook is not None or w.dtype not in (jnp.int4, jnp.int8, jnp.uint8):
        raise ValueError(
            f"zero points of {'a codebook' if codebook is not None else w.dtype.name}: kernels take"
            " them of int4, int8 and codes of 2 and 3 bits."
        )
    if not isinstance(zero, int) and (zero.shape != shape or zero.dtype != jnp.uint8):
        raise ValueError(f"zero points {zero.dtype.name} {zero.shape} must be uint8 {shape}.")


def inputs_of(w: Array, bits: int | None) -> int:
    """Returns the inputs K of a weight [.., N, K], or of codes of so many bits in bytes."""
    return w.shape[-1] if bits is None else w.shape[-1] * 8 // bits


def check_bits(bits: int | None, w: Array) -> None:
    """Refuses bits of codes that no kernel reads in bytes, and those of what is not in bytes.

    Raises:
      ValueError: for them.
    """
    if bits not in ((2, 3) if w.dtype == jnp.uint8 else (None,)):
        raise ValueError(
            f"bits={bits} with {w.dtype.name}: it takes 2 and 3 with uint8, None with all others."
        )


def check_codebook(codebook: Sequence[float] | None, w: Array) -> None:
    """Refuses a codebook that no kernel reads.

    Raises:
      ValueError: for it.
    """
    if codebook is not None and (w.dtype != jnp.int4 or len(codebook) != 16):
        raise ValueError(
            f"a codebook of {len(codebook)} values with {w.dtype.name}: kernels take 16, with int4."
        )


def ordered(x: Array) -> Array:
    """Returns x [.., K] in the order in which `matmul` multiplies weights of 8 bits in none."""
    return interleaved_pairs(x)


def matmul(
    x: Array,
    w: Array,
    scale: Array | Nested | Blocks,
    *,
    codebook: Sequence[float] | None = None,
    zero: int | Array | None = None,
    x_scale: Array | None = None,
    experts: Array | None = None,
    out_dtype: Any = None,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> Array:
    """Returns y[m, n] = sum_k x[m, k] * w[n, k] * scale[k // g, n], as `reference.weight_only`.

    Or that times x_scale[m], if x are codes. Sums are float32. With `scale_on="accumulator"`
    products are exact; with "weight" every weight is first rounded to x's type once more. That is
    taken for scales of 8 bits with weights of 4; it is exact for e2m1 in bfloat16. A scale of all
    inputs multiplies the sums, whatever is tuned.

    Args:
      x: [M, K] bfloat16 or float16.
      w: [N, K] int4, int8 or float8_e4m3fn in the order of `interleave`; or uint8 [N, K * b / 8],
        codes of b = 2 or 3 bits in the order of `planes`, which stand for code - zero. If those of
        8 bits lie as `eight_bit.matmul` takes them, x must be in the order of `ordered`.
      scale: [G, N] bfloat16, float16 or float32; float8_e4m3fn; or uint8, which stands for the
        power of two 2^(scale - 127) (e8m0; needs x in bfloat16, which has all of them). K / G is
        16, 32, 64 or a multiple of 128. Or `Nested` ones, without experts, or `Blocks`.
      codebook: None, or the 16 values of the codes 0 .. 15, which the bits of int4 are then. They
        are rounded to x's type.
      zero: zero point, what unsigned codes are less: uint8 [G, N], all of them codes, or one for
        all. Of int4 these codes are w + 8, of int8 w + 128. Default: the middle, so that both are
        as they are, and of codes of 2 and 3 bits 2 and 4.
      x_scale: None; or float32 [M, 1], steps of tokens, of which x are codes of up to 8 bits.
      experts: None; or of each tile of `tuning.tile_m` tokens the expert that it is multiplied by,
        as `experts.Tiles` has them. Then w is [E, N, K] and scale [E, G, N].
      out_dtype: of y, bfloat16, float16 or float32; default: x's.
      tuning: default: `tuning.weight_only`.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU.

    Raises:
      ValueError: for shapes or types that `supports` refuses.
    """
    if isinstance(scale, Blocks) and groups_of(scale) == 1:
        scale = scale.decoded()
    nested, scale = (scale, scale.codes) if isinstance(scale, Nested) else (None, scale)
    blocks, scale = (scale, scale.values) if isinstance(scale, Blocks) else (None, scale)
    (M, K), N, G = x.shape, w.shape[-2], groups_of(blocks or scale)
    stack = () if experts is None else w.shape[:1]
    bits = w.shape[-1] * hopper.bits(w.dtype) // K
    packed = bits if w.dtype == jnp.uint8 else None
    columns = K * bits // hopper.bits(w.dtype)
    own = (*stack, G, N) if blocks is None else (*stack, N // TILE_N, G)
    if w.shape != (*stack, N, columns) or scale.shape != own or K % G:
        raise ValueError(
            f"x {x.shape}, w {w.shape} and scale {scale.shape} must be [M, K], [N, K] and [G, N],"
            " or `Blocks` of [N / 128, G], the latter two stacked for experts."
        )
    if x_scale is not None and (x_scale.shape != (M, 1) or experts is not None):
        raise ValueError(
            f"pallas_kernels.weight_only: x_scale {x_scale.shape} must be [M, 1] = {(M, 1)}, and"
            " there must be no experts, whose rows are multiplied by theirs outside."
        )
    if nested is not None and experts is not None:
        raise ValueError("pallas_kernels.weight_only: nested scales of experts: it takes others.")
    check_zero(zero, w, bits, (*stack, G, N), codebook)
    stored = jnp.dtype(scale.dtype if nested is None else jnp.float32)
    if reason := supports(w.dtype, x.dtype, K, N, K // G, stored):
        raise ValueError(f"pallas_kernels.weight_only: {reason}.")
    if packed not in (None, 2, 3):
        raise ValueError(f"pallas_kernels.weight_only: codes of {packed} bits: it takes 2 and 3.")
    check_codebook(codebook, w)
    known, zeros = (zero, None) if zero is None or isinstance(zero, int) else (None, zero)
    codes = w.dtype if codebook is None else jnp.uint4
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    tuning = tuning or tunings.weight_only(
        M, K, N, K // G, bits, hopper.bits(out_dtype),
        table_bytes=0 if codebook is None else four_bits.TABLE_BYTES,
        scale_bits=8 * stored.itemsize,
        zero_points=zeros is not None,
    )  # fmt: skip
    group = min(K // G, tuning.tile_k)  # inputs of one step with one scale
    per_step, steps = tuning.tile_k // group, K // G // group  # groups of a step, steps of a group
    on_sums = G == 1 and nested is None and experts is None and stored.itemsize > 1
    shared: Any = nested or blocks
    shared = shared and shared.shared(per_step, steps)
    on_accumulator = tuning.scale_on == "accumulator" and not on_sums
    n_scales = 0 if on_sums else 1 if nested is None else 2

    def parts(w_smem, *rest):
        """Returns what a step has: functions that decode a group's scales, and columns; ..."""
        scales, rest = rest[:n_scales], rest[n_scales:]
        z_smem, rest = (None, rest) if zeros is None else (rest[0], rest[1:])
        *table, turn, k, rows, total = rest
        columns = columns_of(w_smem.at[rows], z_smem, rows, *table)

        def scale_of(g):
            s_smem, *outer = scales
            if blocks is not None:
                return shared.read(s_smem, k, g)[0]
            if nested is None:
                return read_scale(s_smem.at[g, rows], scale.dtype)
            codes = as_float(plgpu.load(s_smem.at[g, rows], layout=plgpu.Layout.WGMMA.reduce(1)))
            factor, *offset = shared.read(*outer, k, g)
            return codes * factor + offset[0] if offset else codes * factor

        return scale_of, columns, turn, total

    def columns_of(w_smem, z_smem, rows, *table):
        """Returns a function (first, count) -> those columns of a block, decoded."""

        def less(first, n):
            if z_smem is None:
                return known
            width = min(group, n)
            return [
                zero_points.load(z_smem.at[k // group, rows])
                for k in range(first, first + n, width)
            ]

        if packed is None:
            return lambda first, n: upcast(
                w_smem.at[:, pl.ds(first, n)], x.dtype, *table, zero=less(first, n)
            )
        q = few_bits.load(w_smem, packed, x.dtype, less(0, tuning.tile_k))
        return lambda first, n: q[:, first : first + n]

    def step_on_accumulator(w_smem, x_smem, *rest):
        scale_of, columns, turn, total = parts(w_smem, *rest)
        groups = range(tuning.tile_k // group)
        # All groups are multiplied before the first is waited for, if there are registers.
        at_once = len(groups) if tuning.tile_m <= 16 else 1
        shape = plgpu.WGMMAAccumulatorRef((hopper.ROWS, tuning.tile_m), jnp.float32)
        for some in itertools.batched(groups, at_once):

            def products(*sums, some=some):
                for g, d in zip(some, sums, strict=True):
                    xt = x_smem.at[:, pl.ds(g * group, group)].T
                    plgpu.wgmma(d, columns(g * group, group), xt)
                turn.end()
                if some[-1] == groups[-1]:
                    hopper.loaded()
                return [d[...] for d in sums]  # waits

            own = [scale_of(g) for g in some]
            turn.begin()
            for s, d in zip(own, pl.run_scoped(products, *[shape] * len(some)), strict=True):
                total += d * lax.broadcast_in_dim(s, d.shape, range(s.ndim))
        return total

    def step_in_tensor_core(w_smem, x_smem, *rest):
        scale_of, columns, turn, total = parts(w_smem, *rest)
        for first in range(0, tuning.tile_k, TILE_K):  # one is multiplied, the next one decoded
            w = columns(first, TILE_K)
            if not on_sums:
                width = min(group, TILE_K)
                own = [
                    scale_of(k // group).astype(x.dtype)
                    for k in range(first, first + TILE_K, width)
                ]
                block = hopper.ROWS, width
                wide = [lax.broadcast_in_dim(s, block, range(s.ndim)) for s in own]
                w *= wide[0] if len(wide) == 1 else jnp.concatenate(wide, axis=1)
            turn.begin()
            plgpu.wgmma(total, w, x_smem.at[:, pl.ds(first, TILE_K)].T)
            turn.end()
        hopper.loaded()
        plgpu.wgmma_wait(0)  # before the stage is released
        return total

    shape = (hopper.ROWS, tuning.tile_m)

    def finish(total, features, tokens, *factors):
        sx, *s = factors if x_scale is not None else (None, *factors)
        if s:
            of_rows = hopper.by_row(s[0].at[0, features], shape)
            total *= zero_points.in_ones(of_rows, codes, x.dtype)
        else:
            total = zero_points.in_ones(total, codes, x.dtype)
        return total if sx is None else total * hopper.by_column(sx.at[0, tokens], shape)

    tile_columns = group if on_accumulator else tuning.tile_k
    w_width = None if packed is None else tuning.tile_k * packed // 8
    operands = [
        Operand(w, "n", columns=w_width or min(tile_columns, 128), width=w_width),
        Operand(x, "m", columns=min(tile_columns, 64)),
    ]
    if not on_sums and blocks is None:
        operands.append(
            Operand(as_bits(scale), "n", is_row=True, rows=per_step, steps_per_row=steps)
        )
    if shared is not None:
        operands.append(shared.operand())
    if zeros is not None:
        operands.append(Operand(zeros, "n", is_row=True, rows=per_step, steps_per_row=steps))
    whole = [] if x_scale is None else [hopper.in_whole_tiles(x_scale, tuning.tile_m)]
    return hopper.product(
        operands,
        step_on_accumulator if on_accumulator else step_in_tensor_core,
        finish,
        whole=[*whole, scale] if on_sums else whole,
        table=None if codebook is None else four_bits.table(codebook, x.dtype),
        in_tensor_core=None if on_accumulator else jnp.float32,
        experts=experts,
        out_dtype=out_dtype,
        sizes=(M, K, N),
        tuning=tuning,
        interpret=interpret,
    )  # fmt: skip
