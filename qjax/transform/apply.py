"""apply: runs an unmodified function on packed weights; explain: says how each weight was used."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from qjax import _compat, sharding
from qjax.ops import activation, packed_dot, packed_rows, ragged, weight
from qjax.qtensor import QTensor, is_qtensor
from qjax.tables import align
from qjax.transform import walk
from qjax.transform.trace import Call, take_apart, trace
from qjax.view import View


@dataclasses.dataclass(frozen=True)
class Use:
    """One way in which one quantized parameter is used.

    Attributes:
      path: of the parameter in the arguments, e.g. "0/params/mlp/kernel".
      op: the JAX operation.
      how: what is done: "x @ W", "x @ Wᵀ", "rows looked up", or "dequantized: " and why.
      implementation: which one runs and why; "" where there is no choice.
      count: how many times it is traced; the body of a scan counts once.
    """

    path: str
    op: str
    how: str
    implementation: str
    count: int = 1

    @property
    def is_packed(self) -> bool:
        return not self.how.startswith(("dequantized", "float:"))


class Explanation(tuple[Use, ...]):
    """All uses of all quantized parameters. Prints as a table."""

    __slots__ = ()

    @property
    def dequantized(self) -> list[Use]:
        """The uses that fall back to the float weight."""
        return [use for use in self if not use.is_packed]

    def __str__(self) -> str:
        lines = [("parameter", "op", "how", "implementation")]
        lines += [
            (u.path, u.op + (f" x{u.count}" if u.count > 1 else ""), u.how, u.implementation)
            for u in self
        ]
        return "\n".join(align(lines))


class Packed(walk.Handler):
    """Runs contractions and lookups on the packed weight and records every use."""

    def __init__(self, implementation: str | None):
        self.implementation = implementation
        self.uses: dict[Use, int] = {}
        self.placements: dict[str, str] = {}  # weight -> what its sharding costs in a product

    def record(self, view: View, op: str, how: str, implementation: str = "") -> None:
        use = Use(view.name, op, how, implementation)
        self.uses[use] = self.uses.get(use, 0) + 1

    def explanation(self) -> Explanation:
        """Returns all recorded uses."""
        return Explanation(dataclasses.replace(u, count=n) for u, n in self.uses.items())

    def record_product(self, view: View, op: str, form: str) -> None:
        name = "x @ W" if form == "forward" else "x @ Wᵀ"
        if op != "dot_general":
            name += " at every position"
        chosen = self.describe(view, form)
        if (placement := self.placements.get(view.name)) is not None:
            chosen += f"; {placement}"
        self.record(view, op, name, chosen)

    def record_conv(self, view: View) -> None:
        chosen = "kernel dequantized in the op"
        qt = stored_of(view)
        if qt.format.activation is not None and qt.pre_scale is not None:
            chosen += ", activations stay float (pre_scale)"
        elif qt.format.activation is not None:
            chosen += f", {activation.describe(qt)}, rounded in float"
        self.record(view, "conv_general_dilated", "x * W", chosen)

    def materialize(self, view, primitive, why):
        self.record(view, primitive, f"dequantized: {why}")
        shape = _compat.abstract_like(
            jax.tree.leaves(view.payload), view.shape, view.dtype, weight.partition(view)
        )
        return self.placed(weight.materialize, view, [], shape)

    def placed(self, run, view, arrays, out):
        # Where shardings are part of the types, the weight is taken out of them: how packed data
        # splits is for `packed_dot` to say, not for the types of its reshapes.
        mesh = _compat.explicit_mesh([*jax.tree.leaves(view.payload), *arrays])
        if mesh is None:
            return run(view, *arrays)
        context, (payload, arrays) = _compat.enter_auto((view.payload, list(arrays)), mesh)
        with context:
            result = run(view.with_payload(payload), *arrays)
        if isinstance(result, View):
            # Leading axes may have gone or come; K and N are where they were.
            n_lead = view.payload.data.ndim - 2

            def back(a, was):
                kept = _compat.spec_of(was)[n_lead:]
                return PartitionSpec(*[None] * (a.ndim - len(kept)), *kept)

            specs = jax.tree.map(back, result.payload, view.payload)
            return result.with_payload(_compat.leave_auto(result.payload, specs, mesh))
        if result is None:
            return None
        return _compat.leave_auto(result, out.sharding.spec, mesh)

    def reshard(self, view, sharding):
        spec = tuple(sharding.spec) + (None,) * (view.ndim - len(sharding.spec))
        sharded = self.shard(view, PartitionSpec(*spec), sharding.mesh)
        if sharded is None:
            return None
        move = lambda a, s: jax.sharding.reshard(a, NamedSharding(sharding.mesh, s))
        return view.with_payload(jax.tree.map(move, view.payload, sharded[0]))

    def checkpoint_policy(self, policy):
        """Asks about a packed product as about the `dot_general` that it stands for."""
        if policy is None:
            return None

        def as_dot(primitive, *avals, **params):
            if primitive is packed_dot.packed_dot_p:
                primitive, avals, params = packed_dot.as_dot_general(*avals, **params)
            return policy(primitive, *avals, **params)

        return as_dot

    def product(self, view: View) -> Callable:
        """Returns the product with a view's canonical weight, for `weight.dot_general`."""
        return functools.partial(
            packed_dot.packed_dot, qt=view.payload, implementation=self.implementation
        )

    def describe(self, view: View, form: str) -> str:
        """Returns which implementation runs such a product, and why."""
        return packed_dot.describe(stored_of(view), form, self.implementation)

    def dot_general(self, view, x, how, *, weight_first, x_axes, w_axes, params):
        self.record_product(view, "dot_general", how.form)
        out_dtype = params["preferred_element_type"]
        if out_dtype is None:
            out_dtype = jnp.result_type(x.dtype, view.dtype)
        return weight.dot_general(
            x,
            view,
            how,
            x_contracting=x_axes[0],
            x_batch=x_axes[1],
            w_contracting=w_axes[0],
            w_batch=w_axes[1],
            weight_first=weight_first,
            out_dtype=out_dtype,
            product=self.product(view),
        )

    def conv(self, view, x, params):
        out_dtype = params["preferred_element_type"] or jnp.result_type(x.dtype, view.dtype)
        if weight.is_pointwise(view, params):
            self.record_product(view, "conv_general_dilated", "forward")
            return weight.pointwise_conv(
                x, view, params, out_dtype=out_dtype, product=self.product(view)
            )
        self.record_conv(view)
        return weight.conv(
            x,
            view,
            params,
            dequantize=weight.materialize,
            rounded=lambda x, view: activation.straight(x, view.payload),
        )

    def ragged_dot(self, view, x, group_sizes, params):
        out_dtype = params["preferred_element_type"] or jnp.result_type(x.dtype, view.dtype)
        out = weight.ragged_dot(
            x, view, group_sizes, out_dtype=out_dtype, precision=params["precision"],
            implementation=self.implementation,
        )  # fmt: skip
        if out is not None:
            chosen = ragged.describe(stored_of(view), self.implementation)
            self.record(view, "ragged_dot", "x @ W by expert", chosen)
        return out

    def gather(self, view, axis, indices, params):
        is_asked = self.implementation == "mosaic"
        why = weight.against_kernel(view, axis) if is_asked else None
        out = weight.lookup(
            view, axis, indices, params["mode"], params["fill_value"],
            by_kernel=is_asked and why is None,
        )  # fmt: skip
        if isinstance(out, View):
            self.record(view, "gather", "experts picked")
        elif out is not None:
            how = packed_rows.DESCRIPTION
            if not is_asked or why is not None:
                how = "xla, reads those rows alone" + (f": {why}" if why else "")
            self.record(view, "gather", "rows looked up", how)
        return out

    def take_axis(self, view, axis, take, size):
        return weight.take_axis(view, axis, take, size)

    def reshaped(self, view):
        return weight.align_lead(view)

    def unstack(self, view):
        return weight.can_unstack(view)

    def shard(self, view, spec, mesh):
        return _shard(view, spec, mesh, self.shard_specs)

    def shard_specs(self, payload: Any, lead: list, k: tuple, n: tuple, mesh: Any) -> Any:
        """Returns the PartitionSpecs of a payload's arrays, as `sharding.shard_specs` does."""
        return sharding.shard_specs(payload, lead, k, n, mesh)


def stored_of(view: View) -> QTensor:
    """Returns the QTensor of a view, also where its payload only holds one."""
    return view.payload if is_qtensor(view.payload) else view.payload.qt


def _shard(view: View, spec: Any, mesh: Any, specs_of: Callable) -> tuple[Any, View] | None:
    """Returns the PartitionSpecs of the stored arrays, and the view that one shard has."""
    lead = view.payload.data.shape[:-2]
    lead_names: list[tuple[str, ...]] = [()] * len(lead)
    names: dict[str, tuple[str, ...]] = {"k": (), "n": ()}
    dims = list(view.dims)
    for axis, entry in enumerate(spec):
        mesh_axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        if not mesh_axes:
            continue
        if not dims[axis]:
            return None
        atom, *minor = dims[axis]
        parts = 1
        for a in mesh_axes:
            parts *= mesh.shape[a]
        if atom.size % parts:
            return None
        if atom.kind == "b":
            stored = weight.lead_axis(view, atom)
            if stored is None:
                return None
            lead_names[stored] = mesh_axes
        elif atom == view.atoms(atom.kind)[0]:
            names[atom.kind] = mesh_axes
        else:
            return None  # only the major part of K or N is contiguous in storage
        local = (atom._replace(size=atom.size // parts),) if atom.size > parts else ()
        dims[axis] = (*local, *minor)
    specs = specs_of(view.payload, lead_names, names["k"], names["n"], mesh)
    return None if specs is None else (specs, view.with_dims(dims))


def constant(qt: QTensor) -> QTensor:
    """Returns a QTensor whose float scales take no part in differentiation."""
    return jax.tree.map(lax.stop_gradient, qt)


def run(handler: Packed, fn: Callable, call: Call, views: Mapping[int, View] | None = None) -> Any:
    """Runs a call of `fn` with a View in place of every QTensor.

    Args:
      views: Views of a transform's own for some leaves of the call, by their index.
    """
    views = views or {}
    jaxpr, consts, rebuild = trace(fn, call)
    values = []
    for i, (leaf, name) in enumerate(zip(call.leaves, call.names, strict=True)):
        if i in views:
            values.append(views[i])
        elif is_qtensor(leaf):
            values.append(weight.as_view(constant(leaf), name))
        else:
            values.append(leaf)
    out = walk.evaluate(handler, jaxpr, consts, values)
    out = [
        handler.materialize(v, "return", "the function returns it") if isinstance(v, View) else v
        for v in out
    ]
    return rebuild(out)


def apply(fn: Callable, *, implementation: str | None = None) -> Callable:
    """Returns `fn` as a function that also takes QTensors wherever it takes float arrays.

    A function transform, like `jax.grad`: fn is traced with the float shapes, and the trace is
    evaluated with packed weights. Matmuls, einsums, lookups and convolutions with a weight run on
    its packed codes; transposes and reshapes of it move no data; what has no packed form runs on
    the dequantized weight, and `explain` lists it.

    Works inside and outside of `jit`, `grad` (with respect to activations and to float leaves;
    QTensors are constants), `vmap`, `jax.checkpoint`, `scan`, `while_loop`, `cond` and `shard_map`.
    Outside of `jit` fn is traced at each call, and its loops compiled as in any function that makes
    them anew; put `jax.jit` around for speed. An export for several devices is not supported.
    Arguments that are no arrays (flags, Python numbers, strings) reach fn unchanged.

    Args:
      fn: any function of arrays and pytrees, such as a Flax `model.apply`.
      implementation: of the packed matmuls, "reference", "xla", "native", "mosaic" or "triton" (see
        `qjax.ops.packed_dot`), and "mosaic" of lookups that it takes; None: the best one for the
        platform. On a CPU that is the native kernel, which the system's C++ compiler builds once,
        or else plain JAX ("xla").

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> w = qjax.quantize({"w": jnp.eye(4)}, qjax.Format("int8"))
      >>> qjax.apply(lambda p, x: x @ p["w"])(w, jnp.arange(4.0))
      Array([0., 1., 2., 3.], dtype=float32)
    """

    @functools.wraps(fn)
    def applied(*args, **kwargs):
        call = take_apart(args, kwargs)
        if not any(map(is_qtensor, call.leaves)):
            return fn(*args, **kwargs)
        return run(Packed(implementation), fn, call)

    return applied


def explain(fn: Callable, *, implementation: str | None = None) -> Callable[..., Explanation]:
    """Returns a function of fn's arguments that lists every use of every QTensor in a call.

    Nothing is computed: arguments may be ShapeDtypeStructs. On a CPU, the native kernel is built if
    that has not been done, as only then it is known whether it can be had.
    """

    @functools.wraps(fn)
    def explained(*args, **kwargs):
        call = take_apart(args, kwargs)
        handler = Packed(implementation)
        for leaf, name in zip(call.leaves, call.names, strict=True):
            if is_qtensor(leaf) and (why := sharding.beside_kernel(leaf)) is not None:
                handler.placements[name] = why
        leaves, tree = jax.tree.flatten(call.leaves)

        def traced(*leaves):
            return run(handler, fn, call._replace(leaves=jax.tree.unflatten(tree, leaves)))

        jax.eval_shape(traced, *leaves)
        return handler.explanation()

    return explained
