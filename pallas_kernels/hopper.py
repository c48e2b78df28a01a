"""The skeleton of every Hopper product: persistent CTAs, a ring of TMA buffers, two warpgroups.

A kernel computes the transpose, yᵀ [N, M] = W [N, K] xᵀ [K, M], and stores y. A wgmma takes its
left operand from registers, which is where dequantized weights are born, and has 64 rows: here
output features. The tokens become its n, a multiple of 8, so that decoding wastes little. Where
nothing is decoded and there are many tokens, they may be the rows: y = x Wᵀ.

Each CTA has one warpgroup that loads blocks by TMA into a ring of buffers in shared memory, and two
that multiply. CTAs are persistent: each walks through the steps of its `shares.Share`, and the ring
goes on from one output tile to the next. What a CTA computes of a tile is one sum; where a tile is
on several CTAs, XLA adds their sums afterwards.
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

from pallas_kernels.shares import added, most_parts, share_of
from pallas_kernels.tuning import TILE_N, Tuning

ROWS = 64  # of a wgmma: the output features of one warpgroup
MEMORY_REGISTERS = 88  # of a thread that loads; with fewer its index arithmetic spills
COMPUTE_REGISTERS = 208  # of one that multiplies: half of the others of an SM, in eights
TOKENS = 8  # TMA moves rows of tokens in eights; if there are fewer in all, as many as there are
STORED = 128  # tokens that are stored at once, through shared memory
ALIGNMENT = 128  # bytes: TMA writes at multiples of it in shared memory, where blocks lie in a ring


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
      width: columns of a block; None: one for every input, or with `is_row` one for every feature
        or token.
    """

    array: Array
    of: str
    is_row: bool = False
    rows: int = 1
    steps_per_row: int = 1
    columns: int | None = None
    shared_by: int = 1
    width: int | None = None

    def block(self, size: int, tile_k: int) -> tuple[int, int]:
        """Returns the shape of a block, of a tile of `size` features or tokens."""
        if self.is_row:
            return self.rows, self.width or size
        return max(1, size // self.shared_by), self.width or tile_k

    def at(self, ref: Any, tile: Any, k: Any, size: int, tile_k: int) -> Any:
        """Returns the block of step k of a tile, in global memory."""
        rows, width = self.block(size, tile_k)
        k = k // self.steps_per_row
        if self.is_row:
            return ref.at[pl.ds(k * rows, rows), pl.ds(tile * width, width)]
        return ref.at[pl.ds(tile * size // self.shared_by, rows), pl.ds(k * width, width)]

    def ring(self, stages: int, size: int, tile_k: int) -> Any:
        """Returns the type of its buffers in shared memory.

        Raises:
          ValueError: if TMA could not write to one of them.
        """
        block = self.block(size, tile_k)
        if (nbytes := math.prod(block) * bits(self.array.dtype) // 8) % ALIGNMENT:
            raise ValueError(
                f"blocks {block} of {self.array.dtype} have {nbytes} bytes, no multiple of"
                f" {ALIGNMENT}: TMA could not write the next one."
            )
        tiling = () if self.columns is None else transforms(self.columns, self.array.dtype)
        return plgpu.SMEM((stages, *block), self.array.dtype, transforms=tiling)


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


@dataclasses.dataclass(frozen=True)
class Turn:
    """When a warpgroup hands products to the tensor core: between `begin` and `end`.

    Two warpgroups that start at once share it and are done at once; then it idles while both decode
    or add. In turns, the products of one are multiplied while the other does that (Shah et al.,
    2024, "FlashAttention-3", section 3.1). What is decoded is so before its turn; accumulators that
    start at 0 are made in it, as only next to their products do they cost nothing.

    Attributes:
      barriers: one for each warpgroup, on which it waits for the other; None: they take no turns.
      wg: whose turn it is, 0 or 1.
    """

    barriers: Any
    wg: Any

    def open(self) -> None:
        """Lets the first warpgroup go first."""
        if self.barriers is not None:
            pl.when(self.wg == 1)(lambda: plgpu.barrier_arrive(self.barriers.at[0]))

    def begin(self) -> None:
        if self.barriers is not None:
            plgpu.barrier_wait(self.barriers.at[self.wg])

    def end(self) -> None:
        if self.barriers is not None:
            plgpu.barrier_arrive(self.barriers.at[1 - self.wg])


def loaded() -> None:
    """Says in a step that its blocks are in registers, as far as it loads any.

    Loads go through the generic proxy, the TMA that next writes the buffer through the async one: a
    barrier alone does not order them. Best said while products are on their way, where it takes no
    time of its own. What only a wgmma reads needs no such fence.
    """
    plgpu.commit_smem()


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
    rows_of: str = "n",
    experts: Array | None = None,
    sum_dtype: Any = jnp.float32,
    out_dtype: Any,
    sizes: tuple[int, int, int],
    tuning: Tuning,
    interpret: Any = None,
) -> Array:
    """Returns y [M, N].

    Args:
      operands: what the loop reads.
      step: function (*blocks in shared memory, table and scratch if there are, turn, rows, total)
        -> total that adds the products of one step for `rows` of the tile's features.
      finish: function (sums [64, tile_m], features, tokens, *whole) -> sums to store.
      whole: arrays that `finish` reads from global memory.
      table: an array that every CTA first copies to shared memory.
      scratch: shared memory of a warpgroup, its first axis of size 2 taken away.
      in_tensor_core: None: `total` is a float32 value; or the type of the accumulator that it is.
      loads_blocks: whether `step` loads blocks into registers and does not itself end with
        `commit_smem`. What only a wgmma reads needs no fence before TMA overwrites it.
      rows_of: what the 64 rows of a warpgroup are: "n", features, or "m", tokens, of which a tile
        then has 128. Sums are [64, 128] there, and `rows` some of the tile's tokens.
      experts: None; or int32 [M / tile_m + 1]: of each tile of tokens its expert, the index into
        stacked operands; and last how many tiles there are. What follows them is not computed.
      sum_dtype: of what `finish` returns; sums of fragments are stored and added in it.
      sizes: (M, K, N), the latter two multiples of the tiles. Tokens that there are not are neither
        read nor written; but arrays in rows of tokens, and those in `whole`, fill the last tile.
    """
    (M, K, N), tile_m, stages = sizes, tuning.tile_m, tuning.stages
    padded = M if M <= TOKENS else -(-M // TOKENS) * TOKENS
    arrays = [
        jnp.pad(o.array, ((0, padded - M), (0, 0))) if o.of == "m" and not o.is_row else o.array
        for o in operands
    ]
    steps = K // tuning.tile_k
    if steps % tuning.split_k or K % tuning.tile_k or N % TILE_N:
        raise ValueError(f"{tuning} does not tile K={K}, N={N}.")
    size = {"n": TILE_N, "m": tile_m}
    if size[rows_of] != 2 * ROWS:
        raise ValueError(f"{tuning} has {tile_m} tokens in a tile: rows of tokens need {2 * ROWS}.")
    of_tokens = rows_of == "m"
    shape = (ROWS, TILE_N if of_tokens else tile_m)
    out_shape = shape if of_tokens else (min(tile_m, STORED), ROWS)
    if experts is None:
        parts = most_parts(tuning, sizes)
    else:  # fewer tiles may be cut into more
        parts = tuning.split_k
    store_dtype = jnp.dtype(out_dtype if parts == 1 else sum_dtype)
    grid = share_of(tuning, sizes).ctas

    def kernel(*refs):
        refs = list(refs)
        ins, extra = [refs.pop(0) for _ in operands], [refs.pop(0) for _ in whole]
        expert_of = None if experts is None else refs.pop(0)
        source = None if table is None else refs.pop(0)
        out, out_smem, is_full, is_free = (refs.pop(0) for _ in range(4))
        rings = [refs.pop(0) for _ in operands]
        own_scratch = () if scratch is None else (refs.pop(0),)
        turns = refs.pop(0) if tuning.in_turn else None
        tables = ()
        if table is not None:
            table_smem, is_there = refs
            tables = (table_smem,)

            @pl.when(lax.axis_index("wg") == 0)
            def _():
                assert source is not None
                plgpu.copy_gmem_to_smem(source, table_smem, is_there)

            plgpu.barrier_wait(is_there)

        m_tiles = -(-M // tile_m)
        if expert_of is not None:
            m_tiles = expert_of[m_tiles]
        share = share_of(tuning, sizes, lax.axis_index("sm"), m_tiles)

        def after(slot):
            return jnp.where(slot == stages - 1, 0, slot + 1)

        def load():
            """Fills the ring, one warpgroup."""

            def one(i, slot, wait):
                tile, k = share.step(i)
                at = {"n": tile // m_tiles, "m": tile % m_tiles}
                if wait:
                    plgpu.barrier_wait(is_free.at[slot])
                expert = None if expert_of is None else expert_of[at["m"]]
                for o, ref, ring in zip(operands, ins, rings, strict=True):
                    if expert is not None and o.array.ndim == 3:
                        n = o.array.shape[1]
                        ref = ref.at[pl.ds(expert * n, n)]
                    block = o.at(ref, at[o.of], k, size[o.of], tuning.tile_k)
                    plgpu.copy_gmem_to_smem(block, ring.at[slot], is_full.at[slot])
                return after(slot)

            count = share.count
            first = jnp.minimum(stages, count)
            lax.fori_loop(0, first, functools.partial(one, wait=False), 0)
            lax.fori_loop(first, count, functools.partial(one, wait=True), 0)

        def compute():
            """Empties it, two warpgroups."""
            wg = lax.axis_index("wg")
            rows = pl.ds(wg * ROWS, ROWS)
            turn = Turn(turns, wg)
            turn.open()

            def fragment(i, slot):
                tile = share.tile(i)
                n, m = tile // m_tiles, tile % m_tiles
                features, tokens = pl.ds(n * TILE_N, TILE_N), pl.ds(m * tile_m, tile_m)
                if of_tokens:  # 64 of them are this warpgroup's
                    tokens = pl.ds(m * tile_m + wg * ROWS, ROWS)
                else:
                    features = pl.ds(n * TILE_N + wg * ROWS, ROWS)

                def body(_, carry):
                    slot, total = carry
                    plgpu.barrier_wait(is_full.at[slot])
                    work = [ref.at[wg] for ref in own_scratch]
                    add = total if accumulator is None else accumulator
                    blocks = (ring.at[slot] for ring in rings)
                    total = step(*blocks, *tables, *work, turn, rows, add)
                    if loads_blocks:
                        # Loads go through the generic proxy, the TMA that next writes this buffer
                        # through the async one: a barrier alone does not order them.
                        plgpu.commit_smem()
                    plgpu.barrier_arrive(is_free.at[slot])
                    return after(slot), None if accumulator is not None else total

                def store(total):
                    sums = finish(total, features, tokens, *extra).astype(store_dtype)
                    own = out_smem.at[wg]
                    for first in range(0, shape[1], STORED):
                        part = sums if shape[1] <= STORED else sums[:, first : first + STORED]
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the one before
                        if of_tokens:
                            own[...] = part
                            at = tokens, features
                        else:
                            own.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
                            at = pl.ds(m * tile_m + first, own.shape[0]), features
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(own, out.at[share.part(i), *at])

                accumulator = None
                if in_tensor_core is None:
                    zeros = jnp.zeros(shape, jnp.float32)
                    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                    slot, total = lax.fori_loop(*share.bounds(i), body, (slot, zeros))
                    store(total)
                    return slot

                def in_accumulator(total):
                    nonlocal accumulator
                    accumulator = total
                    end, _ = lax.fori_loop(*share.bounds(i), body, (slot, None))
                    store(total[...])
                    return end

                return pl.run_scoped(
                    in_accumulator, plgpu.WGMMAAccumulatorRef(shape, in_tensor_core)
                )

            lax.fori_loop(0, share.fragments, fragment, 0)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(lax.axis_index("wg") == 2)
        def _():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            load()

        @pl.when(lax.axis_index("wg") < 2)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            compute()

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((parts, padded, N), store_dtype),
        grid=(grid,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=[
            plgpu.SMEM(
                (2, *out_shape), store_dtype, transforms=transforms(out_shape[1], store_dtype)
            ),
            plgpu.Barrier(num_arrivals=len(operands), num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            *(o.ring(stages, size[o.of], tuning.tile_k) for o in operands),
            *([] if scratch is None else [scratch]),
            *([plgpu.Barrier(num_barriers=2)] if tuning.in_turn else []),
            *([] if table is None else [plgpu.SMEM(table.shape, table.dtype), plgpu.Barrier()]),
        ],
        interpret=interpret,
    )
    rest = [a for a in (experts, table) if a is not None]
    sums = call(*(a.reshape(-1, a.shape[-1]) for a in arrays), *whole, *rest)[:, :M]
    if parts == 1:
        return sums[0]
    m_tiles = None if experts is None else experts[-1]
    return added(sums, share_of(tuning, sizes, m_tiles=m_tiles), tile_m).astype(out_dtype)
