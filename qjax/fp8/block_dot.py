"""block_dot: an FP8 product with a scale for each block of its sum, as a JAX primitive.

The sum of every block is scaled and added in float32, as DeepSeek-V3 trains (DeepSeek-AI, 2024,
section 3.3.2). Which implementation runs is chosen when it is lowered: on a CPU codes are upcast;
on a Hopper GPU a kernel adds the blocks' sums in registers; elsewhere XLA multiplies block by
block, which reads and writes all sums for each of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.tuning import TILE_K, TILE_N
from qjax import _compat
from qjax.ops.partitioning import axes_of, taker


class Blocks(NamedTuple):
    """Codes whose last axis is contracted, in blocks that have a scale.

    Attributes:
      codes: [*lead, R, C, g], in an FP8 type.
      scale: float32 [*lead, R, C], one for each row; or [*lead, ceil(R / g), C], for g rows.
    """

    codes: Array
    scale: Float[Array, "*lead r C"]

    @property
    def by_row(self) -> Array:
        """Scales [*lead, R, C]."""
        R, _, g = self.codes.shape[-3:]
        if self.scale.shape[-2] == R:
            return self.scale
        return jnp.repeat(self.scale, g, axis=-2)[..., :R, :]


def block_dot(a: Blocks, b: Blocks, *, exact_scale: bool, out_dtype: Any) -> Array:
    """Returns y[.., r, s] = sum_c scale_a[r, c] scale_b[s, c] sum_j a[r, c, j] b[s, c, j].

    Args:
      a: has a scale for each row.
      b: has that, or one for g rows.
      exact_scale: whether scales are powers of two.
      out_dtype: of y; sums are float32.
    """
    operands = _compat.align_varying(*a, *b)
    return block_dot_p.bind(*operands, exact_scale=exact_scale, out_dtype=jnp.dtype(out_dtype).name)


block_dot_p = _compat.Primitive("fp8_block_dot")


@block_dot_p.def_abstract_eval
def _abstract(qa, sa, qb, sb, *, exact_scale, out_dtype):
    del sa, sb, exact_scale
    shape = (*qa.shape[:-2], qb.shape[-3])
    partition = ()
    if not qa.sharding.mesh.empty:
        partition = (*qa.sharding.spec[:-2], qb.sharding.spec[-3])
    return _compat.out_aval(qa, shape, out_dtype, partition)


@functools.lru_cache(maxsize=4096)
def _eager(exact_scale, out_dtype):
    bind = functools.partial(block_dot_p.bind, exact_scale=exact_scale, out_dtype=out_dtype)
    return jax.jit(bind)


block_dot_p.def_impl(lambda *args, **params: _eager(**params)(*args))


def _batch(args, axes, **params):
    size = next(a.shape[d] for a, d in zip(args, axes, strict=True) if d is not None)

    def moved(t, own_axes, to):
        """Returns blocks with the batch axis at `to`."""

        def one(a, d):
            if d is not None:
                return jnp.moveaxis(a, d, to)
            return jnp.broadcast_to(jnp.expand_dims(a, to), (*a.shape[:to], size, *a.shape[to:]))

        return Blocks(*map(one, t, own_axes))

    pairs = Blocks(*args[:2]), Blocks(*args[2:])
    pair_axes = axes[:2], axes[2:]
    is_batched = [any(d is not None for d in own) for own in pair_axes]
    if all(is_batched):  # one more leading axis
        a, b = (moved(t, own, 0) for t, own in zip(pairs, pair_axes, strict=True))
        return block_dot_p.bind(*a, *b, **params), 0
    # More rows of the one, against the other as it is.
    at = is_batched.index(True)
    n_lead = pairs[1 - at].codes.ndim - 3
    many = moved(pairs[at], pair_axes[at], n_lead)
    R, _, g = many.codes.shape[-3:]
    if R % g:  # no block of rows may reach into the next
        many = Blocks(many.codes, many.by_row)

    def merged(a):
        return a.reshape(*a.shape[:n_lead], size * a.shape[n_lead + 1], *a.shape[n_lead + 2 :])

    rows = Blocks(*map(merged, many))
    both = (rows, pairs[1]) if at == 0 else (pairs[0], rows)
    y = block_dot_p.bind(*both[0], *both[1], **params)
    axis = n_lead + at
    return y.reshape(*y.shape[:axis], size, R, *y.shape[axis + 1 :]), axis


batching.primitive_batchers[block_dot_p] = _batch


# ---- implementations -----------------------------------------------------------------------------


def upcast(a: Blocks, b: Blocks, exact_scale: bool) -> Array:
    """As one float product, for processors without FP8.

    Codes times powers of two are exact in bfloat16; times other scales, close in float32.
    """
    dtype = jnp.bfloat16 if exact_scale else jnp.float32

    def scaled(t: Blocks) -> Array:
        x = t.codes.astype(dtype) * t.by_row[..., None].astype(dtype)
        return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])

    lead = tuple(range(a.codes.ndim - 3))
    last = len(lead) + 1
    return lax.dot_general(
        scaled(a),
        scaled(b),
        (((last,), (last,)), (lead, lead)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def by_block(a: Blocks, b: Blocks) -> Array:
    """As one FP8 product a block, each added in float32."""
    lead = tuple(range(a.codes.ndim - 3))
    last = len(lead) + 1

    def step(total, block):
        qa, sa, qb, sb = block
        y = lax.dot_general(
            qa, qb, (((last,), (last,)), (lead, lead)), preferred_element_type=jnp.float32
        )
        return total + y * sa[..., :, None] * sb[..., None, :], None

    arrays = a.codes, a.scale, b.codes, b.by_row
    blocks = [jnp.moveaxis(t, len(lead) + 1, 0) for t in arrays]
    start = jnp.zeros((*a.codes.shape[:-2], b.codes.shape[-3]), jnp.float32)
    start, *_ = _compat.align_varying(start, a.codes, b.codes)
    return lax.scan(step, start, blocks)[0]


def hopper(a: Blocks, b: Blocks, out_dtype: Any, interpret: Any = None) -> Array:
    """By the Hopper kernel; `against_hopper` must have nothing against it."""
    from pallas_kernels import blocks as kernel_blocks  # needs Mosaic GPU, which few programs do
    from pallas_kernels import eight_bit

    (R, C, g), S = a.codes.shape, b.codes.shape[0]
    rows = -(-S // TILE_N) * TILE_N
    codes = jnp.pad(b.codes.reshape(S, C * g), ((0, rows - S), (0, 0)))
    scale = b.scale
    if scale.shape[0] * TILE_N == rows:
        scale = kernel_blocks.Blocks(scale)
    else:
        scale = jnp.pad(scale, ((0, rows - S), (0, 0))).T
    y = eight_bit.matmul(
        a.codes.reshape(R, C * g), codes, a.scale, scale, out_dtype=out_dtype, interpret=interpret
    )
    return y[:, :S]


def against_hopper(a: Sequence[int], b: Sequence[int]) -> str | None:
    """Returns why the Hopper kernel cannot multiply codes of such shapes, or None if it can."""
    if len(a) != 3:
        return "stacked weights"
    if a[-1] != TILE_K:
        return f"blocks of {a[-1]}: it takes {TILE_K}"
    if 0 in (*a, *b):
        return "nothing to multiply"
    return None


def describe(block: int, n_lead: int) -> str:
    """Returns what computes a product with weights in blocks on GPUs, for `fp8.explain`."""
    shape = (1,) * (n_lead + 2) + (block,)
    why = against_hopper(shape, shape)
    if why is None:
        return f"blocks of {block}, on an H100 in one kernel, on other GPUs one after another"
    return f"blocks of {block}, on GPUs one after another (no kernel: {why})"


# ---- lowering ------------------------------------------------------------------------------------


def _lower(ctx, *args, platform=None, exact_scale, out_dtype):
    is_hopper = platform == "cuda" and _compat.capability_of(_compat.target(ctx)) == 90

    def run(qa, sa, qb, sb, out_dtype=out_dtype):
        a, b = Blocks(qa, sa), Blocks(qb, sb)
        if platform == "cpu":
            return upcast(a, b, exact_scale).astype(out_dtype)
        if is_hopper and against_hopper(qa.shape, qb.shape) is None:
            return hopper(a, b, out_dtype)
        return by_block(a, b).astype(out_dtype)

    ctx = _compat.unplaced(ctx)
    # One float product partitions by itself. A kernel does not, nor do blocks one after another.
    is_cut = platform != "cpu" and _compat.is_partitioned(ctx)
    with _compat.without_mesh():
        function = _partitioned(run, out_dtype, *ctx.avals_in) if is_cut else run
        return mlir.lower_fun(function, multiple_results=False)(ctx, *args)


mlir.register_lowering(block_dot_p, _lower)
for _platform in ("cuda", "cpu"):
    mlir.register_lowering(
        block_dot_p, functools.partial(_lower, platform=_platform), platform=_platform
    )
_compat.lower_with_devices(block_dot_p)


def _partitioned(run: Any, out_dtype: str, qa: Any, sa: Any, qb: Any, sb: Any) -> Any:
    """Returns `run` with a rule that says how it shards.

    Leading axes and both kinds of rows shard freely, those that share scales in whole blocks. Where
    blocks of the contraction are split, partial sums are added by one all-reduce in float32.
    """
    n_lead, g = len(qa.shape) - 3, qa.shape[-1]
    n_shared = sb.shape[-2] if sb.shape[-2] != qb.shape[-3] else 0
    is_whole = n_shared * g in (0, qb.shape[-3])  # no block is cut short
    function = custom_partitioning(lambda *args: run(*args))

    def partition(mesh, arg_shapes, result_shape):
        a, _, b, _ = (axes_of(t, mesh) for t in arg_shapes)
        y = axes_of(result_shape, mesh)
        take = taker(mesh)
        lead = [take(qa.shape[i], a[i], b[i], y[i]) for i in range(n_lead)]
        r = take(qa.shape[-3], a[-3], y[-2])
        c = take(qa.shape[-2], a[-2], b[-2])
        s = take(n_shared or qb.shape[-3], b[-3], y[-1]) if is_whole else ()

        def named(*entries):
            return NamedSharding(mesh, PartitionSpec(*(e or None for e in (*lead, *entries))))

        def local(*args):
            if not c:
                return run(*args)
            return lax.psum(run(*args, out_dtype="float32"), c).astype(out_dtype)

        operands = named(r, c, ()), named(r, c), named(s, c, ()), named(s, c)
        return mesh, local, named(r, s), operands

    lead = " ".join(f"b{i}" for i in range(n_lead))
    rows, shared = ("s", "s") if not n_shared else ("(t u)", "t") if is_whole else ("s", "t")
    text = f"{lead} r c g, {lead} r c, {lead} {rows} c g, {lead} {shared} c -> {lead} r {rows}"
    function.def_partition(
        partition=partition,
        sharding_rule=text,
        decode_shardings=False,  # not all that come up can be: `_compat.decoded_spec`
        **({"u": g} if n_shared and is_whole else {}),
    )
    return function
