"""Scales that are themselves quantized, as kernels decode them: 8 bits, and two floats a block."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import hopper


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "outer"], meta_fields=["columns"]
)
@dataclasses.dataclass(frozen=True)
class Nested:
    """Scales [G, N] of a weight: code * factor + offset, of which `columns` features share both.

    Double quantization (Dettmers et al., 2023, QLoRA, section 3).

    Attributes:
      codes: uint8 [G, N].
      outer: float32 [G, 2 * C], C blocks of N: of each block its factor, then its offset.
      columns: features in a block, a multiple of 128; the last one may have fewer.
    """

    codes: Array
    outer: Array
    columns: int

    def decoded(self) -> Array:
        """Returns float32 [.., G, N]."""
        N = self.codes.shape[-1]
        of_all = lambda a: jnp.repeat(a, self.columns, axis=-1)[..., :N]
        factor, offset = of_all(self.outer[..., ::2]), of_all(self.outer[..., 1::2])
        return self.codes.astype(jnp.float32) * factor + offset

    def rows(self, groups: int) -> tuple[Array, int]:
        """Returns the factors and offsets as TMA loads them, and how many floats that is at once.

        A block of features has a row [G * 2 ..]. Its factors and offsets for as many groups lie
        together, with zeros up to the bytes that a block has at least.
        """
        G, columns = self.outer.shape
        pairs = self.outer.reshape(G // groups, groups, columns // 2, 2)
        pairs = pairs.transpose(2, 0, 1, 3).reshape(columns // 2, G // groups, 2 * groups)
        pairs = jnp.pad(pairs, ((0, 0), (0, 0), (0, -2 * groups % (hopper.ALIGNMENT // 4))))
        return pairs.reshape(columns // 2, -1), pairs.shape[-1]


def as_float(codes: Array) -> Array:
    """Returns bytes as float32 by the integer pipe: a byte below the bits of 2^23, less 2^23."""
    bits = codes.astype(jnp.int32) | 0x4B000000
    return lax.bitcast_convert_type(bits, jnp.float32) - 2.0**23
