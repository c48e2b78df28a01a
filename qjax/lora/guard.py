"""Finding the leaf that made a loss NaN or infinite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.paths import path_str


@jax.jit
def _broken(leaves: list[Any]) -> list[Any]:
    return [jnp.sum(~jnp.isfinite(x)) for x in leaves]


def check_finite(loss: Any, **trees: Any) -> None:
    """Raises if a loss is NaN or infinite, and names the first leaf that is, too.

    Reads the loss, so it waits for the step; the trees are only looked at if the loss is not
    finite.

    Args:
      loss: a scalar, or any array of losses.
      trees: by name, in the order to look: what went into the loss first, as in
        `check_finite(loss, adapters=adapters, base=qparams, gradients=gradients)`.

    Raises:
      FloatingPointError: naming the leaf, and how many of its numbers are NaN or infinite.
    """
    loss = np.asarray(loss, np.float32)
    if np.isfinite(loss).all():
        return
    worst = loss[~np.isfinite(loss)].flat[0]
    for name, tree in trees.items():
        leaves = [
            (path_str(path), x)
            for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
            if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        ]
        for (path, x), bad in zip(leaves, _broken([x for _, x in leaves]), strict=True):
            if bad:
                raise FloatingPointError(
                    f"the loss is {worst}: in `{name}`, {path} has {int(bad)} of {x.size} numbers"
                    " that are NaN or infinite. Go back to the last checkpoint and lower the"
                    " learning rate or clip gradients (`optax.clip_by_global_norm`); if that is the"
                    " base, repair it."
                )
    looked = ", ".join(f"`{name}`" for name in trees) or "nothing else"
    raise FloatingPointError(
        f"the loss is {worst}, although all numbers of {looked} are finite: activations or the loss"
        " itself overflow, or the batch is bad (an id out of the vocabulary gives NaN)."
    )
