"""Scale rules: from the groups of a weight to its scales and zero points."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax import numerics
from qjax.format import Format, holds_sign, power_of_two_below

# Axes of a grouped weight [*b, G, g, C, c] that share one scale.
_GROUP = (-3, -1)

# Candidates of the "mse" search: fractions of the range that a scale may cover. Below a half even
# two bits only lose; above one is reached by the least-squares refit that follows each candidate.
_MSE_FRACTIONS = 24


def split(w: Float[Array, "*b K N"], fmt: Format, fill: str = "edge") -> Float[Array, "*b G g C c"]:
    """Splits a weight into its groups; a ragged last group is padded by repeating its edge."""
    *b, K, N = w.shape
    G, C = fmt.groups(K, N)
    g, c = fmt.group_size or K, fmt.group_columns or N
    if G * g != K or C * c != N:
        w = jnp.pad(w, [(0, 0)] * len(b) + [(0, G * g - K), (0, C * c - N)], mode=fill)  # pyright: ignore[reportCallIssue,reportArgumentType]
    return w.reshape(*b, G, g, C, c)


def join(groups: Array, K: int, N: int) -> Array:
    """Inverse of `split`: drops the padding."""
    *b, G, g, C, c = groups.shape
    return groups.reshape(*b, G * g, C * c)[..., :K, :N]


def spread(scale: Array, fmt: Format, K: int, N: int) -> Array:
    """Broadcasts scales [*b, G, C] over their groups: [*b, K, N], [*b, K, 1] or [*b, 1, N] wide.

    A scale shared by a whole axis keeps length 1 there, so that XLA broadcasts it.
    """
    if fmt.group_size is not None:
        scale = jnp.repeat(scale, fmt.group_size, axis=-2)[..., :K, :]
    if fmt.group_columns is not None and fmt.group_columns > 1:
        scale = jnp.repeat(scale, fmt.group_columns, axis=-1)[..., :N]
    return scale


def safe_divide(x: Array, scale: Array) -> Array:
    """Returns x / scale, and 0 where the scale is 0: an all-zero group, or one that underflowed."""
    return jnp.where(scale == 0, 0.0, x / jnp.where(scale == 0, 1.0, scale))


def choose(
    w: Float[Array, "*b K N"], fmt: Format, importance: Float[Array, "*b K"] | None = None
) -> tuple[Float[Array, "*b G C"], Float[Array, "*b G C"] | None]:
    """Returns the ideal (float32, unrounded) scales and minima of every group.

    With v the values of one group, qmin and qmax the element's range:

      absmax          scale = max |v| / qmax; for an unsigned element the sign of the largest v
      absmax_full     scale = max |v| / ((qmax - qmin) / 2)
      signed_absmax   scale = v* / qmin, v* the value of largest magnitude with its sign
      minmax          scale = (max v - min v) / (qmax - qmin), and the minimum
      centered        scale = max |v - mean| / qmax, and the mean of all groups
      absmean         scale = mean |v|   (Ma et al., 2024, BitNet b1.58, eq. 3)
      mse             the scale among clipped ranges, each refit by least squares
                      scale = sum v q / sum q^2, that minimizes sum h (v - q scale)^2

    With an e8m0 scale, absmax divides by the largest power of two in the element's range instead of
    by qmax (OCP MX v1.0, section 6.3); absmax_full and minmax round their scale up to a power of
    two, so that no value is clipped.

    Args:
      w: weight, float32.
      fmt: format after `Format.fit`.
      importance: weight h of row k in the mse rule, e.g. a Hessian diagonal; None: all ones.

    Returns:
      `scale` and, for formats with a zero point or an offset, `minimum`. All-zero groups have
      scale 0, groups with a NaN or Inf have scale NaN.
    """
    scale, minimum = _choose(w, fmt, importance)
    # A max can drop NaN and a search never picks it; 0 * x is NaN for NaN and Inf. The whole group
    # then dequantizes to NaN instead of to something plausible.
    return scale + jnp.sum(split(w, fmt) * 0.0, _GROUP), minimum


def _choose(w, fmt, importance):
    element = numerics.get_element(fmt.element)
    if fmt.rule == "ggml":
        raise NotImplementedError(
            "rule='ggml' chooses scales together with the codes and scales above them, in"
            " `quantize_array`. Where scales alone are asked for, as for learned steps, use 'mse'."
        )
    v = split(w, fmt)
    if fmt.scale_rule == "centered":
        mean = jnp.mean(w, (-2, -1), keepdims=True)
        scale = jnp.max(jnp.abs(v - mean[..., None, None]), _GROUP) / element.qmax
        return scale, jnp.broadcast_to(mean, scale.shape)
    if fmt.zero_point or fmt.offset is not None:
        low, high = jnp.min(v, _GROUP), jnp.max(v, _GROUP)
        if fmt.zero_point:  # an integer zero point can only lie in range if the range holds 0
            low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        if isinstance(fmt.offset, Format) and numerics.get_element(fmt.offset.element).qmin == 0:
            low = jnp.minimum(low, 0.0)  # unsigned codes of the minima can only share one sign
        scale = _whole_range((high - low) / (element.qmax - element.qmin), fmt)
        if fmt.scale_rule == "mse":
            return _search_range(w, fmt, element, low, high, scale, importance)
        return scale, low
    absmax = jnp.max(jnp.abs(v), _GROUP)
    if fmt.scale_rule == "absmean":
        ones = split(jnp.ones(w.shape[-2:], w.dtype), fmt, "constant")
        return jnp.sum(jnp.abs(v) * ones, _GROUP) / jnp.sum(ones, _GROUP), None
    if fmt.scale_rule == "absmax_full":
        return _whole_range(absmax / ((element.qmax - element.qmin) / 2), fmt), None
    if fmt.scale_rule == "signed_absmax":
        # On a tie of +a and -a either sign is right; take the negative one, which qmin holds.
        sign = jnp.where(absmax == -jnp.min(v, _GROUP), 1.0, -1.0)
        return sign * absmax / -element.qmin, None
    if element.qmin == 0 and holds_sign(fmt.scale):
        # Unsigned codes cannot carry a sign, so the scale does: minima of k-quants are negative.
        scale = jnp.where(absmax == jnp.max(v, _GROUP), absmax, -absmax) / element.qmax
    elif fmt.scale == "e8m0":
        scale = absmax / power_of_two_below(element.qmax)
    else:
        scale = absmax / element.qmax
    if fmt.scale_rule == "mse":
        return _search_scale(w, fmt, element, absmax, scale, importance), None
    return scale, None


def _whole_range(scale: Array, fmt: Format) -> Array:
    """Returns a scale whose range, once stored as e8m0, still covers the group."""
    return numerics.power_of_two_above(scale) if fmt.scale == "e8m0" else scale


def _importance(w: Array, fmt: Format, importance: Array | None) -> Array:
    """Row weights, broadcastable to groups [*b, G, g, C, c], zero on padding."""
    K, N = w.shape[-2:]
    G, C = fmt.groups(K, N)
    g, c = fmt.group_size or K, fmt.group_columns or N
    h = jnp.ones(K, w.dtype) if importance is None else importance.astype(w.dtype)
    h = jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, G * g - K)])
    h = h.reshape(*h.shape[:-1], G, g, 1, 1)
    if C * c == N:
        return h
    return h * (jnp.arange(C * c) < N).astype(w.dtype).reshape(C, c)


def stored(scale: Array, fmt: str | Format) -> Array:
    """Returns the scale as it will be read back from a plain storage type.

    Scales that are quantized again are searched for in float32: which levels they get depends on
    all scales together.
    """
    if isinstance(fmt, Format):
        return scale
    return numerics.read_scale(numerics.round_scale(scale, fmt), fmt)


def _search_scale(w, fmt, element, absmax, start, importance):
    v, h = split(w, fmt), _importance(w, fmt, importance)

    def wide(x):
        return x[..., :, None, :, None]

    def error(scale):
        q = numerics.round_to_level(safe_divide(v, wide(scale)), element)
        residual = v - q * wide(scale)
        return jnp.sum(h * residual * residual, _GROUP)

    def refit(scale):
        q = numerics.round_to_level(safe_divide(v, wide(scale)), element)
        return safe_divide(jnp.sum(h * v * q, _GROUP), jnp.sum(h * q * q, _GROUP))

    # Types whose negative range is larger take both signs: the sign says which side gets it.
    two_sided = element.qmin < -element.qmax and holds_sign(fmt.scale)
    extent = max(-element.qmin, element.qmax)

    def step(best, fraction):
        signs = (1.0, -1.0) if two_sided else (1.0,)
        for sign in signs:
            guess = sign * fraction * absmax / extent
            candidates = [stored(guess, fmt.scale)]
            if fmt.scale != "e8m0":
                candidates.append(stored(refit(guess), fmt.scale))
            for scale in candidates:
                e = error(scale)
                best = (jnp.where(e < best[1], scale, best[0]), jnp.minimum(e, best[1]))
        return best, None

    start = stored(start, fmt.scale)
    fractions = jnp.linspace(0.4, 1.05, _MSE_FRACTIONS, dtype=w.dtype)
    if fmt.scale == "e8m0":  # neighbouring powers of two are the only other candidates
        base = power_of_two_below(element.qmax)
        fractions = jnp.asarray([0.5, 1.0, 2.0], w.dtype) * (extent / base)
    (scale, _), _ = jax.lax.scan(step, (start, error(start)), fractions)
    return scale


def _search_range(w, fmt, element, low, high, start, importance):
    v, h = split(w, fmt), _importance(w, fmt, importance)
    steps = element.qmax - element.qmin

    def wide(x):
        return x[..., :, None, :, None]

    def error(scale, minimum):
        scale, minimum = stored_pair(scale, minimum, fmt, element)
        if fmt.zero_point:
            q = jnp.clip(
                jnp.round(safe_divide(v, wide(scale))) + wide(minimum), element.qmin, element.qmax
            )
            residual = v - (q - wide(minimum)) * wide(scale)
        else:
            q = numerics.round_to_level(safe_divide(v - wide(minimum), wide(scale)), element)
            residual = v - (q * wide(scale) + wide(minimum))
        return jnp.sum(h * residual * residual, _GROUP)

    def step(best, fractions):
        a, b = fractions
        scale, minimum = (b * high - a * low) / steps, a * low
        e = error(scale, minimum)
        better = e < best[2]
        return (
            jnp.where(better, scale, best[0]),
            jnp.where(better, minimum, best[1]),
            jnp.minimum(e, best[2]),
        ), None

    # Clip both ends together, then each end alone.
    f = jnp.linspace(0.5, 1.0, 12, dtype=w.dtype)
    one = jnp.ones_like(f)
    a = jnp.concatenate([f, f, one])
    b = jnp.concatenate([f, one, f])
    (scale, minimum, _), _ = jax.lax.scan(step, (start, low, error(start, low)), (a, b))
    return scale, minimum


def stored_pair(scale: Array, minimum: Array, fmt: Format, element: numerics.Element):
    """Returns scale and zero point (or offset) as they will be read back."""
    scale = stored(scale, fmt.scale)
    if fmt.zero_point:
        zero = jnp.round(element.qmin - safe_divide(minimum, scale))
        return scale, jnp.clip(zero, element.qmin, element.qmax)
    return scale, stored(minimum, fmt.offset)  # pyright: ignore[reportArgumentType]
