"""What a packed_dot computes, static under `jit`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from qjax import numerics
from qjax.format import Format
from qjax.prepare import scale_axes

IMPLEMENTATIONS = ("reference", "xla", "native", "mosaic", "triton")
LAYOUTS = ("mosaic", "triton")  # those that take weights of a layout of their own


@dataclasses.dataclass(frozen=True)
class Spec:
    """A product with a packed weight.

    Attributes:
      format: of the weight; its scale is given as float32 [*lead, G, C] whatever the format says,
        or as `Prepared.stored_scale` gives it; of a prepared weight in the order of `scale_axes`.
        Or as `Prepared.nested_scale` or `Prepared.multiples` does, whose second array then takes
        the place of zero points. Those are float32 too, or as `Prepared` has them.
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

    def nested_columns(self, scale: Any) -> int | None:
        """Returns how many columns share factors of nested scales, None if they are not nested."""
        inner = self.format.scale
        if not isinstance(inner, Format) or scale.dtype != jnp.uint8 or inner.group_columns == 1:
            return None
        return inner.group_columns

    @property
    def factors_of_group(self) -> int:
        """How many floats nested scales of a group are decoded with: a factor, maybe an offset."""
        inner = self.format.scale
        return 1 if isinstance(inner, Format) and inner.offset is None else 2

    @property
    def scale_axes(self) -> str:
        """The order in which scales have their last axes, G and C."""
        return scale_axes(self.format) if self.layout == "mosaic" else "gc"

    @property
    def layout(self) -> str | None:
        """The implementation in whose layout the weight is, or None."""
        if self.extra is None:
            return None
        return "mosaic" if self.capability is None else "triton"

    def out_shape(self, x: Any, data: Any) -> tuple[int, ...]:
        K, N = self.sizes(data)
        return (*x.shape[:-1], K if self.transposed else N)
