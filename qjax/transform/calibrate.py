"""calibrate: statistics of every weight's input, folded inside the function over batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from qjax import _compat
from qjax.layout import Layout
from qjax.observers import OBSERVERS
from qjax.paths import path_str
from qjax.transform import floats, walk
from qjax.transform.trace import take_apart, trace
from qjax.transform.usage import Usage
from qjax.transform.usage import usage as usage_of


class CalibrationError(ValueError):
    """Calibration data and function do not fit together; the message names the site."""


class Site(NamedTuple):
    """What was seen of the input of one parameter.

    Attributes:
      path: of the parameter.
      shared: path of the parameter whose statistics these are: its own, or that of another one that
        reads the same activation.
      stats: finalized statistic of every observer by name, with the parameter's leading axes.
      rows: how many were seen, [*lead]; 0 where an expert was never routed to.
    """

    path: str
    shared: str
    stats: dict[str, Any]
    rows: Array


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Statistics of every site, by parameter path."""

    states: dict[str, dict[str, Any]]
    rows: dict[str, Array]
    shared: dict[str, str]
    usage: Usage

    def __contains__(self, path: str) -> bool:
        return path in self.shared

    def __getitem__(self, path: str) -> Site:
        try:
            owner = self.shared[path]
        except KeyError:
            raise CalibrationError(
                f"{path}: no calibration data."
                f" {self.usage.why_not(path) or 'It was not asked for.'}"
            ) from None
        stats = {name: OBSERVERS[name].finalize(s) for name, s in self.states[owner].items()}
        return Site(path, owner, stats, self.rows[owner])

    @property
    def paths(self) -> list[str]:
        return list(self.shared)

    @property
    def nbytes(self) -> int:
        """Bytes of all statistics."""
        return sum(a.nbytes for a in jax.tree.leaves((self.states, self.rows)))

    def without_data(self) -> list[str]:
        """Returns the sites, or the parts of stacked ones, that no row reached."""
        out = []
        for path, owner in self.shared.items():
            for index in np.argwhere(np.asarray(self.rows[owner]) == 0):
                out.append(path + "".join(f"[{i}]" for i in index))
        return out


class _Scope(NamedTuple):
    stats: dict[str, Any]  # path -> {observer: state, "rows": rows}
    seen: dict[Any, tuple[str, Any]]  # product key -> path, activation (kept alive: keys hold ids)


class Collector(floats.FloatHandler):
    """Emits the statistics of one batch; bodies of scans and branches hand theirs out."""

    def __init__(self, observers: Sequence[str], mask: Any):
        self.observers = observers
        self.mask = mask
        self.shared: dict[str, str] = {}
        self.scopes = [_Scope({}, {})]

    def product(self, x, view, key, *, transposed, out_dtype):
        if not transposed and view.payload.tag:
            self._observe(x, view, key)
        return super().product(x, view, key, transposed=transposed, out_dtype=out_dtype)

    def _observe(self, x, view, key):
        scope = self.scopes[-1]
        key, activation = key
        if key in scope.seen and self.shared.get(view.name) in (None, scope.seen[key][0]):
            self.shared[view.name] = scope.seen[key][0]
            if view.name != self.shared[view.name]:
                return
        lead = view.payload.data.shape[:-2]
        tokens = x.shape[len(lead) : -1]
        flat = x.reshape(*lead, -1, x.shape[-1])
        mask = jnp.broadcast_to(self._mask(tokens), flat.shape[:-1])
        self._fold(view.name, flat, mask)
        self.shared.setdefault(view.name, view.name)
        scope.seen.setdefault(key, (view.name, activation))

    def _fold(self, name, x, mask):
        """Adds rows x [*lead, M, K] to the statistics of a site."""
        x = lax.stop_gradient(x)
        lead, K = x.shape[:-2], x.shape[-1]

        def fold(x, mask):
            new = {
                o: OBSERVERS[o].update(OBSERVERS[o].init(lead, K), x, mask) for o in self.observers
            }
            return new | {"rows": jnp.sum(mask, -1, dtype=jnp.float32)}

        stats = over_rows(fold, len(lead), x, mask)
        self._merge(self.scopes[-1].stats, {name: stats})

    def _mask(self, tokens: tuple[int, ...]) -> Array:
        if self.mask is None:
            return jnp.ones((), bool)
        shape = self.mask.shape
        size = int(np.prod(tokens))
        if size == self.mask.size:
            return self.mask.reshape(-1)
        if tokens[: len(shape)] == shape:
            extra = tokens[len(shape) :]
            return jnp.broadcast_to(self.mask.reshape(*shape, *[1] * len(extra)), tokens).reshape(
                -1
            )
        raise CalibrationError(
            f"the mask has shape {shape}, but a weight is applied to token axes {tokens}. Pool over"
            " valid tokens only, or calibrate without padding."
        )

    def ragged_dot(self, view, x, group_sizes, params):
        if view.payload.tag and len(view.payload.data.shape) == 3:
            ends = jnp.cumsum(group_sizes)
            row = jnp.arange(x.shape[0])
            of = (row >= (ends - group_sizes)[:, None]) & (row < ends[:, None])  # [E, M]
            mask = of & jnp.broadcast_to(self._mask((x.shape[0],)), of.shape)
            self._fold(view.name, jnp.broadcast_to(x, (of.shape[0], *x.shape)), mask)
            self.shared.setdefault(view.name, view.name)
        w = self.materialize(view, "ragged_dot", "")
        return lax.ragged_dot_general(x, w, group_sizes, **params)

    def conv(self, view, x, params):
        if view.payload.tag:
            self._fold(view.name, *self._patches(view, x, params))
            self.shared.setdefault(view.name, view.name)
        return lax.conv_general_dilated_p.bind(x, self.materialize(view, "conv", ""), **params)

    def _patches(self, view, x, params):
        """Returns what the kernel sees at every position, rows [M, K] in the kernel's own order."""
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            raise CalibrationError(
                f"{view.name}: a grouped convolution has an input of its own for every group;"
                " leave it out of `paths`."
            )
        numbers = params["dimension_numbers"]
        _, into, *spatial = numbers.rhs_spec
        patches = lax.conv_general_dilated_patches(
            x.transpose(numbers.lhs_spec),  # [batch, features, *spatial]
            [view.shape[i] for i in spatial],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            precision=lax.Precision.HIGHEST,
        )  # [batch, features * window, *positions]
        axes = [into, *spatial]
        rows = jnp.moveaxis(patches, 1, -1)
        positions = rows.shape[1:-1]
        rows = rows.reshape(-1, *(view.shape[i] for i in axes))
        order = sorted(range(len(axes)), key=axes.__getitem__)
        rows = rows.transpose(0, *(1 + i for i in order)).reshape(rows.shape[0], -1)
        mask = jnp.broadcast_to(
            self._mask((x.shape[numbers.lhs_spec[0]], *positions)), rows.shape[:1]
        )
        return rows, mask

    # ---- statistics leave the bodies they were made in ----

    def nested(self, run: Callable) -> tuple[Any, Any]:
        self.scopes.append(_Scope({}, {}))
        try:
            out = run()
        finally:
            scope = self.scopes.pop()
        return out, scope.stats

    def absorb(self, collected: Any) -> None:
        self._merge(self.scopes[-1].stats, collected)

    def absorb_stacked(self, collected: Any, sliced: set[str]) -> None:
        """Takes what a scan collected, one entry a step: kept apart where the weight was sliced."""
        for name, stats in collected.items():
            if name not in sliced:
                first = jax.tree.map(lambda a: a[0], stats)
                rest = jax.tree.map(lambda a: a[1:], stats)
                stats, _ = lax.scan(lambda a, b: (self._join(a, b), None), first, rest)
            self.absorb({name: stats})

    def empty_like(self, collected: Any) -> Any:
        """Returns statistics of no data, of the shapes in `collected`."""

        def empty(name, state):
            if name == "rows":
                return jnp.zeros(state.shape, state.dtype)
            if name == "minmax":
                shape = state.low.shape
            else:
                return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
            return OBSERVERS[name].init(shape[:-1], shape[-1])

        return {p: {o: empty(o, s) for o, s in stats.items()} for p, stats in collected.items()}

    def joined(self, a: Any, b: Any) -> Any:
        """Returns the statistics of two sets of data, of which either may lack sites."""
        out = dict(a)
        self._merge(out, b)
        return out

    def _merge(self, into: dict, collected: dict) -> None:
        for name, stats in collected.items():
            into[name] = self._join(into[name], stats) if name in into else stats

    def _join(self, a, b):
        return {o: a[o] + b[o] if o == "rows" else OBSERVERS[o].merge(a[o], b[o]) for o in a}


def over_rows(fold: Callable, lead: int, *args: Any) -> Any:
    """Returns fold(*args), sums over rows, which may be split over a mesh with explicit axes.

    Args:
      fold: of trees of arrays; its outputs have the first `lead` axes of the first array.
      lead: how many axes come before rows and columns.
    """
    leaves = jax.tree.leaves(args)
    mesh = _compat.explicit_mesh(leaves)
    if mesh is None:
        return fold(*args)
    stacked = _compat.spec_of(leaves[0])[:lead]
    context, args = _compat.enter_auto(args, mesh)
    with context:
        out = fold(*args)
    spec = lambda a: PartitionSpec(*stacked, *[None] * (a.ndim - lead))
    return _compat.leave_auto(out, jax.tree.map(spec, out), mesh)


class _Program:
    """The jitted functions that compute and fold the statistics of a batch.

    Attributes:
      shared: whose statistics each site uses; filled by the first trace.
    """

    def __init__(self, fn: Callable, usage: Usage, wanted: set[str], observers: tuple[str, ...]):
        self.fn, self.usage, self.wanted, self.observers = fn, usage, wanted, observers
        self.layouts = {
            p.path: Layout.parse(p.layout, p.shape)
            for p in usage.parameters.values()
            if p.layout is not None
        }
        self.shared: dict[str, str] = {}
        self.first = jax.jit(self._collect)
        self.fold = jax.jit(self._fold, donate_argnums=0)

    def _collect(self, params: Any, args: tuple, mask: Any) -> dict[str, Any]:
        """Runs fn once and returns the statistics of that batch."""
        call = take_apart((params, *args), {})
        handler = Collector(self.observers, mask)
        jaxpr, consts, _ = trace(self.fn, call)
        values = []
        for leaf, path in zip(call.leaves, call.paths, strict=True):
            name = path_str(path[2:])
            is_param = path[0].idx == 0 and path[1].idx == 0
            if is_param and name in self.layouts:
                tag = name in self.wanted
                values.append(floats.as_view(leaf, self.layouts[name], name, tag=tag))
            else:
                values.append(leaf)
        walk.evaluate(handler, jaxpr, consts, values)
        self.shared.update(handler.shared)
        return handler.scopes[0].stats

    def _fold(self, state: dict[str, Any], params: Any, args: tuple, mask: Any) -> dict[str, Any]:
        return Collector(self.observers, None).joined(state, self._collect(params, args, mask))


def _wanted(usage: Usage, paths: Iterable[str] | None) -> set[str]:
    if paths is None:
        return {p.path for p in usage.parameters.values() if p.is_multiplied}
    for path in (wanted := set(paths)):
        if usage[path].layout is None:
            raise CalibrationError(f"{path}: {usage.why_not(path)}.")
        if not usage[path].is_multiplied:
            raise CalibrationError(
                f"{path}: is only looked up; a lookup has no input to calibrate on."
            )
    return wanted


def calibrate(
    fn: Callable,
    params: Any,
    batches: Iterable[Any],
    observers: Sequence[str] = ("hessian",),
    *,
    usage: Usage | None = None,
    paths: Iterable[str] | None = None,
    mask: Callable[[Any], Array] | None = None,
    report: Callable[[str], None] | None = print,
) -> Calibration:
    """Folds statistics of the input of every weight over calibration batches.

    fn runs unmodified, once for each batch, jitted; the statistics are computed inside it, under
    scan, checkpoint, cond and while loops, and no activation is kept. Weights that read the same
    activation share one statistic. Over batches sharded by the caller the sums are global.

    Args:
      fn: any function of `(params, *batch)`.
      params: its float parameters.
      batches: what is passed after params: a tuple of arguments, or one argument. Batches of equal
        shapes share one compilation.
      observers: names in `qjax.observers.OBSERVERS`.
      usage: `qjax.usage(fn)(params, *batch)` if it is at hand.
      paths: the parameters to observe; None: every weight of a product.
      mask: function of a batch that says which tokens count, [B, T]; None: all.
      report: called with the memory plan before the first batch; None: silent.

    Returns:
      A `Calibration`: `calibration[path].stats["hessian"]`.

    Raises:
      CalibrationError: no batches, a requested parameter that is no weight or is never reached, or
        NaN or Inf activations: which site, in which batch.
    """
    program: _Program | None = None
    state: Any = None
    for n, batch in enumerate(batches, start=1):
        args = batch if isinstance(batch, tuple) else (batch,)
        token_mask = mask(batch) if mask is not None else None
        if program is None:
            used = usage if usage is not None else usage_of(fn)(params, *args)
            program = _Program(fn, used, _wanted(used, paths), tuple(observers))
            shapes = jax.eval_shape(program.first, params, args, token_mask)
            if never := sorted(program.wanted - set(program.shared)):
                raise CalibrationError(f"{never[0]}: asked for, but no product with it is reached.")
            if report is not None:
                size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))
                report(
                    f"calibrate: {len(program.shared)} weights at {len(shapes)} activations,"
                    f" {size / 1e6:.1f} MB of statistics ({', '.join(observers)})"
                )
        if state is None:
            state = program.first(params, args, token_mask)
        else:
            state = program.fold(state, params, args, token_mask)
        _check_finite(state, n)
    if program is None:
        raise CalibrationError("no calibration batches; pass at least one.")
    rows = {p: s["rows"] for p, s in state.items()}
    states = {p: {o: v for o, v in s.items() if o != "rows"} for p, s in state.items()}
    shared = {p: program.shared[p] for p in program.usage.parameters if p in program.shared}
    return Calibration(states, rows, shared, program.usage)


def _check_finite(state: Any, batch: int) -> None:
    for path, stats in state.items():
        for observer, s in stats.items():
            if observer == "minmax":
                continue  # infinite before the first row
            if not all(bool(jnp.isfinite(jnp.sum(a))) for a in jax.tree.leaves(s)):
                raise CalibrationError(
                    f"{path}: its input is NaN or Inf in calibration batch {batch} ({observer})."
                    " Look at the data, or calibrate in float32."
                )
