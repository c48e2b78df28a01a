"""lora.apply: runs an unmodified function with adapters added to the products of a frozen base."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from qjax.lora.adapter import Adapter, canonical_shape
from qjax.ops import weight
from qjax.paths import path_str
from qjax.qtensor import QTensor, is_qtensor
from qjax.transform import floats
from qjax.transform.apply import Explanation, Packed, constant, run
from qjax.transform.floats import FloatWeight
from qjax.transform.trace import Call, take_apart
from qjax.view import Atom, View


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "adapter", "key"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """The payload of a View of a weight with an adapter.

    Attributes:
      base: the frozen weight.
      adapter: what is added to its products; leading axes as those of the base.
      key: None; or PRNG keys [*lead] of the dropout, so that stacked layers drop independently.
    """

    base: QTensor | FloatWeight
    adapter: Adapter
    key: Array | None

    @property
    def data(self) -> Array:
        return self.base.data


def low_rank(
    x: Float[Array, "*lead *m K"], adapter: Adapter, *, transposed: bool = False
) -> Float[Array, "*lead *m N"]:
    """Returns s * (x @ A) @ B in float32, or s * (x @ Bᵀ) @ Aᵀ: the adapter's part of a product.

    Operands have the wider of the types of x and of the adapter; sums are float32.
    """
    first, second = (adapter.b, adapter.a) if transposed else (adapter.a, adapter.b)
    dtype = jnp.promote_types(x.dtype, first.dtype)
    product = functools.partial(
        floats.product, transposed=transposed, out_dtype=jnp.promote_types(dtype, jnp.float32)
    )
    t = product(x.astype(dtype), first.astype(dtype)) * adapter.scale
    return product(t.astype(dtype), second.astype(dtype))


def dropped(
    x: Float[Array, "*lead *m K"], rate: float, key: Array | None
) -> Float[Array, "*lead *m K"]:
    """Returns x with entries set to 0 with probability `rate` and the others divided by 1 - rate.

    Args:
      key: PRNG keys [*lead]; None: nothing is dropped.
    """
    if key is None:
        return x
    shape = x.shape[key.ndim :]
    draw = lambda k: jax.random.bernoulli(k, 1 - rate, shape)
    for _ in range(key.ndim):
        draw = jax.vmap(draw)
    return jnp.where(draw(key), x / (1 - rate), jnp.zeros((), x.dtype))


class _Adapting(Packed):
    """Adds to each product with an adapted weight; all other weights are as in `qjax.apply`."""

    def __init__(self, implementation: str | None, rate: float):
        super().__init__(implementation)
        self.rate = rate
        self.draws: dict[str, int] = {}

    def _dropped(self, x: Array, view: View, key: Array | None) -> Array:
        if key is not None:  # each use of a weight in the trace drops on its own
            use = self.draws.get(view.name, 0)
            self.draws[view.name] = use + 1
            fold = lambda k: jax.random.fold_in(k, use)
            for _ in range(key.ndim):
                fold = jax.vmap(fold)
            key = fold(key)
        return dropped(x, self.rate, key)

    def materialize(self, view, primitive, why):
        if isinstance(view.payload, Adapted):
            raise NotImplementedError(
                f"{view.name}: has an adapter, which is added at products, but"
                f" `{primitive}` uses the weight otherwise ({why}). Leave it out of the targets;"
                " or, if that is a product over other axes, pass `usage=qjax.usage(fn)(...)` to"
                " `lora.init`."
            )
        return super().materialize(view, primitive, why)

    def product(self, view):
        payload = view.payload
        if not isinstance(payload, Adapted):
            return super().product(view)
        if isinstance(payload.base, QTensor):
            base = super().product(view.with_payload(payload.base))
        else:
            base = functools.partial(floats.product, w=payload.base.data.astype(view.dtype))

        def run(x, *, transposed, out_dtype):
            wide = jnp.promote_types(out_dtype, jnp.float32)
            y = base(x, transposed=transposed, out_dtype=wide)
            x = self._dropped(x, view, payload.key)
            y = y + low_rank(x, payload.adapter, transposed=transposed).astype(wide)
            return y.astype(out_dtype)

        return run

    def describe(self, view, form):
        payload = view.payload
        if not isinstance(payload, Adapted):
            return super().describe(view, form)
        base = "float"
        if isinstance(payload.base, QTensor):
            base = super().describe(view.with_payload(payload.base), form)
        return f"{base}; adapter of rank {payload.adapter.rank}"

    def conv(self, view, x, params) -> Any:
        if isinstance(view.payload, Adapted):
            return self.materialize(view, "conv_general_dilated", "adapters add to plain products")
        return super().conv(view, x, params)

    def ragged_dot(self, view, x, group_sizes, params):
        payload = view.payload
        if not isinstance(payload, Adapted):
            return super().ragged_dot(view, x, group_sizes, params)
        kinds = [[a.kind for a in dim] for dim in view.dims]
        if kinds != [["b"], ["k"], ["n"]] or payload.data.ndim != 3:
            return None
        precision = params["precision"]
        out_dtype = params["preferred_element_type"] or jnp.result_type(x.dtype, view.dtype)
        wide = jnp.promote_types(out_dtype, jnp.float32)
        if isinstance(payload.base, QTensor):
            y = weight.ragged_dot(
                x,
                view.with_payload(payload.base),
                group_sizes,
                out_dtype=wide,
                precision=precision,
                implementation=self.implementation,
            )
            if y is None:
                return None
        else:
            w = payload.data.astype(view.dtype)
            y = lax.ragged_dot(x, w, group_sizes, precision=precision, preferred_element_type=wide)
        # Rows are sorted by expert, a row's draw needs no key of its expert.
        x = self._dropped(x, view, None if payload.key is None else payload.key[0])
        adapter = payload.adapter
        dtype = jnp.promote_types(x.dtype, adapter.a.dtype)
        for factor in (adapter.a, adapter.b):
            x = lax.ragged_dot(
                x.astype(dtype), factor.astype(dtype), group_sizes, preferred_element_type=wide
            )
        self.record(view, "ragged_dot", "x @ W by expert", self.describe(view, "forward"))
        return (y + adapter.scale * x).astype(out_dtype)

    def gather(self, view, axis, indices, params):
        payload = view.payload
        if not isinstance(payload, Adapted):
            return super().gather(view, axis, indices, params)
        atoms = view.dims[axis]
        stored = weight.lead_axis(view, atoms[0]) if len(atoms) == 1 else None
        if stored is None or not isinstance(payload.base, QTensor):
            return None
        # Experts picked: what lies outside is NaN by the base, whatever the adapter adds.
        base = super().gather(view.with_payload(payload.base), axis, indices, params)
        if base is None:
            return None
        rows = jnp.clip(indices.reshape(-1), 0, view.shape[axis] - 1)
        take = lambda a: jnp.take(a, rows, axis=stored, mode="clip")
        adapter, key = jax.tree.map(take, (payload.adapter, payload.key))
        return base.with_payload(Adapted(base.payload, adapter, key))

    def take_axis(self, view, axis, take, size):
        payload = view.payload
        if not isinstance(payload, Adapted):
            return super().take_axis(view, axis, take, size)
        if len(view.dims[axis]) != 1:
            return None
        (atom,) = view.dims[axis]
        if weight.lead_axis(view, atom) is not None:
            return weight.take_axis(view, axis, take, size)
        last = lambda a: take(a, a.ndim - 1)
        if isinstance(payload.base, QTensor):
            cut = weight.take_axis(view.with_payload(payload.base), axis, take, size)
            if cut is None:
                return None
            base, dim = cut.payload, cut.dims[axis]
        elif atom.kind == "n" and view.atoms("n") == [atom]:
            base = dataclasses.replace(payload.base, data=last(payload.data))
            dim = (Atom("n", atom.position, size),) if size > 1 else ()
        else:
            return None
        adapter = dataclasses.replace(payload.adapter, b=last(payload.adapter.b))
        return view.replace(axis, dim, Adapted(base, adapter, payload.key))

    def shard_specs(self, payload, lead, k, n, mesh):
        if not isinstance(payload, Adapted):
            return super().shard_specs(payload, lead, k, n, mesh)
        if payload.key is not None:
            raise NotImplementedError(
                "`dropout` inside of `shard_map` would draw the same mask on every shard. Use 0, or"
                " shard the function from outside, by the shardings of its arguments."
            )
        axes = [names or None for names in (*lead, k, n)]
        spec = lambda *axes: PartitionSpec(*axes)
        if isinstance(payload.base, QTensor):
            base = super().shard_specs(payload.base, lead, k, n, mesh)
            if base is None:
                return None
        else:
            base = dataclasses.replace(payload.base, data=spec(*axes))
        *lead, k, n = axes
        adapter = dataclasses.replace(
            payload.adapter, a=spec(*lead, k, None), b=spec(*lead, None, n)
        )
        return Adapted(base, adapter, None)


def _views(call: Call, adapters: Mapping[str, Adapter], key: Array | None) -> dict[int, View]:
    """Returns the Views of all adapted weights, by the index of their leaf in the call."""
    own = {
        path_str(path[2:]): i
        for i, path in enumerate(call.paths)
        if path[0].idx == 0 and path[1].idx == 0
    }
    if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    views = {}
    for path, adapter in adapters.items():
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"`adapters` must be a dict from paths to Adapters, as `lora.init` makes it, got"
                f" {type(adapter).__name__} at {path!r}."
            )
        if path not in own:
            some = ", ".join(map(repr, list(own)[:4]))
            raise ValueError(
                f"{path}: has an adapter, but the base has no such weight; its paths are {some},"
                " ... The adapters are of another model, or were made for a tree around this one."
            )
        leaf = call.leaves[own[path]]
        check_fits(path, adapter, leaf)
        keys = None
        if key is not None:
            lead = adapter.a.shape[:-2]
            draw = jax.random.fold_in(key, zlib.crc32(path.encode()))
            keys = jax.random.split(draw, lead) if lead else draw
        name = call.names[own[path]]
        if is_qtensor(leaf):
            view = weight.as_view(leaf, name)
            base = constant(leaf)
        else:
            view = floats.as_view(leaf, adapter.layout, name)
            base = view.payload
        views[own[path]] = view.with_payload(Adapted(base, adapter, keys))
    return views


def check_fits(path: str, adapter: Adapter, leaf: Any) -> None:
    """Refuses an adapter whose shapes are not those of its weight.

    Raises:
      ValueError: naming the path and both shapes.
    """
    shape = "x".join(map(str, leaf.shape))
    if is_qtensor(leaf) and leaf.layout != adapter.layout:
        raise ValueError(
            f"{path}: the adapter was made for a weight of layout {adapter.layout.letters!r}, this"
            f" one ({shape}) has {leaf.layout.letters!r}. Make adapters for this base."
        )
    *lead, K, N = canonical_shape(leaf, adapter.layout)
    r = adapter.rank
    if adapter.a.shape != (*lead, K, r) or adapter.b.shape != (*lead, r, N):
        raise ValueError(
            f"{path}: an adapter with A {list(adapter.a.shape)} and B {list(adapter.b.shape)} does"
            f" not fit a weight [*lead, K, N] = {[*lead, K, N]}. It is of another model, or of one"
            " whose layers are stacked differently."
        )


def apply(
    fn: Callable,
    *,
    dropout: float = 0.0,
    key: Array | None = None,
    implementation: str | None = None,
) -> Callable:
    """Returns a function of `(base, adapters, *args, **kwargs)` that runs `fn(base, *args, ...)`.

    Every product with a weight that has an adapter becomes

      y = x @ W + s * (dropout(x) @ A) @ B

    wherever the trace of fn has it: under jit, scan over stacked layers, remat, cond, shard_map.
    The base is a tree of QTensors and float arrays; QTensors are constants, so that `jax.grad` with
    respect to the adapters carries activations back through the packed weights and forms nothing of
    a weight's size (Dettmers et al., 2023, QLoRA, eq. 5). Weights without an adapter, in the base
    or in `args`, run as under `qjax.apply`.

    Args:
      fn: any function whose first argument is the base, such as a Flax `model.apply`.
      dropout: probability with which an entry of an adapter's input is left out; the base sees all.
      key: PRNG key of the dropout, a new one for each step. Every adapter, every stacked layer and
        every use in the trace draws on its own; the steps of a loop over one weight share a draw.
      implementation: of the packed products, as in `qjax.apply`.

    Raises:
      ValueError: for adapters that do not fit the base, or dropout without a key.
      NotImplementedError: where a weight with an adapter is used other than in a product
        (lookups, convolutions); names its path.

    Example:
      >>> import qjax
      >>> from qjax import lora
      >>> base = qjax.quantize({"w": jnp.eye(64)}, qjax.Format("nf4", group_size=64))
      >>> adapters = lora.init(jax.random.key(0), base, "w", rank=2)
      >>> loss = lambda ad: jnp.sum(
      ...     lora.apply(lambda p, x: x @ p["w"])(base, ad, jnp.ones(64)) ** 2
      ... )
      >>> jax.grad(loss)(adapters)["w"].b.shape
      (2, 64)
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be at least 0 and below 1, got {dropout}.")
    if dropout and key is None:
        raise ValueError(
            f"`dropout={dropout}` needs a `key`, a new one for each step. To evaluate, leave"
            " dropout out."
        )

    @functools.wraps(fn)
    def applied(base, adapters, *args, **kwargs):
        call = take_apart((base, *args), kwargs)
        views = _views(call, adapters, key if dropout else None)
        return run(_Adapting(implementation, dropout), fn, call, views)

    return applied


def explain(fn: Callable, *, implementation: str | None = None) -> Callable[..., Explanation]:
    """Returns a function of `(base, adapters, ...)` that lists every use of every weight.

    As `qjax.explain`, with the weights that have adapters, packed or float. Nothing is computed.
    """

    @functools.wraps(fn)
    def explained(base, adapters, *args, **kwargs):
        call = take_apart((base, *args), kwargs)
        handler = _Adapting(implementation, 0.0)

        def traced(leaves, adapters):
            with_leaves = call._replace(leaves=leaves)
            return run(handler, fn, with_leaves, _views(with_leaves, adapters, None))

        jax.eval_shape(traced, call.leaves, adapters)
        return handler.explanation()

    return explained
