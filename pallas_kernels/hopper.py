"""The skeleton of every Hopper product: persistent CTAs, a ring of TMA buffers, two warpgroups.

A kernel computes the transpose, yᵀ [N, M] = W [N, K] xᵀ [K, M], and stores y. A wgmma takes its
left operand from registers, which is where dequantized weights are born, and has 64 rows: here
output features. The tokens become its n, a multiple of 8, so that decoding wastes little.

Each CTA has one warpgroup that loads tiles by TMA into a ring of buffers in shared memory, and two
that multiply. CTAs are persistent and walk over work items: an output tile and a part of K. Every
part writes its own sums, which XLA adds afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tuning import TILE_N, Tuning

ROWS = 64  # of a wgmma: the output features of one warpgroup
MEMORY_REGISTERS = 88  # of a thread that loads; with fewer its index arithmetic spills


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array that the loop reads, a block of it in every step of `tile_k` inputs.

    Attributes:
      array: [N, K] or [M, K]; or, with `is_row`, [R, N] or [R, M] with a row for some inputs. In a
        transposed product N are the inputs and K the features. Of experts a stack of such arrays.
      of: "n" for output features, "m" for tokens.
      is_row: whether K, or what stands for it, is the first axis.
      rows: with `is_row`, rows in a block.
      steps_per_row: steps that share one block; with `is_row`, one row.
      columns: without `is_row`, inputs that are contiguous in a tile in shared memory; the kernel
        can cut the tile there. With it, the same of features; None: rows lie one after another.
      shared_by: without `is_row`, features or tokens that share a row.
      width: without `is_row`, columns of a block; None: one for every input.
    """

    array: Array
    of: str
    is_row: bool = False
    rows: int = 1
    steps_per_row: int = 1
    columns: int | None = None
    shared_by: int = 1
    width: int | None = None

    def block_spec(self, size: int, tile_k: int, first: Any) -> Any:
        block = lambda k: (first + k) // self.steps_per_row
        shape, index = (self.rows, size), lambda k: (block(k), 0)
        if not self.is_row:
            width = self.width or tile_k
            shape, index = (max(1, size // self.shared_by), width), lambda k: (0, block(k))
        tiling = () if self.columns is None else transforms(self.columns, self.array.dtype)
        return plgpu.BlockSpec(shape, index, transforms=tiling, memory_space=plgpu.SMEM)

    def cut(self, ref: Any, tile: Any, size: int) -> Any:
        """Returns what belongs to a tile of `size` features or tokens."""
        if self.is_row:
            return ref.at[:, pl.ds(tile * size, size)]
        rows = max(1, size // self.shared_by)
        return ref.at[pl.ds(tile * size // self.shared_by, rows), :]


def bits(dtype: Any) -> int:
    """Returns how many bits of device memory a value takes."""
    dtype = jnp.dtype(dtype)
    return 4 if dtype.name in ("int4", "uint4") else dtype.itemsize * 8


def transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
    """Returns the layout of a tile in shared memory: rows of at most 128 bytes, swizzled."""
    swizzle = plgpu.find_swizzle(columns * bits(dtype))
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits(dtype)))  # pyright: ignore[reportAbstractUsage]
    if swizzle == 16:  # is none
        return (tiling,)
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def padded_tokens(x: Array, tile_m: int) -> Array:
    """Returns x with zero tokens up to whole tiles."""
    return jnp.pad(x, ((0, -x.shape[0] % tile_m), (0, 0)))


def product(
    operands: Sequence[Operand],
    step: Callable[..., Any],
    finish: Callable[..., Any],
    *,
    whole: Sequence[Array] = (),
    table: Array | None = None,
    scratch: Any = None,
    in_tensor_core: Any = None,
    loads_blocks: bool = True,
    experts: Array | None = None,
    out_dtype: Any,
    sizes: tuple[int, int, int],
    tuning: Tuning,
    interpret: Any = None,
) -> Array:
    """Returns the sums of every part of K, [split_k, M, N].

    Args:
      operands: what the loop reads.
      step: function (*blocks in shared memory, table and scratch if there are, rows, total) ->
        total that adds the products of one step for `rows` of the tile's features.
      finish: function (sums [64, tile_m], features, tokens, *whole) -> sums to store.
      whole: arrays that `finish` reads from global memory.
      table: an array that every CTA first copies to shared memory.
      scratch: shared memory of a warpgroup, its first axis of size 2 taken away.
      in_tensor_core: None: `total` is a float32 value; or the type of the accumulator that it is.
      loads_blocks: whether `step` loads blocks into registers and does not itself end with
        `commit_smem`. What only a wgmma reads needs no fence before TMA overwrites it.
      experts: None; or int32 [M / tile_m + 1]: of each tile of tokens its expert, the index into
        stacked operands; and last how many tiles there are. What follows them is not computed.
      sizes: (M, K, N), multiples of the tiles.
    """
    (M, K, N), tile_m, split = sizes, tuning.tile_m, tuning.split_k
    steps = K // tuning.tile_k // split
    if steps * split * tuning.tile_k != K or M % tile_m or N % TILE_N:
        raise ValueError(f"{tuning} does not tile M={M}, K={K}, N={N}.")
    size = {"n": TILE_N, "m": tile_m}

    def pipeline(step, context, part: Any = 0):
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            memory_registers=MEMORY_REGISTERS,
            wg_axis="wg",
            num_compute_wgs=2,
            max_concurrent_steps=tuning.stages,
            compute_context=context,
            in_specs=[o.block_spec(size[o.of], tuning.tile_k, part * steps) for o in operands],
        )

    def kernel(*refs):
        refs = list(refs)
        ins, extra = [refs.pop(0) for _ in operands], [refs.pop(0) for _ in whole]
        expert_of = None if experts is None else refs.pop(0)
        source = None if table is None else refs.pop(0)
        out, out_smem = refs.pop(0), refs.pop(0)
        own_scratch = () if scratch is None else (refs.pop(0),)
        tables = ()
        if table is not None:
            table_smem, is_there = refs
            tables = (table_smem,)

            @pl.when(lax.axis_index("wg") == 0)
            def _():
                assert source is not None
                plgpu.copy_gmem_to_smem(source, table_smem, is_there)

            plgpu.barrier_wait(is_there)

        def ignore(*_, **__):
            pass

        def of_expert(tile):
            if expert_of is None:
                return ins
            expert = expert_of[tile]
            rows = [o.array.shape[1] if o.array.ndim == 3 else None for o in operands]
            return [
                ref if n is None else ref.at[pl.ds(expert * n, n)]
                for ref, n in zip(ins, rows, strict=True)
            ]

        m_tiles = M // tile_m if expert_of is None else expert_of[M // tile_m]

        @functools.partial(
            pl.run_scoped,
            buffers=pipeline(ignore, ignore).get_allocations(*of_expert(0)),
            collective_axes="wg",
        )
        def _(buffers):
            wg = lax.axis_index("wg")
            rows = pl.ds(wg * ROWS, ROWS)

            @plgpu.nd_loop((N // TILE_N, split, m_tiles), collective_axes="sm")
            def _(item):
                n, part, m = item.index
                own = pl.ds(n * TILE_N + wg * ROWS, ROWS)
                tokens = pl.ds(m * tile_m, tile_m)

                def store(total):
                    tile = finish(total, own, tokens, *extra)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
                    out_smem.at[wg].T[...] = plgpu.layout_cast(
                        tile.astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED
                    )
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_smem.at[wg], out.at[part, tokens, own])

                def context(run):
                    if in_tensor_core is None:
                        zeros = jnp.zeros((ROWS, tile_m), jnp.float32)
                        store(run(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)))
                        return

                    @functools.partial(
                        pl.run_scoped,
                        total=plgpu.WGMMAAccumulatorRef((ROWS, tile_m), in_tensor_core),
                    )
                    def _(total):
                        run(total)
                        store(total[...])

                def body(_, *blocks):
                    work = [ref.at[wg] for ref in own_scratch]
                    total = step(*blocks[:-1], *tables, *work, rows, blocks[-1])
                    if loads_blocks:
                        # Loads go through the generic proxy, the TMA that next writes this buffer
                        # through the async one: a barrier alone does not order them.
                        plgpu.commit_smem()
                    return total

                tile = {"n": n, "m": m}
                cut = lambda o, ref: o.cut(ref, tile[o.of], size[o.of])
                pipeline(body, context, part)(
                    *map(cut, operands, of_expert(m)), allocations=buffers
                )

        plgpu.wait_smem_to_gmem(0)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((split, M, N), out_dtype),
        grid=(min(tuning.sms, math.prod((N // TILE_N, split, M // tile_m))),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=[
            plgpu.SMEM((2, tile_m, ROWS), out_dtype, transforms=transforms(ROWS, out_dtype)),
            *([] if scratch is None else [scratch]),
            *([] if table is None else [plgpu.SMEM(table.shape, table.dtype), plgpu.Barrier()]),
        ],
        interpret=interpret,
    )
    arrays = [o.array.reshape(-1, o.array.shape[-1]) for o in operands]
    rest = [a for a in (experts, table) if a is not None]
    return call(*arrays, *whole, *rest)
