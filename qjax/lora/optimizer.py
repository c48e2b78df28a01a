"""Optimizer states of adapters: float32 copies of what is optimized, and states on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

HOST = "pinned_host"


class MasterWeights(NamedTuple):
    """State of `master_weights`.

    Attributes:
      params: the parameters in float32.
      inner: the state of the optimizer that moves them.
    """

    params: Any
    inner: Any


def master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that moves float32 copies of its parameters (Micikevicius et al., 2017).

    A bfloat16 number near 0.1 has neighbours 5e-4 away, so that steps of 1e-4 would be rounded off.
    The parameters become the rounded copies: after `optax.apply_updates` they are
    round(copy + update), where `inner` alone would leave round(params + update).
    """
    inner = optax.with_extra_args_support(inner)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params):
        copies = wide(params)
        return MasterWeights(copies, inner.init(copies))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "`master_weights` needs the parameters: `update(grads, state, params)`."
            )
        moves, inner_state = inner.update(wide(updates), state.inner, state.params, **extra)
        copies = optax.apply_updates(state.params, moves)
        # In float32 params + (rounded copy - params) is the rounded copy, and apply_updates casts.
        step = lambda copy, p: copy.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32)
        return jax.tree.map(step, copies, params), MasterWeights(copies, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def offload(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose state lies in pinned host memory between steps.

    A step copies it to the device, updates it and copies it back, leaf by leaf as XLA schedules the
    copies: the device then holds the state of the leaves at work and not all of it. That is what
    QLoRA's paged optimizers are for (Dettmers et al., 2023, section 3), decided at compile time and
    not by page faults. Scalars, such as step counters, stay where they are.

    `init` places the state; `update` belongs inside of `jit`. To restore a checkpoint, use a
    state from `init` as the template.

    Raises:
      NotImplementedError: by `init`, on a backend without pinned host memory.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        kinds = [memory.kind for memory in jax.local_devices()[0].addressable_memories()]
        if HOST not in kinds:
            raise NotImplementedError(
                f"`offload` keeps the optimizer's state in {HOST!r} memory, and this backend"
                f" ({jax.default_backend()}) has only {', '.join(kinds)}. Use the optimizer without"
                " `offload`."
            )
        return _move(inner.init(params), jax.memory.Space.Host)

    def update(updates, state, params=None, **extra):
        state = _move(state, jax.memory.Space.Device)
        updates, state = inner.update(updates, state, params, **extra)
        return updates, _move(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)


def _move(state: Any, space: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space) if jnp.ndim(x) else x, state)
