"""Products of prepared weights by the Hopper kernels: from a format to the kernels' operands.

Weights are the `data` of a `Prepared`, `extra` what was added to its K and N; scales [G, C], or in
the order "cg" of its `scale_axes`, are float32 or as `Prepared.stored_scale` gives them, zero
points [G, C] uint8 as it has them, or offsets [G, C] float32. Or both are what
`Prepared.nested_scale` or `Prepared.multiples` gives.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels import reference
from pallas_kernels.blocks import Blocks, groups_of
from pallas_kernels.nested import Nested
from pallas_kernels.tuning import TILE_K, TILE_N
from qjax import numerics
from qjax.format import Format
from qjax.ops import blocked
from qjax.prepare import (
    are_multiples,
    are_natural,
    by_group,
    kernel_codes,
    looked_up,
    most_in_bytes,
    read_zeros,
    scale_axes,
    short_scale,
    zero_of,
)

KERNEL_ACTIVATIONS = ("bfloat16", "float16")  # types of x that the weight-only kernels take


def weight_only(
    x: Array,
    data: Array,
    scale: Array,
    zero: Array | None,
    *,
    format: Format,
    extra: tuple[int, int],
    out_dtype: Any,
    step: Array | None = None,
) -> Array:
    """Returns x @ W by the Hopper kernel, whose weight has no offsets; or step * (x @ W).

    They are a product of their own with the sums of x over groups, xs [M, G]:
    sum_k x[m, k] * (q[k, n] * scale[g, n] + b[g, n]) = kernel + sum_g xs[m, g] * b[g, n]
    """
    from pallas_kernels import weight_only as kernel  # needs Mosaic GPU, which few programs do

    data, extra = _whole_tiles(data, extra)
    (M, K), (N_, K_) = x.shape, _sizes(data, format)
    data, padded, b, codes = _weight(
        data, scale, zero, x.dtype, format, extra, are_blocks_taken=True
    )
    x = jnp.pad(x, ((0, 0), (0, K_ - K)))
    in_order = kernel.ordered(x) if codes.pop("natural") else x
    y = kernel.matmul(
        in_order, data, padded, **codes, x_scale=step, out_dtype=_summed(b, out_dtype)
    )
    y = y[:, : N_ - extra[1]]
    if b is not None:
        sums = jnp.sum(x.reshape(M, groups_of(padded), -1).astype(jnp.float32), axis=-1)
        y = y + jnp.dot(sums[:, : b.shape[0]], b, precision=lax.Precision.HIGHEST)
    return y.astype(out_dtype)


def transposed(
    dy: Array,
    data: Array,
    scale: Array,
    zero: Array | None,
    *,
    format: Format,
    extra: tuple[int, int],
    out_dtype: Any,
) -> Array:
    """Returns dy @ Wᵀ by the Hopper kernel. Offsets b, as above, are a product of their own.

    Nested scales are decoded in front of the kernel.

    sum_n dy[m, n] * (q[k, n] * scale[g, n] + b[g, n]) = kernel + sum_n dy[m, n] * b[g, n]
    """
    from pallas_kernels import transposed as kernel

    scale, zero = _decoded(scale, zero, format)
    data, extra = _whole_tiles(data, extra)
    N_, K_ = _sizes(data, format)
    data, padded, b, codes = _weight(data, scale, zero, dy.dtype, format, extra)
    K, N = K_ - extra[0], dy.shape[1]
    padded_dy = jnp.pad(dy, ((0, 0), (0, N_ - N)))
    dx = kernel.matmul(
        padded_dy,
        data,
        padded,
        **codes,
        bits=_bits_in_bytes(format),
        out_dtype=_summed(b, out_dtype),
    )[:, :K]
    if b is not None:
        of_groups = jnp.dot(dy.astype(jnp.float32), b.T, precision=lax.Precision.HIGHEST)
        dx = dx + jnp.repeat(of_groups, K_ // padded.shape[0], axis=1)[:, :K]
    return dx.astype(out_dtype)


def experts(
    x: Array,
    data: Array,
    scale: Array,
    zero: Array | None = None,
    *,
    group_sizes: Array | None = None,
    transposed: bool,
    format: Format,
    extra: tuple[int, int],
    out_dtype: Any,
) -> Array:
    """Returns x @ W or x @ Wᵀ for stacked weights by one Hopper kernel. Offsets are as above.

    So are nested scales, for both.

    Args:
      x: [M, K] with rows sorted by expert; without `group_sizes` [E, M, K], rows of each of them.
      data, scale, zero: stacked.
      group_sizes: [E], how many rows each expert has.
    """
    from pallas_kernels import experts as kernel

    scale, zero = _decoded(scale, zero, format)
    data, extra = _whole_tiles(data, extra)
    N_, K_ = _sizes(data, format)
    data, padded, b, codes = _weight(
        data, scale, zero, x.dtype, format, extra, are_blocks_taken=not transposed
    )
    K, N = K_ - extra[0], N_ - extra[1]
    inner, outer = (N_, K) if transposed else (K_, N)
    unpadded = [(0, 0)] * (x.ndim - 1)
    filled = jnp.pad(x, (*unpadded, (0, inner - x.shape[-1])))
    options = {
        **codes, "bits": _bits_in_bytes(format), "transposed": transposed,
        "out_dtype": _summed(b, out_dtype),
    }  # fmt: skip
    if group_sizes is None:
        y = kernel.batched(filled, data, padded, **options)
        dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    else:
        y = kernel.matmul(filled, data, padded, group_sizes, **options)
        dot = functools.partial(
            lax.ragged_dot, group_sizes=group_sizes, precision=lax.Precision.HIGHEST
        )
    y = y[..., :outer]
    if b is not None:
        G, groups = b.shape[-2], groups_of(padded)
        if transposed:
            of_groups = dot(x.astype(jnp.float32), b.swapaxes(-1, -2))
            y = y + jnp.repeat(of_groups, K_ // groups, axis=-1)[..., :K]
        else:
            sums = filled.reshape(*x.shape[:-1], groups, -1).astype(jnp.float32)
            y = y + dot(jnp.sum(sums, axis=-1)[..., :G], b)
    return y.astype(out_dtype)


def rows(
    indices: Array, data: Array, scale: Array, zero: Array | None, *, format: Format,
    extra: tuple[int, int], out_dtype: Any,
) -> Array:  # fmt: skip
    """Returns Wᵀ[indices] [M, K] by the Hopper kernel. Where one is outside the row is NaN."""
    from pallas_kernels import lookup as kernel

    data, extra = _whole_tiles(data, extra)
    _, K_ = _sizes(data, format)
    N = data.shape[0] - extra[1]
    indices = jnp.where(indices < N, indices, -1) if extra[1] else indices
    data, padded, _, codes = _weight(data, scale, zero, jnp.bfloat16, format, extra)
    del codes["natural"]
    bits = _bits_in_bytes(format)
    y = kernel.rows(indices, data, padded, **codes, bits=bits, out_dtype=out_dtype)
    return y[:, : K_ - extra[0]]


def _whole_tiles(data: Array, extra: tuple[int, int]) -> tuple[Array, tuple[int, int]]:
    """Returns codes of whole tiles of columns, and what was added to K and N.

    They are so as prepared; but a device may have a part of them that is not.
    """
    more = -data.shape[-2] % TILE_N
    padding = [(0, 0)] * (data.ndim - 2) + [(0, more), (0, 0)]
    return (jnp.pad(data, padding) if more else data), (extra[0], extra[1] + more)


def _sizes(data: Array, format: Format) -> tuple[int, int]:
    """Returns N' and K' of prepared codes."""
    *_, N, columns = data.shape
    return N, columns * 8 // numerics.get_element(format.element).bits


def _bits_in_bytes(format: Format) -> int | None:
    """Returns how many bits codes have that kernels take in bytes, several in each; else None."""
    bits = numerics.get_element(format.element).bits
    return bits if bits < 4 else None


def _weight(
    data: Array, scale: Array, zero: Array | None, x_dtype: Any, format: Format,
    extra: tuple[int, int], *, are_blocks_taken: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Returns what the weight-only kernels take: codes and scales; and what codes stand for.

    That comes last, a codebook, zero points and the order by name. And third, offsets b [G, N] of
    every group, which the kernels do not add, or None. All may be stacked.
    """
    scale, zero = _multiplied(by_group(scale, format), zero, format)
    element = numerics.get_element(format.element)
    levels = element.levels if element.kind == "table" else None
    N_, K_ = _sizes(data, format)
    codes: dict[str, Any] = {
        "codebook": levels, "zero": zero_of(format.element),
        "natural": are_natural(data, format),
    }  # fmt: skip
    data = kernel_codes(looked_up(data, format), format.element)
    G, N = scale.shape[-2], N_ - extra[1]
    g = K_ if G == 1 else format.group_size
    assert g is not None
    unstacked = [(0, 0)] * (scale.ndim - 2)
    more = (*unstacked, (0, K_ // g - G), (0, N_ - N))
    if (nested := _nested(scale, zero, format)) is not None:
        outer = jnp.pad(nested.outer, ((0, 0), (0, (K_ // g - G) * (1 + nested.has_offset))))
        return data, Nested(jnp.pad(nested.codes, more), outer, nested.columns), None, codes
    if scale.dtype == jnp.uint8 and x_dtype != jnp.bfloat16:  # not all are float16
        scale = numerics.read_scale(scale, "e8m0")
    stored = short_scale(format) or scale.dtype

    def wide(a):  # a scale of many columns, for each of them
        return a if a.shape[-1] == N else jnp.repeat(a, format.group_columns or N, axis=-1)[..., :N]

    b = None
    if format.offset is not None:
        assert zero is not None
        # Codes about their middle, as others round more once they are times a scale.
        codes["zero"] = middle = 2 ** (element.bits - 1)
        b = wide(zero) + (middle + element.qmin) * wide(scale)
    elif zero is not None:
        codes["zero"] = jnp.pad(wide(zero), more)
    if are_blocks_taken and scale_axes(format) == "cg":
        values = numerics.read_scale(scale, "e8m0") if scale.dtype == jnp.uint8 else scale
        more = (*unstacked, (0, 0), (0, K_ // g - G))
        values = jnp.pad(values.swapaxes(-1, -2), more)
        return data, Blocks(values.astype(short_scale(format) or "float32")), b, codes
    return data, jnp.pad(wide(scale), more).astype(stored), b, codes


def _nested(scale: Array, zero: Array | None, format: Format) -> Nested | None:
    """Returns what `Prepared.nested_scale` gave as the kernels take it, or None for others."""
    if zero is None or not isinstance(format.scale, Format) or scale.dtype != jnp.uint8:
        return None
    assert format.scale.group_columns is not None
    return Nested(scale, zero, format.scale.group_columns)


def _multiplied(scale: Array, zero: Array | None, format: Format) -> tuple[Array, Array | None]:
    """Returns multiples, times what they are multiples of, as floats, all others as they are."""
    if not are_multiples(scale, format):
        return scale, zero
    assert zero is not None
    return reference.float_multiples(scale) * zero, None


def _decoded(scale: Array, zero: Array | None, format: Format) -> tuple[Array, Array | None]:
    """Returns nested scales and multiples as floats, all others as they are."""
    scale, zero = _multiplied(scale, zero, format)
    nested = _nested(scale, zero, format)
    return (scale, zero) if nested is None else (nested.decoded(), None)


def _summed(b: Array | None, out_dtype: Any) -> Any:
    """Returns the type that a kernel returns: of 16 bits only where offsets need not be added."""
    is_last = b is None and jnp.dtype(out_dtype).name in KERNEL_ACTIVATIONS
    return out_dtype if is_last else jnp.float32


def quantized(
    xq: Array,
    step: Array,
    data: Array,
    scale: Array,
    zero: Array | None = None,
    *,
    format: Format,
    extra: tuple[int, int],
    out_dtype: Any,
) -> Array:
    """Returns step * (xq @ W) by a Hopper kernel: that for operands of 8 bits, or with xq in 16.

    Args:
      xq: [M, K], codes of at most 8 bits, all of which bfloat16 has.
      step: [M, 1], or [M, G] of groups.
      scale, zero: scales alone, or both of `Prepared.multiples`, or what `weight_only` takes.
    """
    from pallas_kernels import eight_bit as kernel

    if not _are_bytes(xq, data, format, extra):
        options = {"format": format, "extra": extra, "out_dtype": out_dtype}
        if step.shape[1] == 1:
            x = xq.astype(jnp.bfloat16)
            return weight_only(x, data, scale, zero, step=step, **options)
        assert format.group_size is not None
        steps = jnp.repeat(step, format.group_size, axis=1)[:, : xq.shape[1]]
        x = (xq.astype(jnp.float32) * steps).astype(jnp.bfloat16)
        return weight_only(x, data, scale, zero, **options)
    data, extra = _whole_tiles(data, extra)
    data = kernel_codes(data, format.element)
    K, (N_, K_) = xq.shape[1], data.shape
    N = N_ - extra[1]
    options: dict[str, Any] = {"out_dtype": out_dtype}
    if zero is not None:  # multiples of the scales of columns
        G = len(scale)
        groups = 1 if G == 1 else K_ // (format.group_size or K_)
        options["multiples"] = jnp.pad(scale, ((0, groups - G), (0, N_ - N)))
        scale = zero
    own: Any = scale.astype(short_scale(format) or "float32")
    groups = lambda G: (0, K_ // TILE_K - G if G > 1 else 0)
    if scale_axes(format) == "cg":
        own = Blocks(jnp.pad(own, ((0, 0), groups(own.shape[1]))))
    else:
        wide = blocked.per_column(own, N, format.group_columns or N)
        wide = jnp.pad(wide, (groups(len(wide)), (0, N_ - N)))
        own = wide.astype(own.dtype)
    xq = jnp.pad(xq, ((0, 0), (0, K_ - K)))
    xq = kernel.ordered(xq, data.dtype, multiples=options.get("multiples"))
    return kernel.matmul(xq, data, step, own, **options)[:, :N]


def _are_bytes(xq: Array, data: Array, format: Format, extra: tuple[int, int]) -> bool:
    """Returns whether codes are multiplied as bytes, by a weight that lies so."""
    is_int4 = format.element == "int4"  # which lies one way for both
    K = _sizes(data, format)[1] - extra[0]
    return (is_int4 or data.dtype != jnp.uint8) and xq.shape[0] <= most_in_bytes(format, K)


def rounded(x: Array, format: Format) -> tuple[Array, Array] | None:
    """Returns the codes and steps of rows, or of their groups, by one kernel; or None.

    As `activation.quantize_tokens` and `quantize_groups` do, but only for some numbers of columns:
    a row is held in registers, and there are no shorter groups.
    """
    from pallas_kernels import quantize_rows as kernel

    assert format.activation is not None
    dtype = numerics.get_element(format.activation).dtype
    in_blocks = format.activation_scale == "group"
    if in_blocks and format.group_size != kernel.BLOCK:
        return None
    if kernel.supports(x.shape[1], x.dtype, dtype, in_blocks=in_blocks):
        return None
    return (kernel.by_block if in_blocks else kernel.by_token)(x, dtype)


def read(
    scale: Array, zero: Array | None, format: Format
) -> tuple[Float[Array, "G C"], Array | None]:
    """Returns scales and zero points in float32 of what `Prepared` gives in their place.

    Scales are [G, C], however `Prepared` has them: see `by_group`.
    """
    scale, zero = _decoded(scale, zero, format)
    if zero is not None and zero.dtype == jnp.uint8:
        zero = read_zeros(zero, format)
    stored = "e8m0" if scale.dtype == jnp.uint8 else "float32"
    return numerics.read_scale(scale, stored), zero
