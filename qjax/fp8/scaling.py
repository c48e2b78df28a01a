"""Scales of FP8 operands: from magnitudes to steps, and from values to codes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax import numerics

# Products of two scales must not underflow, or results that float32 can hold would vanish.
_SMALLEST = 2.0**-63


def amax(x: Array, axes: tuple[int, ...], split: tuple[str, ...] = ()) -> Array:
    """Returns max |x| over `axes` in float32; infinity if one of them is NaN or Inf.

    Args:
      axes: to reduce; they stay, of length 1.
      split: mesh axes over which parts of x lie, inside a shard_map.
    """
    # A max may drop NaN on some backends; Inf stays, and stands for both from here on.
    magnitude = jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf)
    if not x.size:
        shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
        return jnp.zeros(shape, jnp.float32)
    largest = jnp.max(magnitude, axes, keepdims=True).astype(jnp.float32)
    return lax.pmax(largest, split) if split else largest


def scale_of(
    amax: Float[Array, "*s"], element: str, *, margin: int, power_of_two: bool
) -> Float[Array, "*s"]:
    """Returns the step s of codes that hold magnitudes up to `amax`.

    s = 2^margin * amax / qmax, rounded up to a power of two if asked for

    s is 1 where amax is 0, NaN where amax is infinite, and never below 2^-63.
    """
    s = amax * (2.0**margin / numerics.get_element(element).qmax)
    if power_of_two:
        s = numerics.power_of_two_above(s)
    s = jnp.where(amax == 0, 1.0, jnp.maximum(s, _SMALLEST))
    return jnp.where(jnp.isfinite(amax), s, jnp.nan)


def cast(x: Array, scale: Float[Array, ...], element: str) -> Array:
    """Returns the codes round(x / scale), saturated; NaN for NaN and Inf.

    Args:
      scale: broadcasts against x.
    """
    steps = x.astype(jnp.float32) / scale
    # Inf would saturate to the largest code and look like any other number.
    steps = jnp.where(jnp.isfinite(x), steps, jnp.nan)
    return numerics.encode(steps, numerics.get_element(element))


def dot(
    a: Array, b: Array, numbers: Any, scale: Array, *, exact_scale: bool, out_dtype: Any
) -> Array:
    """Returns scale * (a . b) of FP8 codes, accumulated in float32.

    Equivalent to: lax.dot_general of the codes in float64, times scale, rounded to `out_dtype`,
    up to the order of the sum.

    Args:
      numbers: dimension numbers of `lax.dot_general`.
      scale: a float32 that broadcasts against the result.
      exact_scale: whether it is a power of two, by which a rounded result can be multiplied.
    """
    out_dtype = jnp.dtype(out_dtype)
    # float16 has no room for sums of unscaled codes; bfloat16 has float32's range.
    accumulated = out_dtype if exact_scale and out_dtype == jnp.bfloat16 else jnp.float32

    def native(a, b):
        # The operands as they are, and one factor on the result: what XLA makes a cublasLt FP8
        # matmul of, with the factor inside.
        return lax.dot_general(a, b, numbers, preferred_element_type=accumulated)

    def upcast(a, b):
        # CPUs have no FP8 product. Codes are exact in bfloat16, and so are products in float32.
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return lax.dot_general(a, b, numbers, preferred_element_type=accumulated)

    y = lax.platform_dependent(a, b, cpu=upcast, default=native)
    return (y * scale.astype(accumulated)).astype(out_dtype)
