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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.tuning import TILE_K, TILE_N
from qjax import _compat, ampere, numerics, packing, qtensor
from qjax.format import Format
from qjax.ops import activation, blocked, digits, mosaic_dot, native, triton_dot
from qjax.ops.mosaic_dot import KERNEL_ACTIVATIONS
from qjax.prepare import Prepared, canonical_codes, reason_against
from qjax.qtensor import QTensor

IMPLEMENTATIONS = ("reference", "xla", "native", "mosaic", "triton")
_LAYOUTS = ("mosaic", "triton")  # those that take weights of a layout of their own


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a packed_dot computes, static under `jit`.

    Attributes:
      format: of the weight; its scale is given as float32 [*lead, G, C] whatever the format says,
        or as `Prepared.stored_scale` gives it.
      pad: padding codes of each packed column.
      transposed: False: y = x @ W, x ends in K. True: y = x @ Wᵀ, x ends in N.
      out_dtype: of the result; accumulation is in float32.
      implementation: None chooses; "reference" dequantizes the whole weight, "xla" works block by
        block in plain JAX, "native" is the compiled kernel for CPUs (`qjax.ops.native`), "mosaic"
        the one for Hopper GPUs.
      summed_over: mesh axes that hold the other parts of the contraction, inside one partition.
      extra: None; or that of a weight that is `Prepared`.
      capability: None; or that of a weight that is prepared for a GPU before Hopper.
    """

    format: Format
    pad: int
    transposed: bool
    out_dtype: str
    implementation: str | None
    summed_over: tuple[str, ...] = ()
    extra: tuple[int, int] | None = None
    capability: int | None = None

    @property
    def element(self) -> numerics.Element:
        return numerics.get_element(self.format.element)

    def sizes(self, data: Any) -> tuple[int, int]:
        """Returns K and N."""
        if self.extra is not None:
            K = data.shape[-1] * 8 // self.element.bits
            return K - self.extra[0], data.shape[-2] - self.extra[1]
        return data.shape[-2] * 8 // self.element.bits - self.pad, data.shape[-1]


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
    one with a `perm` then reorders its channels.
    With `activation` in the format, x is then quantized with a step s that belongs to each token,
    to all of x, or to the weight: xq = round(x / s), and y = s * (xq @ q) * scale; its derivative
    is that of the product without rounding (straight-through).

    With `outliers` in the format, channels of x with a magnitude of that threshold or more leave
    the quantized product and are multiplied in float (Dettmers et al., 2022, LLM.int8()).

    The weight is a constant: derivatives with respect to its scales are refused, not zero.

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
    """Binds the primitive: the product with the codes and scales of `qt`, without its factors."""
    scale, zero = qtensor.read_scales(qt)
    factor = None
    if type(qt) is Prepared and (stored := qt.stored_scale()) is not None:
        scale, factor = stored
    extra = qt.extra if isinstance(qt, Prepared) else None
    capability = qt.capability if isinstance(qt, ampere.PreparedTriton) else None
    if implementation in _LAYOUTS and implementation != _layout_of(extra, capability):
        against = ampere.reason_against if implementation == "triton" else reason_against
        why = against(qt) or "it is not prepared for it: see `qjax.prepare`"
        raise ValueError(f'implementation="{implementation}" does not take {qt!r}: {why}.')
    if implementation == "native" and (why := _against_native(qt, transposed)):
        raise (NotImplementedError if transposed else ValueError)(
            f'implementation="native" has no kernel for {qt!r}: {why}. With None, plain JAX'
            " computes it."
        )
    spec = Spec(
        qt.format, qt.pad, transposed, jnp.dtype(out_dtype).name, implementation,
        extra=extra, capability=capability,
    )  # fmt: skip
    operands = [x, qt.data, scale] + ([] if zero is None else [zero])
    if factor is None:
        return packed_dot_p.bind(*_compat.align_varying(*operands), spec=spec)
    wide = dataclasses.replace(spec, out_dtype="float32")
    y = packed_dot_p.bind(*_compat.align_varying(*operands), spec=wide)
    return (y * activation.over_tokens(factor, y.ndim, y.ndim)).astype(out_dtype)


def _layout_of(extra: tuple[int, int] | None, capability: int | None) -> str | None:
    if extra is None:
        return None
    return "mosaic" if capability is None else "triton"


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
        return _bind(x, plain, jnp.float32, None if implementation in _LAYOUTS else implementation)

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


def _out_shape(x: Any, data: Any, spec: Spec) -> tuple[int, ...]:
    K, N = spec.sizes(data)
    return (*x.shape[:-1], K if spec.transposed else N)


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


def _local(x, data, scale, *zero, spec: Spec, platform: str | None):
    """Computes packed_dot on the arrays at hand; the weight's leading axes become one vmap.

    Args:
      platform: "cuda" in what is lowered for NVIDIA GPUs, "cpu" in what runs on a CPU of this
        process, None in all else.
    """
    lead = data.shape[:-2]
    tokens = x.shape[len(lead) : -1]
    if not math.prod(x.shape[:-1]):
        return jnp.zeros(_out_shape(x, data, spec), spec.out_dtype)

    def flat(a, *rest):
        return a.reshape(math.prod(lead), *rest) if lead else a.reshape(rest)

    x = flat(x, math.prod(tokens), x.shape[-1])
    weight = [flat(a, *a.shape[-2:]) for a in (data, scale, *zero)]
    if (kernel := _native_kernel(spec, platform, data, math.prod(tokens))) is not None:
        y = _native(x, *weight, spec=spec, kernel=kernel)
        return y.reshape(*lead, *tokens, y.shape[-1])
    one = functools.partial(_one, spec=spec, is_stacked=bool(lead), platform=platform)
    if lead and spec.extra is not None:  # a kernel has no batch axis
        y = lax.map(lambda args: one(*args), (x, *weight))
    else:
        y = jax.vmap(one)(x, *weight) if lead else one(x, *weight)
    return y.reshape(*lead, *tokens, y.shape[-1])


def _one(x, data, scale, zero=None, *, spec: Spec, is_stacked: bool, platform: str | None = None):
    if spec.extra is not None:
        return _prepared(x, data, scale, zero, spec, is_stacked, platform)
    scale = mosaic_dot.read(scale)
    if spec.format.activation is not None and not spec.transposed:
        return _activation_quantized(x, data, scale, spec)
    if spec.implementation == "reference":
        y = _reference(x, data, scale, zero, spec)
    else:
        y = _blocked(x, data, scale, zero, spec, is_stacked)
    y = y.astype(spec.out_dtype)
    # Each shard's sum is rounded to the output type, as XLA does for a sharded float dot.
    return lax.psum(y, spec.summed_over) if spec.summed_over else y


def _prepared(x, data, scale, zero, spec: Spec, is_stacked: bool, platform: str | None):
    """The kernel on GPUs; elsewhere, and where there is none, as with a canonical weight."""
    fmt, extra = spec.format, spec.extra
    assert extra is not None
    operands = [x, data, scale] + ([] if zero is None else [zero])

    def xla(x, data, *scales):
        canonical = canonical_codes if spec.capability is None else ampere.canonical_codes
        data = canonical(data, fmt.element, extra)
        plain = dataclasses.replace(spec, extra=None, capability=None)
        return _one(x, data, *scales, spec=plain, is_stacked=is_stacked)

    is_quantized = fmt.activation is not None and not spec.transposed
    why = _against_transposed(fmt, spec.capability) if spec.transposed else None
    has_kernel = why is None and (is_quantized or x.dtype.name in KERNEL_ACTIVATIONS)
    kernel = _mosaic if spec.capability is None else _triton
    if spec.implementation in _LAYOUTS:
        asked = f'implementation="{spec.implementation}"'
        if why is not None:
            raise NotImplementedError(
                f"{asked} has no kernel for x @ Wᵀ, as in derivatives, {why}. With None,"
                " plain JAX computes it."
            )
        if not has_kernel:
            raise ValueError(
                f"{asked} takes x in {' or '.join(KERNEL_ACTIVATIONS)}, got"
                f" {x.dtype.name}. Cast the activation, or leave the choice to None."
            )
        if platform != "cuda":
            raise NotImplementedError(
                f"{asked} runs on NVIDIA GPUs only. Leave the choice to None: then"
                " one program has the kernel for them and plain JAX for the rest."
            )
    elif spec.implementation is not None or not has_kernel or platform != "cuda":
        return xla(*operands)
    y = kernel(*operands, spec=spec)
    return lax.psum(y, spec.summed_over) if spec.summed_over else y


def _against_transposed(fmt: Format, capability: int | None) -> str | None:
    """Returns why no GPU kernel computes x @ Wᵀ with a prepared weight, or None."""
    if capability is not None:
        return "on GPUs before Hopper"
    return "in groups of 16" if fmt.group_size == 16 else None


def _mosaic(x, data, scale, zero=None, *, spec: Spec):
    """Returns x @ W or x @ Wᵀ by the Hopper kernels."""
    options: dict[str, Any] = {
        "format": spec.format, "extra": spec.extra, "out_dtype": spec.out_dtype
    }  # fmt: skip
    if spec.transposed:
        return mosaic_dot.transposed(x, data, scale, zero, **options)
    if spec.format.activation is not None:
        return mosaic_dot.quantized(*_quantized_tokens(x, spec), data, scale, **options)
    return mosaic_dot.weight_only(x, data, scale, zero, **options)


def _triton(x, data, scale, zero=None, *, spec: Spec):
    """Returns x @ W by the kernels in Triton, for GPUs before Hopper."""
    options = {
        "format": spec.format, "extra": spec.extra, "capability": spec.capability,
        "out_dtype": jnp.dtype(spec.out_dtype),
    }  # fmt: skip
    if spec.format.activation is not None:
        return triton_dot.int8(*_quantized_tokens(x, spec), data, scale, **options)
    return triton_dot.weight_only(x, data, scale, zero, **options)


def _quantized_tokens(x, spec: Spec) -> tuple[Array, Array]:
    """Returns the codes of x and the step of each row, [M, 1].

    With a step that all tokens share, x is already in such steps, and the caller multiplies by it.
    """
    fmt = spec.format
    assert fmt.activation is not None
    is_dynamic = fmt.activation_scale == "token"
    quantize = activation.quantize_tokens if is_dynamic else activation.round_steps
    return quantize(x, fmt.activation, spec.summed_over)


def _against_native(w: QTensor | Spec, transposed: bool) -> str | None:
    """Returns why the native kernel does not take a product, or None."""
    if transposed:
        return "x @ Wᵀ, as in derivatives"
    if w.format.activation is not None:
        return "its activations are quantized"
    prepared = isinstance(w, Prepared) or getattr(w, "extra", None) is not None
    return "it is prepared for another kernel" if prepared else None


def _in_bytes(fmt: Format, data: Any, K: int) -> range:
    """Returns the numbers of tokens for which plain JAX beats the native kernel."""
    if data.ndim > 2:  # batched over leading axes, products of bytes are slow
        return range(0)
    return digits.beats_native(K, fmt.group_size or K, numerics.get_element(fmt.element))


def _native_kernel(spec: Spec, platform: str | None, data: Any, M: int) -> native.Kernel | None:
    """Returns the kernel that is to compute a product of M tokens, None for plain JAX."""
    if spec.implementation not in (None, "native") or _against_native(spec, spec.transposed):
        return None
    is_forced = spec.implementation == "native"
    if platform != "cpu":
        if is_forced:
            raise NotImplementedError(
                'implementation="native" runs on CPUs, in the process that compiled it: not on'
                " other devices, and not in an exported program. Leave the choice to None."
            )
        return None
    if not is_forced and M in _in_bytes(spec.format, data, spec.sizes(data)[0]):
        return None
    try:
        return native.kernel()
    except native.Unavailable as e:
        if is_forced:
            raise native.Unavailable(f'implementation="native" cannot be had: {e}') from e
        return None


def _native(x, data, scale, zero=None, *, spec: Spec, kernel: native.Kernel):
    """Returns x @ W by the native kernel, which takes one leading axis."""
    fmt = spec.format
    K, N = spec.sizes(data)
    is_stacked = data.ndim == 3
    operands = [x, data] + [
        blocked.per_column(a, N, fmt.group_columns or N) for a in (scale, zero) if a is not None
    ]
    x, data, scale, *bias = operands if is_stacked else [a[None] for a in operands]
    if bias and fmt.offset is None:
        bias = [-bias[0] * scale]
    y = native.matmul(
        x, data, scale, *bias, element=spec.element, group_size=fmt.group_size or K, kernel=kernel
    )
    y = (y if is_stacked else y[0]).astype(spec.out_dtype)
    return lax.psum(y, spec.summed_over) if spec.summed_over else y


def _blocked(x, data, scale, zero, spec: Spec, is_stacked: bool):
    """Block by block, without the whole float weight."""
    fmt, element = spec.format, spec.element
    is_offset = fmt.offset is not None
    K, N = spec.sizes(data)
    dot = blocked.matmul_t if spec.transposed else blocked.matmul
    # Products of bytes that are batched over leading axes are slow.
    size = {"K": K} if spec.transposed else {"in_bytes": not is_stacked}
    return dot(
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


def _codes(data, spec: Spec):
    if spec.element.is_packed:
        data = packing.unpack(data, spec.element.bits, spec.pad)
    return numerics.decode(data, spec.element)


def _reference(x, data, scale, zero, spec: Spec):
    """Equivalent to: dequantize W, then dot."""
    w = qtensor.unscaled(_codes(data, spec), scale, zero, spec.format)
    w = w.T if spec.transposed else w
    return jnp.dot(x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)


def _activation_quantized(x, data, scale, spec: Spec):
    """Returns s_x * sum_g (xq @ q)_g * scale_g; the inner product is exact in int32 or of FP8."""
    fmt = spec.format
    assert fmt.activation is not None
    xq, sx = _quantized_tokens(x, spec)
    K, N = spec.sizes(data)
    q, accumulator, precision = data, jnp.float32, lax.Precision.HIGHEST
    is_int = numerics.get_element(fmt.activation).kind == "int"
    zero = 0
    if is_int:
        accumulator, precision = jnp.int32, None
        if fmt.activation == "uint8":  # integer dots take signed bytes: a zero point of -128
            xq, zero = lax.bitcast_convert_type(xq ^ jnp.uint8(128), jnp.int8), -128
        if spec.element.is_packed:
            q = packing.unpack(data, spec.element.bits, spec.pad).astype(jnp.int8)
            q = q + jnp.int8(int(spec.element.qmin))
    elif fmt.element != fmt.activation:  # one FP8 type: that dot is left to XLA as it is
        q, xq = _codes(data, spec), xq.astype(jnp.float32)
    G, C = scale.shape
    g = fmt.group_size or K
    if G * g != K:
        xq = jnp.pad(xq, ((0, 0), (0, G * g - K)))
        q = jnp.pad(q, ((0, G * g - K), (0, 0)))
    columns = 1 if C == 1 else fmt.group_columns or 1
    wide = jnp.repeat(scale, columns, axis=-1)[:, :N] if columns > 1 else scale

    def product(xq, q):
        y = jnp.dot(xq, q, precision=precision, preferred_element_type=accumulator)
        return y - zero * jnp.sum(q, axis=0, dtype=accumulator) if zero else y

    if G == 1:
        y = product(xq, q)
        if spec.summed_over:  # one scale for all of K: the integers add up exactly
            y = lax.psum(y, spec.summed_over)
        return (sx * (y.astype(jnp.float32) * wide)).astype(spec.out_dtype)

    # Group after group: one product batched over groups is up to 20 times slower on a CPU, where
    # only plain integer dots are fast, and holds [G, M, N] integers.
    def step(total, group):
        xq, q, scale = group
        return total + product(xq, q).astype(jnp.float32) * scale, None

    groups = (xq.reshape(-1, G, g).swapaxes(0, 1), q.reshape(G, g, N), wide)
    y, _ = lax.scan(step, jnp.zeros((xq.shape[0], N), jnp.float32), groups)
    y = sx * y
    if spec.summed_over:  # every shard has groups of its own
        y = lax.psum(y, spec.summed_over)
    return y.astype(spec.out_dtype)


# ---- partitioning -------------------------------------------------------------------------------


class _Shapes(NamedTuple):
    """Sizes that decide how a packed_dot splits over a mesh.

    Attributes:
      n_lead, n_tokens: leading axes of the weight, token axes of x.
      K, N: of the weight.
      rows: rows of the packed codes.
      G, C: of the scales.
      k_parts, n_parts: K and N split into any divisor of this number of parts. K in whole groups
        and whole packing units, N in whole column blocks, both in whole tiles of a kernel that the
        weight is prepared for; 1 where the storage cannot be cut.
      has_zero: whether there are zero points or offsets.
      columns: None; or, of a prepared weight, the rows of `data`, which are its N and more.
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


def _shapes(spec: Spec, x: Any, data: Any, scale: Any, has_zero: bool) -> _Shapes:
    fmt, element = spec.format, spec.element
    n_lead = len(data.shape) - 2
    (K, N), (G, C) = spec.sizes(data), scale.shape[-2:]
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
        n_parts = 1 if spec.extra[1] else N // TILE_N
    n_tokens = len(x.shape) - n_lead - 1
    return _Shapes(n_lead, n_tokens, K, N, rows, G, C, k_parts, n_parts, has_zero, columns)


def _rule(s: _Shapes, transposed: bool) -> tuple[str, dict[str, int]]:
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
    scale = [*lead, axis("k", s.k_parts, "g", s.G), axis("n", s.n_parts, "c", s.C)]
    if s.n_parts == 1:
        N = "n"  # whole blocks of columns do not divide N, but x, data and y may still agree
    inner, outer = (N, K) if transposed else (K, N)
    data = [rows, N]
    if s.columns is not None:
        data = [N if s.columns == s.N else "x", rows]
    operands = [[*lead, *tokens, inner], [*lead, *data], scale] + [scale] * s.has_zero
    for shared in "kn":  # sizes are only for factors that are nowhere a whole axis
        if any(shared in operand for operand in operands):
            sizes.pop(shared, None)
    text = ", ".join(" ".join(o) for o in operands) + " -> " + " ".join([*lead, *tokens, outer])
    return text, sizes


@functools.lru_cache(maxsize=4096)
def _partitioned(spec: Spec, shapes: _Shapes, platform: str | None):
    """Returns `_local` with a rule that says how it shards.

    Leading axes, tokens and output features shard freely. The contraction shards if every shard
    holds whole groups and whole bytes; then each computes a partial sum and one all-reduce adds
    them. Where tokens and weight are split over the same mesh axis, the one that is more bytes
    stays: either the packed codes are gathered (never floats), or the activations are.
    """
    local = jax.jit(functools.partial(_local, spec=spec, platform=platform))
    # Inside `jit`, as custom_partitioning takes no function with array constants of its own.
    function = custom_partitioning(lambda *args: local(*args))
    n_lead = shapes.n_lead

    def partition(mesh, arg_shapes, result_shape):
        def axes_of(a):
            entries = _compat.decoded_spec(a.sharding, mesh)
            return [_names(e) for e in entries] + [()] * (len(a.shape) - len(entries))

        x, data, y = axes_of(arg_shapes[0]), axes_of(arg_shapes[1]), axes_of(result_shape)
        data_k, data_n = data[n_lead:] if shapes.columns is None else reversed(data[n_lead:])
        taken: set[str] = set()

        def take(parts: int, *candidates: tuple[str, ...]) -> tuple[str, ...]:
            """The first candidate's longest prefix of unused mesh axes that splits `parts`."""
            for names in candidates:
                names = tuple(a for a in names if a not in taken)
                while names and parts % math.prod(mesh.shape[a] for a in names):
                    names = names[:-1]
                if names:
                    taken.update(names)
                    return names
            return ()

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
        scale = named(*lead, k if shapes.G > 1 else (), n if shapes.C > 1 else ())
        codes = named(*lead, k, n) if shapes.columns is None else named(*lead, n, k)
        args = [named(*lead, *m, inner), codes, scale] + [scale] * shapes.has_zero
        one = dataclasses.replace(spec, summed_over=inner)

        def run(*args):  # the primitive again, as its lowering ignores the mesh of the caller
            return packed_dot_p.bind(*args, spec=one)

        return mesh, run, named(*lead, *m, outer), tuple(args)

    rule, factors = _rule(shapes, spec.transposed)
    function.def_partition(
        partition=partition,
        sharding_rule=rule,
        decode_shardings=False,  # not all that come up can be: `_compat.decoded_spec`
        **factors,  # pyright: ignore[reportArgumentType]
    )
    return function


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _lower(ctx, x, data, scale, *zero, spec, platform=None):
    if platform == "cpu" and _compat.is_exported(ctx):
        platform = None
    ctx = _compat.unplaced(ctx)
    run = functools.partial(_local, spec=spec, platform=platform)
    if _compat.is_partitioned(ctx):
        x_aval, data_aval, scale_aval = ctx.avals_in[:3]
        run = _partitioned(spec, _shapes(spec, x_aval, data_aval, scale_aval, bool(zero)), platform)
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
        if isinstance(qt, Prepared) and implementation in (None, *_LAYOUTS):
            name = _kernel_name(qt)
            where = f"{name} (asked for)" if implementation else f"{name} on CUDA, else xla"
        return f"{where}, {activation.describe(qt)}, {kind}"
    why = None
    if isinstance(qt, Prepared) and form != "forward":
        why = _against_transposed(fmt, getattr(qt, "capability", None))
    if implementation == "reference":
        text = "reference: dequantizes the whole weight (asked for)"
    elif isinstance(qt, Prepared) and why is None and implementation != "xla":
        text = f"{_kernel_name(qt)} on CUDA, x in bfloat16 or float16; else xla"
        if implementation in _LAYOUTS:
            text = f"{implementation} (asked for)"
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


def _kernel_name(qt: Prepared) -> str:
    return "triton" if isinstance(qt, ampere.PreparedTriton) else "mosaic"


def _describe_cpu(qt: QTensor, form: str, implementation: str | None) -> str:
    asked = "" if implementation is None else " (asked for)"
    plain = f"xla, blocks of K{asked}"
    if implementation == "xla" or jax.default_backend() != "cpu" or isinstance(qt, Prepared):
        return plain
    why = _against_native(qt, form != "forward") or native.why_not()
    if why is None:
        tokens = range(0) if asked else _in_bytes(qt.format, qt.data, qt.canonical_shape[-2])
        text = f"native, {native.kernel().isa}{asked}"
        return text + (f", xla in bytes for {tokens[0]} to {tokens[-1]} tokens" if tokens else "")
    return f"{plain}: no native kernel, {why.rstrip('.')}"
