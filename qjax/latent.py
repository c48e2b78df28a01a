"""Latent: a weight in training - its float values and the step sizes that are learned with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

ACT_RULES = ("lsq", "pact")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Latent:
    """A leaf of a parameter tree with leaves of its own beside it, for quantization-aware training.

    `qjax.fake_quant` shows the function its fake-quantized array, `qjax.quantize` stores it with
    the steps that it has. An optimizer sees up to three float leaves: `kernel` itself (the last
    step of the path, `value`, is left out), `kernel/scale` and `kernel/act_scale`.

    Attributes:
      value: the float weight, in its logical shape.
      scale: None, the format's rule chooses; or the learned step sizes, float32 [*lead, G, C].
      act_scale: None; or the step of the activation's codes, float32 [*lead], for formats with
        `activation_scale="static"`.
      act_rule: static. How `act_scale` learns: "lsq", a step size; "pact", a clipping level.
    """

    value: Any
    scale: Any = None
    act_scale: Any = None
    act_rule: str = "lsq"

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        names = ("value", "scale", "act_scale")
        return tuple((key(n), getattr(self, n)) for n in names), (self.act_rule,)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children, *aux)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def size(self) -> int:
        return self.value.size

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def _refuse(self, *_, **__):
        raise TypeError(
            f"a Latent of shape {self.shape} was used as an array. Weights in training run inside"
            " `qjax.fake_quant(fn, policy)(params, ...)`; `qjax.qat.values(params)` gives the float"
            " arrays, `qjax.quantize(params, policy)` the packed ones."
        )

    __jax_array__ = __array__ = __matmul__ = __rmatmul__ = __mul__ = __rmul__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __getitem__ = _refuse


def is_latent(x: Any) -> bool:
    """Whether `x` is a Latent; the `is_leaf` of tree functions that treat it as one weight."""
    return isinstance(x, Latent)


def values(params: Any) -> Any:
    """Returns the tree with the float array of every Latent in its place."""
    return jax.tree.map(lambda a: a.value if is_latent(a) else a, params, is_leaf=is_latent)
