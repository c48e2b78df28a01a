"""How a packed_dot splits over a mesh, without gathering the weight."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.tuning import TILE_K, TILE_N
from qjax import _compat, packing
from qjax.ops.dispatch import compute
from qjax.ops.spec import Spec
from qjax.prepare import are_multiples
from qjax.qtensor import in_order


class Shapes(NamedTuple):
    """Sizes that decide how a packed_dot splits over a mesh.

    Attributes:
      n_lead, n_tokens: leading axes of the weight, token axes of x.
      K, N: of the weight.
      rows: rows of the packed codes.
      G, C: of the scales.
      k_parts, n_parts: K and N split into any divisor of this number of parts. K in whole
        groups, whole packing units and whole tiles of a kernel that the weight is prepared for, N
        in whole column blocks, also of nested scales; 1 where the storage cannot be cut.
      has_zero: whether there are zero points or offsets, or what scales are multiples of.
      columns: None; or, of a prepared weight, the rows of `data`, which are its N and more.
      scale_axes: the order of G and C.
      outer: None; or the sizes along groups and columns of what scales are multiples of: one and C,
        scales of columns; or of nested ones G, or 2 * G with offsets, and blocks of columns.
      outer_axes: the order of both.
    """

    n_lead: int
    n_tokens: int
    K: int
    N: int
    rows: int
    G: int
    C: int
    k_parts: int
    n_parts: int
    has_zero: bool
    columns: int | None = None
    scale_axes: str = "gc"
    outer: tuple[int, int] | None = None
    outer_axes: str = "gc"


def shapes_of(spec: Spec, x: Any, data: Any, scale: Any, has_zero: bool) -> Shapes:
    fmt, element = spec.format, spec.element
    n_lead = len(data.shape) - 2
    (K, N), (G, C) = spec.sizes(data), in_order(spec.scale_axes, *scale.shape[-2:])
    units = K // packing.unit(element.bits) if element.is_packed else K
    k_parts = 1 if spec.pad else units
    if spec.extra is not None:
        k_parts = 1 if spec.extra[0] else K // TILE_K
    if G > 1:
        k_parts = math.gcd(k_parts, G) if G * (fmt.group_size or K) == K else 1
    n_parts = N
    if C > 1:
        n_parts = C if C * (fmt.group_columns or N) == N else 1
    rows, columns = data.shape[-2], None
    if spec.extra is not None:
        columns, rows = data.shape[-2:]
        whole = n_parts if spec.capability is None else math.gcd(n_parts, N // TILE_N)
        n_parts = 1 if spec.extra[1] else whole
    outer, outer_axes = None, "gc"
    if (shared_by := spec.nested_columns(scale)) is not None:
        blocks = -(-N // shared_by)
        n_parts = math.gcd(n_parts, blocks) if blocks * shared_by == N else 1
        outer, outer_axes = (G * spec.factors_of_group, blocks), "cg"
    elif are_multiples(scale, fmt):
        outer = 1, C
    n_tokens = len(x.shape) - n_lead - 1
    return Shapes(
        n_lead, n_tokens, K, N, rows, G, C, k_parts, n_parts, has_zero, columns,
        spec.scale_axes, outer, outer_axes,
    )  # fmt: skip


def rule(s: Shapes, transposed: bool) -> tuple[str, dict[str, int]]:
    """Returns the Shardy rule and its factor sizes.

    K, the packed rows and the groups differ in number; they share the factor k, of which each shard
    holds a part: K = (k p), rows = (k r), G = (k g). In the same way N = (n w) and C = n.
    """
    sizes: dict[str, int] = {}

    def axis(shared: str, parts: int, own: str, size: int) -> str:
        if parts == 1 or size == 1:
            return own
        if size == parts:
            return shared
        sizes.update({shared: parts, own: size // parts})
        return f"({shared} {own})"

    lead = [f"b{i}" for i in range(s.n_lead)]
    tokens = [f"m{i}" for i in range(s.n_tokens)]
    K, rows = axis("k", s.k_parts, "p", s.K), axis("k", s.k_parts, "r", s.rows)
    N = axis("n", s.n_parts, "w", s.N)
    of_groups = axis("k", s.k_parts, "g", s.G), axis("n", s.n_parts, "c", s.C)
    scale = [*lead, *in_order(s.scale_axes, *of_groups)]
    if s.n_parts == 1:
        N = "n"  # whole blocks of columns do not divide N, but x, data and y may still agree
    inner, outer = (N, K) if transposed else (K, N)
    data = [rows, N]
    if s.columns is not None:
        data = [N if s.columns == s.N else "x", rows]
    zero = [*lead, *of_groups]
    if s.outer is not None:
        groups, blocks = s.outer
        q = "q" if s.G == 1 else axis("k", s.k_parts, "q", groups)
        zero = [*lead, *in_order(s.outer_axes, q, axis("n", s.n_parts, "o", blocks))]
    operands = [[*lead, *tokens, inner], [*lead, *data], scale] + [zero] * s.has_zero
    for shared in "kn":  # sizes are only for factors that are nowhere a whole axis
        if any(shared in operand for operand in operands):
            sizes.pop(shared, None)
    text = ", ".join(" ".join(o) for o in operands) + " -> " + " ".join([*lead, *tokens, outer])
    return text, sizes


@functools.lru_cache(maxsize=4096)
def partitioned(spec: Spec, shapes: Shapes, platform: str | None, bind: Callable[..., Any]):
    """Returns `compute` with a rule that says how it shards.

    Leading axes, tokens and output features shard freely. The contraction shards if every shard
    holds whole groups and whole bytes; then each computes a partial sum and one all-reduce adds
    them. Where tokens and weight are split over the same mesh axis, the one that is more bytes
    stays: either the packed codes are gathered (never floats), or the activations are.

    Args:
      bind: binds the primitive.
    """
    local = jax.jit(functools.partial(compute, spec=spec, platform=platform))
    # Inside `jit`, as custom_partitioning takes no function with array constants of its own.
    function = custom_partitioning(lambda *args: local(*args))
    n_lead = shapes.n_lead

    def partition(mesh, arg_shapes, result_shape):
        x, data, y = (axes_of(a, mesh) for a in (*arg_shapes[:2], result_shape))
        data_k, data_n = data[n_lead:] if shapes.columns is None else reversed(data[n_lead:])
        take = taker(mesh)
        sizes = [a.shape for a in arg_shapes]
        lead = [take(sizes[1][i], data[i], x[i], y[i]) for i in range(n_lead)]
        ends = (x[-1], y[-1]) if not spec.transposed else (y[-1], x[-1])
        # A replicated weight costs nothing to split as its operands are.
        k_wanted, n_wanted = [data_k, ends[0]], [data_n, ends[1]]
        tokens = list(zip(x[n_lead:-1], y[n_lead:-1], sizes[0][n_lead:-1], strict=True))
        weight_bytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in arg_shapes[1:])
        moved = (arg_shapes[0], result_shape)
        token_bytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in moved)
        split = lambda: [take(size, x_, y_) for x_, y_, size in tokens]
        if weight_bytes <= token_bytes:
            m = split()
            k, n = take(shapes.k_parts, *k_wanted), take(shapes.n_parts, *n_wanted)
        else:
            k, n = take(shapes.k_parts, *k_wanted), take(shapes.n_parts, *n_wanted)
            m = split()

        def named(*entries):
            return NamedSharding(mesh, PartitionSpec(*(e or None for e in entries)))

        inner, outer = (n, k) if spec.transposed else (k, n)

        def of_groups(order, groups):
            g, c = k if groups > 1 else (), n if shapes.C > 1 else ()
            return named(*lead, *in_order(order, g, c))

        scale = of_groups(shapes.scale_axes, shapes.G)
        rows = shapes.G if shapes.outer is None else min(shapes.outer[0], shapes.G)
        zero = of_groups(shapes.outer_axes, rows)
        codes = named(*lead, k, n) if shapes.columns is None else named(*lead, n, k)
        args = [named(*lead, *m, inner), codes, scale] + [zero] * shapes.has_zero
        one = dataclasses.replace(spec, summed_over=inner)

        def run(*args):  # the primitive again, as its lowering ignores the mesh of the caller
            return bind(*args, spec=one)

        return mesh, run, named(*lead, *m, outer), tuple(args)

    text, factors = rule(shapes, spec.transposed)
    function.def_partition(
        partition=partition,
        sharding_rule=text,
        decode_shardings=False,  # not all that come up can be: `_compat.decoded_spec`
        **factors,  # pyright: ignore[reportArgumentType]
    )
    return function


def taker(mesh: Any) -> Callable[..., tuple[str, ...]]:
    """Returns a function that gives each axis of a product mesh axes of its own.

    It takes a size and candidates, in order of preference, and returns the first candidate's
    longest prefix of mesh axes, none of them given before, that splits the size.
    """
    taken: set[str] = set()

    def take(size: int, *candidates: tuple[str, ...]) -> tuple[str, ...]:
        for names in candidates:
            names = tuple(a for a in names if a not in taken)
            while names and size % math.prod(mesh.shape[a] for a in names):
                names = names[:-1]
            if names:
                taken.update(names)
                return names
        return ()

    return take


def axes_of(a: Any, mesh: Any) -> list[tuple[str, ...]]:
    """Returns over which mesh axes each axis of an array is split."""
    entries = _compat.decoded_spec(a.sharding, mesh)
    return [_names(e) for e in entries] + [()] * (len(a.shape) - len(entries))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
