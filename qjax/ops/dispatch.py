"""Which implementation computes a packed_dot on the arrays at hand, and how it is called."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qjax import _compat, ampere, numerics, packing, qtensor
from qjax.format import Format
from qjax.ops import activation, blocked, digits, mosaic_dot, native, triton_dot
from qjax.ops.mosaic_dot import KERNEL_ACTIVATIONS
from qjax.ops.spec import LAYOUTS, Spec
from qjax.prepare import Prepared, by_group, canonical_codes
from qjax.qtensor import QTensor


def compute(x, data, scale, *zero, spec: Spec, platform: str | None):
    """Computes packed_dot on the arrays at hand; the weight's leading axes become one vmap.

    Args:
      platform: "cuda" in what is lowered for NVIDIA GPUs, "cpu" in what runs on a CPU of this
        process, None in all else.
    """
    lead = data.shape[:-2]
    tokens = x.shape[len(lead) : -1]
    if not math.prod(x.shape[:-1]):
        return jnp.zeros(spec.out_shape(x, data), spec.out_dtype)

    def flat(a, *rest):
        return a.reshape(math.prod(lead), *rest) if lead else a.reshape(rest)

    x = flat(x, math.prod(tokens), x.shape[-1])
    weight = [flat(a, *a.shape[-2:]) for a in (data, scale, *zero)]
    if (kernel := _native_kernel(spec, platform, data, math.prod(tokens))) is not None:
        y = _native(x, *weight, spec=spec, kernel=kernel)
        return y.reshape(*lead, *tokens, y.shape[-1])
    # Batched over leading axes products of bytes are slow, and for another device this CPU says
    # nothing.
    in_bytes = platform == "cpu" and not lead
    one = functools.partial(_one, spec=spec, platform=platform, in_bytes=in_bytes)
    if lead and _is_batched(spec, x.dtype, platform):
        y = _mosaic_stack(x, *weight, spec=spec)
        y = lax.psum(y, spec.summed_over) if spec.summed_over else y
    elif lead and spec.extra is not None:  # no other kernel has a batch axis
        y = lax.map(lambda args: one(*args), (x, *weight))
    else:
        y = jax.vmap(one)(x, *weight) if lead else one(x, *weight)
    return y.reshape(*lead, *tokens, y.shape[-1])


def _one(x, data, scale, zero=None, *, spec: Spec, platform: str | None, in_bytes: bool):
    if spec.extra is not None:
        return _prepared(x, data, scale, zero, spec, platform)
    scale, zero = mosaic_dot.read(scale, zero, spec.format)
    if spec.format.activation is not None and not spec.transposed:
        return _activation_quantized(x, data, scale, spec)
    if spec.implementation == "reference":
        y = _reference(x, data, scale, zero, spec)
    else:
        y = _blocked(x, data, scale, zero, spec, in_bytes)
    y = y.astype(spec.out_dtype)
    # Each shard's sum is rounded to the output type, as XLA does for a sharded float dot.
    return lax.psum(y, spec.summed_over) if spec.summed_over else y


def _prepared(x, data, scale, zero, spec: Spec, platform: str | None):
    """The kernel on GPUs; elsewhere, and where there is none, as with a canonical weight.

    Without bytes, so that an exported program computes the same.
    """
    fmt, extra = spec.format, spec.extra
    assert extra is not None
    operands = [x, data, scale] + ([] if zero is None else [zero])

    def xla(x, data, scale, *zero):
        scale = by_group(scale, fmt) if spec.layout == "mosaic" else scale
        canonical = canonical_codes if spec.capability is None else ampere.canonical_codes
        data = canonical(data, fmt, extra)
        plain = dataclasses.replace(spec, extra=None, capability=None)
        return _one(x, data, scale, *zero, spec=plain, platform=platform, in_bytes=False)

    if not takes_kernel(spec, x.dtype, platform):
        return xla(*operands)
    y = (_mosaic if spec.capability is None else _triton)(*operands, spec=spec)
    return lax.psum(y, spec.summed_over) if spec.summed_over else y


def takes_kernel(spec: Spec, x_dtype: Any, platform: str | None) -> bool:
    """Returns whether a GPU kernel computes a product with a prepared weight.

    Raises:
      NotImplementedError, ValueError: if it is to, and cannot.
    """
    is_quantized = spec.format.activation is not None and not spec.transposed
    why = against_transposed(spec.format, spec.capability) if spec.transposed else None
    has_kernel = why is None and (is_quantized or x_dtype.name in KERNEL_ACTIVATIONS)
    if spec.implementation not in LAYOUTS:
        return spec.implementation is None and has_kernel and platform == "cuda"
    asked = f'implementation="{spec.implementation}"'
    if why is not None:
        raise NotImplementedError(
            f"{asked} has no kernel for x @ Wᵀ, as in derivatives, {why}. With None,"
            " plain JAX computes it."
        )
    if not has_kernel:
        of = "" if not spec.transposed else " of x @ Wᵀ, as in derivatives of its type,"
        raise ValueError(
            f"{asked} takes x{of} in {' or '.join(KERNEL_ACTIVATIONS)}, got"
            f" {x_dtype.name}. Cast the activation, or leave the choice to None."
        )
    if platform != "cuda":
        raise NotImplementedError(
            f"{asked} runs on NVIDIA GPUs only. Leave the choice to None: then"
            " one program has the kernel for them and plain JAX for the rest."
        )
    return True


def against_transposed(fmt: Format, capability: int | None) -> str | None:
    """Returns why no GPU kernel computes x @ Wᵀ with a prepared weight, or None."""
    if capability is not None:
        return "on GPUs before Hopper"
    if not _compat.LOADS_ACROSS:
        return "in JAX before 0.11.2"
    return "in groups of 16" if fmt.group_size == 16 else None


def _is_batched(spec: Spec, x_dtype: Any, platform: str | None) -> bool:
    """Returns whether one kernel multiplies all weights of a stack."""
    is_kernel = spec.layout == "mosaic" and takes_kernel(spec, x_dtype, platform)
    return is_kernel and (spec.transposed or against_stack(spec.format) is None)


def against_stack(fmt: Format) -> str | None:
    """Returns why no kernel multiplies all weights of a stack, or None."""
    if fmt.activation is None or activation.have_row_steps(fmt):
        return None
    return "outliers" if fmt.outliers is not None else "activations rounded in groups"


def _options(spec: Spec) -> dict[str, Any]:
    return {"format": spec.format, "extra": spec.extra, "out_dtype": spec.out_dtype}


def _mosaic(x, data, scale, zero=None, *, spec: Spec):
    """Returns x @ W or x @ Wᵀ by the Hopper kernels."""
    options = _options(spec)
    if spec.transposed:
        return mosaic_dot.transposed(x, data, scale, zero, **options)
    if spec.format.activation is not None:
        rounded = mosaic_dot.rounded(x, spec.format) if _rounds_rows(spec) else None
        rounded = _quantized_tokens(x, spec) if rounded is None else rounded
        return mosaic_dot.quantized(*rounded, data, scale, zero, **options)
    return mosaic_dot.weight_only(x, data, scale, zero, **options)


def _mosaic_stack(x, data, scale, zero=None, *, spec: Spec):
    """Returns x @ W or x @ Wᵀ for a stack of weights by one Hopper kernel.

    It multiplies rounded activations as codes, which bfloat16 has exactly; the steps of rows are
    factors of its results.
    """
    options = {**_options(spec), "transposed": spec.transposed}
    if spec.transposed or spec.format.activation is None:
        return mosaic_dot.experts(x, data, scale, zero, **options)
    codes, step = _quantized_tokens(x, spec)
    options["out_dtype"] = "float32"
    y = mosaic_dot.experts(codes.astype(jnp.bfloat16), data, scale, zero, **options)
    return (y * step).astype(spec.out_dtype)


def _triton(x, data, scale, zero=None, *, spec: Spec):
    """Returns x @ W by the kernels in Triton, for GPUs before Hopper."""
    options = {
        "format": spec.format, "extra": spec.extra, "capability": spec.capability,
        "out_dtype": jnp.dtype(spec.out_dtype),
    }  # fmt: skip
    if spec.format.activation is not None:
        return triton_dot.int8(*_quantized_tokens(x, spec), data, scale, **options)
    return triton_dot.weight_only(x, data, scale, zero, **options)


def _rounds_rows(spec: Spec) -> bool:
    """Returns whether a kernel of its own is to round x, whose rows or their groups have steps.

    Only where kernels are asked for: XLA has three of its own for it, but joins them with what
    makes x, such as a norm, and shares them between products of one x.
    """
    if spec.implementation != "mosaic":
        return False
    # A row of which a shard has a part has a step that all its parts share.
    scale = spec.format.activation_scale
    return scale == "group" or (scale == "token" and not spec.summed_over)


def _quantized_tokens(x, spec: Spec) -> tuple[Array, Array]:
    """Returns the codes of x and the step of each row, [M, 1], or of each of its groups, [M, G].

    With a step that all tokens share, x is already in such steps, and the caller multiplies by it.
    """
    fmt = spec.format
    assert fmt.activation is not None
    if fmt.activation_scale == "token":
        return activation.quantize_tokens(x, fmt.activation, spec.summed_over)
    if fmt.activation_scale == "group":
        assert fmt.group_size is not None
        return activation.quantize_groups(x, fmt.activation, fmt.group_size, spec.summed_over)
    # By a kernel every shard is multiplied by its own: NaN is in the sum of all.
    axes = spec.summed_over if spec.extra is None else ()
    return activation.round_steps(x, fmt.activation, axes)


def against_native(w: QTensor | Spec, transposed: bool) -> str | None:
    """Returns why the native kernel does not take a product, or None."""
    if transposed:
        return "x @ Wᵀ, as in derivatives"
    if w.format.activation is not None:
        return "its activations are quantized"
    prepared = isinstance(w, Prepared) or getattr(w, "extra", None) is not None
    return "it is prepared for another kernel" if prepared else None


def in_bytes(fmt: Format, data: Any, K: int) -> range:
    """Returns the numbers of tokens for which plain JAX beats the native kernel."""
    if data.ndim > 2:  # batched over leading axes, products of bytes are slow
        return range(0)
    return digits.beats_native(K, fmt.group_size or K, numerics.get_element(fmt.element))


def _native_kernel(spec: Spec, platform: str | None, data: Any, M: int) -> native.Kernel | None:
    """Returns the kernel that is to compute a product of M tokens, None for plain JAX."""
    if spec.implementation not in (None, "native") or against_native(spec, spec.transposed):
        return None
    is_forced = spec.implementation == "native"
    if platform != "cpu":
        if is_forced:
            raise NotImplementedError(
                'implementation="native" runs on CPUs, in the process that compiled it: not on'
                " other devices, and not in an exported program. Leave the choice to None."
            )
        return None
    if not is_forced and M in in_bytes(spec.format, data, spec.sizes(data)[0]):
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


def _blocked(x, data, scale, zero, spec: Spec, in_bytes: bool):
    """Block by block, without the whole float weight."""
    fmt, element = spec.format, spec.element
    is_offset = fmt.offset is not None
    K, N = spec.sizes(data)
    dot = blocked.matmul_t if spec.transposed else blocked.matmul
    size = {"K": K} if spec.transposed else {"in_bytes": in_bytes}
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


def codes_of(data, spec: Spec):
    """Returns the values of packed codes [.., K, N] in float32, unscaled."""
    if spec.element.is_packed:
        data = packing.unpack(data, spec.element.bits, spec.pad)
    return numerics.decode(data, spec.element)


def _reference(x, data, scale, zero, spec: Spec):
    """Equivalent to: dequantize W, then dot."""
    w = qtensor.unscaled(codes_of(data, spec), scale, zero, spec.format)
    w = w.T if spec.transposed else w
    return jnp.dot(x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)


def _activation_quantized(x, data, scale, spec: Spec):
    """Returns sum_g s_x (xq @ q)_g * scale_g; the inner product is exact in int32 or of FP8.

    Steps s_x of a token, which all its groups share, multiply the sum.
    """
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
        q, xq = codes_of(data, spec), xq.astype(jnp.float32)
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
        is_part = fmt.group_size is None or fmt.group_size > K  # of the rows with this scale
        if spec.summed_over and is_part:  # one scale for all of K: the integers add up exactly
            y = lax.psum(y, spec.summed_over)
        y = sx * (y.astype(jnp.float32) * wide)
        if spec.summed_over and not is_part:  # every shard has a group of its own
            y = lax.psum(y, spec.summed_over)
        return y.astype(spec.out_dtype)

    # Group after group: one product batched over groups is up to 20 times slower on a CPU, where
    # only plain integer dots are fast, and holds [G, M, N] integers.
    def step(total, group):
        xq, q, scale, *sx = group
        y = product(xq, q).astype(jnp.float32) * scale[None]
        return total + (y * sx[0] if sx else y), None

    groups = (xq.reshape(-1, G, g).swapaxes(0, 1), q.reshape(G, g, N), wide)
    if fmt.activation_scale == "group":
        groups, sx = (*groups, sx.T[..., None]), 1.0
    y, _ = lax.scan(step, jnp.zeros((xq.shape[0], N), jnp.float32), groups)
    y = sx * y
    if spec.summed_over:  # every shard has groups of its own
        y = lax.psum(y, spec.summed_over)
    return y.astype(spec.out_dtype)
