"""SmoothQuant: scales of input channels that share outliers between activations and weights.

Xiao et al., 2022 (arXiv:2211.10438). Our W is theirs, [K, N] with y = x @ W. With x / s quantized
instead of x, and diag(s) W instead of W (eq. 3-4),

  s_j = max |x_j|^alpha / max |W_j|^(1 - alpha)

moves the part alpha of each channel's range from the activation, whose step all channels share, to
the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax import numerics, scales
from qjax.format import ACTIVATION_SCALES, Format
from qjax.ops import activation as activations
from qjax.qtensor import dequantize_canonical, quantize_array
from qjax.transform.fold import tie
from qjax.transform.scaling import Piece

_HIGHEST = lax.Precision.HIGHEST

# The paper's code keeps s above 1e-5; the inverse bounds it from above.
_LARGEST = 1e5


class Found(NamedTuple):
    """The result of `search`, as arrays of the group's leading shape.

    Attributes:
      scale: s [*lead, K].
      alpha: its exponent; NaN where s = 1 was best.
      act_scale: [*lead], the static step of x / s: its largest magnitude over qmax.
      before, after: squared output error of quantized activations and weights on the sample,
        relative to the squared output, with s = 1 and with s; summed over all weights.
    """

    scale: Float[Array, "*lead K"]
    alpha: Float[Array, "*lead"]
    act_scale: Float[Array, "*lead"]
    before: Float[Array, "*lead"]
    after: Float[Array, "*lead"]


def smoothing(
    x_absmax: Float[Array, "*lead K"],
    w_absmax: Float[Array, "*lead K"],
    alpha: float | Array = 0.5,
    tied: tuple[Piece, ...] = (),
) -> Float[Array, "*lead K"]:
    """Returns s = x_absmax^alpha / w_absmax^(1 - alpha), positive and finite.

    A channel that was never seen has s = 1. One whose weights are all zero counts as one with tiny
    weights: nothing is lost if its activations shrink.

    Args:
      x_absmax: largest magnitude of every input channel.
      w_absmax: largest magnitude of its weights, over all weights of the group.
      alpha: what part of the range the weights take.
      tied: `group.tied` of the group.
    """
    x, w = x_absmax.astype(jnp.float32), w_absmax.astype(jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    w = jnp.maximum(w, jnp.maximum(1e-5 * jnp.max(w, -1, keepdims=True), tiny))
    log_s = alpha * jnp.log(jnp.where(x > 0, x, 1.0)) - (1 - alpha) * jnp.log(w)
    s = jnp.where(x > 0, jnp.exp(log_s), 1.0)
    return tie(jnp.clip(s, 1 / _LARGEST, _LARGEST), tied)


def _quantized(
    x: Array, absmax: Array, element: str, activation_scale: str, group_size: int
) -> Array:
    """Returns x [*lead, R, K] as its codes stand for it."""
    e = numerics.get_element(element)
    if activation_scale == "group":
        codes, step = activations.quantize_groups(x, element, group_size)
        return codes.astype(jnp.float32) * activations.of_inputs(step, group_size, x.shape[-1])
    if activation_scale == "token":
        largest = jnp.max(jnp.abs(x), -1, keepdims=True)
    elif activation_scale == "tensor":
        largest = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    else:
        largest = jnp.max(absmax, -1)[..., None, None]
    step = largest / e.qmax
    return numerics.round_to_level(scales.safe_divide(x, step), e) * step


@functools.partial(
    jax.jit, static_argnames=("fmt", "alpha", "grid", "activation", "activation_scale", "tied")
)
def search(
    weights: Sequence[Float[Array, "*lead K N"]],
    absmax: Float[Array, "*lead K"],
    sample: Float[Array, "*lead R K"],
    fmt: Format,
    *,
    alpha: float | None = 0.5,
    grid: int = 20,
    activation: str = "int8",
    activation_scale: str = "token",
    tied: tuple[Piece, ...] = (),
) -> Found:
    """Returns the scales of a group's input channels, and what they do to its outputs.

    The error is that of rounded activations times rounded weights,

      sum_i ‖Q(X / s) Q(diag(s) W_i) - X W_i‖² / sum_i ‖X W_i‖²

    Args:
      weights: canonical weights of one `fold.Group`, in any float type.
      absmax: largest magnitudes of their common input, over all calibration data.
      sample: rows of that input; rows of zeros do not count.
      fmt: how the weights will be stored. Static.
      alpha: None: the best of 0, 1/grid, ..., 1 and s = 1 on the sample, never worse than s = 1;
        each leading index for itself, unless ties span them. Static.
      grid: steps of alpha. Static.
      activation: element type of the activations. Static.
      activation_scale: "token", a step for each row; "group", for each of its groups, as `fmt` has
        them; "tensor", one for the sample; "static", one from `absmax`. Static.
      tied: `group.tied` of the group. Static.

    Raises:
      ValueError: for another `activation_scale`, or an `alpha` outside of [0, 1].
    """
    if activation_scale not in ACTIVATION_SCALES:
        raise ValueError(
            f"`activation_scale` must be one of {', '.join(ACTIVATION_SCALES)},"
            f" got {activation_scale!r}."
        )
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1], or None to search, got {alpha}.")
    weights = [w.astype(jnp.float32) for w in weights]
    absmax, sample = absmax.astype(jnp.float32), sample.astype(jnp.float32)
    lead, K = absmax.shape[:-1], absmax.shape[-1]
    spans_lead = any(p.stride >= K for p in tied)
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(w), -1) for w in weights])
    second = jnp.mean(sample * sample, -2)

    def total(errors):
        e = functools.reduce(jnp.add, [jnp.sum(d * d, (-2, -1)) for d in errors])
        return jnp.broadcast_to(jnp.sum(e), lead) if spans_lead else e

    def output(x, w):
        return jnp.matmul(x, w, precision=_HIGHEST)

    wanted = [output(sample, w) for w in weights]

    def loss(s):
        x = sample / s[..., None, :]
        x = _quantized(x, absmax / s, activation, activation_scale, fmt.fit(K).group_size or K)
        importance = second / (s * s)
        rounded = (
            dequantize_canonical(quantize_array(w * s[..., None], fmt, importance=importance))
            for w in weights
        )
        return total([y - output(x, w) for y, w in zip(wanted, rounded, strict=True)])

    def step(best, a):
        s = smoothing(absmax, largest, a, tied)
        new = (s, jnp.broadcast_to(a, lead), loss(s))
        # A given alpha is taken as it is; a searched one has to be better.
        better = (new[-1] < best[-1]) if alpha is None else jnp.ones(lead, bool)
        return jax.tree.map(
            lambda a, b: jnp.where(better.reshape(*lead, *[1] * (a.ndim - len(lead))), a, b),
            new,
            best,
        ), None

    one = jnp.ones_like(absmax)
    before = loss(one)
    alphas = jnp.linspace(0.0, 1.0, grid + 1) if alpha is None else jnp.full(1, alpha)
    start = (one, jnp.full(lead, jnp.nan), before)
    (s, chosen, after), _ = lax.scan(step, start, alphas)
    squared = total(wanted)
    act_scale = jnp.max(absmax / s, -1) / numerics.get_element(activation).qmax
    relative = functools.partial(scales.safe_divide, scale=squared)
    return Found(s, chosen, act_scale, relative(before), relative(after))
