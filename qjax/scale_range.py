"""Whether scales can do their work: those of weights in their type, those of activations at all."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from qjax import numerics
from qjax.errors import QuantizationError
from qjax.format import Format
from qjax.qtensor import QTensor


@functools.partial(jax.jit, static_argnames="dtype")
def _largest(stored, dtype):
    return jnp.max(jnp.abs(numerics.read_scale(stored, dtype)))


def check_range(path: str, w: Float[Array, ...], qt: QTensor) -> None:
    """Refuses scales that their type cannot hold: it would clip weights, or make all of them 0.

    Args:
      path: of the parameter.
      w: the weight, in any layout; its largest magnitude will do.
      qt: what was made of it, by whatever solver.

    Raises:
      QuantizationError: naming the path, the type and the largest weight.
    """
    parts = [("scale", qt.scale, qt.format.scale), ("offset", qt.zero, qt.format.offset)]
    for name, stored, dtype in parts:
        while isinstance(dtype, Format):
            stored, dtype, name = stored.scale, dtype.scale, f"{name}.scale"
        if dtype is None:
            continue
        largest = float(_largest(stored, dtype))
        limit = numerics.largest_scale(dtype)
        if not largest < limit:
            what = f"ends at {limit:g}" if np.isfinite(limit) else "is not finite for such weights"
        elif largest == 0 and qt.format.offset is None and jnp.any(w != 0):
            what = "holds 0 for all of them"
        else:
            continue
        raise QuantizationError(
            f"{path}: its {name}s do not fit into {dtype}, which {what}; the largest weight is"
            f" {float(jnp.max(jnp.abs(w))):.3g}. Use another type of scale ('float32' holds most),"
            " or scale or skip this parameter."
        )


def check_act_scale(path: str, step: Float[Array, "*lead"]) -> None:
    """Refuses steps of activations that are 0: whatever is multiplied later would become 0.

    Args:
      path: of the weight that reads them.
      step: as measured, one for each stacked weight.

    Raises:
      QuantizationError: naming the path, and the index in a stack.
    """
    if isinstance(step, Tracer):
        return
    steps = np.asarray(step)
    if (steps > 0).all():
        return
    index = "".join(f"[{i}]" for i in np.argwhere(~(steps > 0))[0])
    raise QuantizationError(
        f"{path}{index}: its input was 0 wherever it was measured, which gives its codes no step."
        " Measure on more data, use activation_scale='token', or skip this parameter."
    )
