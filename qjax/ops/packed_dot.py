"""packed_dot: the product of an activation with a packed weight, as a JAX primitive.

Being a primitive gives it exact rules where a function would have to be traced through: it is linear
in the activation (so jvp, grad and their compositions stay packed), it batches, it partitions over a
mesh without gathering the weight, and its implementation is chosen when it is lowered.
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
from jaxtyping import Array, Float

from qjax import _compat, numerics, packing, qtensor
from qjax.format import Format
from qjax.ops import blocked
from qjax.qtensor import QTensor

IMPLEMENTATIONS = ("reference", "xla")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a packed_dot computes, static under `jit`.

    Attributes:
      format: of the weight; its scale is given as float32 [*lead, G, C] whatever the format says.
      pad: padding codes of each packed column.
      transposed: False: y = x @ W, x ends in K. True: y = x @ Wᵀ, x ends in N.
      out_dtype: of the result; accumulation is in float32.
      implementation: None chooses; "reference" dequantizes the whole weight, "xla" works block by
        block in plain JAX.
    """

    format: Format
    pad: int
    transposed: bool
    out_dtype: str
    implementation: str | None

    @property
    def element(self) -> numerics.Element:
        return numerics.get_element(self.format.element)

    def rows(self, data: Any) -> int:
        """Returns K."""
        return data.shape[-2] * 8 // self.element.bits - self.pad


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

    accumulated in float32. With `activation` in the format, x is first quantized per token:
    s = max |x| / qmax, xq = round(x / s), and y = s * (xq @ q) * scale; its derivative is that of
    the product without rounding (straight-through).

    The weight is a constant: derivatives with respect to its scales are refused, not zero.

    Args:
      x: activation; its leading axes equal those of the weight, then any number of token axes.
      qt: the weight.
      transposed: contract N instead of K.
      out_dtype: default: that of x.
      implementation: None, "reference" or "xla".
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` must be None or one of {', '.join(IMPLEMENTATIONS)},"
            f" got {implementation!r}."
        )
    scale, zero = qtensor.read_scales(qt)
    out = jnp.dtype(x.dtype if out_dtype is None else out_dtype).name
    spec = Spec(qt.format, qt.pad, transposed, out, implementation)
    operands = [x, qt.data, scale] + ([] if zero is None else [zero])
    return packed_dot_p.bind(*_compat.align_varying(*operands), spec=spec)


packed_dot_p = _compat.Primitive("packed_dot")


def _out_shape(x: Any, data: Any, spec: Spec) -> tuple[int, ...]:
    return (*x.shape[:-1], spec.rows(data) if spec.transposed else data.shape[-1])


@packed_dot_p.def_abstract_eval
def _abstract(x, data, scale, *zero, spec):
    n_lead = data.ndim - 2
    K, N = spec.rows(data), data.shape[-1]
    if x.shape[-1] != (N if spec.transposed else K) or x.shape[:n_lead] != data.shape[:n_lead]:
        raise TypeError(
            f"packed_dot: x of shape {x.shape} does not fit a weight [*lead, K, N] ="
            f" {(*data.shape[:-2], K, N)} with {spec.transposed=}."
        )
    if x.sharding.mesh.empty:
        partition = ()
    else:
        w = data.sharding.spec
        partition = (*x.sharding.spec[:-1], w[-2] if spec.transposed else w[-1])
    return _compat.out_aval(x, _out_shape(x, data, spec), spec.out_dtype, partition)


@functools.lru_cache(maxsize=4096)
def _eager(spec: Spec):
    return jax.jit(functools.partial(packed_dot_p.bind, spec=spec))


packed_dot_p.def_impl(lambda *args, spec: _eager(spec)(*args))


# ---- derivatives: linear in x, constant in the weight -------------------------------------------


def _jvp(primals, tangents, *, spec):
    if any(type(t) is not ad.Zero for t in tangents[1:]):
        raise TypeError(
            "packed_dot: differentiation with respect to the scales of a packed weight. A QTensor"
            " is a constant; to train through quantization use fake quantization on the float"
            " parameters."
        )
    y = packed_dot_p.bind(*primals, spec=spec)
    if type(tangents[0]) is ad.Zero:
        return y, ad.Zero.from_primal_value(y)
    return y, packed_dot_p.bind(tangents[0], *primals[1:], spec=_linear(spec))


def _linear(spec: Spec) -> Spec:
    # The tangent is not rounded: straight-through.
    if spec.format.activation is None:
        return spec
    return dataclasses.replace(spec, format=dataclasses.replace(spec.format, activation=None))


def _transpose(ct, x, *weight, spec):
    if type(ct) is ad.Zero:
        return [None] * (1 + len(weight))
    back = dataclasses.replace(
        _linear(spec), transposed=not spec.transposed, out_dtype=x.aval.dtype.name
    )
    return [packed_dot_p.bind(ct, *weight, spec=back)] + [None] * len(weight)


ad.primitive_jvps[packed_dot_p] = _jvp
ad.primitive_transposes[packed_dot_p] = _transpose


def _batch(args, axes, *, spec):
    x, *weight = args
    x_axis, *weight_axes = axes
    n_lead = weight[0].ndim - 2 - (weight_axes[0] is not None)
    if all(a is None for a in weight_axes):  # a batch of activations is one more token axis
        return packed_dot_p.bind(jnp.moveaxis(x, x_axis, n_lead), *weight, spec=spec), n_lead
    size = next(a.shape[d] for a, d in zip(args, axes, strict=True) if d is not None)

    def leading(a, d):
        if d is None:
            return jnp.broadcast_to(a, (size, *a.shape))
        return jnp.moveaxis(a, d, 0)

    moved = [leading(a, d) for a, d in zip(args, axes, strict=True)]
    return packed_dot_p.bind(*moved, spec=spec), 0


batching.primitive_batchers[packed_dot_p] = _batch


# ---- lowering -----------------------------------------------------------------------------------


def _local(x, data, scale, *zero, spec: Spec):
    """Computes packed_dot on the arrays at hand; the weight's leading axes become one vmap."""
    lead = data.shape[:-2]
    tokens = x.shape[len(lead) : -1]

    def flat(a, *rest):
        return a.reshape(math.prod(lead), *rest) if lead else a.reshape(rest)

    x = flat(x, math.prod(tokens), x.shape[-1])
    weight = [flat(a, *a.shape[-2:]) for a in (data, scale, *zero)]
    one = functools.partial(_one, spec=spec)
    y = jax.vmap(one)(x, *weight) if lead else one(x, *weight)
    return y.reshape(*lead, *tokens, y.shape[-1])


def _one(x, data, scale, zero=None, *, spec: Spec):
    fmt, element = spec.format, spec.element
    if fmt.activation is not None and not spec.transposed:
        return _activation_quantized(x, data, scale, spec)
    if spec.implementation == "reference":
        return _reference(x, data, scale, zero, spec)
    is_offset = fmt.offset is not None
    K, N = spec.rows(data), data.shape[-1]
    dot = blocked.matmul_t if spec.transposed else blocked.matmul
    size = {"K": K} if spec.transposed else {}
    y = dot(
        x,
        data,
        scale,
        None if is_offset else zero,
        zero if is_offset else None,
        element=element,
        group_size=fmt.group_size or K,
        columns=fmt.group_columns or N,
        **size,
    )
    return y.astype(spec.out_dtype)


def _codes(data, spec: Spec):
    if spec.element.is_packed:
        data = packing.unpack(data, spec.element.bits, spec.pad)
    return numerics.decode(data, spec.element)


def _reference(x, data, scale, zero, spec: Spec):
    """Equivalent to: dequantize W, then dot."""
    w = qtensor.unscaled(_codes(data, spec), scale, zero, spec.format)
    w = w.T if spec.transposed else w
    y = jnp.dot(x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)
    return y.astype(spec.out_dtype)


def quantize_tokens(x: Float[Array, "M K"], element: str) -> tuple[Array, Float[Array, "M 1"]]:
    """Quantizes each row of x: s = max |x| / qmax, codes = round(x / s)."""
    e = numerics.get_element(element)
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # 0 * x is NaN for NaN and Inf, which a max or a cast to int8 would hide.
    scale = absmax / e.qmax + jnp.sum(x * 0.0, axis=-1, keepdims=True)
    safe = jnp.where(scale == 0, 1.0, scale)
    return numerics.encode(x / safe, e), scale


def _activation_quantized(x, data, scale, spec: Spec):
    """y = s_x * sum_g (xq @ q)_g * scale_g, the inner product exact in int32 (or of FP8 values)."""
    fmt = spec.format
    xq, sx = quantize_tokens(x, fmt.activation)  # pyright: ignore[reportArgumentType]
    K, N = spec.rows(data), data.shape[-1]
    if fmt.activation == "int8":
        q = packing.unpack(data, spec.element.bits, spec.pad) if spec.element.is_packed else data
        if spec.element.is_packed:
            q = (q.astype(jnp.int8) + jnp.int8(int(spec.element.qmin))).astype(jnp.int8)
        accumulator = jnp.int32
    else:
        q, xq, accumulator = _codes(data, spec), xq.astype(jnp.float32), jnp.float32
    G, C = scale.shape
    g = fmt.group_size or K
    if G * g != K:
        xq = jnp.pad(xq, ((0, 0), (0, G * g - K)))
        q = jnp.pad(q, ((0, G * g - K), (0, 0)))
    parts = lax.dot_general(
        xq.reshape(-1, G, g),
        q.reshape(G, g, N),
        (((2,), (1,)), ((1,), (0,))),
        preferred_element_type=accumulator,
    )  # [G, M, N]
    columns = 1 if C == 1 else fmt.group_columns or 1
    wide = jnp.repeat(scale, columns, axis=-1)[:, :N] if columns > 1 else scale
    y = sx * jnp.sum(parts.astype(jnp.float32) * wide[:, None, :], axis=0)
    return y.astype(spec.out_dtype)


@functools.lru_cache(maxsize=4096)
def _partitioned(spec: Spec, n_lead: int, n_tokens: int, has_zero: bool):
    """Returns `_local` with a rule that says how it shards.

    Leading axes, tokens and output features shard freely. The contraction shards if every shard
    holds whole groups and whole bytes; then each computes a partial sum and one all-reduce adds
    them. Otherwise the packed codes (never floats) are gathered along it.
    """
    local = functools.partial(_local, spec=spec)
    function = custom_partitioning(lambda *args: local(*args))

    def partition(mesh, arg_shapes, result_shape):
        def axes_of(shape_and_sharding):
            spec_ = tuple(shape_and_sharding.sharding.spec)
            return list(spec_) + [None] * (len(shape_and_sharding.shape) - len(spec_))

        x, data, scale = arg_shapes[0], arg_shapes[1], arg_shapes[2]
        lead = axes_of(data)[:n_lead]
        x_axes, (k, n) = axes_of(x), axes_of(data)[n_lead:]
        tokens = x_axes[n_lead:-1]
        k, n = _agree(mesh, spec, data.shape, scale.shape, k, n)
        taken = {a for e in (*lead, k, n) for a in _names(e)}
        tokens = [e if not taken & set(_names(e)) else None for e in tokens]
        G, C = scale.shape[-2:]
        scale_axes = (*lead, k if G > 1 else None, n if C > 1 else None)
        inner, outer = (n, k) if spec.transposed else (k, n)

        def named(*entries):
            return NamedSharding(mesh, PartitionSpec(*entries))

        args = [named(*lead, *tokens, inner), named(*lead, k, n), named(*scale_axes)]
        if has_zero:
            args.append(named(*scale_axes))

        def run(*args):
            y = local(*args)
            # Partial sums of a sharded contraction.
            return lax.psum(y, _names(inner)) if inner is not None else y

        return mesh, run, named(*lead, *tokens, outer), tuple(args)

    b = [f"b{i}" for i in range(n_lead)]
    m = [f"m{i}" for i in range(n_tokens)]
    k_of = "n" if spec.transposed else "k"
    y_of = "k" if spec.transposed else "n"
    # Packed rows, groups and rows differ in number, so to the propagation they are factors of their
    # own; `partition` brings them together.
    terms = [[*b, *m, k_of], [*b, "r", "n"], [*b, "g", "c"]]
    if has_zero:
        terms.append([*b, "g", "c"])
    result = [*b, *m, y_of]
    rule = ", ".join(" ".join(t) for t in terms) + " -> " + " ".join(result)
    function.def_partition(partition=partition, sharding_rule=rule)
    return function


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _agree(mesh, spec: Spec, data_shape, scale_shape, k, n):
    """Returns the mesh axes over which K and N of the weight can be split, or None."""
    fmt = spec.format
    K, N = data_shape[-2] * 8 // spec.element.bits - spec.pad, data_shape[-1]
    G, C = scale_shape[-2:]

    def parts(entry):
        return math.prod(mesh.shape[a] for a in _names(entry))

    whole_k = spec.pad == 0 and (G == 1 or (K == G * (fmt.group_size or K) and G % parts(k) == 0))
    if not whole_k or data_shape[-2] % parts(k):
        k = None
    whole_n = C == 1 or (N == C * (fmt.group_columns or N) and C % parts(n) == 0)
    if not whole_n or N % parts(n):
        n = None
    return k, n


def _lower(ctx, x, data, *rest, spec):
    data_aval, x_aval = ctx.avals_in[1], ctx.avals_in[0]
    n_lead = data_aval.ndim - 2
    if _compat.runs_on_one_device(ctx):
        run = functools.partial(_local, spec=spec)
    else:
        run = _partitioned(spec, n_lead, x_aval.ndim - n_lead - 1, len(rest) == 2)
    return mlir.lower_fun(run, multiple_results=False)(ctx, x, data, *rest)


mlir.register_lowering(packed_dot_p, _lower)


def describe(fmt: Format, form: str, implementation: str | None) -> str:
    """Returns which implementation runs and why, for `qjax.explain`."""
    if fmt.activation is not None and form == "forward":
        kind = "int32 accumulator" if fmt.activation == "int8" else "FP8 values"
        return f"xla, {fmt.activation} activations per token, {kind}"
    if implementation == "reference":
        return "reference: dequantizes the whole weight (asked for)"
    return "xla, blocks of K" + ("" if implementation is None else " (asked for)")
