"""Rows of a packed weight on Hopper, as floats: the lookups of an embedding.

Every lane reads its own words of rows that are wherever an index says, as TMA cannot on Hopper.
They arrive as a product's would from shared memory, and are decoded by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels import few_bits, four_bits, hopper, weight_only, whole_bytes, zero_points
from pallas_kernels.hopper import ROWS, TOKENS
from pallas_kernels.interleave import bytes_of_int4, codes_of_bytes, interleaved
from pallas_kernels.tuning import TILE_K

_EXACT = jnp.float16  # has all integers of 8 bits, and their differences, and all e4m3


def rows(
    indices: Array,
    w: Array,
    scale: Array,
    *,
    codebook: Sequence[float] | None = None,
    zero: int | Array | None = None,
    bits: int | None = None,
    out_dtype: Any = jnp.bfloat16,
    interpret: Any = None,
) -> Array:
    """Returns y[m, k] = w[indices[m], k] * scale[k // g, indices[m]], as `reference.rows` does.

    Bit for bit: the product is rounded once, to `out_dtype`. Unlike `weight_only.matmul` it takes
    the values of a codebook as they are, float32.

    Args:
      indices: [M] int32. Where one is not in 0 .. N - 1 the row is NaN.
      w, zero: [N, K], as for `weight_only.matmul`; codes of 8 bits lie in the order of
        `interleave`.
      scale: [G, N], as there, but neither `Nested` nor `Blocks`.
      codebook: None, or the 16 values of the codes 0 .. 15, which the bits of int4 are then.
      bits: of codes in bytes, which do not tell by themselves: 2 or 3; or None for all other types.
      out_dtype: bfloat16, float16 or float32.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU.

    Raises:
      ValueError: for shapes or types that `weight_only.supports` refuses.
    """
    weight_only.check_bits(bits, w)
    (M,), (N, _), G, K = indices.shape, w.shape, scale.shape[0], weight_only.inputs_of(w, bits)
    if scale.shape != (G, N) or K % G or indices.dtype != jnp.int32:
        raise ValueError(
            f"pallas_kernels.lookup: indices {indices.dtype.name}, w {w.shape} and scale"
            f" {scale.shape} must be int32, [N, K] and [G, N]."
        )
    if reason := weight_only.supports(w.dtype, jnp.bfloat16, K, N, K // G, scale.dtype):
        raise ValueError(f"pallas_kernels.lookup: {reason}.")
    weight_only.check_codebook(codebook, w)
    weight_only.check_zero(zero, w, bits or hopper.bits(w.dtype), (G, N), codebook)
    group = min(K // G, TILE_K)
    groups = TILE_K // group  # of a tile
    stored = scale.dtype
    padded = M if M <= TOKENS else -(-M // TOKENS) * TOKENS
    at_once = min(ROWS, -(-M // TOKENS) * TOKENS)  # rows of a CTA that are stored

    def body(given: dict[str, Any], out: Any, out_smem: Any):
        m, k = lax.axis_index("m"), lax.axis_index("k")
        token = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=zero_points.ROWS)
        # What is not stored looks up as the last one.
        token = jnp.minimum(token + m * ROWS, M - 1)
        i = _of_rows(given["indices"], 0, token)
        is_inside = (i >= 0) & (i < N)
        i = jnp.where(is_inside, i, 0)

        def of_groups(ref):
            first = k * TILE_K // (K // G)
            return [_of_rows(ref, first + g, i) for g in range(groups)]

        zeros = of_groups(given["zero"]) if "zero" in given else zero
        w = _decoded(given["w"], i, k, given.get("codebook"), bits, zeros)
        of_columns = []
        for s in of_groups(given["scale"]):
            s = jnp.where(is_inside, weight_only.float_scale(s, stored), jnp.nan)
            of_columns.append(lax.broadcast_in_dim(s, (ROWS, group), (0,)))
        y = w * (of_columns[0] if groups == 1 else jnp.concatenate(of_columns, axis=1))
        out_smem[...] = y.astype(out_dtype)
        plgpu.commit_smem()
        some = pl.ds(m * ROWS, at_once), pl.ds(k * TILE_K, TILE_K)
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, at_once)], out.at[some])
        plgpu.wait_smem_to_gmem(0)

    given: dict[str, Any] = {
        "indices": indices[None],
        "w": w,
        "scale": weight_only.as_bits(scale),
    }
    if codebook is not None:
        given["codebook"] = jnp.asarray(codebook, jnp.float32)
    if zero is not None and not isinstance(zero, int):
        given["zero"] = zero
    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((padded, K), out_dtype),
        grid=(-(-M // ROWS), K // TILE_K),
        grid_names=("m", "k"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=[
            plgpu.SMEM((ROWS, TILE_K), out_dtype, transforms=hopper.transforms(TILE_K, out_dtype))
        ],
        interpret=interpret,
    )
    return call(given)[:M]


def _decoded(w: Any, i: Array, k: Any, codebook: Any, bits: int | None, zero: Any) -> Array:
    """Returns tile k of the rows `i` of a weight without scales, float32 [64, 128], in a kernel."""
    if bits is not None:
        data = _codes(w, i, k, TILE_K * bits // 8, few_bits.READ)
        return few_bits.floats(data, bits, _EXACT, zero).astype(jnp.float32)
    if w.dtype == jnp.int4:
        q = _codes(w, i, k, TILE_K, four_bits.READ)
        if codebook is not None:
            return _looked_up(q, codebook)
        return four_bits.floats(q, _EXACT, zero=8 if zero is None else zero).astype(jnp.float32)
    q = _codes(w, i, k, TILE_K, whole_bytes.READ)
    zero = whole_bytes.MIDDLE if zero is None else zero
    return whole_bytes.floats(q, _EXACT, zero).astype(jnp.float32)


def _codes(ref: Any, i: Array, k: Any, width: int, layout: Any) -> Array:
    """Returns columns k * width on of the rows `i` of an array, in a layout, in a kernel."""
    dtype, shape = jnp.dtype(ref.dtype), (i.shape[0], width)
    nbytes = lambda n: n * hopper.bits(dtype) // 8

    def values(_, ref, i, k):
        i8, i32, i64 = (ir.IntegerType.get_signless(n) for n in (8, 32, 64))
        kind, element = layout.to_mgpu(), mgpu.utils.dtype_to_ir_type(dtype)
        of_lane = ir.VectorType.get((kind.vector_length,), element)
        # Four lanes read 16 bytes of a row at once; `of_lane` is a word.
        _, column = next(iter(kind.thread_idxs((i.shape[0], 4 * kind.vector_length))))
        first = arith.shrui(arith.index_cast(i64, column), mgpu.utils.c(dtype == jnp.int4, i64))
        tile = arith.muli(arith.extui(i64, k.registers.item()), mgpu.utils.c(nbytes(width), i64))
        first = arith.addi(first, tile)
        start = []  # of the rows that a lane has
        for row in i.registers.flat:
            row = arith.extui(i64, mgpu.utils.bitcast(row, i32))
            row = arith.muli(row, mgpu.utils.c(nbytes(ref.type.shape[1]), i64))
            start.append(arith.addi(row, first))
        base = mgpu.utils.memref_ptr(ref)
        words = []
        for n in range(math.prod(kind.registers_shape(shape))):
            block, row = divmod(n, len(start))
            at = arith.addi(start[row], mgpu.utils.c(16 * block, i64))
            at = llvm.getelementptr(
                base.type, base, [at], [-(2**31)], i8, llvm.GEPNoWrapFlags.inbounds
            )
            words.append(mgpu.utils.bitcast(llvm.load(i32, at), of_lane))
        registers = np.empty(len(words), object)
        registers[:] = words
        registers = registers.reshape(kind.registers_shape(shape))
        return _array(registers, kind, dtype)

    def reference(w, i, k):  # read by the interpreter
        return lax.dynamic_slice_in_dim(w, k * width, width, axis=1)[i]

    values.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), zero_points.ROWS, plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout),
    )(values)(ref, i, jnp.asarray(k, jnp.int32))


def _of_rows(ref: Any, g: Any, i: Array) -> Array:
    """Returns what group g of the rows `i` of a weight has, of an array [G, N], in a kernel."""
    dtype, layout = jnp.dtype(ref.dtype), zero_points.ROWS

    def values(_, ref, g, i):
        kind, index = layout.to_mgpu(), ir.IndexType.get()
        of_lane = kind.registers_element_type(mgpu.utils.dtype_to_ir_type(dtype))
        registers = np.empty_like(i.registers)
        g = arith.index_cast(index, g.registers.item())
        for place, row in np.ndenumerate(i.registers):
            row = mgpu.utils.bitcast(row, ir.IntegerType.get_signless(32))
            value = memref.load(ref, [g, arith.index_cast(index, row)])
            registers[place] = vector.from_elements(of_lane, [value])
        return _array(registers, kind, dtype)

    values.reference = lambda a, g, i: a[g, i]  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), layout),
        return_type=plgpu.ShapeDtypeStruct(i.shape, dtype, layout),
    )(values)(ref, jnp.asarray(g, jnp.int32), i)


def _array(registers: np.ndarray, layout: Any, dtype: Any) -> Any:
    """Returns an array of such registers, in inlined GPU code."""
    is_int = jnp.issubdtype(dtype, jnp.integer)
    is_signed = jnp.issubdtype(dtype, jnp.signedinteger) if is_int else None
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)


def _looked_up(q: Array, codebook: Any) -> Array:
    """Returns the values of codes, float32 in the layout of wgmma, in a kernel.

    All 16 of them are in one or two lines of L1: copying a table to shared memory would take longer
    than the few codes of a CTA do.

    Args:
      q: int4 [R, C] in the order of `interleaved`, in the layout `four_bits.READ`.
      codebook: float32 [16], in global memory.
    """

    def values(_, q, codebook):
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        layout = plgpu.Layout.WGMMA.to_mgpu()
        out = np.empty(layout.registers_shape(q.shape), object)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        by_block = out.reshape(-1, 4, 2)  # 32 columns, 8 of them, rows i and i + 8
        for (block, row), eight in np.ndenumerate(q.registers.reshape(-1, 2)):
            word = mgpu.utils.bitcast(eight, i32)
            for b in range(4):
                own = []
                for shift in (8 * b, 8 * b + 4):
                    code = arith.shrui(word, mgpu.utils.c(shift, i32))
                    code = arith.andi(code, mgpu.utils.c(15, i32))
                    own.append(memref.load(codebook, [arith.index_castui(index, code)]))
                by_block[block, b, row] = vector.from_elements(pair, own)
        return _array(out, layout, jnp.float32)

    def reference(q, codebook):  # read by the interpreter
        return codebook[codes_of_bytes(interleaved(bytes_of_int4(q)))]

    values.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(four_bits.READ, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(q.shape, jnp.dtype("float32"), plgpu.Layout.WGMMA),
    )(values)(q, codebook)
