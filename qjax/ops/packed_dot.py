"""packed_dot: the product of an activation with a packed weight, as a JAX primitive.

Being a primitive gives it exact rules where a function would have to be traced through: it is
linear in the activation (so jvp, grad and their compositions stay packed), it batches, it
partitions over a mesh without gathering the weight, and its implementation is chosen when it is
lowered.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from qjax import _compat, ampere, numerics, qtensor
from qjax.ops import activation, native
from qjax.ops.dispatch import (
    against_native,
    against_stack,
    against_transposed,
    compute,
    in_bytes,
)
from qjax.ops.partitioning import partitioned, shapes_of
from qjax.ops.spec import IMPLEMENTATIONS, LAYOUTS, Spec
from qjax.prepare import Prepared, against_gpu, reason_against
from qjax.qtensor import QTensor, is_qtensor


def packed_dot(
    x: Float[Array, "*lead *m K"],
    qt: QTensor,
    *,
    transposed: bool = False,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*lead *m N"]:
    """Returns x @ W, or x @ Wᵀ, for a packed canonical weight W [*lead, K, N].

    y[.., n] = sum_k x[.., k] * (q[k, n] - zero_point[g(k), n]) * scale[g(k), n]

    accumulated in float32. A weight with a `pre_scale` multiplies x by it first (Wᵀ: the result),
    one with a `perm` then reorders its channels. That factor's product is rounded to x's type if
    the weight is prepared for a kernel that takes it, and is float32 otherwise.
    With `activation` in the format, x is then quantized with a step s that belongs to each token,
    to all of x, or to the weight: xq = round(x / s), and y = s * (xq @ q) * scale; its derivative
    is that of the product without rounding (straight-through).

    With `outliers` in the format, channels of x with a magnitude of that threshold or more leave
    the quantized product and are multiplied in float (Dettmers et al., 2022, LLM.int8()).

    The weight is a constant: derivatives with respect to its scales are refused, not zero. Those
    with respect to x in bfloat16 and with a weight prepared for an H100 round the cotangent to x's
    type, too, and run on its kernel; but not where x is divided by a step that all tokens share, or
    has outliers: that is in float32, in plain JAX.

    Args:
      x: activation; its leading axes equal those of the weight, then any number of token axes.
      qt: the weight.
      transposed: contract N instead of K.
      out_dtype: default: that of x.
      implementation: None, "reference", "xla", "native" or, for a weight that `qjax.prepare` has
        prepared, "mosaic" (for an H100) or "triton" (for a GPU before it).

    Raises:
      ValueError: for an unknown implementation or one that does not take this weight or x, or
        static activations without their step.
      NotImplementedError: for "native" or "triton" and x @ Wᵀ, "mosaic" and that in groups of 16,
        or "native" for another platform than a CPU or in an export.
      qjax.ops.native.Unavailable: for "native" where it cannot be had.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` must be None or one of {', '.join(IMPLEMENTATIONS)},"
            f" got {implementation!r}."
        )
    out = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if transposed:
        if qt.pre_scale is None:
            return activation.restored(_bind(x, qt, out, implementation, transposed=True), qt)
        y = _bind(x, qt, jnp.float32, implementation, transposed=True)
        return activation.scaled(activation.restored(y, qt), qt).astype(out)
    x = activation.ordered(activation.scaled(x, qt), qt)
    if qt.format.outliers is not None:
        return _with_outliers(x, qt, implementation).astype(out)
    step = activation.step_of(x, qt)
    if step is None:
        return _bind(x, qt, out, implementation)
    x = activation.in_steps(x, step)
    return (step * _bind(x, qt, jnp.float32, implementation)).astype(out)


def _bind(x, qt: QTensor, out_dtype, implementation: str | None, transposed: bool = False) -> Array:
    """Returns the product with the codes and scales of `qt`, without its factors.

    Of scales that are decoded, derivatives keep what is stored and decode it anew: in a scan over
    layers, floats of all of them would be kept.
    """
    bind = functools.partial(
        _decode_and_bind, out_dtype=out_dtype, implementation=implementation, transposed=transposed
    )
    is_decoded = is_qtensor(qt.scale) or qt.scale.dtype != jnp.float32 or qt.zero is not None
    if is_decoded and isinstance(x, Tracer):  # else no derivative is taken
        return jax.checkpoint(bind, prevent_cse=False)(x, qt)
    return bind(x, qt)


def scales_of(qt: QTensor, *, are_nested: bool = True) -> tuple[Array, Array | None, Array | None]:
    """Returns scales, zero points and the factor of the product, as a primitive takes them.

    They are floats, and there is no factor; or what a prepared weight has in their place, in the
    order of its `scale_axes`.

    Args:
      are_nested: whether `Prepared.nested_scale` and `Prepared.multiples` are taken.
    """
    if type(qt) is not Prepared:
        return *qtensor.read_scales(qt), None
    zero = qt.zero if qt.format.offset is None else qtensor.read_scales(qt)[1]
    if (stored := qt.stored_scale()) is not None:
        scale, factor = stored
        return scale, zero, factor
    if are_nested and (nested := qt.nested_scale() or qt.multiples()) is not None:
        return *nested, None
    return qt.float_scale(), zero, None


def _decode_and_bind(
    x, qt: QTensor, *, out_dtype: Any, implementation: str | None, transposed: bool
) -> Array:
    """Binds the primitive."""
    scale, zero, factor = scales_of(qt)
    spec = Spec(
        qt.format,
        qt.pad,
        transposed,
        jnp.dtype(out_dtype).name,
        implementation,
        extra=qt.extra if isinstance(qt, Prepared) else None,
        capability=qt.capability if isinstance(qt, ampere.PreparedTriton) else None,
    )
    if implementation in LAYOUTS and implementation != spec.layout:
        against = ampere.reason_against if implementation == "triton" else reason_against
        why = against(qt) or "it is not prepared for it: see `qjax.prepare`"
        raise ValueError(f'implementation="{implementation}" does not take {qt!r}: {why}.')
    if implementation == "native" and (why := against_native(qt, transposed)):
        raise (NotImplementedError if transposed else ValueError)(
            f'implementation="native" has no kernel for {qt!r}: {why}. With None, plain JAX'
            " computes it."
        )
    operands = [x, qt.data, scale] + ([] if zero is None else [zero])
    if factor is None:
        return packed_dot_p.bind(*_compat.align_varying(*operands), spec=spec)
    wide = dataclasses.replace(spec, out_dtype="float32")
    y = packed_dot_p.bind(*_compat.align_varying(*operands), spec=wide)
    return (y * activation.over_tokens(factor, y.ndim, y.ndim)).astype(out_dtype)


def _with_outliers(x, qt: QTensor, implementation: str | None) -> Array:
    """Returns the int8 product of the regular channels of x plus a float one of the others.

    The float product reads as many rows of the weight as the format has room for. Were there more
    outliers, it would be wrong; then all of x's outliers meet all of the weight.
    """
    fmt, lead = qt.format, qt.data.shape[:-2]
    K = x.shape[-1]
    capacity = min(fmt.outlier_capacity, K)
    plain = dataclasses.replace(
        qt, format=fmt.weight_only, pre_scale=None, act_scale=None, perm=None
    )
    assert fmt.outliers is not None
    inside, outside, is_outlier = activation.split_outliers(x, fmt.outliers, len(lead))

    def all_rows(x):  # in float32, for which there is no kernel
        return _bind(x, plain, jnp.float32, None if implementation in LAYOUTS else implementation)

    def few_rows(x):
        rows = lax.top_k(is_outlier.astype(jnp.float32), capacity)[1]  # [*lead, capacity]

        def one(x, rows, qt):
            w = qtensor.dequantize_rows(qt, rows)
            return jnp.dot(x[..., rows], w, precision=lax.Precision.HIGHEST)

        for _ in lead:
            one = jax.vmap(one)
        return one(x, rows, plain)

    y = _bind(inside, qt, jnp.float32, implementation)
    if capacity == K:
        return y + all_rows(outside)
    too_many = jnp.any(jnp.sum(is_outlier, axis=-1) > capacity)
    return y + lax.cond(too_many, all_rows, few_rows, outside)


packed_dot_p = _compat.Primitive("packed_dot")


@packed_dot_p.def_abstract_eval
def _abstract(x, data, scale, *zero, spec):
    n_lead = data.ndim - 2
    K, N = spec.sizes(data)
    if x.shape[-1] != (N if spec.transposed else K) or x.shape[:n_lead] != data.shape[:n_lead]:
        raise TypeError(
            f"packed_dot: x of shape {x.shape} does not fit a weight [*lead, K, N] ="
            f" {(*data.shape[:-2], K, N)} with {spec.transposed=}."
        )
    if x.sharding.mesh.empty:
        partition = ()
    else:
        w = dict(zip("kn" if spec.extra is None else "nk", data.sharding.spec[-2:], strict=True))
        partition = (*x.sharding.spec[:-1], w["k" if spec.transposed else "n"])
    return _compat.out_aval(x, spec.out_shape(x, data), spec.out_dtype, partition)


@functools.lru_cache(maxsize=4096)
def _eager(spec: Spec):
    return jax.jit(functools.partial(packed_dot_p.bind, spec=spec))


packed_dot_p.def_impl(lambda *args, spec: _eager(spec)(*args))


# ---- derivatives: linear in x, constant in the weight -------------------------------------------


def refuse_weight_tangents(name: str, tangents: Sequence[Any]) -> None:
    """Raises TypeError if derivatives with respect to a packed weight are asked for."""
    if any(type(t) is not ad.Zero for t in tangents):
        raise TypeError(
            f"{name}: differentiation with respect to the scales of a packed weight. A QTensor is a"
            " constant; to train through quantization use fake quantization on the float"
            " parameters."
        )


def _jvp(primals, tangents, *, spec):
    refuse_weight_tangents("packed_dot", tangents[1:])
    y = packed_dot_p.bind(*primals, spec=spec)
    if type(tangents[0]) is ad.Zero:
        return y, ad.Zero.from_primal_value(y)  # pyright: ignore[reportAttributeAccessIssue]
    return y, packed_dot_p.bind(tangents[0], *primals[1:], spec=_linear(spec))


def _linear(spec: Spec) -> Spec:
    # The tangent is not rounded: straight-through.
    return dataclasses.replace(spec, format=spec.format.weight_only)


def _transpose(ct, x, *weight, spec):
    if type(ct) is ad.Zero:
        return [None] * (1 + len(weight))
    back = dataclasses.replace(
        _linear(spec), transposed=not spec.transposed, out_dtype=x.aval.dtype.name
    )
    return [packed_dot_p.bind(short(ct, back), *weight, spec=back)] + [None] * len(weight)


def short(ct: Array, spec: Spec) -> Array:
    """Returns a cotangent in bfloat16 where that is what its product gives and a kernel takes.

    Results in float32, as of weights with a factor of their own, have cotangents in float32. To
    round those adds about as much error as the result's own rounding. float16 lacks their range.
    """
    is_kernel = spec.layout == "mosaic" and spec.implementation in (None, "mosaic")
    if spec.transposed and against_transposed(spec.format, spec.capability) is not None:
        is_kernel = False
    if is_kernel and spec.out_dtype == "bfloat16" and ct.dtype == jnp.float32:
        return ct.astype(jnp.bfloat16)
    return ct


ad.primitive_jvps[packed_dot_p] = _jvp
ad.primitive_transposes[packed_dot_p] = _transpose


def batch_first(args: Sequence[Any], axes: Sequence[int | None]) -> list[Array]:
    """Returns operands with their batch axis in front, broadcast if they have none."""
    size = next(a.shape[d] for a, d in zip(args, axes, strict=True) if d is not None)
    return [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args, axes, strict=True)
    ]


def _batch(args, axes, *, spec):
    x, *weight = args
    x_axis, *weight_axes = axes
    n_lead = weight[0].ndim - 2 - (weight_axes[0] is not None)
    if all(a is None for a in weight_axes):  # a batch of activations is one more token axis
        return packed_dot_p.bind(jnp.moveaxis(x, x_axis, n_lead), *weight, spec=spec), n_lead
    return packed_dot_p.bind(*batch_first(args, axes), spec=spec), 0


batching.primitive_batchers[packed_dot_p] = _batch


# ---- lowering -----------------------------------------------------------------------------------


def _lower(ctx, x, data, scale, *zero, spec, platform=None):
    if platform == "cpu" and _compat.is_exported(ctx):
        platform = None
    ctx = _compat.unplaced(ctx)
    run = functools.partial(compute, spec=spec, platform=platform)
    if _compat.is_partitioned(ctx):
        x_aval, data_aval, scale_aval = ctx.avals_in[:3]
        run = partitioned(
            spec,
            shapes_of(spec, x_aval, data_aval, scale_aval, bool(zero)),
            platform,
            packed_dot_p.bind,
        )
    with _compat.without_mesh():
        return mlir.lower_fun(run, multiple_results=False)(ctx, x, data, scale, *zero)


mlir.register_lowering(packed_dot_p, _lower)
# A program for several platforms has a branch for each, lowered by its own rule.
for _platform in ("cuda", "cpu"):
    mlir.register_lowering(
        packed_dot_p, functools.partial(_lower, platform=_platform), platform=_platform
    )
_compat.lower_with_devices(packed_dot_p)


def as_dot_general(x, data, scale, *zero, spec: Spec) -> tuple[Any, tuple, dict]:
    """Returns (primitive, abstract operands, parameters) of the float dot it stands for."""
    n_lead = len(data.shape) - 2
    w = jax.ShapeDtypeStruct((*data.shape[:-2], *spec.sizes(data)), x.dtype)
    lead = tuple(range(n_lead))
    contracting = ((len(x.shape) - 1,), (n_lead + spec.transposed,))
    params = {
        "dimension_numbers": (contracting, (lead, lead)),
        "precision": None,
        "preferred_element_type": jnp.dtype(spec.out_dtype),
        "out_sharding": None,
    }
    return lax.dot_general_p, (x, w), params


def describe(qt: QTensor, form: str, implementation: str | None) -> str:
    """Returns which implementation runs and why, for `qjax.explain`.

    Where products run on a CPU by default, this builds the native kernel if it is not there yet.
    """
    fmt = qt.format
    if fmt.activation is not None and form == "forward":
        is_int = numerics.get_element(fmt.activation).kind == "int"
        kind = "int32 accumulator" if is_int else "FP8 values"
        where = "xla"
        if isinstance(qt, Prepared) and implementation in (None, *LAYOUTS):
            beside = _in_sixteen_bits(qt) + _on_every_call(qt, form)
            where = f"{implementation} (asked for){beside}"
            if implementation is None:
                where = f"{_kernel_name(qt)} on CUDA{beside}, else xla"
        return f"{where}, {activation.describe(qt)}, {kind}{_unprepared(qt, implementation)}"
    why = None
    if isinstance(qt, Prepared) and form != "forward":
        why = against_transposed(fmt, getattr(qt, "capability", None))
    if implementation == "reference":
        text = "reference: dequantizes the whole weight (asked for)"
    elif isinstance(qt, Prepared) and implementation in LAYOUTS:
        text = f"{implementation} (asked for)"
        text += _on_every_call(qt, form) if why is None else f": no kernel for x @ Wᵀ {why}"
    elif isinstance(qt, Prepared) and why is None and implementation is None:
        text = f"{_kernel_name(qt)} on CUDA, x in bfloat16 or float16"
        text += f"{_on_every_call(qt, form)}; else xla"
    else:
        text = _describe_cpu(qt, form, implementation)
        if isinstance(qt, Prepared):
            text += ", codes repacked in the op"
            text += "" if why is None else f": no kernel for x @ Wᵀ {why}"
    if qt.pre_scale is not None:
        text += ", x * pre_scale" if form == "forward" else ", y * pre_scale"
    if qt.perm is not None:
        text += ", channels reordered"
    return text


def _in_sixteen_bits(qt: Prepared) -> str:
    """Returns of which products the Hopper kernel multiplies rounded activations as bfloat16."""
    if isinstance(qt, ampere.PreparedTriton) or (most := qt.most_in_bytes) == math.inf:
        return ""
    if qt.data.ndim > 2 and against_stack(qt.format) is None:  # all of them are
        return ""
    what = "steps times codes rounded to" if qt.format.activation_scale == "group" else "codes in"
    return f", {what} bfloat16" + (f" for more than {most} tokens" if most else "")


def _on_every_call(qt: Prepared, form: str) -> str:
    """Returns what is done beside the kernel, and whether it is called more than once."""
    text = qt.in_front(transposed=form != "forward")
    if qt.data.ndim == 2:
        return text
    why = against_stack(qt.format) if form == "forward" else None
    why = "before Hopper" if isinstance(qt, ampere.PreparedTriton) else why
    if why is not None:
        return f"{text}, one weight of the stack after another (a scan copies them for it): {why}"
    is_rounded = qt.format.activation is not None and form == "forward"
    return text + (", codes as bfloat16 times all of the stack" if is_rounded else "")


def _unprepared(qt: QTensor, implementation: str | None) -> str:
    """Returns why a GPU at hand has no kernel for a weight, unless something else is asked for."""
    why = against_gpu(qt) if implementation is None else None
    return f": {why}" if why else ""


def _kernel_name(qt: Prepared) -> str:
    return "triton" if isinstance(qt, ampere.PreparedTriton) else "mosaic"


def _describe_cpu(qt: QTensor, form: str, implementation: str | None) -> str:
    asked = "" if implementation is None else " (asked for)"
    plain = f"xla, blocks of K{asked}{_unprepared(qt, implementation)}"
    if implementation == "xla" or jax.default_backend() != "cpu" or isinstance(qt, Prepared):
        return plain
    why = against_native(qt, form != "forward") or native.why_not()
    if why is None:
        tokens = range(0) if asked else in_bytes(qt.format, qt.data, qt.canonical_shape[-2])
        text = f"native, {native.kernel().isa}{asked}"
        return text + (f", xla in bytes for {tokens[0]} to {tokens[-1]} tokens" if tokens else "")
    return f"{plain}: no native kernel, {why.rstrip('.')}"
