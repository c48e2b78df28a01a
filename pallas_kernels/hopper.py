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
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels.shares import Share, added, most_parts, share_of
from pallas_kernels.tuning import TILE_N, Tuning

ROWS = 64  # of a wgmma: the output features of one warpgroup
MEMORY_REGISTERS = 88  # of a thread that loads; with fewer its index arithmetic spills
COMPUTE_REGISTERS = 208  # of one that multiplies: half of the others of an SM, in eights
TOKENS = 8  # TMA moves rows of tokens in eights; if there are fewer in all, as many as there are
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


def from_zero(
    products: Callable[[Any], None], shape: tuple[int, int], dtype: Any, number: int
) -> Array:
    """Returns the sums of products in an accumulator that starts at 0.

    As `pl.run_scoped`, but with a zero of its own: that of several accumulators of a step is one
    register to the compiler, and the assembler then writes it to each of the second one's, as many
    instructions as sums. From a zero that it knows a product starts for nothing.

    Args:
      products: function of the accumulator. What it multiplies is waited for.
      dtype: float32 or int32.
      number: of the accumulator in a step. Code that differs is not merged.
    """
    dtype = jnp.dtype(dtype)
    text = f"mov.b32 $0, 0;  // {number}"

    def values(_):
        kind = mgpu.utils.dtype_to_ir_type(dtype)
        layout = plgpu.Layout.WGMMA.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), object)
        zero = llvm.inline_asm(kind, [], text, "=f" if dtype == jnp.float32 else "=r")
        registers.fill(vector.broadcast(layout.registers_element_type(kind), zero))
        is_signed = None if dtype == jnp.float32 else True
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)

    zeros = plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct(shape, dtype, plgpu.Layout.WGMMA))(
        values
    )()
    start: Any = plgpu.WGMMAAccumulatorRef.init(zeros)
    return pl.run_state(products)(start)


def in_whole_tiles(steps: Array, tile_m: int) -> Array:
    """Returns steps of tokens [M, G] in rows of tokens, [G, M'], which fill the last tile."""
    return jnp.pad(steps.astype(jnp.float32), ((0, -steps.shape[0] % tile_m), (0, 0))).T


def by_row(ref: Any, shape: tuple[int, int]) -> Array:
    """Returns what each row of sums is multiplied by, in float32, in a kernel."""
    s = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(s.astype(jnp.float32), shape, (0,))


def by_column(ref: Any, shape: tuple[int, int], factor: Any = 1.0) -> Array:
    """Returns what each column of sums is multiplied by, float32, in a kernel."""
    s = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(s * factor, shape, (1,))


def load_column(ref: Any, at: Any, layout: Any) -> Array:
    """Returns column `at` of a block [R, C] in shared memory, as a vector in a layout, in a kernel.

    Pallas loads no vector whose values are not contiguous.
    """
    (rows, _), dtype = ref.shape, jnp.dtype(ref.dtype)

    def values(_, ref, at):
        kind, index = layout.to_mgpu(), ir.IndexType.get()
        at = arith.index_cast(index, at.registers.item())
        registers = np.empty(kind.registers_shape((rows,)), object)
        of_lane = kind.registers_element_type(mgpu.utils.dtype_to_ir_type(dtype))
        for place, (row,) in zip(
            np.ndindex(registers.shape), kind.thread_idxs((rows,)), strict=True
        ):
            places = [arith.addi(row, mgpu.utils.c(i, index)) for i in range(kind.vector_length)]
            loaded = [memref.load(ref, [row, at]) for row in places]
            registers[place] = vector.from_elements(of_lane, loaded)
        return mgpu.FragmentedArray(_registers=registers, _layout=kind, _is_signed=None)

    values.reference = lambda block, at: block[:, at]  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct((rows,), dtype, layout),
    )(values)(ref, jnp.asarray(at, jnp.int32))


def put(ref: Any, value: Array) -> None:
    """Stores registers, in whatever layout they are, without a care for banks or sectors."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # JAX 0.11, where every store may be so
        ref[...] = value


def product(
    operands: Sequence[Operand],
    step: Callable[..., Any],
    finish: Callable[..., Any],
    *,
    whole: Sequence[Array] = (),
    table: Array | None = None,
    in_tensor_core: Any = None,
    rows_of: str = "n",
    stored_as: Any = plgpu.Layout.WGMMA_TRANSPOSED,
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
      step: function (*blocks in shared memory, table if there is one, turn, k, rows, total)
        -> total that adds the products of step k of a tile for `rows` of its features. One that
        loads blocks into registers says so, `loaded`.
      finish: function (sums [64, tile_m], features, tokens, *whole) -> sums to store.
      whole: arrays that `finish` reads from global memory.
      table: an array that every CTA first copies to shared memory.
      in_tensor_core: None: `total` is a float32 value; or the type of the accumulator that it is.
      rows_of: what the 64 rows of a warpgroup are: "n", features, or "m", tokens, of which a tile
        then has 128. Sums are [64, 128] there, and `rows` some of the tile's tokens.
      stored_as: layout of sums [64, tile_m] in registers when they are stored, of rows of features:
        what `finish` returns, or what a wgmma's can be cast to.
      experts: None; or int32 [M / tile_m + 1]: of each tile of tokens its expert, the index into
        stacked operands; and last how many tiles there are. What follows them is not computed.
      sum_dtype: of what `finish` returns; sums of fragments are stored and added in it.
      sizes: (M, K, N), the latter two multiples of the tiles. Tokens that there are not are neither
        read nor written; but arrays in rows of tokens, and those in `whole`, fill the last tile.
    """
    (M, K, N), tile_m = sizes, tuning.tile_m
    if (K // tuning.tile_k) % tuning.split_k or K % tuning.tile_k or N % TILE_N:
        raise ValueError(f"{tuning} does not tile K={K}, N={N}.")
    if rows_of == "m" and tile_m != 2 * ROWS:
        raise ValueError(f"{tuning} has {tile_m} tokens in a tile: rows of tokens need {2 * ROWS}.")
    # Of experts, fewer tiles than there may be can be cut into more parts.
    parts = most_parts(tuning, sizes) if experts is None else tuning.split_k
    store_dtype = jnp.dtype(out_dtype if parts == 1 else sum_dtype)
    kernel = _Kernel(
        operands, step, finish, in_tensor_core, rows_of == "m", stored_as, tuning,
        sizes, store_dtype,
    )  # fmt: skip
    padded = M if M <= TOKENS else -(-M // TOKENS) * TOKENS
    arrays = [
        jnp.pad(o.array, ((0, padded - M), (0, 0))) if o.of == "m" and not o.is_row else o.array
        for o in operands
    ]
    given = {
        "ins": [a.reshape(-1, a.shape[-1]) for a in arrays],
        "whole": list(whole),
        "experts": experts,
        "table": table,
    }

    memory = kernel.memory(table)

    def body(given: dict[str, Any], out: Any, *own: Any):
        kernel.run(_Cta(**given, out=out, **dict(zip(memory, own, strict=True))))

    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((parts, padded, N), store_dtype),
        grid=(share_of(tuning, sizes).ctas,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=list(memory.values()),  # in this order
        interpret=interpret,
    )
    sums = call(given)[:, :M]
    if parts == 1:
        return sums[0]
    m_tiles = None if experts is None else experts[-1]
    return added(sums, share_of(tuning, sizes, m_tiles=m_tiles), tile_m).astype(out_dtype)


@dataclasses.dataclass(frozen=True)
class _Cta:
    """What a CTA has: arrays in global memory, and its own shared memory and barriers.

    Attributes:
      ins, whole, experts, table: what `product` was given.
      out: [parts, M, N].
      out_smem: what each warpgroup stores next.
      rings: of every operand the buffers, which are full or free as one.
      is_full, is_free: a barrier for each buffer.
      turns: see `Turn`.
      table_smem, has_table: the table's copy, and a barrier.
    """

    ins: Sequence[Any]
    whole: Sequence[Any]
    experts: Any
    table: Any
    out: Any
    out_smem: Any
    rings: Sequence[Any]
    is_full: Any
    is_free: Any
    turns: Any = None
    table_smem: Any = None
    has_table: Any = None


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel: what its three warpgroups do. Attributes are those of `product`.

    Attributes:
      of_tokens: whether the rows of a warpgroup are tokens.
      store_dtype: of what is stored.
    """

    operands: Sequence[Operand]
    step: Callable[..., Any]
    finish: Callable[..., Any]
    in_tensor_core: Any
    of_tokens: bool
    stored_as: Any
    tuning: Tuning
    sizes: tuple[int, int, int]
    store_dtype: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Of a warpgroup's sums."""
        return ROWS, TILE_N if self.of_tokens else self.tuning.tile_m

    @property
    def at_once(self) -> int:
        """How many of a warpgroup's columns of sums are stored at once."""
        return min(self.shape[1], self.tuning.stored)

    def size(self, of: str) -> int:
        """Returns the features ("n") or tokens ("m") of a tile."""
        return {"n": TILE_N, "m": self.tuning.tile_m}[of]

    def memory(self, table: Array | None) -> dict[str, Any]:
        """Returns the types of shared memory and barriers, by their names in `_Cta`."""
        stages = self.tuning.stages
        stored = (ROWS, self.at_once) if self.of_tokens else (self.at_once, ROWS)
        # JAX 0.11 swizzles only what a wgmma leaves. Other sums collide in banks, once a tile.
        is_usual = self.stored_as is plgpu.Layout.WGMMA_TRANSPOSED
        can_swizzle = is_usual or hasattr(plgpu, "store")
        swizzle = transforms(stored[1], self.store_dtype) if can_swizzle else ()
        types = {
            "out_smem": plgpu.SMEM((2, *stored), self.store_dtype, transforms=swizzle),
            "is_full": plgpu.Barrier(num_arrivals=len(self.operands), num_barriers=stages),
            "is_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "rings": [o.ring(stages, self.size(o.of), self.tuning.tile_k) for o in self.operands],
        }
        if self.tuning.in_turn:
            types["turns"] = plgpu.Barrier(num_barriers=2)
        if table is not None:
            types["table_smem"] = plgpu.SMEM(table.shape, table.dtype)
            types["has_table"] = plgpu.Barrier()
        return types

    def run(self, cta: _Cta) -> None:
        """Is the kernel's body, of every warpgroup."""
        if cta.table is not None:
            copy = lambda: plgpu.copy_gmem_to_smem(cta.table, cta.table_smem, cta.has_table)
            pl.when(lax.axis_index("wg") == 0)(copy)
            plgpu.barrier_wait(cta.has_table)
        m_tiles = -(-self.sizes[0] // self.tuning.tile_m)
        if cta.experts is not None:
            m_tiles = cta.experts[m_tiles]
        share = share_of(self.tuning, self.sizes, lax.axis_index("sm"), m_tiles)

        @pl.when(lax.axis_index("wg") == 2)
        def _():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            self.load(cta, share, m_tiles)

        @pl.when(lax.axis_index("wg") < 2)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            self.compute(cta, share, m_tiles)

    def after(self, slot: Any) -> Any:
        """Returns the buffer that follows one in the ring."""
        return jnp.where(slot == self.tuning.stages - 1, 0, slot + 1)

    def load(self, cta: _Cta, share: Share, m_tiles: Any) -> None:
        """Fills the ring, step after step of all tiles."""

        def one(i, slot, wait):
            tile, k = share.step(i)
            at = {"n": tile // m_tiles, "m": tile % m_tiles}
            if wait:
                plgpu.barrier_wait(cta.is_free.at[slot])
            expert = None if cta.experts is None else cta.experts[at["m"]]
            for o, ref, ring in zip(self.operands, cta.ins, cta.rings, strict=True):
                if expert is not None and o.array.ndim == 3:
                    n = o.array.shape[1]
                    ref = ref.at[pl.ds(expert * n, n)]
                block = o.at(ref, at[o.of], k, self.size(o.of), self.tuning.tile_k)
                plgpu.copy_gmem_to_smem(block, ring.at[slot], cta.is_full.at[slot])
            return self.after(slot)

        first = jnp.minimum(self.tuning.stages, share.count)
        lax.fori_loop(0, first, functools.partial(one, wait=False), 0)
        lax.fori_loop(first, share.count, functools.partial(one, wait=True), 0)

    def compute(self, cta: _Cta, share: Share, m_tiles: Any) -> None:
        """Empties it, and stores the sums of one fragment after another."""
        wg = lax.axis_index("wg")  # asked for here alone: in a loop that takes instructions
        turn = Turn(cta.turns, wg)
        turn.open()

        def fragment(i, slot):
            tile = share.tile(i)
            n, m = tile // m_tiles, tile % m_tiles
            slot, total = self.sum(cta, turn, share.bounds(i), slot)
            self.store(cta, wg, total, (n, m), share.part(i))
            return slot

        lax.fori_loop(0, share.fragments, fragment, 0)
        plgpu.wait_smem_to_gmem(0)

    def sum(self, cta: _Cta, turn: Turn, bounds: tuple[Any, Any], slot: Any) -> tuple[Any, Any]:
        """Returns the sums of some steps of a tile, after the buffer that comes next."""
        rows = pl.ds(turn.wg * ROWS, ROWS)
        extra = [cta.table_smem] if cta.table_smem is not None else []

        def one(k, slot, total):
            plgpu.barrier_wait(cta.is_full.at[slot])
            blocks = (ring.at[slot] for ring in cta.rings)
            total = self.step(*blocks, *extra, turn, k, rows, total)
            plgpu.barrier_arrive(cta.is_free.at[slot])
            return self.after(slot), total

        if self.in_tensor_core is None:
            zeros = plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), plgpu.Layout.WGMMA)
            return lax.fori_loop(*bounds, lambda k, carry: one(k, *carry), (slot, zeros))

        def in_accumulator(total):
            end = lax.fori_loop(*bounds, lambda k, slot: one(k, slot, total)[0], slot)
            return end, total[...]

        return pl.run_scoped(
            in_accumulator, plgpu.WGMMAAccumulatorRef(self.shape, self.in_tensor_core)
        )

    def store(self, cta: _Cta, wg: Any, total: Any, tile: tuple[Any, Any], part: Any) -> None:
        """Stores a warpgroup's sums of a fragment of a tile, through shared memory."""
        (n, m), tile_m = tile, self.tuning.tile_m
        features, tokens = pl.ds(n * TILE_N, TILE_N), pl.ds(m * tile_m, tile_m)
        if self.of_tokens:  # 64 of them are this warpgroup's
            tokens = pl.ds(m * tile_m + wg * ROWS, ROWS)
        else:
            features = pl.ds(n * TILE_N + wg * ROWS, ROWS)
        sums = self.finish(total, features, tokens, *cta.whole).astype(self.store_dtype)
        own = cta.out_smem.at[wg]
        for first in range(0, self.shape[1], self.at_once):
            is_all = self.at_once == self.shape[1]
            some = sums if is_all else sums[:, first : first + self.at_once]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the one before
            if self.of_tokens:
                own[...] = some
                features = pl.ds(n * TILE_N + first, self.at_once)
            else:
                some = plgpu.layout_cast(some, self.stored_as)
                put(own.T, some)
                tokens = pl.ds(m * tile_m + first, self.at_once)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own, cta.out.at[part, tokens, features])
