"""product: a weight product of which all three matmuls, forward and backward, run in FP8."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax import _compat
from qjax.fp8 import meter, scaling
from qjax.fp8.block_dot import Blocks, block_dot

OPERAND = "e4m3"


@dataclasses.dataclass(frozen=True)
class Spec:
    """How a product is computed, static under `jit`.

    Attributes:
      block: None, one scale for each tensor; or the side of a weight's blocks.
      transposed: whether x meets Wᵀ.
      out_dtype, x_dtype, w_dtype: of the result, and of the derivatives.
      gradient, margin, power_of_two: as in `Fp8Recipe`.
      stacked_over: mesh axes over which the leading axes are split, inside a shard_map.
    """

    block: int | None
    transposed: bool
    out_dtype: str
    x_dtype: str
    w_dtype: str
    gradient: str = "e5m2"
    margin: int = 0
    power_of_two: bool = True
    stacked_over: tuple[str, ...] = ()

    def quantize(
        self, x: Array, axes: tuple[int, ...], element: str, scale: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Returns codes, their scales, and the largest magnitudes; `axes` share one, length 1."""
        split = tuple(a for a in _compat.split_over(x) if a not in self.stacked_over)
        amax = scaling.amax(x, axes, split)
        if scale is None:
            scale = scaling.scale_of(
                amax, element, margin=self.margin, power_of_two=self.power_of_two
            )
        scale = scale.reshape(amax.shape)
        return scaling.cast(x, scale, element), scale, amax


def product(
    x: Float[Array, "*lead *m K"],
    w: Float[Array, "*lead K N"],
    spec: Spec,
    scales: Float[Array, "*lead 3"] | None = None,
    probe: Any = None,
) -> Float[Array, "*lead *m N"]:
    """Returns x @ W, or x @ Wᵀ, multiplied in FP8; so are both of its derivatives.

    With Q_t the rounding to the codes of type t in steps of a scale s, saturating, and G the
    gradient of the result Y:

      Y  = s_x s_w Q_e4m3(X) Q_e4m3(W)
      dX = s_g s_w Q_e5m2(G) Q_e4m3(W)ᵀ
      dW = s_x s_g Q_e4m3(X)ᵀ Q_e5m2(G)

    accumulated in float32 (Micikevicius et al., 2022, FP8 Formats for Deep Learning). Rounding has
    derivative 1, also where it saturates. With blocks, X and G are scaled along whatever axis is
    contracted, so that each is rounded twice (DeepSeek-AI, 2024, DeepSeek-V3, section 3.3).

    NaN and Inf, in X, W or G, make NaN of what they are multiplied into.

    Args:
      x: the input; its leading axes are those of the weight.
      w: the canonical weight, in the precision in which it is updated.
      spec: what to compute.
      scales: of input, weight and gradient, from before this step; None: from what is multiplied.
      probe: meters [*lead, 3] to which the backward pass reports max |X|, |W|, |G|; None: none.
    """
    # Where x is split over a mesh and W is not, dW is a sum over the parts: the transpose of this.
    x, w = _compat.align_varying(x, w)
    if spec.block is not None:
        return _blocked(spec, x, w)
    return _whole(spec, x, w, scales, probe)


# ---- one scale for each tensor -------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(spec: Spec, x, w, scales, probe):
    return _whole_forward(spec, x, w, scales, probe)[0]


def _whole_forward(spec, x, w, scales, probe):
    n_lead = w.ndim - 2
    sx, sw, sg = (None,) * 3 if scales is None else (scales[..., i] for i in range(3))
    qx, sx, ax = spec.quantize(x, tuple(range(n_lead, x.ndim)), OPERAND, sx)
    qw, sw, aw = spec.quantize(w, (n_lead, n_lead + 1), OPERAND, sw)
    y = _dot(spec, qx, qw, _input_numbers(x, n_lead, spec.transposed), sx, sw, spec.out_dtype)
    return y, (qx, qw, sx, sw, sg, None if probe is None else (ax, aw))


def _whole_backward(spec, residuals, g):
    qx, qw, sx, sw, sg, seen = residuals
    n_lead = qw.ndim - 2
    qg, sg, ag = spec.quantize(g, tuple(range(n_lead, g.ndim)), spec.gradient, sg)
    back = _input_numbers(g, n_lead, not spec.transposed)
    dx = _dot(spec, qg, qw, back, sg, sw, spec.x_dtype)
    pair = (qg, qx) if spec.transposed else (qx, qg)
    dw = _dot(spec, *pair, _weight_numbers(qx, n_lead), sx, sg, spec.w_dtype)
    if seen is None:
        return dx, dw, None, None
    seen = [a.reshape(a.shape[:n_lead]) for a in (*seen, ag)]
    return dx, dw, None, meter.meter(jnp.stack(seen, axis=-1))


_whole.defvjp(_whole_forward, _whole_backward)


def _input_numbers(x: Any, n_lead: int, transposed: bool) -> Any:
    """Dimension numbers of x [*lead, *m, K] times W [*lead, K, N], or Wᵀ."""
    lead = tuple(range(n_lead))
    return ((x.ndim - 1,), (n_lead + 1 if transposed else n_lead,)), (lead, lead)


def _weight_numbers(x: Any, n_lead: int) -> Any:
    """Dimension numbers of [*lead, *m, K] times [*lead, *m, N], summed over *m."""
    lead, tokens = tuple(range(n_lead)), tuple(range(n_lead, x.ndim - 1))
    return (tokens, tokens), (lead, lead)


def _dot(spec: Spec, a, b, numbers, sa, sb, out_dtype) -> Array:
    """Returns sa * sb * (a . b) for scales that belong to the leading axes."""
    n_lead = len(numbers[1][0])
    ndim = a.ndim + b.ndim - 2 * len(numbers[0][0]) - n_lead
    of_lead = lambda s: s.reshape(*s.shape[:n_lead], *[1] * (ndim - n_lead))
    return scaling.dot(
        a,
        b,
        numbers,
        of_lead(sa) * of_lead(sb),
        exact_scale=spec.power_of_two,
        out_dtype=out_dtype,
    )


# ---- blocks --------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(spec: Spec, x, w):
    return _blocked_forward(spec, x, w)[0]


def _blocked_forward(spec, x, w):
    n_lead = w.ndim - 2
    K, N = w.shape[-2:]
    assert spec.block is not None
    blocks = _blocks(_blocks(w, -2, spec.block), -1, spec.block)
    weight = spec.quantize(blocks, (-3, -1), OPERAND)[:2]
    rows = _rows(x, n_lead)
    columns = K if spec.transposed else N
    y = _dot_of_blocks(
        spec,
        _along(spec, rows, OPERAND),
        _weight(weight, columns, by_column=not spec.transposed),
        spec.out_dtype,
    ).reshape(*x.shape[:-1], columns)
    # What dW takes of x is rounded along the tokens.
    return y, (_along(spec, rows.swapaxes(-1, -2), OPERAND), weight)


def _blocked_backward(spec, residuals, g):
    x_columns, weight = residuals
    n_lead = weight[0].ndim - 4
    rows = _rows(g, n_lead)
    inputs = x_columns[0].shape[n_lead]
    dx = _dot_of_blocks(
        spec,
        _along(spec, rows, spec.gradient),
        _weight(weight, inputs, by_column=spec.transposed),
        spec.x_dtype,
    ).reshape(*g.shape[:-1], inputs)
    g_columns = _along(spec, rows.swapaxes(-1, -2), spec.gradient)
    pair = (g_columns, x_columns) if spec.transposed else (x_columns, g_columns)
    return dx, _dot_of_blocks(spec, *pair, spec.w_dtype)


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _dot_of_blocks(spec: Spec, a: Blocks, b: Blocks, out_dtype: str) -> Array:
    return block_dot(a, b, exact_scale=spec.power_of_two, out_dtype=out_dtype)


def _rows(x: Float[Array, "*lead *m C"], n_lead: int) -> Float[Array, "*lead M C"]:
    return x.reshape(*x.shape[:n_lead], math.prod(x.shape[n_lead:-1]), x.shape[-1])


def _blocks(x: Array, axis: int, size: int) -> Array:
    """Splits one axis, counted from the end, into [blocks, size]; zeros fill the last block."""
    axis += x.ndim
    missing = -x.shape[axis] % size
    if missing:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def _along(spec: Spec, x: Float[Array, "*lead R C"], element: str) -> Blocks:
    """Returns the codes of blocks of the last axis, a scale for each."""
    assert spec.block is not None
    codes, scale, _ = spec.quantize(_blocks(x, -1, spec.block), (-1,), element)
    return Blocks(codes, scale[..., 0])


def _weight(weight: tuple[Array, Array], n: int, *, by_column: bool) -> Blocks:
    """Returns a blocked weight [*lead, KB, g, NB, g] with its contraction last.

    Args:
      n: how many rows or columns it has without padding, of those that are kept.
      by_column: whether columns are kept and K is contracted.
    """
    codes, scale = weight[0], weight[1][..., 0, :, 0]  # scale [*lead, KB, NB]
    if by_column:
        codes, scale = jnp.moveaxis(codes, (-2, -1), (-4, -3)), scale.swapaxes(-1, -2)
    kept = codes.shape[-4] * codes.shape[-3]
    codes = codes.reshape(*codes.shape[:-4], kept, *codes.shape[-2:])
    return Blocks(codes[..., :n, :, :], scale)
