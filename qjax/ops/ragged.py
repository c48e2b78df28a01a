"""ragged_dot: rows sorted by expert times stacked packed weights, in plain JAX or on a kernel.

On a weight that is prepared for Hopper it is a JAX primitive, for the reasons that `packed_dot` is
one: its implementation is chosen when it is lowered, and it splits over a mesh without gathering
the weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qjax import _compat, packing, qtensor
from qjax.format import Format
from qjax.ops import activation, mosaic_dot, partitioning
from qjax.ops.dispatch import against_stack, codes_of, takes_kernel
from qjax.ops.packed_dot import refuse_weight_tangents, scales_of, short
from qjax.ops.spec import Spec
from qjax.prepare import Prepared, against_gpu, by_group, canonical_codes
from qjax.qtensor import QTensor, in_order


def ragged_dot(
    x: Float[Array, "M K"],
    qt: QTensor,
    group_sizes: Int[Array, " E"],
    *,
    dtype: Any,
    out_dtype: Any,
    precision: Any,
    implementation: str | None,
) -> Float[Array, "M N"]:
    """Returns `lax.ragged_dot` with packed experts [E, K, N]: row m times the weight of its expert.

    Args:
      x: rows sorted by expert, as the product sees them: see `activation.of_experts`.
      qt: the experts, without factors or an order of their channels.
      group_sizes: rows of each expert; rows beyond their sum give 0.
      dtype: of the float weight that plain JAX makes, a block of K at a time.
      out_dtype: of the result; sums are float32.
      implementation: None chooses; "mosaic" is the kernel for an H100, and all else plain JAX.

    Raises:
      NotImplementedError: for "mosaic" and another platform or derivatives in groups of 16.
    """
    spec = Spec(qt.format, qt.pad, False, jnp.dtype(out_dtype).name, implementation)
    if type(qt) is not Prepared or implementation not in (None, "mosaic"):
        qt = qt.canonical()
        scale, zero = qtensor.read_scales(qt)
        operands = [qt.data, scale] + ([] if zero is None else [zero])
        return _blocked(
            x, group_sizes, *operands, spec=spec, dtype=jnp.dtype(dtype), precision=precision
        )
    scale, zero, factor = scales_of(qt, are_nested=False)
    # The factor of a product is that of an expert here: its rows are multiplied by it.
    wide = spec if factor is None else dataclasses.replace(spec, out_dtype="float32")
    y = ragged_dot_p.bind(
        *_compat.align_varying(x, group_sizes, qt.data, scale, *([] if zero is None else [zero])),
        spec=dataclasses.replace(wide, extra=qt.extra),
        dtype=jnp.dtype(dtype).name,
        precision=precision,
    )
    if factor is None:
        return y
    own = activation.expert_of_rows(group_sizes, x.shape[0])
    return (y * factor[own][:, None]).astype(out_dtype)


def check(qt: QTensor, implementation: str | None) -> None:
    """Refuses an implementation that has no kernel for experts `qt`.

    Raises:
      ValueError: for "mosaic" and a weight that is not prepared for it.
      NotImplementedError: for "triton", or "mosaic" and outliers or activations that are rounded in
        groups.
    """
    if implementation == "triton":
        raise NotImplementedError('implementation="triton" has no kernel for ragged_dot.')
    if implementation != "mosaic":
        return
    if type(qt) is not Prepared:
        why = "it is not prepared for it: see `qjax.prepare`"
        raise ValueError(f'implementation="mosaic" does not take {qt!r}: {why}.')
    if why := _against_rounded(qt.format):
        raise NotImplementedError(
            f'implementation="mosaic" does not take {qt!r}: {why}. With None, plain JAX computes'
            " it."
        )


def takes_codes(qt: QTensor, implementation: str | None) -> bool:
    """Returns whether rows are given as codes in bfloat16, not as floats that were rounded."""
    is_for_kernel = type(qt) is Prepared and implementation in (None, "mosaic")
    return is_for_kernel and activation.have_row_steps(qt.format)


def _against_rounded(fmt: Format) -> str | None:
    """Returns why the kernel for experts does not take activations that are rounded so, or None."""
    why = against_stack(fmt)
    return why and f"no kernel for experts with {why}"


def _blocked(x, sizes, data, scale, zero=None, *, spec: Spec, dtype: Any, precision: Any):
    """Plain JAX: dequantizes one block of K at a time, of all experts."""
    E = data.shape[0]
    K, N = spec.sizes(data)
    block = _row_block(spec, K)
    dot = functools.partial(lax.ragged_dot, group_sizes=sizes, precision=precision)
    weight = lambda data, s, z: qtensor.unscaled(codes_of(data, spec), s, z, spec.format)
    if block == K:
        w = weight(data, scale, zero).astype(dtype)
        return dot(x, w, preferred_element_type=jnp.dtype(spec.out_dtype))
    n_blocks = K // block

    def blocks(a):  # [E, rows, c] -> [n_blocks, E, rows / n_blocks, c]
        if a is None:
            return None
        if a.shape[1] == 1:
            return jnp.broadcast_to(a, (n_blocks, *a.shape))
        return jnp.moveaxis(a.reshape(E, n_blocks, -1, a.shape[-1]), 1, 0)

    # Recomputing the block in the backward pass keeps floats of the weight's shape out of it.
    @jax.checkpoint
    def step(total, operands):
        xb, *part = operands
        y = dot(xb, weight(*part).astype(dtype), preferred_element_type=jnp.float32)
        return total + y, None

    xs = jnp.moveaxis(x.reshape(x.shape[0], n_blocks, block), 1, 0)
    start = jnp.zeros((x.shape[0], N), jnp.float32)
    total, _ = lax.scan(step, start, (xs, blocks(data), blocks(scale), blocks(zero)))
    return total.astype(spec.out_dtype)


def _row_block(spec: Spec, K: int) -> int:
    """Returns rows of K per block: whole groups and bytes, about 256, dividing K; else K."""
    unit = packing.unit(spec.element.bits) if spec.element.is_packed else 1
    step = math.lcm(unit, spec.format.group_size or 1)
    if spec.pad or K % step:
        return K
    return max((b for b in range(step, min(K, 256) + 1, step) if K % b == 0), default=K)


# ---- the primitive, on prepared weights ---------------------------------------------------------

ragged_dot_p = _compat.Primitive("packed_ragged_dot")


@ragged_dot_p.def_abstract_eval
def _abstract(x, sizes, data, scale, *zero, spec, dtype, precision):
    K, N = spec.sizes(data)
    inner, outer = (N, K) if spec.transposed else (K, N)
    if x.shape[1:] != (inner,) or sizes.shape != data.shape[:1]:
        raise TypeError(
            f"ragged_dot: x of shape {x.shape} and group_sizes of {sizes.shape} do not fit experts"
            f" [E, K, N] = {(*data.shape[:-2], K, N)} with {spec.transposed=}."
        )
    partition = ()
    if not x.sharding.mesh.empty:
        _, n, k = data.sharding.spec
        partition = (x.sharding.spec[0], k if spec.transposed else n)
    return _compat.out_aval(x, (x.shape[0], outer), spec.out_dtype, partition)


@functools.lru_cache(maxsize=4096)
def _eager(**static):
    return jax.jit(functools.partial(ragged_dot_p.bind, **static))


ragged_dot_p.def_impl(lambda *args, **static: _eager(**static)(*args))


def _jvp(primals, tangents, **static):
    refuse_weight_tangents("ragged_dot", tangents[2:])
    y = ragged_dot_p.bind(*primals, **static)
    if type(tangents[0]) is ad.Zero:
        return y, ad.Zero.from_primal_value(y)  # pyright: ignore[reportAttributeAccessIssue]
    return y, ragged_dot_p.bind(tangents[0], *primals[1:], **static)


def _transpose(ct, x, sizes, *weight, spec, **static):
    if type(ct) is ad.Zero:
        return [None] * (2 + len(weight))
    back = dataclasses.replace(spec, transposed=not spec.transposed, out_dtype=x.aval.dtype.name)
    dx = ragged_dot_p.bind(short(ct, back), sizes, *weight, spec=back, **static)
    return [dx] + [None] * (1 + len(weight))


ad.primitive_jvps[ragged_dot_p] = _jvp
ad.primitive_transposes[ragged_dot_p] = _transpose


def _batch(args, axes, **static):
    batched = [jnp.moveaxis(a, d, 0) for a, d in zip(args, axes, strict=True) if d is not None]

    def one(batched):  # one after another: groups of another product lie elsewhere
        rest = iter(batched)
        own = [a if d is None else next(rest) for a, d in zip(args, axes, strict=True)]
        return ragged_dot_p.bind(*own, **static)

    return lax.map(one, batched), 0


batching.primitive_batchers[ragged_dot_p] = _batch


# ---- lowering -----------------------------------------------------------------------------------


def _compute(x, sizes, data, scale, *zero, spec: Spec, dtype: Any, precision: Any, platform):
    """Computes it on the arrays at hand: on the kernel for GPUs, else in plain JAX."""
    if not x.shape[0]:
        return jnp.zeros(spec.out_shape(x, data), spec.out_dtype)
    if takes_kernel(spec, x.dtype, platform):
        y = mosaic_dot.experts(
            x, data, scale, *zero, group_sizes=sizes, transposed=spec.transposed,
            format=spec.format, extra=spec.extra or (0, 0), out_dtype=spec.out_dtype,
        )  # fmt: skip
    else:
        y = _plain(x, sizes, data, scale, *zero, spec=spec, dtype=dtype, precision=precision)
    return lax.psum(y, spec.summed_over) if spec.summed_over else y


def _plain(x, sizes, data, scale, *zero, spec: Spec, dtype: Any, precision: Any):
    """The same as with a canonical weight; with Wᵀ, as the derivative of that."""
    weight = (canonical_codes(data, spec.format, spec.extra or (0, 0)),)
    scale = by_group(scale, spec.format)
    weight += mosaic_dot.read(scale, zero[0] if zero else None, spec.format)
    plain = dataclasses.replace(spec, extra=None, transposed=False)
    options = {"dtype": jnp.dtype(dtype), "precision": precision}
    if not spec.transposed:
        return _blocked(x.astype(dtype), sizes, *weight, spec=plain, **options)
    wide = dataclasses.replace(plain, out_dtype="float32")
    forward = lambda x: _blocked(x, sizes, *weight, spec=wide, **options)
    (dx,) = jax.linear_transpose(forward, jax.ShapeDtypeStruct(spec.out_shape(x, data), dtype))(
        x.astype(jnp.float32)
    )
    return dx.astype(spec.out_dtype)


@functools.lru_cache(maxsize=4096)
def _partitioned(spec: Spec, dtype: Any, precision: Any, shapes: partitioning.Shapes, platform):
    """Returns `_compute` with a rule that says how it shards.

    Experts, features and the contraction shard as the weight is; rows are gathered, since those of
    an expert may be anywhere. A shard with some of the experts computes their rows, and one
    all-reduce adds up those of all.
    """
    static = {"dtype": dtype, "precision": precision}
    local = jax.jit(functools.partial(_compute, spec=spec, platform=platform, **static))
    function = custom_partitioning(lambda *args: local(*args))

    def partition(mesh, arg_shapes, result_shape):
        del result_shape
        e, n, k = partitioning.axes_of(arg_shapes[2], mesh)
        count = lambda names: math.prod(mesh.shape[a] for a in names)
        e = e if not arg_shapes[2].shape[0] % count(e) else ()
        n = n if not shapes.n_parts % count(n) else ()
        k = k if not shapes.k_parts % count(k) else ()

        def named(*entries):
            return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in entries)))

        inner, outer = (n, k) if spec.transposed else (k, n)
        g, c = k if shapes.G > 1 else (), n if shapes.C > 1 else ()
        scale = named(e, *in_order(spec.scale_axes, g, c))
        zero = [named(e, g, c)] * shapes.has_zero
        args = [named((), inner), named(()), named(e, n, k), scale, *zero]
        one = dataclasses.replace(spec, summed_over=inner)

        def run(x, sizes, data, *scales):
            if not e:
                return ragged_dot_p.bind(x, sizes, data, *scales, spec=one, **static)
            # Rows of this shard's experts come first, those of others are beyond their sum.
            E = data.shape[0]
            first = lax.axis_index(e) * E
            start = jnp.sum(jnp.where(jnp.arange(sizes.shape[0]) < first, sizes, 0))
            own = lax.dynamic_slice(sizes, (first,), (E,))
            y = ragged_dot_p.bind(
                jnp.roll(x, -start, axis=0), own, data, *scales, spec=one, **static
            )
            return lax.psum(jnp.roll(y, start, axis=0), e)

        return mesh, run, named((), outer), tuple(args)

    # As a product that is batched over experts, but for x and y, which have no such axis.
    text, factors = partitioning.rule(shapes, spec.transposed)
    operands, out = text.split(" -> ")
    x, *weight = operands.split(", ")
    text = ", ".join([x.removeprefix("b0 "), "s", *weight]) + " -> " + out.removeprefix("b0 ")
    function.def_partition(
        partition=partition,
        sharding_rule=text,
        decode_shardings=False,
        **factors,  # pyright: ignore[reportArgumentType]
    )
    return function


def _lower(ctx, x, sizes, data, scale, *zero, spec, dtype, precision, platform=None):
    ctx = _compat.unplaced(ctx)
    run = functools.partial(
        _compute, spec=spec, dtype=dtype, precision=precision, platform=platform
    )
    if _compat.is_partitioned(ctx):
        x_aval, _, data_aval, scale_aval = ctx.avals_in[:4]
        shapes = partitioning.shapes_of(spec, x_aval, data_aval, scale_aval, bool(zero))
        run = _partitioned(spec, dtype, precision, shapes._replace(n_tokens=1), platform)
    with _compat.without_mesh():
        return mlir.lower_fun(run, multiple_results=False)(ctx, x, sizes, data, scale, *zero)


mlir.register_lowering(ragged_dot_p, _lower)
mlir.register_lowering(ragged_dot_p, functools.partial(_lower, platform="cuda"), platform="cuda")
_compat.lower_with_devices(ragged_dot_p)


def describe(qt: QTensor, implementation: str | None) -> str:
    """Returns which implementation runs and why, for `qjax.explain`."""
    rounded = activation.describe(qt)
    text = "xla, blocks of K" + (f", {rounded}, rounded in float" if rounded else "")
    text += ", codes repacked in the op" if isinstance(qt, Prepared) else ""
    if type(qt) is not Prepared or implementation not in (None, "mosaic"):
        why = against_gpu(qt) if implementation is None else None
        return f"{text}: {why}" if why else text
    if why := _against_rounded(qt.format):
        return f"{text}: {why}"
    unrounded = dataclasses.replace(qt, format=qt.format.weight_only)  # as the kernel sees it
    for_all = "one kernel for all experts" + unrounded.in_front(transposed=False)
    taken = f"{rounded} as bfloat16" if rounded else "x in bfloat16 or float16"
    if implementation == "mosaic":
        return f"mosaic (asked for), {rounded and taken + ', '}{for_all}"
    return f"mosaic on CUDA, {taken}, {for_all}; else xla"
