"""Scales that are quantized again: the scale of their own is chosen for the weight, too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax import numerics, scales
from qjax.format import Format, is_stepped

# Factors of the scale that the largest scales ask for: an octave, after which the levels of floats
# are the same again. Those of integers are so at most; above their ends they clip a few scales.
_FACTORS = np.exp2(np.arange(-2, 10) / 12)


def are_searched(fmt: Format) -> bool:
    """Whether `search` chooses the scales of scales of this format."""
    is_plain = not fmt.zero_point and fmt.offset is None
    return is_plain and fmt.scale_rule == "mse" and fmt.group_columns == 1 and is_stepped(fmt.scale)


def search(
    w: Float[Array, "*b K N"],
    scale: Float[Array, "*b G N"],
    fmt: Format,
    importance: Float[Array, "*b K"] | None = None,
) -> tuple[Float[Array, "*b G N"], Float[Array, "*b g N"]]:
    """Returns scales that can be stored, and their own scales.

    A scale is rounded to one of two levels, and the step between those is that of its own scale. Of
    some of these the one is taken, and of both levels, that minimize sum h (w - q scale)^2 over all
    that share it.

    Args:
      w: the weight, float32.
      scale: what would be stored if it could.
      fmt: format after `Format.fit`, of which `are_searched`.
      importance: as for `scales.choose`.
    """
    assert isinstance(fmt.scale, Format)
    G, N = scale.shape[-2:]
    inner, element = fmt.scale.fit(G), numerics.get_element(fmt.element)
    levels = jnp.asarray(numerics.positive_levels(inner.element))
    v, h = scales.split(w, fmt), scales.row_weights(w, fmt, importance)
    first, _ = scales.choose(scale, inner)
    assert isinstance(inner.scale, str)

    def error(scale: Array) -> Array:
        wide = scale[..., :, None, :, None]
        residual = v - numerics.round_to_level(scales.safe_divide(v, wide), element) * wide
        return jnp.sum(h * residual * residual, (-3, -1))

    def stored(factor: Array) -> tuple[Array, Array, Array]:
        step = scales.stored(first * factor, inner.scale)
        wide = jnp.broadcast_to(scales.spread(step, inner, G, N), scale.shape)
        above = jnp.searchsorted(levels, jnp.abs(scales.safe_divide(scale, wide)))
        both = [
            jnp.sign(scale) * levels[jnp.clip(above - down, 0, len(levels) - 1)] * wide
            for down in (1, 0)
        ]
        errors = [error(one) for one in both]
        kept = jnp.where(errors[1] <= errors[0], both[1], both[0])
        total = scales.split(jnp.minimum(*errors), inner, "constant")
        return kept, step, jnp.sum(total, (-3, -1))

    def better(best, factor):
        new = stored(factor)
        take = new[2] < best[2]  # false for NaN, which then stays
        wide = jnp.broadcast_to(scales.spread(take, inner, G, N), scale.shape)
        return (
            jnp.where(wide, new[0], best[0]),
            jnp.where(take, new[1], best[1]),
            jnp.where(take, new[2], best[2]),
        ), None

    factors = jnp.asarray(_FACTORS, w.dtype)
    (kept, step, _), _ = jax.lax.scan(better, stored(jnp.ones((), w.dtype)), factors)
    return kept, step
