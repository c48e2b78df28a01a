"""The transforms of FP8 training: apply, explain, init and value_and_grad."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.format import Format
from qjax.fp8 import meter
from qjax.fp8 import state as states
from qjax.fp8.handler import Fp8, as_view
from qjax.fp8.recipe import Fp8Recipe, is_block
from qjax.fp8.state import State
from qjax.layout import Layout
from qjax.paths import path_str
from qjax.quantize import assign
from qjax.transform import apply as packed
from qjax.transform.fake_quant import values
from qjax.transform.trace import take_apart
from qjax.transform.usage import usage as usage_of


class _Weight(NamedTuple):
    """A parameter that takes part."""

    format: Format
    layout: Layout
    lead: tuple[int, ...]  # its stacked axes


def _weights(
    fn: Callable, recipe: Fp8Recipe, usage: Any, params: Any, args: tuple, kwargs: dict
) -> dict[str, _Weight]:
    """Returns the parameters that take part in a call of fn, by path."""
    params = values(params)
    used = usage_of(fn)(params, *args, **kwargs) if usage is None else usage
    out = {}
    for path, leaf, fmt, layout, _ in assign(params, recipe.policy, used):
        if fmt is None or layout is None or not used[path].is_multiplied:
            continue
        canonical = jax.eval_shape(
            layout.to_canonical, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        )
        out[path] = _Weight(fmt, layout, canonical.shape[:-2])
    return out


def _metered(weights: dict[str, _Weight]) -> dict[str, tuple[int, ...]]:
    """Returns the leading axes of the weights that have a history under delayed scaling."""
    return {path: w.lead for path, w in weights.items() if not is_block(w.format)}


def _run(
    handler: Fp8,
    fn: Callable,
    weights: dict[str, _Weight],
    scales: dict[str, Any],
    probes: dict[str, Any],
    args: tuple,
    kwargs: dict,
) -> Any:
    """Calls fn with a View in place of each weight in its first argument."""
    call = take_apart(args, kwargs)
    views = {}
    for i, (path, leaf) in enumerate(zip(call.paths, call.leaves, strict=True)):
        name = path_str(path[2:])
        if path[0].idx == 0 and path[1].idx == 0 and name in weights:
            w = weights[name]
            block = w.format.group_size if is_block(w.format) else None
            views[i] = as_view(
                leaf,
                Layout(w.layout),
                name,
                scales=scales.get(name),
                probe=probes.get(name),
                block=block,
            )
    return packed.run(handler, fn, call, views)


def _scales(state: State, recipe: Fp8Recipe) -> dict[str, Any]:
    return {path: states.scales(amax, recipe) for path, amax in state.history.items()}


def _checked(given: State | None, recipe: Fp8Recipe, weights: dict[str, _Weight]) -> State:
    """Returns the state to go by, after checking that it fits the weights."""
    if given is None and recipe.scaling == "current":
        return State({})
    states.check(given, _metered(weights) if recipe.scaling == "delayed" else {}, recipe)
    assert given is not None
    return given


def apply(
    fn: Callable, recipe: Any = "current", state: State | None = None, *, usage: Any = None
) -> Callable:
    """Returns `fn` with every product with one of its parameters, and its derivatives, in FP8.

    A function transform, like `jax.checkpoint`: the unmodified fn is traced, and its products with
    float parameters run as `qjax.fp8.product` says: e4m3 x e4m3 forward, e5m2 gradients x e4m3
    backward, accumulated in float32. Parameters and their gradients stay as precise as they were.
    What is no product (lookups, norms, softmax, attention scores) stays float; `explain` lists it.
    Convolutions and `ragged_dot` (experts, each with scales of its own) have the same numbers, but
    multiply codes as float32: no hardware form of them is used.

    Works for Linen, NNX (split and merged) and plain functions, inside `jit`, `grad`, `vmap`,
    `scan` over layers, `jax.checkpoint`, `shard_map`, and on sharded arrays. Derivatives are those
    of reverse mode.

    Args:
      fn: function of `(params, ...)`.
      recipe: an Fp8Recipe, "current", "delayed", "block", or a policy; see `Fp8Recipe.of`.
      state: that of delayed scaling, from `init` and `value_and_grad`; evaluating leaves it as
        it is.
      usage: `qjax.usage(fn)(params, ...)` if it is at hand.

    Raises:
      QuantizationError: as `quantize` does, naming the parameter path.
      NotImplementedError: for a convolution or ragged_dot with a parameter in blocks.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> f = qjax.fp8.apply(lambda w, x: x @ w)
      >>> f(jnp.array([[1.0], [0.3]]), jnp.array([[1.0, 1.0]]))
      Array([[1.3125]], dtype=float32)
    """
    recipe = Fp8Recipe.of(recipe)

    @functools.wraps(fn)
    def applied(params, *args, **kwargs):
        weights = _weights(fn, recipe, usage, params, args, kwargs)
        scales = _scales(_checked(state, recipe, weights), recipe)
        return _run(Fp8(recipe), fn, weights, scales, {}, (params, *args), kwargs)

    return applied


def explain(fn: Callable, recipe: Any = "current") -> Callable[..., packed.Explanation]:
    """Returns a function of fn's arguments that lists how each parameter that takes part is used.

    Nothing is computed: arguments may be ShapeDtypeStructs.
    """
    recipe = Fp8Recipe.of(recipe)

    @functools.wraps(fn)
    def explained(params, *args, **kwargs):
        weights = _weights(fn, recipe, None, params, args, kwargs)
        handler = Fp8(recipe)
        call = take_apart((params, *args), kwargs)
        scales = {}
        if recipe.scaling == "delayed":
            scales = {path: jnp.ones((*lead, 3)) for path, lead in _metered(weights).items()}

        def run(*leaves):
            args, kwargs = call.rebuild(list(leaves))
            return jax.tree.leaves(_run(handler, fn, weights, scales, {}, args, kwargs))

        jax.eval_shape(run, *call.leaves)
        return handler.explanation()

    return explained


# ---- training ------------------------------------------------------------------------------------

Transform = Callable[[Callable], Callable]


def _differentiate(
    handler: Fp8,
    fn: Callable,
    weights: dict[str, _Weight],
    scales: dict[str, Any],
    metered: dict[str, tuple[int, ...]],
    has_aux: bool,
    transform: Transform | None,
    params: Any,
    args: tuple,
    kwargs: dict,
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Returns fn's value, what else it returns, its gradients, and the magnitudes by path."""
    probes = {path: meter.meter(jnp.zeros((*lead, 3))) for path, lead in metered.items()}

    def loss(params, probes):
        def run(*args, **kwargs):
            return _run(handler, fn, weights, scales, probes, args, kwargs)

        return (transform(run) if transform is not None else run)(params, *args, **kwargs)

    value, pull, *aux = jax.vjp(loss, params, probes, has_aux=has_aux)
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            f"a loss is one float, got {jnp.result_type(value)} of shape {jnp.shape(value)}."
            " Return the mean, and anything else with has_aux=True."
        )
    grads, seen = pull(jnp.ones_like(value))
    seen = {path: meter.read(a) for path, a in seen.items()}
    return value, aux[0] if has_aux else None, grads, seen


def init(
    fn: Callable,
    recipe: Any,
    *,
    has_aux: bool = False,
    transform: Transform | None = None,
    usage: Any = None,
) -> Callable[..., State]:
    """Returns a function of fn's arguments that makes the state of its FP8 training.

    For delayed scaling it computes fn and its gradients once, with current scaling, to see how
    large everything is: the first step then scales as well as any other. For other recipes there is
    nothing to know and nothing is computed.

    Args:
      fn, has_aux, transform, usage: as for `value_and_grad`.
      recipe: as for `apply`.

    Raises:
      ValueError: naming a weight of which this call saw nothing: no gradient reaches its products,
        or none of them ran. Inside `jit` its history is empty instead, and its first scales are 1.
    """
    recipe = Fp8Recipe.of(recipe)

    @functools.wraps(fn)
    def initial(params, *args, **kwargs) -> State:
        if recipe.scaling == "current":
            return State({})
        weights = _weights(fn, recipe, usage, params, args, kwargs)
        metered = _metered(weights)
        *_, seen = _differentiate(
            Fp8(recipe), fn, weights, {}, metered, has_aux, transform, params, args, kwargs
        )
        for path, a in seen.items():
            if not isinstance(a, Tracer) and np.all(np.asarray(a) < 0):
                raise ValueError(
                    f"{path}: no gradient came to a product with it in this call, and delayed"
                    " scaling sees magnitudes there. If the product is in a branch of a `cond` that"
                    " was not taken, or in a loop of no steps, make the state from arguments that"
                    " run it, or from several: `fp8.init(lambda params, *batches: sum(loss(params,"
                    " b) for b in batches), recipe)`. If no gradient ever comes (`stop_gradient`),"
                    " leave the weight in float by a rule without a format, or use current scaling."
                )
        return states.push(states.empty(metered, recipe), seen)

    return initial


def value_and_grad(
    fn: Callable,
    recipe: Any,
    *,
    has_aux: bool = False,
    transform: Transform | None = None,
    usage: Any = None,
) -> Callable[..., Any]:
    """Returns a function of `(state, params, ...)`: the loss, the next state, and gradients in FP8.

        state = fp8.init(loss, "delayed")(params, batch)

        @jax.jit
        def step(params, opt_state, state, batch):
            (value, state), grads = fp8.value_and_grad(loss, "delayed")(state, params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, state, value

    Args:
      fn: loss of `(params, ...)`: a float, or with `has_aux` a pair of it and anything else.
      recipe: as for `apply`.
      has_aux: whether fn returns such a pair.
      transform: applied to fn once its products are in FP8, such as
        `lambda f: qjax.fake_quant(f, "int4-g128")`: weights are fake-quantized, and the results
        multiplied in FP8.
      usage: as for `apply`.

    Returns:
      A function that returns `((value, state), grads)`, or with `has_aux` `((value, state, aux),
      grads)`. Gradients are those of its second argument, `params`.
    """
    recipe = Fp8Recipe.of(recipe)

    @functools.wraps(fn)
    def stepped(state, params, *args, **kwargs):
        weights = _weights(fn, recipe, usage, params, args, kwargs)
        state = _checked(state, recipe, weights)
        metered = _metered(weights) if recipe.scaling == "delayed" else {}
        value, aux, grads, seen = _differentiate(
            Fp8(recipe), fn, weights, _scales(state, recipe), metered, has_aux, transform,
            params, args, kwargs,
        )  # fmt: skip
        state = states.push(state, seen)
        return ((value, state, aux) if has_aux else (value, state)), grads

    return stepped
