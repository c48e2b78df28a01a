"""fake_quant: runs a function on float parameters as `apply` will on their quantized selves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from qjax import numerics, qtensor
from qjax.latent import Latent, is_latent, values
from qjax.ops import activation, weight
from qjax.paths import path_str
from qjax.policy import Policy
from qjax.qtensor import QTensor, is_qtensor
from qjax.quantize import quantize
from qjax.transform import apply, floats
from qjax.transform import straight_through as ste
from qjax.transform.straight_through import FakeWeight
from qjax.transform.trace import take_apart
from qjax.view import View, view_of

if TYPE_CHECKING:  # they are above this module
    from qjax.qat.ranges import Range
    from qjax.qat.schedules import Phase


class FakeQuant(apply.Packed):
    """Runs operations as `Packed` does, with straight-through derivatives for the float weights.

    Weights that are QTensors in the parameters themselves stay the constants that they are.

    Attributes:
      phase: of a schedule; None: everything is quantized.
    """

    def __init__(self, implementation: str | None, phase: Phase | None = None):
        super().__init__(implementation)
        self.phase = phase

    def materialize(self, view, primitive, why):
        if not isinstance(view.payload, FakeWeight):
            return super().materialize(view, primitive, why)
        self.record(view, primitive, f"dequantized: {why}")
        return _dense(view)

    def product(self, view):
        if not isinstance(view.payload, FakeWeight):
            return super().product(view)

        def run(x, *, transposed, out_dtype):
            w = view.payload if transposed else self.prepared(view.payload, x, view.name)
            exact = functools.partial(
                ste.product,
                weight_dtype=view.dtype,
                transposed=transposed,
                out_dtype=out_dtype,
                implementation=self.implementation,
            )
            if self.phase is None:
                return exact(x, w)

            def early(x, w):
                x = x if transposed else self.early_activation(x, w)
                return floats.product(x, w.dense.astype(view.dtype), transposed, out_dtype)

            return lax.cond(self.phase.bits <= 0, exact, early, x, w)

        return run

    def prepared(self, w: FakeWeight, x: Any, name: str) -> FakeWeight:
        """Returns the weight as it multiplies x [*lead, *m, K]; a place to look at x."""
        return w

    def early_activation(self, x: Any, w: FakeWeight) -> Any:
        """Returns the activation of a product whose weight does not have its own bits yet."""
        assert self.phase is not None
        return jnp.where(self.phase.on, activation.straight(x, w.qt, w.act_scale, w.act_rule), x)

    def conv(self, view, x, params):
        if not isinstance(view.payload, FakeWeight) or weight.is_pointwise(view, params):
            return super().conv(view, x, params)
        self.record_conv(view)
        features = params["dimension_numbers"].lhs_spec[1]
        w = self.prepared(view.payload, jnp.moveaxis(x, features, -1), view.name)

        def rounded(x, view):
            if self.phase is not None:
                return self.early_activation(x, view.payload)
            return activation.straight(
                x, view.payload.qt, view.payload.act_scale, view.payload.act_rule
            )

        return weight.conv(x, view.with_payload(w), params, dequantize=_dense, rounded=rounded)

    def ragged_dot(self, view, x, group_sizes, params):
        payload = view.payload
        if not isinstance(payload, FakeWeight):
            return super().ragged_dot(view, x, group_sizes, params)
        value = super().ragged_dot(_packed(view), x, group_sizes, params)
        if value is None:
            return None
        if payload.qt.format.activation_scale == "static":
            raise NotImplementedError(
                f"{view.name}: experts with static activations cannot be trained yet; use"
                " activation_scale='token' or 'tensor'."
            )
        like = lax.ragged_dot(
            activation.of_experts(x, payload.qt, group_sizes).astype(x.dtype),
            payload.dense.astype(view.dtype),
            group_sizes,
            precision=params["precision"],
            preferred_element_type=value.dtype,
        )
        return ste.with_value_of(value, like)

    def gather(self, view, axis, indices, params):
        payload = view.payload
        if not isinstance(payload, FakeWeight):
            return super().gather(view, axis, indices, params)
        out = super().gather(_packed(view), axis, indices, params)
        if out is None:
            return None
        if isinstance(out, View):  # experts
            stored = weight.lead_axis(view, view.dims[axis][0])
            assert stored is not None
            flat = indices.reshape(-1)
            take = lambda a: jnp.moveaxis(_lookup(a, stored, flat, params), 0, stored)
            return out.with_payload(_cut(payload, out.payload, take))
        like = _lookup(_dense(view), axis, indices, params, fill_value=0)
        if self.phase is not None:
            out = jnp.where(self.phase.bits <= 0, out, like)
        return ste.with_value_of(out, like)

    def take_axis(self, view, axis, take, size):
        payload = view.payload
        if not isinstance(payload, FakeWeight):
            return super().take_axis(view, axis, take, size)
        out = weight.take_axis(_packed(view), axis, take, size)
        if out is None:
            return None
        stored = weight.lead_axis(view, view.dims[axis][0])
        if stored is not None:
            return out.with_payload(_cut(payload, out.payload, lambda a: take(a, stored)))
        dense = take(payload.dense, payload.dense.ndim - 1)
        return out.with_payload(dataclasses.replace(payload, qt=out.payload, dense=dense))

    def shard_specs(self, payload, lead, k, n, mesh):
        if not isinstance(payload, FakeWeight):
            return super().shard_specs(payload, lead, k, n, mesh)
        qt = super().shard_specs(payload.qt, lead, k, n, mesh)
        if qt is None:
            return None
        stacked = jax.tree.map(
            lambda a: PartitionSpec(*tuple(qt.data)[: a.ndim]), (payload.act_scale, payload.seen)
        )
        return dataclasses.replace(
            payload, qt=qt, dense=qt.data, act_scale=stacked[0], seen=stacked[1]
        )


def _packed(view: View) -> View:
    return view.with_payload(view.payload.qt)


def _dense(view: View) -> Any:
    """Returns the float array that a view of a FakeWeight stands for."""
    return weight.rearrange_from_stored(view.payload.dense.astype(view.dtype), view)


def _lookup(a: Any, axis: int, indices: Any, params: dict, fill_value: Any = None) -> Any:
    """Returns entries of one axis, [*indices, *others], as `lax.gather` finds them."""
    entries = jnp.moveaxis(a, axis, 0).at[indices]
    return entries.get(mode=params["mode"], fill_value=fill_value, wrap_negative_indices=False)


def _cut(payload: FakeWeight, qt: QTensor, cut: Callable) -> FakeWeight:
    """Returns the payload with a leading axis of all arrays cut as that of `qt` was."""
    dense, act_scale, seen = jax.tree.map(cut, (payload.dense, payload.act_scale, payload.seen))
    return dataclasses.replace(payload, qt=qt, dense=dense, act_scale=act_scale, seen=seen)


def views(
    params: Any,
    policy: Policy,
    usage: Any,
    phase: Phase | None = None,
    ranges: Mapping[str, Range] | None = None,
) -> dict[str, View]:
    """Returns, by path, a View of each parameter that is quantized, as FakeQuant takes them."""
    # Rounding happens here and nowhere else: by the function that makes the packed tree. The
    # barrier keeps XLA from seeing through it, e.g. from dropping a scale's rounding to bfloat16.
    qparams = lax.optimization_barrier(quantize(lax.stop_gradient(params), policy, usage=usage))
    is_leaf = lambda a: is_qtensor(a) or is_latent(a)
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)[0]
    stored = jax.tree.leaves(qparams, is_leaf=is_leaf)
    out = {}
    for (key_path, leaf), qt in zip(leaves, stored, strict=True):
        if is_qtensor(qt) and not is_qtensor(leaf):
            path = path_str(key_path)
            out[path] = _view(leaf, qt, path, phase, (ranges or {}).get(path))
    return out


def _view(leaf: Any, qt: QTensor, path: str, phase: Phase | None, seen: Range | None) -> View:
    latent = leaf if is_latent(leaf) else Latent(leaf)
    w = qt.layout.to_canonical(jnp.asarray(latent.value)).astype(jnp.float32)
    dense = ste.rounded_weight(w, latent.scale, qt)
    if phase is not None:
        fmt, early = qt.format, w
        if phase.is_gradual:
            element = numerics.get_element(fmt.element)
            if element.kind != "int" or fmt.element == "ternary" or qt.zero is not None:
                raise NotImplementedError(
                    f"{path}: a gradual bit width needs a symmetric integer element, its format is"
                    f" ({fmt}). Use a Schedule without `bits`."
                )
            early = ste.finer_weight(w, phase.bits, fmt, jnp.abs(qtensor.read_scales(qt)[0]))
        dense = jnp.where(phase.bits <= 0, dense, early)
    learns = latent.act_scale if qt.format.activation_scale == "static" else None
    payload = FakeWeight(qt, dense, learns, seen, latent.act_rule)
    *lead, K, N = qt.canonical_shape
    return view_of(payload, lead, qt.layout, K, N, jnp.dtype(qt.dtype), path)


def fake_quant(
    fn: Callable,
    policy: Any,
    *,
    usage: Any = None,
    phase: Phase | None = None,
    implementation: str | None = None,
) -> Callable:
    """Returns `fn` with fake-quantized parameters: quantization-aware training in one line.

    The value of `fake_quant(fn, policy)(params, ...)` is that of `apply(fn)(quantize(params,
    policy), ...)` bit for bit: the weights are quantized by the same function and multiplied by the
    same products, activations rounded as the formats say. Derivatives are straight-through: that of
    a rounded value with respect to the float one is 1 where it is not clipped, else 0 (see
    `qjax.transform.straight_through`), so any optax loop over float parameters trains the
    quantized model.

        loss = lambda p: cross_entropy(qjax.fake_quant(model.apply, policy)(p, x), labels)
        grads = jax.grad(loss)(params)

    Works for Linen, NNX (split and merged) and plain functions, inside `jit`, `vmap`, `scan` over
    layers, `jax.checkpoint`, and on sharded arrays. Derivatives are those of reverse mode. Steps
    are learned where `qjax.qat.init` has put a `Latent` into the tree.

    Args:
      fn: function of `(params, ...)`.
      policy: as for `quantize`. Its recipe is for quantizing with data afterwards; here weights are
        rounded to nearest.
      usage: as for `quantize`: how fn contracts each parameter. Pass both the same.
      phase: what a `qjax.qat.Schedule` says of this step; None: all is quantized.
      implementation: as for `apply`.

    Raises:
      QuantizationError: as `quantize` does, naming the parameter path.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> w = jnp.array([[0.26], [1.0]])
      >>> f = fake_quant(lambda w, x: (x @ w).sum(), qjax.Format("int4"))
      >>> f(w, jnp.array([7.0, 0.0])).round(3), jax.grad(f)(w, jnp.array([7.0, 0.0])).tolist()
      (Array(2., dtype=float32), [[7.0], [0.0]])
    """
    policy = dataclasses.replace(Policy.of(policy), recipe=None)

    @functools.wraps(fn)
    def faked(params, *args, **kwargs):
        own = views(params, policy, usage, phase)
        return run(FakeQuant(implementation, phase), fn, params, own, args, kwargs)

    return faked


def run(
    handler: FakeQuant, fn: Callable, params: Any, quantized: dict[str, View], args, kwargs
) -> Any:
    """Calls `fn(params, *args, **kwargs)` with Views by path in place of float parameters."""
    call = take_apart((values(params), *args), kwargs)
    own = {}
    for i, (path, name) in enumerate(zip(call.paths, call.names, strict=True)):
        view = quantized.get(path_str(path[2:])) if path[0].idx == path[1].idx == 0 else None
        if view is not None:
            own[i] = View(view.payload, view.dims, view.dtype, name)
    return apply.run(handler, fn, call, own)
