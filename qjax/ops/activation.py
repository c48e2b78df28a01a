"""The activation of a product, quantized at run time: steps, codes, outlier channels."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qjax import numerics
from qjax.format import Format
from qjax.prepare import Prepared
from qjax.qtensor import QTensor

# Beyond the range of every element, and still finite.
_FAR = 2.0**127


def scaled(x: Float[Array, "*b *m K"], qt: QTensor) -> Float[Array, "*b *m K"]:
    """Returns x * pre_scale, see `_times`, or x if the weight has none."""
    if qt.pre_scale is None:
        return x
    return _times(x, over_tokens(qt.pre_scale, x.ndim, x.ndim - 1), qt)


def _times(x: Array, factor: Array, qt: QTensor) -> Array:
    """Returns x times a float32 factor of its channels.

    In float32, but in x's type for a weight that is prepared for a GPU's kernel: that multiplies
    x of 16 bits. Where x becomes codes, these are made of float32.
    """
    y = x.astype(jnp.float32) * factor
    return y.astype(x.dtype) if isinstance(qt, Prepared) and qt.format.activation is None else y


def ordered(x: Float[Array, "*b *m K"], qt: QTensor) -> Float[Array, "*b *m K"]:
    """Returns x with its channels in the order of the stored rows."""
    if qt.perm is None:
        return x
    return jnp.take_along_axis(x, over_tokens(qt.perm, x.ndim, x.ndim - 1), axis=-1)


def restored(y: Float[Array, "*b *m K"], qt: QTensor) -> Float[Array, "*b *m K"]:
    """Inverse of `ordered`."""
    if qt.perm is None:
        return y
    inverse = jnp.argsort(qt.perm, axis=-1)
    return jnp.take_along_axis(y, over_tokens(inverse, y.ndim, y.ndim - 1), axis=-1)


def over_tokens(a: Float[Array, "*b *c"], ndim: int, at: int) -> Array:
    """Returns `a` with axes of size 1 after its first ones, `ndim` in all.

    Args:
      at: where the axes after the new ones begin: `ndim - 1` for [*b, K], `ndim` for [*b].
    """
    n_lead = a.ndim - (ndim - at)
    return a.reshape(*a.shape[:n_lead], *[1] * (at - n_lead), *a.shape[n_lead:])


def step_of(x: Float[Array, "*b *m K"], qt: QTensor) -> Float[Array, "*b *1"] | None:
    """Returns the step s that all tokens of `x` share; None where every token has its own.

      tensor   s = max |x| / qmax over all of x, NaN if x has a NaN or Inf; max x for unsigned codes
      static   s = act_scale

    Args:
      x: the activation after `scaled`; its leading axes are those of the weight.

    Raises:
      ValueError: if the step is static, and the weight has none.
    """
    fmt, n_lead = qt.format, qt.data.ndim - 2
    if fmt.activation is None or fmt.activation_scale in ("token", "group"):
        return None
    if fmt.activation_scale == "static":
        if qt.act_scale is None:
            raise ValueError(
                f"{qt!r}: `activation_scale='static'` takes the step of the activation from"
                " `act_scale`, and this weight has none. Quantize it with calibration data, or"
                " use activation_scale='token'."
            )
        s = over_tokens(qt.act_scale, x.ndim, x.ndim)
    else:
        s = _largest_step(x, fmt.activation, tuple(range(n_lead, x.ndim)))
    return lax.stop_gradient(s)


def largest(x: Float[Array, "*b *m K"], element: str, axes: tuple[int, ...] | int) -> Array:
    """Returns max |x| over axes that stay with size 1; for unsigned elements max x, at least 0."""
    unsigned = numerics.get_element(element).qmin == 0
    x = x.astype(jnp.float32)
    return jnp.max(jnp.maximum(x, 0.0) if unsigned else jnp.abs(x), axes, keepdims=True)


def _largest_step(x: Array, element: str, axes: tuple[int, ...]) -> Array:
    x = x.astype(jnp.float32)
    if not x.size:
        return jnp.ones([1 if i in axes else n for i, n in enumerate(x.shape)], jnp.float32)
    return _step(_largest_or_inf(x, element, axes), element)


def _largest_or_inf(x: Array, element: str, axes: tuple[int, ...] | int) -> Array:
    """Returns `largest`, and Inf where any of x is NaN, which a max may drop, or Inf."""
    return largest(jnp.where(jnp.isfinite(x), x, jnp.inf), element, axes)


def _step(most: Array, element: str) -> Array:
    # NaN and not Inf: codes of bytes would hide that.
    return jnp.where(jnp.isinf(most), jnp.nan, most / numerics.get_element(element).qmax)


def in_steps(x: Float[Array, "*b *m K"], step: Float[Array, "*b *1"]) -> Float[Array, "*b *m K"]:
    """Returns x / step: finite where x is, NaN where it is not, 0 where the step is 0."""
    steps = x.astype(jnp.float32) / jnp.where(step == 0, 1.0, step)
    return jnp.where(jnp.isfinite(x), jnp.clip(steps, -_FAR, _FAR), jnp.nan)


def quantize_tokens(
    x: Float[Array, "*m K"], element: str, axes: tuple[str, ...] = ()
) -> tuple[Array, Float[Array, "*m 1"]]:
    """Quantizes each row of x: s = max |x| / qmax (max x for unsigned codes), codes = round(x / s).

    Args:
      x: activation.
      element: what the codes are.
      axes: mesh axes over which the rows of x are split, inside one partition.

    Returns:
      The codes as values of the element, in a byte, and s: NaN for a row with a NaN or Inf.
    """
    e = numerics.get_element(element)
    x = x.astype(jnp.float32)
    most = _largest_or_inf(x, element, -1)
    scale = _step(lax.pmax(most, axes) if axes else most, element)
    safe = jnp.where(scale == 0, 1.0, scale)
    return _codes(x / safe, e), scale


def quantize_groups(
    x: Float[Array, "*m K"], element: str, group_size: int, axes: tuple[str, ...] = ()
) -> tuple[Array, Float[Array, "*m G"]]:
    """Quantizes each group of every row of x, the last of which may be shorter: `quantize_tokens`.

    Args:
      x, element: as there.
      group_size: g, of G = ceil(K / g) groups.
      axes: mesh axes over which the rows of x are split, in whole groups or as parts of one.

    Returns:
      The codes [*m, K], and the steps, NaN for a group with a NaN or Inf.
    """
    *m, K = x.shape
    groups = jnp.pad(x, [(0, 0)] * len(m) + [(0, -K % group_size)]).reshape(*m, -1, group_size)
    codes, scale = quantize_tokens(groups, element, axes if group_size > K else ())
    return codes.reshape(*m, -1)[..., :K], scale[..., 0]


def _dynamic(x: Float[Array, "*m K"], fmt: Format) -> tuple[Array, Array]:
    """Returns codes of x in steps of its tokens or their groups, and those, [*m, 1] or [*m, K]."""
    assert fmt.activation is not None
    if fmt.activation_scale == "token":
        return quantize_tokens(x, fmt.activation)
    assert fmt.group_size is not None
    codes, scale = quantize_groups(x, fmt.activation, fmt.group_size)
    return codes, of_inputs(scale, fmt.group_size, x.shape[-1])


def of_inputs(scale: Float[Array, "*m G"], group_size: int, K: int) -> Float[Array, "*m K"]:
    """Returns the step of each of K inputs, of the steps of their groups."""
    return jnp.repeat(scale, group_size, axis=-1)[..., :K]


def _codes(x: Array, element: numerics.Element) -> Array:
    """Returns values in steps rounded to the element, as bytes that hold its values."""
    codes = numerics.encode(x, element)
    if element.is_packed:  # codes of fewer bits count from 0
        return codes.astype(jnp.int8) + jnp.int8(int(element.qmin))
    return codes


def round_steps(
    x: Float[Array, "M K"], element: str, axes: tuple[str, ...] = ()
) -> tuple[Array, Float[Array, "M 1"]]:
    """Rounds x, already in steps, to codes; what lies outside the range saturates.

    Arguments as for `quantize_tokens`.

    Returns:
      The codes, and 1 for each row: NaN for a row with a NaN.
    """
    poison = jnp.sum(x * 0.0, axis=-1, keepdims=True)
    if axes:
        poison = lax.psum(poison, axes)
    return _codes(x, numerics.get_element(element)), 1.0 + poison


def split_outliers(
    x: Float[Array, "*b *m K"], threshold: float, n_lead: int
) -> tuple[Float[Array, "*b *m K"], Float[Array, "*b *m K"], Bool[Array, "*b K"]]:
    """Splits x into (regular channels, outlier channels, which are outliers); the parts add up.

    A channel is an outlier if any token has a magnitude of `threshold` or more in it
    (Dettmers et al., 2022, LLM.int8(), section 3.2). NaN and Inf stay with the regular ones, whose
    codes say so.
    """
    x = x.astype(jnp.float32)
    is_large = jnp.abs(x) >= threshold
    is_outlier = jnp.any(is_large, tuple(range(n_lead, x.ndim - 1)))  # [*b, K]
    leaves = over_tokens(is_outlier, x.ndim, x.ndim - 1) & jnp.isfinite(x)
    return jnp.where(leaves, 0.0, x), jnp.where(leaves, x, 0.0), is_outlier


class Rounded(NamedTuple):
    """An activation as a product sees it, for derivatives of that product.

    Attributes:
      value: the activation after rounding.
      steps, codes: the activation in steps, before and after rounding; None if it is not rounded.
      inside: where it lies in the range of the codes; None: everywhere.
    """

    value: Array
    steps: Array | None = None
    codes: Array | None = None
    inside: Array | None = None


def rounded(x: Float[Array, "*b *m K"], qt: QTensor) -> Rounded:
    """Returns what `packed_dot` multiplies by the float weight of `qt`, in float32."""
    fmt = qt.format
    x = scaled(x, qt)
    if fmt.activation is None or not math.prod(x.shape):
        return Rounded(x)
    if fmt.activation_scale == "group" and qt.perm is not None:  # groups of the stored rows
        plain = dataclasses.replace(qt, pre_scale=None, perm=None)
        return jax.tree.map(lambda a: restored(a, qt), rounded(ordered(x, qt), plain))
    element = numerics.get_element(fmt.activation)
    outside = None
    if fmt.outliers is not None:
        x, outside, _ = split_outliers(x, fmt.outliers, qt.data.ndim - 2)
    step = step_of(x, qt)
    if step is None:
        codes, step = _dynamic(x, fmt)
        steps = in_steps(x, step)
    else:
        steps = in_steps(x, step)
        codes, poison = round_steps(steps, fmt.activation)
        step = step * poison
    codes = codes.astype(jnp.float32)
    value = codes * step if outside is None else codes * step + outside
    # A step measured on x itself clips nothing above; the largest may lie an ulp beyond qmax.
    inside = None
    if fmt.activation_scale == "static":
        inside = (steps >= element.qmin) & (steps <= element.qmax)
    elif element.qmin == 0:
        inside = steps >= 0
    return Rounded(value, steps, codes, inside)


def straight(
    x: Float[Array, "*b *m K"],
    qt: QTensor,
    act_scale: Float[Array, "*b"] | None = None,
    act_rule: str = "lsq",
) -> Float[Array, "*b *m K"]:
    """Returns `rounded(x, qt).value` in x's dtype, with straight-through derivatives.

    For convolutions. Where the kernel has a `pre_scale`, whose entries belong to no single channel
    of x, x stays as it is.

    Args:
      act_scale: a learned step, with the value of `qt.act_scale`, to be derived too.
      act_rule: how, see `straight_through.product`.
    """
    if qt.format.activation is None or qt.pre_scale is not None:
        return x
    if qt.format.activation_scale == "group":
        raise NotImplementedError(
            f"{qt!r}: `activation_scale='group'` is for products. Groups of a convolution's kernel"
            " run through its window; use activation_scale='token' for it."
        )
    return _straight(act_rule, x, act_scale, qt)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight(act_rule, x, act_scale, qt):
    del act_scale
    return rounded(x, qt).value.astype(x.dtype)


def _straight_fwd(act_rule, x, act_scale, qt):
    return _straight(act_rule, x, act_scale, qt), (x, act_scale, qt)


def _straight_bwd(act_rule, residuals, dx):
    x, act_scale, qt = residuals
    dx, ds = pulled_back(dx, rounded(x, qt), act_scale, act_rule)
    return dx.astype(x.dtype), ds, None


_straight.defvjp(_straight_fwd, _straight_bwd)


def pulled_back(
    dx: Array, seen: Rounded, act_scale: Array | None, act_rule: str
) -> tuple[Array, Array | None]:
    """Returns the derivatives with respect to an activation and its learned step.

    Args:
      dx: with respect to `seen.value`.
      act_scale: the learned step, or None.
      act_rule: "lsq" or "pact", see `straight_through.product`.
    """
    ds, m = None, seen.inside
    if act_scale is not None:
        assert seen.codes is not None
        assert seen.steps is not None
        assert m is not None
        inner = seen.codes - seen.steps if act_rule == "lsq" else 0.0
        slope = dx * jnp.where(m, inner, seen.codes)
        ds = jnp.sum(slope, tuple(range(act_scale.ndim, dx.ndim)), dtype=jnp.float32)
    return dx if m is None else jnp.where(m, dx, 0.0), ds


def of_experts(x: Float[Array, "M K"], qt: QTensor, group_sizes: Int[Array, " E"]) -> Array:
    """Returns float rows, sorted by expert, as the product with the codes of each expert sees them.

    Multiplied by `pre_scale` and rounded as the format says; the derivative is that without
    rounding. A step that all tokens share, and outliers, are those of all rows together.

    Args:
      qt: experts [E, K, N].
      group_sizes: rows of each expert.
    """
    x = _times_own(x, qt, group_sizes)
    if qt.format.activation is None or not math.prod(x.shape):
        return x
    wide = x.astype(jnp.float32)
    outside = jnp.zeros_like(wide)
    if qt.format.outliers is not None:
        wide, outside, _ = split_outliers(wide, qt.format.outliers, 0)
    codes, step = _codes_of_experts(wide, qt, group_sizes)
    rounded = codes.astype(jnp.float32) * step + outside
    return lax.stop_gradient(rounded) + (x - lax.stop_gradient(x))  # it to the bit


def codes_of_experts(
    x: Float[Array, "M K"], qt: QTensor, group_sizes: Int[Array, " E"]
) -> tuple[Float[Array, "M K"], Float[Array, "M 1"]]:
    """Returns what `of_experts` does as codes, which bfloat16 has exactly, and steps of rows.

    For formats that `have_row_steps`. Rows of zeros have the step 1, and so have those of no
    expert, whose result is 0 whatever they are.
    """
    wide = _times_own(x, qt, group_sizes).astype(jnp.float32)
    codes, step = lax.stop_gradient(_codes_of_experts(wide, qt, group_sizes))
    has_expert = jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes)
    step = jnp.where((step == 0) | ~has_expert, 1.0, step)
    steps = wide / step
    steps = codes.astype(jnp.float32) + (steps - lax.stop_gradient(steps))  # codes to the bit
    return steps.astype(jnp.bfloat16), step


def have_row_steps(fmt: Format) -> bool:
    """Returns whether activations of experts are rounded, all entries of a row in one step."""
    is_rounded = fmt.activation is not None and fmt.outliers is None
    return is_rounded and fmt.activation_scale != "group"


def _times_own(x: Array, qt: QTensor, group_sizes: Array) -> Array:
    """Returns rows times the `pre_scale` of their expert."""
    if qt.pre_scale is None:
        return x
    return _times(x, qt.pre_scale[expert_of_rows(group_sizes, x.shape[0])], qt)


def _codes_of_experts(wide: Array, qt: QTensor, group_sizes: Array) -> tuple[Array, Array]:
    """Returns codes of rows and their steps, [M, 1], or [M, K] if their groups have some."""
    fmt = qt.format
    assert fmt.activation is not None
    if fmt.activation_scale in ("token", "group"):
        return _dynamic(wide, fmt)
    if fmt.activation_scale == "static":
        step_of(wide[None], qt)  # says what is missing
        assert qt.act_scale is not None
        step = qt.act_scale[expert_of_rows(group_sizes, wide.shape[0])][:, None]
    else:
        step = _largest_step(wide, fmt.activation, (0, 1))
    codes, s = round_steps(in_steps(wide, step), fmt.activation)
    return codes, s * step


def expert_of_rows(group_sizes: Int[Array, " E"], M: int) -> Int[Array, " M"]:
    """Returns whose each of M rows is, the last one's for rows beyond all groups."""
    ends = jnp.cumsum(group_sizes)
    # Comparisons with all experts are one kernel; a search would be a loop.
    expert = jnp.searchsorted(ends, jnp.arange(M), side="right", method="compare_all")
    return jnp.minimum(expert, ends.shape[0] - 1)


def describe(qt: QTensor) -> str:
    """Returns what happens to the activation, for `qjax.explain`; "" if nothing does."""
    fmt, parts = qt.format, []
    if qt.pre_scale is not None:
        parts.append("x * pre_scale")
    if fmt.activation is not None:
        how = {
            "token": "per token", "group": f"per token and group of {fmt.group_size}",
            "tensor": "per tensor", "static": "in static steps",
        }  # fmt: skip
        parts.append(f"{fmt.activation} activations {how[fmt.activation_scale]}")
    if fmt.outliers is not None:
        room = f"room for {fmt.outlier_capacity}, else in a branch, for which a scan copies layers"
        parts.append(f"channels from {fmt.outliers:g} on in float ({room})")
    return ", ".join(parts)
