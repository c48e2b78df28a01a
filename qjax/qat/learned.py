"""Learned step sizes: the tree of Latents that LSQ and PACT train, and its ways in and out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from qjax import numerics, qtensor, scales
from qjax.errors import QuantizationError
from qjax.latent import ACT_RULES, Latent, is_latent
from qjax.policy import Policy
from qjax.qat.ranges import Range
from qjax.qtensor import QTensor, is_qtensor
from qjax.quantize import Assignment, assign
from qjax.scale_range import check_act_scale

STARTS = ("rule", "lsq")


def init(
    params: Any,
    policy: Any,
    *,
    usage: Any = None,
    weights: str | None = "rule",
    ranges: Mapping[str, Range] | None = None,
    activations: str = "rule",
    act_rule: str = "lsq",
) -> Any:
    """Returns the tree with a `Latent` in place of each weight that has steps of its own to learn.

    Train it as it is: `fake_quant(fn, policy)(params, ...)`, any optax optimizer (see
    `qjax.qat.optim` for what decays and how steep steps learn), `quantize(params, policy)`.

    Args:
      params: tree of float arrays; what has a Latent keeps its parts.
      policy, usage: as for `quantize`.
      weights: where the learned steps of weights start: "rule", the scale that the format's rule
        chooses; "lsq", 2 mean |w| / sqrt(q_max) (Esser et al., 2020, 3.1); None: not learned.
      ranges: what `tracked` saw, by path, for formats with `activation_scale="static"`. Their
        steps become leaves too.
      activations: where those start: "rule", the outermost code on the running largest value;
        "lsq", 2 mean |x| / sqrt(q_max).
      act_rule: how they learn: "lsq", a step size; "pact", a clipping level (Choi et al., 2018).

    Raises:
      QuantizationError: naming the parameter, for a static format without a range, and for learned
        steps of a format with zero points or offsets.
    """
    for name, value in (("weights", weights), ("activations", activations)):
        if value not in (*STARTS, None) or (value is None and name == "activations"):
            raise ValueError(f"`{name}` must be one of {', '.join(STARTS)}, got {value!r}.")
    if act_rule not in ACT_RULES:
        raise ValueError(f"`act_rule` must be one of {', '.join(ACT_RULES)}, got {act_rule!r}.")

    def one(a: Assignment) -> Any:
        assert a.format is not None
        latent = a.leaf if is_latent(a.leaf) else Latent(a.leaf)
        scale, act_scale = latent.scale, latent.act_scale
        if weights is not None and scale is None:
            scale = _first_steps(a, weights)
        if a.format.activation_scale == "static" and act_scale is None:
            act_scale = _first_act_step(a, ranges, activations)
        if scale is None and act_scale is None:
            return a.leaf
        return Latent(latent.value, scale, act_scale, act_rule)

    return _replaced(params, policy, usage, one)


def attach(params: Any, policy: Any, ranges: Mapping[str, Range], *, usage: Any = None) -> Any:
    """Returns the tree with the static steps of its activations taken from running ranges.

    For evaluation with, and conversion of, what `tracked` trained: `quantize(attach(...), policy)`.
    """
    return init(params, policy, usage=usage, weights=None, ranges=ranges)


def from_quantized(qparams: Any, params: Any = None) -> Any:
    """Returns Latents that quantize to the codes and scales of a quantized tree.

    QAT then starts where a solver such as GPTQ ended.

    Args:
      qparams: tree with QTensors.
      params: the float tree that it came of. Each value is then as near to its float weight as its
        code allows, so that a code that was a close call is soon another; None: on its code.

    Raises:
      NotImplementedError: naming the parameter, for formats with zero points or offsets, smoothed
        or reordered weights.
    """

    def one(path, qt, w):
        if not is_qtensor(qt):
            return qt
        if qt.zero is not None or qt.pre_scale is not None or qt.perm is not None:
            raise NotImplementedError(
                f"{jax.tree_util.keystr(path)}: only symmetric weights without `pre_scale` and"
                f" `perm` can be trained on from their codes, this is {qt!r}."
            )
        scale, _ = qtensor.read_scales(qt)
        centre = qtensor.dequantize_canonical(qt)
        if w is not None:
            K, N = centre.shape[-2:]
            # A little less than half a step, so that the code survives rounding errors.
            reach = 0.49 * jnp.abs(scales.spread(scale, qt.format, K, N))
            w = qt.layout.to_canonical(w).astype(jnp.float32)
            centre = jnp.clip(w, centre - reach, centre + reach)
        value = qt.layout.from_canonical(centre).astype(qt.dtype)
        return Latent(value, scale, qt.act_scale)

    floats = params
    if params is None:
        floats = jax.tree.map(lambda _: None, qparams, is_leaf=is_qtensor)
    return jax.tree_util.tree_map_with_path(one, qparams, floats, is_leaf=is_qtensor)


def in_steps(params: Any, policy: Any, *, usage: Any = None) -> Any:
    """Returns the tree with each weight that has learned steps counted in them: v = w / s.

    Training v and s, in place of w and s, has three advantages after a solver such as GPTQ. A step
    whose weights lie on their codes learns at all: LSQ's derivative by s, dL/dŵ (q - u), is 0
    there, while with w = s v it is dL/dŵ q. With v left alone (`train_only`) codes stay and only
    steps learn, as in the last phase of EfficientQAT (Chen et al., 2024, section 3.3). And one
    learning rate, in steps, suits the weights of all layers.

        v = qat.in_steps(qat.from_quantized(qparams), policy)
        loss = lambda v: kl(qjax.fake_quant(fn, policy)(qat.from_steps(v, policy), x), known)

    Args:
      params: tree with Latents, from `init` or `from_quantized`.
      policy, usage: as for `quantize`.
    """
    return _rescaled(params, policy, usage, lambda w, s: w / s)


def from_steps(params: Any, policy: Any, *, usage: Any = None) -> Any:
    """Returns the tree of Latents that `in_steps` came of, w = s v; differentiable in both."""
    return _rescaled(params, policy, usage, lambda v, s: v * s)


def _rescaled(params: Any, policy: Any, usage: Any, rescale: Any) -> Any:
    def one(a: Assignment) -> Any:
        if not is_latent(a.leaf) or a.leaf.scale is None:
            return a.leaf
        assert a.format is not None
        assert a.layout is not None
        w = a.layout.to_canonical(a.leaf.value).astype(jnp.float32)
        K, N = w.shape[-2:]
        w = rescale(w, scales.spread(a.leaf.scale, a.format.fit(K), K, N))
        value = a.layout.from_canonical(w).astype(a.leaf.value.dtype)
        return dataclasses.replace(a.leaf, value=value)

    return _replaced(params, policy, usage, one)


def shapes_of(a: Assignment) -> QTensor:
    """Returns the ShapeDtypeStructs of what an assigned leaf will be stored as."""
    assert a.format is not None
    shape = jax.ShapeDtypeStruct(a.leaf.shape, jnp.float32)
    fmt = dataclasses.replace(a.format, activation=None, activation_scale="token", outliers=None,
                              outlier_capacity=type(a.format).outlier_capacity)  # fmt: skip
    quantize = lambda w: qtensor.quantize_array(w, fmt, a.layout)  # pyright: ignore[reportArgumentType]
    return jax.eval_shape(quantize, shape)


def _replaced(params: Any, policy: Any, usage: Any, one: Any) -> Any:
    """Returns the tree with `one(assignment)` in place of each leaf that gets a format."""
    is_leaf = lambda x: is_qtensor(x) or is_latent(x)
    plan = assign(params, Policy.of(policy), usage)
    leaves = [a.leaf if a.format is None or a.layout is None else one(a) for a in plan]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_leaf), leaves)


def _first_steps(a: Assignment, start: str) -> Array:
    assert a.format is not None
    assert a.layout is not None
    if a.format.zero_point or a.format.offset is not None:
        raise QuantizationError(
            f"{a.path}: steps are learned for formats without zero point or offset, its format is"
            f" ({a.format}). Use a symmetric one, or weights=None for steps that follow the rule."
        )
    value = a.leaf.value if is_latent(a.leaf) else a.leaf
    w = a.layout.to_canonical(jnp.asarray(value)).astype(jnp.float32)
    fmt = a.format.fit(w.shape[-2])
    if start == "rule":
        return scales.choose(w, fmt)[0]
    ones = scales.split(jnp.ones(w.shape[-2:], w.dtype), fmt, "constant")
    mean = jnp.sum(jnp.abs(scales.split(w, fmt)) * ones, (-3, -1)) / jnp.sum(ones, (-3, -1))
    return 2 * mean / numerics.get_element(fmt.element).qmax ** 0.5


def _first_act_step(a: Assignment, ranges: Mapping[str, Range] | None, start: str) -> Array:
    assert a.format is not None
    assert a.format.activation is not None
    if ranges is None or a.path not in ranges:
        raise QuantizationError(
            f"{a.path}: the step of its activations is static, and `ranges` has nothing of it. Pass"
            " what `qjax.qat.tracked` returned, or use activation_scale='token'."
        )
    seen = ranges[a.path]
    if not isinstance(seen.batches, Tracer) and not bool(jnp.all(seen.batches > 0)):
        raise QuantizationError(f"{a.path}: its range saw no batch; run `qjax.qat.tracked` first.")
    if start == "rule":
        step = seen.step(a.format.activation)
    else:
        step = 2 * seen.mean / numerics.get_element(a.format.activation).qmax ** 0.5
    check_act_scale(a.path, step)
    return step
