"""Products without an FP8 form in hardware, convolutions and ragged_dot, computed on FP8 codes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax import _compat
from qjax.fp8 import meter, scaling
from qjax.fp8.product import OPERAND, Spec


@dataclasses.dataclass(frozen=True)
class Conv:
    """`lax.conv_general_dilated` of an image and a kernel; each has one scale.

    Attributes:
      params: static arguments of `lax.conv_general_dilated`, as pairs.
      n_lead: axes that scales have. A kernel picked from a stack keeps, with length 1, the axes
        that it was picked along.
    """

    params: tuple[tuple[str, Any], ...]
    n_lead: int

    def multiply(self, x: Array, w: Array, sizes: None) -> Array:
        return lax.conv_general_dilated(x, w, **dict(self.params), precision=lax.Precision.HIGHEST)

    def largest(self, x: Array, sizes: None) -> Float[Array, "*lead"]:
        """Returns max |x| of all that shares a scale."""
        return scaling.amax(x, tuple(range(x.ndim))).reshape([1] * self.n_lead)

    def spread(self, scale: Float[Array, "*lead"], rows: int, sizes: None) -> Float[Array, ""]:
        """Returns scales that broadcast against x or the result."""
        return scale.reshape(())

    def over_weight(self, a: Float[Array, "*lead"]) -> Float[Array, ""]:
        """Returns factors that broadcast against w."""
        return a.reshape(())


@dataclasses.dataclass(frozen=True)
class Ragged:
    """`lax.ragged_dot`: x [M, K] in groups of rows, each times an expert of w [E, K, N].

    Every expert has scales of its own, for its weight, its rows and their gradients: it is the FP8
    product that it would be alone. Rows past the groups, whose result is 0, have none.
    """

    def multiply(self, x: Array, w: Array, sizes: Int[Array, " E"]) -> Array:
        return lax.ragged_dot(x, w, sizes, precision=lax.Precision.HIGHEST)

    def largest(self, x: Array, sizes: Int[Array, " E"]) -> Float[Array, " E"]:
        rows = scaling.amax(x, (1,))[:, 0]
        found = jax.ops.segment_max(rows, _experts(len(x), sizes), num_segments=len(sizes))
        return jnp.maximum(found, 0.0)  # an expert without rows

    def spread(self, scale: Float[Array, " E"], rows: int, sizes: Int[Array, " E"]) -> Array:
        return jnp.append(scale, 1.0)[_experts(rows, sizes), None]

    def over_weight(self, a: Float[Array, " E"]) -> Float[Array, "E 1 1"]:
        return a[:, None, None]


def _experts(rows: int, sizes: Int[Array, " E"]) -> Int[Array, " M"]:
    """Returns the expert of each row; E past the last group."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")


Op = Conv | Ragged


def product(
    op: Op,
    x: Float[Array, "M ..."],
    w: Float[Array, "*lead ..."],
    sizes: Int[Array, " E"] | None,
    spec: Spec,
    scales: Float[Array, "*lead 3"] | None = None,
    probe: Any = None,
) -> Array:
    """Returns op(x, w), multiplied in FP8; so are both of its derivatives.

    As `qjax.fp8.product.product` with one scale for each tensor, for any bilinear op: with Q_t the
    rounding to codes in steps of a scale s, and opˣ, opʷ the transposes of op,

      Y  = s_x s_w op(Q_e4m3(X), Q_e4m3(W))
      dX = s_g s_w opˣ(Q_t(G), Q_e4m3(W))
      dW = s_x s_g opʷ(Q_e4m3(X), Q_t(G))

    Codes are multiplied as float32, in which their products are exact: the numbers of FP8 training,
    not its speed.

    Args:
      sizes: of the groups of a ragged_dot.
      spec: its types and rules of scales; `block` must be None.
      scales, probe: as for `qjax.fp8.product.product`.
    """
    x, w = _compat.align_varying(x, w)
    return _product(op, spec, x, w, sizes, scales, probe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(op: Op, spec: Spec, x, w, sizes, scales, probe):
    return _forward(op, spec, x, w, sizes, scales, probe)[0]


def _quantize(
    op: Op, spec: Spec, x: Array, sizes: Any, element: str, scale: Array | None
) -> tuple[Array, Array, Array]:
    """Returns codes of x, the scales [*lead] of its groups, and their largest magnitudes."""
    amax = op.largest(x, sizes)
    if split := tuple(a for a in _compat.split_over(x) if a not in spec.stacked_over):
        amax = lax.pmax(amax, split)
    if scale is None:
        scale = scaling.scale_of(amax, element, margin=spec.margin, power_of_two=spec.power_of_two)
    return scaling.cast(x, op.spread(scale, len(x), sizes), element), scale, amax


def _forward(op, spec, x, w, sizes, scales, probe):
    sx, sw, sg = (None,) * 3 if scales is None else (scales[..., i] for i in range(3))
    qx, sx, ax = _quantize(op, spec, x, sizes, OPERAND, sx)
    axes = tuple(range(1 if isinstance(op, Ragged) else 0, w.ndim))
    qw, sw, aw = spec.quantize(w, axes, OPERAND, sw)
    sw, aw = sw.reshape(sx.shape), aw.reshape(sx.shape)
    y = op.multiply(_float(qx), _float(qw), sizes) * op.spread(sx * sw, len(x), sizes)
    return y.astype(spec.out_dtype), (
        qx,
        qw,
        sx,
        sw,
        sg,
        sizes,
        None if probe is None else (ax, aw),
    )


def _backward(op, spec, residuals, g):
    qx, qw, sx, sw, sg, sizes, seen = residuals
    qg, sg, ag = _quantize(op, spec, g, sizes, spec.gradient, sg)
    _, pull = jax.vjp(lambda x, w: op.multiply(x, w, sizes), _float(qx), _float(qw))
    dx, dw = pull(_float(qg))
    dx = (dx * op.spread(sg * sw, len(dx), sizes)).astype(spec.x_dtype)
    dw = (dw * op.over_weight(sx * sg)).astype(spec.w_dtype)
    probe = None if seen is None else meter.meter(jnp.stack([*seen, ag], axis=-1))
    return dx, dw, None, None, probe


def _float(codes: Array) -> Array:
    return codes.astype(jnp.float32)


_product.defvjp(_forward, _backward)
