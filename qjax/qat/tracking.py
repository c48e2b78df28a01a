"""tracked: fake quantization that keeps running ranges of its activations, as explicit state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import QuantizationError
from qjax.latent import Latent, is_latent
from qjax.paths import path_str
from qjax.policy import Policy
from qjax.qat import ranges as ranges_
from qjax.qat.learned import shapes_of
from qjax.qat.ranges import Range
from qjax.qat.schedules import Phase
from qjax.qtensor import is_qtensor
from qjax.quantize import assign
from qjax.transform import fake_quant


class Tracking(fake_quant.FakeQuant):
    """Updates the range of every activation with static steps, and takes its step from there."""

    def __init__(self, implementation: str | None, phase: Phase | None, decay: float):
        super().__init__(implementation, phase)
        self.decay = decay
        self.scopes: list[dict[str, Range]] = [{}]

    def prepared(self, w, x, name):
        if w.seen is None:
            return w
        element = w.qt.format.activation
        assert element is not None
        new = ranges_.update(w.seen, x, element, self.decay)
        if self.phase is not None:
            new = ranges_.where(self.phase.frozen, w.seen, new)
        self.absorb({name: new})
        qt = dataclasses.replace(w.qt, act_scale=lax.stop_gradient(new.step(element)))
        return dataclasses.replace(w, qt=qt)

    # ---- ranges leave the bodies they were made in ----

    def nested(self, run: Callable) -> tuple[Any, Any]:
        self.scopes.append({})
        try:
            out = run()
        finally:
            scope = self.scopes.pop()
        return out, scope

    def absorb(self, collected: Any) -> None:
        self.scopes[-1] = self.joined(self.scopes[-1], collected)

    def absorb_stacked(self, collected: Any, sliced: set[str]) -> None:
        self.absorb({n: r if n in sliced else ranges_.over_steps(r) for n, r in collected.items()})

    def empty_like(self, collected: Any) -> Any:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), collected)

    def joined(self, a: Any, b: Any) -> Any:
        return {n: ranges_.joined(a[n], b[n]) if n in a and n in b else (a | b)[n] for n in a | b}


def init_ranges(params: Any, policy: Any, *, usage: Any = None) -> dict[str, Range]:
    """Returns ranges of which nothing was seen, by path, of all activations with static steps.

    Raises:
      QuantizationError: if the policy has none.
    """
    out = {}
    for a in assign(params, Policy.of(policy), usage):
        if a.format is not None and a.format.activation_scale == "static":
            out[a.path] = ranges_.init(shapes_of(a).canonical_shape[:-2])
    if not out:
        raise QuantizationError(
            f"policy {Policy.of(policy).name!r} has no activations with static steps: no format"
            " with activation_scale='static' applies."
        )
    return out


def tracked(
    fn: Callable,
    policy: Any,
    *,
    usage: Any = None,
    decay: float = 0.99,
    phase: Phase | None = None,
    implementation: str | None = None,
) -> Callable:
    """Returns `fake_quant(fn, policy)` as a function `(params, ranges, ...) -> (out, ranges)`.

    Every activation with a static step takes it from its running range, this batch included; the
    step is a constant to derivatives. With the ranges that come back,

        out == fake_quant(fn, policy)(qat.attach(params, policy, ranges), ...)

    bit for bit, and `quantize(qat.attach(params, policy, ranges), policy)` packs that model. With
    ranges held fixed (`phase.frozen`, or just not passed on) they are fixed ranges.

    Args:
      fn, policy, usage, implementation: as for `fake_quant`.
      decay: of the running means over batches; 0: the last batch alone.
      phase: of a schedule; ranges also grow before quantization starts, and stay when frozen.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must be from 0 on and below 1, got {decay}.")
    policy = dataclasses.replace(Policy.of(policy), recipe=None)

    @functools.wraps(fn)
    def run(params, ranges: Mapping[str, Range], *args, **kwargs):
        started = _with_any_step(params, ranges)
        own = fake_quant.views(started, policy, usage, phase, ranges)
        own = {path: _without_learned_step(view, ranges) for path, view in own.items()}
        handler = Tracking(implementation, phase, decay)
        out = fake_quant.run(handler, fn, started, own, args, kwargs)
        new = dict(ranges)
        for name, found in handler.scopes[0].items():
            path = name.partition("/")[2]
            if found.largest.shape != ranges[path].largest.shape:
                raise NotImplementedError(
                    f"{path}: its range has the shape {ranges[path].largest.shape}, but it is used"
                    f" in parts of {found.largest.shape}. Stacked weights are tracked under `scan`"
                    " or batched."
                )
            new[path] = found
        return out, new

    return run


def _without_learned_step(view, ranges):
    if view.name not in ranges:
        return view
    return view.with_payload(dataclasses.replace(view.payload, act_scale=None))


def _with_any_step(params: Any, ranges: Mapping[str, Range]) -> Any:
    """Returns Latents with some static step, which the handler replaces once it has seen x."""

    def one(path, leaf):
        name = path_str(path)
        if name not in ranges:
            return leaf
        latent = leaf if is_latent(leaf) else Latent(leaf)
        return dataclasses.replace(latent, act_scale=jnp.ones_like(ranges[name].largest))

    is_leaf = lambda x: is_latent(x) or is_qtensor(x)
    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_leaf)
