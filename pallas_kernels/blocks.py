"""Scales that the features of a block share, one group of inputs after another.

So is what a kernel reads of them: TMA loads 16 bytes of a row at least, and writes at multiples of
128 in a ring. So a step loads what several steps need, in 128 bytes, and reads its own of it: as it
is stored, in no order for a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import hopper
from pallas_kernels.hopper import Operand
from pallas_kernels.tuning import TILE_N


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Scales of a weight, each for a group of inputs of 128 features.

    Attributes:
      values: float32, bfloat16 or float16 [.., N / 128, G].
    """

    values: Array

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def decoded(self) -> Array:
        """Returns them for each feature, [.., G, N]."""
        return jnp.repeat(self.values.swapaxes(-1, -2), TILE_N, axis=-1)

    def shared(self, per_step: int, steps: int) -> Shared:
        """Returns them as a kernel with such steps reads them."""
        return Shared(self.values, TILE_N, per_step, steps)


def groups_of(scale: Array | Blocks) -> int:
    """Returns how many groups of inputs scales are of."""
    return scale.values.shape[-1] if isinstance(scale, Blocks) else scale.shape[-2]


@dataclasses.dataclass(frozen=True)
class Shared:
    """Floats of blocks of features, in a kernel.

    Attributes:
      array: [.., C, each * G], C blocks of N features and G groups of inputs.
      columns: features in a block, a multiple of 128; the last one may have fewer.
      per_step, steps: groups of a step, and steps of a group, one of which is 1.
      each: how many floats a block and group have.
    """

    array: Array
    columns: int
    per_step: int
    steps: int
    each: int = 1

    @property
    def groups(self) -> int:
        """How many are loaded at once."""
        return hopper.ALIGNMENT * 8 // hopper.bits(self.array.dtype) // self.each

    def operand(self) -> Operand:
        return Operand(
            in_sixteen_bytes(self.array),
            "n",
            shared_by=self.columns,
            width=self.groups * self.each,
            steps_per_row=self.groups // self.per_step * self.steps,
        )

    def read(self, block: Any, k: Any, g: int) -> list[Array]:
        """Returns the floats, in float32, of a block in shared memory for group g of step k."""
        at = first_of_step(k, self.groups, self.per_step, self.steps) + g
        return [block[0, at * self.each + i].astype(jnp.float32) for i in range(self.each)]


def first_of_step(k: Any, groups: int, per_step: int, steps: int = 1) -> Any:
    """Returns where the first group of step k is among as many as are loaded at once."""
    return k // steps * per_step % groups


def in_sixteen_bytes(a: Array) -> Array:
    """Returns rows of whole 16 bytes, as TMA takes them: with zeros after them if need be."""
    more = -a.shape[-1] % (128 // hopper.bits(a.dtype))
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
