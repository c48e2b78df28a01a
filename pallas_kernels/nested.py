"""Scales that are themselves quantized, as kernels decode them: 8 bits, and two floats a block."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.blocks import Shared


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "outer"], meta_fields=["columns"]
)
@dataclasses.dataclass(frozen=True)
class Nested:
    """Scales [G, N] of a weight: code * factor + offset, which `columns` features share.

    Double quantization (Dettmers et al., 2023, QLoRA, section 3).

    Attributes:
      codes: uint8 [.., G, N].
      outer: float32 [.., C, G], C blocks of N: of each block the factor of one group after another.
        Or [.., C, 2 * G]: after every factor the offset. See `outer_of`.
      columns: features in a block, a multiple of 128; the last one may have fewer.
    """

    codes: Array
    outer: Array
    columns: int

    def decoded(self) -> Array:
        """Returns float32 [.., G, N]."""
        N = self.codes.shape[-1]
        of_all = lambda a: jnp.repeat(a, self.columns, axis=-1)[..., :N]
        factor, *offset = map(of_all, factors(self.outer, has_offset=self.has_offset))
        scale = self.codes.astype(jnp.float32) * factor
        return scale + offset[0] if offset else scale

    @property
    def has_offset(self) -> bool:
        return self.outer.shape[-1] == 2 * self.codes.shape[-2]

    def shared(self, per_step: int, steps: int) -> Shared:
        """Returns factors and offsets as a kernel with such steps reads them."""
        return Shared(self.outer, self.columns, per_step, steps, each=1 + self.has_offset)


def outer_of(factor: Array, offset: Array | None) -> Array:
    """Returns factors, and offsets if there are any, [.., G, C] as `Nested.outer` has them."""
    own = [a.swapaxes(-1, -2) for a in (factor, offset) if a is not None]
    both = jnp.stack(own, axis=-1)
    return both.reshape(*both.shape[:-2], -1)


def factors(outer: Array, *, has_offset: bool) -> list[Array]:
    """Returns the factors [.., G, C] that `outer_of` was given, and offsets."""
    each = 1 + has_offset
    return [outer[..., i::each].swapaxes(-1, -2) for i in range(each)]


def as_float(codes: Array) -> Array:
    """Returns bytes as float32 by the integer pipe: a byte below the bits of 2^23, less 2^23."""
    bits = codes.astype(jnp.int32) | 0x4B000000
    return lax.bitcast_convert_type(bits, jnp.float32) - 2.0**23
