"""Weights in the layout that kernels in Triton read: NVIDIA GPUs before Hopper, capability 8.x."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.triton import packing as halves
from pallas_kernels.triton.tuning import TILE_K, TILE_N
from qjax import numerics, packing
from qjax.format import Format
from qjax.prepare import Prepared, fields_of, has_floats, stored_zeros, zeros_in_bytes
from qjax.qtensor import QTensor

# Names of devices for programs that are compiled elsewhere, and their compute capabilities.
DEVICES = {"a100": 80, "rtx3090": 86, "rtx4090": 89}
# Element -> zero point of its codes as the kernel reads them, if the weight has none of its own.
# Codes of 4 bits are without sign, as a QTensor stores them; those of 8 bits with one.
ZERO = {"int4": 8, "uint4": 0, "int8": 0, "uint8": -128}


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PreparedTriton(Prepared):
    """A QTensor whose codes lie as `pallas_kernels.triton` reads them; all else is as it was.

    Attributes:
      data: bytes [*lead, N', K' * b / 8]. Of 8 bits: q in two's complement, minus 128 of an
        unsigned type. Of 4 bits: the codes by `pallas_kernels.triton.packing`.
      capability: static. What to compile for: 80, 86 or 89.
    """

    capability: int = 80

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[Any, ...]]:
        children, aux = super().tree_flatten_with_keys()
        return children, (*aux, self.capability)

    @classmethod
    def tree_unflatten(cls, aux, children):
        data, scale, zero, *factors = children
        fmt, layout, dtype, pad, extra, capability = aux
        return cls(
            data, scale, zero, fmt, layout, dtype, pad, *factors,
            extra=extra, capability=capability,
        )  # fmt: skip

    def parts(self) -> tuple[int, int]:
        (k_parts, n_parts), N = super().parts(), self.canonical_shape[-1]
        return k_parts, math.gcd(n_parts, N // TILE_N)  # in whole tiles, too

    @property
    def scale_axes(self) -> str:
        return "gc"

    def stored_scales(self) -> tuple[Any, Any]:
        return self.scale, self.zero

    def canonical(self) -> QTensor:
        data = canonical_codes(self.data, self.format, self.extra)
        return QTensor(**fields_of(self, data=data, zero=stored_zeros(self)))

    def in_front(self, *, transposed: bool) -> str:
        del transposed  # for which there is no kernel
        fmt = self.format
        text = self._made_of_scales(has_floats(fmt), has_blocks=False)
        text += ", zero points decoded in front of it" if fmt.zero_point else ""
        return text + (", offsets by a product of their own" if fmt.offset is not None else "")

    def codes_of_rows(self, rows: Int[Array, " i"]) -> Array:
        data = self.data[: self.canonical_shape[-1]]
        if self.element.bits == 8:
            return _flipped(data[:, rows].T, self.format.element)
        return halves.unpack_columns(data, rows).T


def reason_against(qt: QTensor) -> str | None:
    """Returns why the kernels in Triton cannot read a weight, or None if they can.

    Example:
      >>> import qjax
      >>> qt = qjax.quantize({"w": jnp.ones((256, 8))}, qjax.Format("int3", group_size=64))["w"]
      >>> reason_against(qt)
      'int3 codes: kernels read int4, uint4, int8, uint8 and tables of 16 levels'
    """
    fmt, element = qt.format, qt.element
    *_, K, N = qt.canonical_shape
    G, C = fmt.groups(K, N)
    g = fmt.group_size
    is_table = element.kind == "table" and element.bits == 4
    if fmt.element not in ZERO and not is_table:
        return f"{fmt.element} codes: kernels read {', '.join(ZERO)} and tables of 16 levels"
    if C not in (1, N):
        return f"{fmt.group_columns} columns share a scale: kernels take 1 or all"
    if fmt.activation is not None:
        if (fmt.element, fmt.activation) != ("int8", "int8") or G > 1:
            return (
                f"{fmt.element} codes in {G} groups x {fmt.activation} activations: kernels"
                " multiply int8 x int8 in one group"
            )
    elif g is not None and G > 1 and g not in (32, 64) and g % TILE_K:
        return f"groups of {g}: kernels read 32, 64 and multiples of {TILE_K}"
    return None


def prepared(qt: QTensor, capability: int) -> PreparedTriton:
    """Returns a weight that `reason_against` has nothing against in the kernels' layout."""
    *lead, K, N = qt.canonical_shape
    g, bits = qt.format.group_size, qt.element.bits
    unit = TILE_K if g is None or g >= K else math.lcm(TILE_K, g)
    extra = (-K % unit, -N % TILE_N)
    data = _flipped(qt.data, qt.format.element)
    if bits == 4:
        data = packing.unpack(data, bits, qt.pad)
    data = data.swapaxes(-1, -2)
    data = jnp.pad(data, [(0, 0)] * len(lead) + [(0, extra[1]), (0, extra[0])])
    if bits == 4:
        data = halves.pack(data)
    fields = fields_of(qt, data=data, zero=zeros_in_bytes(qt))
    return PreparedTriton(**fields, extra=extra, capability=capability)


def canonical_codes(data: Array, fmt: Format, extra: tuple[int, int]) -> Array:
    """Returns the codes [*lead, N', K' in bytes] of a prepared weight as a QTensor stores them."""
    bits = numerics.get_element(fmt.element).bits
    if bits == 4:
        data = halves.unpack(data)
    *_, N, K = data.shape
    data = data[..., : N - extra[1], : K - extra[0]].swapaxes(-1, -2)
    return packing.pack(data, bits) if bits == 4 else _flipped(data, fmt.element)


def _flipped(data: Array, element: str) -> Array:
    return data ^ jnp.uint8(128) if element == "uint8" else data
