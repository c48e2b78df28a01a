"""FP8 training of unmodified functions: e4m3 forward, e5m2 gradients, float parameters.

    state = fp8.init(loss, "delayed")(params, batch)  # or "current", "block", an Fp8Recipe

    @jax.jit
    def step(params, opt_state, state, batch):
        (value, state), grads = fp8.value_and_grad(loss, "delayed")(state, params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, value

Parameters and their gradients keep their precision; `Fp8Recipe` says what is scaled how.
"""

from qjax.fp8.recipe import BLOCK, TENSOR, Fp8Recipe
from qjax.fp8.state import Amax, State
from qjax.fp8.train import apply, explain, init, value_and_grad
from qjax.guard import NonFiniteError, check_finite

__all__ = [
    "BLOCK",
    "TENSOR",
    "Amax",
    "Fp8Recipe",
    "NonFiniteError",
    "State",
    "apply",
    "check_finite",
    "explain",
    "init",
    "value_and_grad",
]
