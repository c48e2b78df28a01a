"""FP8 training: e4m3 forward, e5m2 gradients, current, delayed and block scales."""

from qjax.fp8.recipe import BLOCK, TENSOR, Recipe
from qjax.fp8.state import Amax, State
from qjax.fp8.train import apply, explain, init, value_and_grad
from qjax.qat.guard import NonFiniteError, check_finite

__all__ = [
    "BLOCK",
    "TENSOR",
    "Amax",
    "NonFiniteError",
    "Recipe",
    "State",
    "apply",
    "check_finite",
    "explain",
    "init",
    "value_and_grad",
]
