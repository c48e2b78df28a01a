"""Guards: a non-finite loss, gradient or parameter is an error that names the leaf."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.paths import path_str


class NonFiniteError(FloatingPointError):
    """A value of training is NaN or Inf; the message names the leaf."""


@jax.jit
def _finite(leaves: list[Any]) -> Any:
    # 0 * x is NaN for NaN and Inf: one pass, no array of booleans.
    return jnp.stack([jnp.isfinite(jnp.sum(a.astype(jnp.float32) * 0.0)) for a in leaves])


def check_finite(step: int | None = None, **trees: Any) -> None:
    """Refuses trees with NaN or Inf in them.

        qat.check_finite(step, loss=loss, grads=grads, params=params)

    One pass over all arrays and one transfer; on the host, after a step, as often as you like.

    Args:
      step: for the message.
      trees: by the name that the message gives them.

    Raises:
      NonFiniteError: naming all leaves that are not finite, e.g. "grads/mlp/up/scale".
    """
    names, leaves = [], []
    for what, tree in trees.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                names.append(what + ("" if not path else "/" + path_str(path)))
                leaves.append(jnp.asarray(leaf))
    if not leaves:
        return
    fine = np.asarray(_finite(leaves))
    if fine.all():
        return
    bad = [name for name, ok in zip(names, fine, strict=True) if not ok]
    at = "" if step is None else f" at step {step}"
    more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    raise NonFiniteError(
        f"NaN or Inf{at} in {', '.join(bad[:4])}{more}. Go back to the last checkpoint with a lower"
        " learning rate, or with steps that start elsewhere."
    )
