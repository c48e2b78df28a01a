"""optax glue: which leaves train and decay, and how steeply learned steps learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qjax import numerics
from qjax.latent import Latent, is_latent
from qjax.paths import path_str
from qjax.policy import Policy
from qjax.qat.learned import shapes_of
from qjax.quantize import assign

WEIGHT, STEP, OTHER = "weight", "step", "other"


def labels(params: Any) -> Any:
    """Returns the tree with a label for each leaf, for `optax.multi_transform` and masks.

    "step" is a learned step size, "weight" the float value of a Latent or any array of two or more
    axes, "other" the rest: biases, norms.
    """

    def one(leaf):
        if is_latent(leaf):
            named = lambda a: None if a is None else STEP
            return Latent(WEIGHT, named(leaf.scale), named(leaf.act_scale), leaf.act_rule)
        return WEIGHT if jnp.ndim(leaf) > 1 else OTHER

    return jax.tree.map(one, params, is_leaf=is_latent)


def decay_mask(params: Any) -> Any:
    """Returns which leaves decay: weights do, steps, biases and norms do not.

    For `optax.adamw(..., mask=qat.decay_mask)`.
    """
    return jax.tree.map(lambda label: label == WEIGHT, labels(params))


def step_mask(params: Any) -> Any:
    """Returns which leaves are learned steps."""
    return jax.tree.map(lambda label: label == STEP, labels(params))


def train_only(tx: optax.GradientTransformation, which: Callable[[Any], Any]) -> Any:
    """Returns `tx` for the leaves for which `which(params)` is true; the others stay as they are.

    `optax.masked` alone would pass their gradients through as updates.

    Args:
      which: function of the tree to booleans, e.g. `step_mask`, or `lambda p: jax.tree.map(...)`.
    """
    names = lambda params: jax.tree.map(lambda on: "train" if on else "keep", which(params))
    return optax.multi_transform({"train": tx, "keep": optax.set_to_zero()}, names)


def gradient_scales(params: Any, policy: Any, *, usage: Any = None) -> Any:
    """Returns LSQ's gradient scale for each leaf, as Python floats; 1 for what is no step.

    g = 1 / sqrt(N q_max)                                      (Esser et al., 2020, section 2.2)

    N is the number of weights that share a step or, for a step of activations, of the features that
    do, K. It makes relative updates of steps as large as those of weights.
    """
    factors: dict[str, Latent] = {}
    for a in assign(params, Policy.of(policy), usage):
        if not is_latent(a.leaf) or a.format is None:
            continue
        *_, K, _ = shapes_of(a).canonical_shape
        scale = act_scale = None
        if a.leaf.scale is not None:
            shared = a.leaf.value.size / a.leaf.scale.size
            scale = 1 / math.sqrt(shared * numerics.get_element(a.format.element).qmax)
        if a.leaf.act_scale is not None:
            assert a.format.activation is not None
            act_scale = 1 / math.sqrt(K * numerics.get_element(a.format.activation).qmax)
        factors[a.path] = Latent(1.0, scale, act_scale, a.leaf.act_rule)

    def one(path, leaf):
        # A Latent without steps that the policy leaves in float has one leaf.
        return factors.get(path_str(path), Latent(1.0)) if is_latent(leaf) else 1.0

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_latent)


def scale_by_lsq(params: Any, policy: Any, *, usage: Any = None) -> optax.GradientTransformation:
    """Returns the transformation that multiplies gradients of steps by LSQ's scale.

    First in a chain: `optax.chain(qat.scale_by_lsq(params, policy), optax.sgd(...))`. Adam divides
    a constant factor out again; with it, give steps a smaller learning rate (`labels`).
    """
    factors = gradient_scales(params, policy, usage=usage)

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda g, f: g * f, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def freeze_steps(start: int) -> optax.GradientTransformation:
    """Returns the transformation that keeps learned steps as they are from update `start` on.

    Last in a chain, so that momentum does not move them either.
    """

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        del params
        on = state.count < start
        mask = step_mask(updates)
        updates = jax.tree.map(
            lambda u, is_step: jnp.where(on, u, jnp.zeros_like(u)) if is_step else u, updates, mask
        )
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
