"""Guards of a training loop: a loss or leaf that is NaN or Inf is an error that names the leaf."""

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


def check_loss(loss: Any, **trees: Any) -> None:
    """Raises if a loss is NaN or infinite, and names the first leaf that is, too.

    Reads the loss, so it waits for the step; the trees are only looked at if the loss is not
    finite.

    Args:
      loss: a scalar, or any array of losses.
      trees: by name, in the order to look: what went into the loss first, as in
        `check_loss(loss, adapters=adapters, base=qparams, gradients=gradients)`.

    Raises:
      NonFiniteError: naming the leaf, and how many of its numbers are NaN or infinite.
    """
    loss = np.asarray(loss, np.float32)
    if np.isfinite(loss).all():
        return
    worst = loss[~np.isfinite(loss)].flat[0]
    for name, tree in trees.items():
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if jnp.issubdtype(jnp.result_type(x), jnp.floating) and not _finite([x])[0]:
                bad = jnp.sum(~jnp.isfinite(x))
                raise NonFiniteError(
                    f"the loss is {worst}: in `{name}`, {path_str(path)} has {int(bad)} of"
                    f" {jnp.size(x)} numbers that are NaN or infinite. Go back to the last"
                    " checkpoint and lower the learning rate, or clip gradients"
                    " (`optax.clip_by_global_norm`); if that is the base, repair it."
                )
    looked = ", ".join(f"`{name}`" for name in trees) or "nothing else"
    raise NonFiniteError(
        f"the loss is {worst}, although all numbers of {looked} are finite: activations or the loss"
        " itself overflow, or the batch is bad (an id out of the vocabulary gives NaN)."
    )
