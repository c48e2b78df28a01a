"""State of delayed scaling: the largest magnitudes that recent steps have seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.fp8 import scaling
from qjax.fp8.product import OPERAND
from qjax.fp8.recipe import Fp8Recipe


class Amax(NamedTuple):
    """Largest magnitudes of the operands of one weight's products, the newest first.

    Attributes:
      input, weight, gradient: float32 [*lead, history], of its inputs, of itself, and of the
        gradients of its results; `lead` are its stacked axes, layers or experts. 0: not seen.
        Infinity: one of them was NaN or Inf.
    """

    input: Float[Array, "*lead H"]
    weight: Float[Array, "*lead H"]
    gradient: Float[Array, "*lead H"]


class State(NamedTuple):
    """What delayed scaling knows between steps: a pytree of float32, saved like any other.

    Attributes:
      history: by parameter path; empty for recipes that only scale by what is at hand.
    """

    history: dict[str, Amax]


def empty(leads: dict[str, tuple[int, ...]], recipe: Fp8Recipe) -> State:
    """Returns the state of weights of which nothing was seen, by path and leading axes."""
    zeros = lambda lead: jnp.zeros((*lead, recipe.history), jnp.float32)
    return State({path: Amax(*(zeros(lead) for _ in Amax._fields)) for path, lead in leads.items()})


def push(state: State, seen: dict[str, Float[Array, "*lead 3"]]) -> State:
    """Returns the state one step later.

    Where there was nothing to see, in a branch not taken, for an expert without tokens, the history
    stays as it is: zeros in its place would after some such steps leave nothing to scale by.

    Args:
      seen: the largest magnitudes of this step by path, of input, weight and gradient; below 0
        where a weight was not used.
    """

    def one(history, new):
        new = new[..., None]
        return jnp.where(new > 0, jnp.concatenate([new, history[..., :-1]], axis=-1), history)

    return State(
        {
            path: Amax(*(one(h, seen[path][..., i]) for i, h in enumerate(amax)))
            for path, amax in state.history.items()
        }
    )


def scales(amax: Amax, recipe: Fp8Recipe) -> Float[Array, "*lead 3"]:
    """Returns the scales of input, weight and gradient for the step that follows."""
    elements = (OPERAND, OPERAND, recipe.gradient)
    of = lambda history, element: scaling.scale_of(
        jnp.max(history, axis=-1), element, margin=recipe.margin, power_of_two=recipe.power_of_two
    )
    out = [of(history, element) for history, element in zip(amax, elements, strict=True)]
    return jax.lax.stop_gradient(jnp.stack(out, axis=-1))


def check(state: Any, leads: dict[str, tuple[int, ...]], recipe: Fp8Recipe) -> None:
    """Refuses a state that is not of these weights.

    Raises:
      ValueError: naming the parameter path.
    """
    if state is None:
        raise ValueError(
            "delayed scaling needs its state: `state = fp8.init(fn, recipe)(params, *batch)`."
        )
    if not isinstance(state, State):
        raise TypeError(f"`state` must be a State, as `fp8.init` returns it, got {type(state)!r}.")
    wanted = leads if recipe.scaling == "delayed" else {}
    for path in sorted(set(wanted) ^ set(state.history)):
        what = "has no history" if path in wanted else "has a history but is no FP8 weight here"
        raise ValueError(
            f"{path}: {what} in the state. Make it by `fp8.init` with the same function, parameters"
            " and recipe."
        )
    for path, lead in wanted.items():
        shape = (*lead, recipe.history)
        for name, a in zip(Amax._fields, state.history[path], strict=True):
            if tuple(a.shape) != shape:
                raise ValueError(
                    f"{path}: its {name} history has shape {tuple(a.shape)}, not {shape}: leading"
                    f" axes, then history={recipe.history}. Make the state anew by `fp8.init`."
                )
