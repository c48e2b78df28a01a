"""meter: a float whose derivatives are joined by maximum instead of by sum.

A product reports the largest magnitudes of its operands as the "derivative" with respect to a
meter: that of the gradient exists nowhere but in the backward pass. JAX joins what several uses of
one value report, such as the steps of a scan, by the addition of the value's type; this type has
the maximum for it. (Flax's `fp8_ops` is where the idea comes from.)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qjax import _compat

# What was not reported; magnitudes are not negative.
NOTHING = -jnp.inf


class _Rules:
    @staticmethod
    def physical_element_aval(dtype):
        return _compat.ShapedArray((), jnp.dtype(jnp.float32))

    @staticmethod
    def convert_from(dtype, other) -> bool:
        return other == jnp.float32

    @staticmethod
    def convert_to(other, dtype) -> bool:
        return other == jnp.float32

    @staticmethod
    def add(dtype, x, y):
        return meter(jnp.maximum(read(x), read(y)))

    @staticmethod
    def zero(dtype):
        return meter(jnp.float32(NOTHING))

    global_sharded_result_handler = staticmethod(_compat.extended_results)

    @staticmethod
    def tangent_dtype(dtype):
        return dtype

    @staticmethod
    def full(shape, fill_value, dtype):
        return meter(lax.full(shape, lax.convert_element_type(fill_value, jnp.float32)))


class _MeterType(jax.dtypes.extended):
    pass


class _Meter(_compat.ExtendedDType):
    name = "qjax_meter"
    type: Any = _MeterType
    _rules = _Rules

    def __repr__(self) -> str:
        return self.name


DTYPE: Any = _Meter()
meter = functools.partial(lax.convert_element_type, new_dtype=DTYPE)


def read(a: Any) -> Array:
    """Returns a meter, or what was reported to it, as float32."""
    return lax.convert_element_type(a, jnp.float32)
