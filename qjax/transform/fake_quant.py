"""fake_quant: runs a function on float parameters as `apply` will on their quantized selves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from qjax.latent import Latent, is_latent
from qjax.layout import Layout
from qjax.ops import activation, weight
from qjax.paths import path_str
from qjax.policy import Policy
from qjax.qat import ste
from qjax.qat.ste import FakeWeight
from qjax.qtensor import QTensor, is_qtensor
from qjax.quantize import quantize
from qjax.transform import apply
from qjax.transform.trace import take_apart
from qjax.view import View, view_of


class FakeQuant(apply.Packed):
    """Runs operations as `Packed` does, with straight-through derivatives for the float weights.

    Weights that are QTensors in the parameters themselves stay the constants that they are.
    """

    def materialize(self, view, primitive, why):
        if not isinstance(view.payload, FakeWeight):
            return super().materialize(view, primitive, why)
        self.record(view, primitive, f"dequantized: {why}")
        return _dense(view)

    def product(self, view):
        if not isinstance(view.payload, FakeWeight):
            return super().product(view)
        return functools.partial(
            ste.product,
            w=view.payload,
            weight_dtype=view.dtype,
            implementation=self.implementation,
        )

    def conv(self, view, x, params):
        if not isinstance(view.payload, FakeWeight) or weight.is_pointwise(view, params):
            return super().conv(view, x, params)
        self.record_conv(view)
        return weight.conv(x, view, params, dequantize=_dense, rounded=_rounded)

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
            take = lambda a: jnp.take(a, indices.reshape(-1), axis=stored, mode="clip")
            return out.with_payload(
                dataclasses.replace(
                    payload,
                    qt=out.payload,
                    dense=take(payload.dense),
                    act_scale=None if payload.act_scale is None else take(payload.act_scale),
                )
            )
        like = jnp.take(_dense(view), indices, axis=axis, mode="fill", fill_value=0)
        n = indices.ndim
        like = jnp.moveaxis(like, range(axis, axis + n), range(n))
        return ste.with_value_of(out, like)

    def take_axis(self, view, axis, take, size):
        payload = view.payload
        if not isinstance(payload, FakeWeight):
            return super().take_axis(view, axis, take, size)
        out = weight.take_axis(_packed(view), axis, take, size)
        if out is None:
            return None
        stored = weight.lead_axis(view, view.dims[axis][0])
        cut = lambda a, at: a if a is None else take(a, at)
        at = payload.dense.ndim - 1 if stored is None else stored
        act_scale = payload.act_scale if stored is None else cut(payload.act_scale, stored)
        return out.with_payload(
            dataclasses.replace(
                payload, qt=out.payload, dense=cut(payload.dense, at), act_scale=act_scale
            )
        )

    def shard_specs(self, payload, lead, k, n, mesh):
        if not isinstance(payload, FakeWeight):
            return super().shard_specs(payload, lead, k, n, mesh)
        qt = super().shard_specs(payload.qt, lead, k, n, mesh)
        if qt is None:
            return None
        act_scale = None
        if payload.act_scale is not None:
            act_scale = PartitionSpec(*tuple(qt.data)[: payload.act_scale.ndim])
        return dataclasses.replace(payload, qt=qt, dense=qt.data, act_scale=act_scale)


def _packed(view: View) -> View:
    return view.with_payload(view.payload.qt)


def _dense(view: View) -> Any:
    """Returns the float array that a view of a FakeWeight stands for."""
    return weight.rearrange_from_stored(view.payload.dense.astype(view.dtype), view)


def _rounded(x: Any, view: View) -> Any:
    w = view.payload
    return activation.straight(x, w.qt, w.act_scale, w.act_rule)


def values(params: Any) -> Any:
    """Returns the tree with the float array of every Latent in its place."""
    return jax.tree.map(lambda a: a.value if is_latent(a) else a, params, is_leaf=is_latent)


def views(params: Any, policy: Policy, usage: Any) -> dict[str, View]:
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
            out[path] = _view(leaf, qt, path)
    return out


def _view(leaf: Any, qt: QTensor, path: str) -> View:
    latent = leaf if is_latent(leaf) else Latent(leaf)
    w = qt.layout.to_canonical(jnp.asarray(latent.value)).astype(jnp.float32)
    dense = ste.rounded_weight(w, latent.scale, qt)
    learns = latent.act_scale if qt.format.activation_scale == "static" else None
    payload = FakeWeight(qt, dense, learns, latent.act_rule)
    *lead, K, N = qt.canonical_shape
    return view_of(payload, lead, Layout(qt.layout), K, N, jnp.dtype(qt.dtype), path)


def fake_quant(
    fn: Callable,
    policy: Any,
    *,
    usage: Any = None,
    implementation: str | None = None,
) -> Callable:
    """Returns `fn` with fake-quantized parameters: quantization-aware training in one line.

    The value of `fake_quant(fn, policy)(params, ...)` is that of `apply(fn)(quantize(params,
    policy), ...)` bit for bit: the weights are quantized by the same function and multiplied by the
    same products, activations rounded as the formats say. Derivatives are straight-through: that of
    a rounded value with respect to the float one is 1 where it is not clipped, else 0 (see
    `qjax.qat.ste`), so any optax loop over float parameters trains the quantized model.

        loss = lambda p: cross_entropy(qjax.fake_quant(model.apply, policy)(p, x), labels)
        grads = jax.grad(loss)(params)

    Works for Linen, NNX (split and merged) and plain functions, inside `jit`, `vmap`, `scan` over
    layers, `jax.checkpoint`, and on sharded arrays. Derivatives are those of reverse mode.

    Args:
      fn: function of `(params, ...)`.
      policy: as for `quantize`. Its recipe is for quantizing with data afterwards; here weights are
        rounded to nearest.
      usage: as for `quantize`: how fn contracts each parameter. Pass both the same.
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
        return run(FakeQuant(implementation), fn, params, policy, usage, args, kwargs)

    return faked


def run(
    handler: FakeQuant,
    fn: Callable,
    params: Any,
    policy: Policy,
    usage: Any,
    args: Any,
    kwargs: Any,
) -> Any:
    """Calls `fn(params, *args, **kwargs)` with quantized parameters as `handler` treats them."""
    quantized = views(params, policy, usage)
    call = take_apart((values(params), *args), kwargs)
    own = {}
    for i, (path, name) in enumerate(zip(call.paths, call.names, strict=True)):
        view = quantized.get(path_str(path[2:])) if path[0].idx == path[1].idx == 0 else None
        if view is not None:
            own[i] = View(view.payload, view.dims, view.dtype, name)
    return apply.run(handler, fn, call, own)
