"""Sequential quantization: weights are solved on inputs that the quantized model before them made.

The function runs level by level (`qjax.transform.segments`) over all calibration batches. At each
level the second moments of the inputs of its weights are summed, the weights are solved, and the
next level runs on them, packed, as they will run later. With the `asymmetric` option the float
model runs beside it, and every weight also makes up for errors made before it:

  minimize over Q   ‖X W - X̂ Q‖²      X float inputs, X̂ those of the quantized model

which, with H = X̂ᵀX̂ and C = X̂ᵀX, is the problem of GPTQ for another target (up to a constant):

  T = W + α (H + λ diag H)⁻¹ (C - H) W

α = 1 is the least-squares target (Li et al., 2025, GPTAQ, arXiv:2504.02692, section 3.2), α < 1 the
damped one of Arai and Ichikawa, 2025 (QEP, arXiv:2504.09629, eq. 10). Few rows make C - H noisy:
α and λ are chosen on held-out batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qjax.format import Format
from qjax.layout import Layout
from qjax.paths import path_str
from qjax.ptq.moments import Moments
from qjax.ptq.solve import Item, Solved, SolverOptions, solve_weights
from qjax.ptq.store import Store
from qjax.transform import segments
from qjax.transform.calibrate import CalibrationError, over_rows
from qjax.transform.segments import Key, Level, Rows, Segments


class Batch(NamedTuple):
    """What is alive of one batch: values of the quantized model and of the float one."""

    quantized: dict[Any, Any]
    exact: dict[Any, Any] | None
    mask: Any
    held_out: bool


def _moments(rows: Sequence[Rows], others: Sequence[Rows] | None) -> Moments:
    """Sums over the rows [*lead, M, K] that a weight read, in one or more products."""
    total = None
    for i, (x, mask) in enumerate(rows):
        weights = mask[..., None].astype(jnp.float32)
        x = jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)
        dot = lambda a, b: jnp.einsum("...mk,...ml->...kl", a, b, precision=lax.Precision.HIGHEST)
        cross = None
        # Which tokens reach an expert differs between the streams: their rows do not correspond.
        if others is not None and x.ndim == 2:
            cross = dot(x, jnp.where(mask[..., None], others[i].x.astype(jnp.float32), 0.0))
        one = Moments(dot(x, x), cross, jnp.sum(weights, (-2, -1)))
        total = one if total is None else total + one
    assert total is not None
    return total


def _fold(state: Mapping[str, Moments] | None, rows: Any, others: Any) -> dict[str, Moments]:
    new = {}
    for name, mine in rows.items():
        theirs = None if others is None else others[name]
        new[name] = over_rows(_moments, mine[0].x.ndim - 2, mine, theirs)
    return new if state is None else {name: state[name] + m for name, m in new.items()}


def quantize(
    fn: Callable,
    params: Any,
    formats: Mapping[str, tuple[Format, Layout]],
    batches: Sequence[Any],
    *,
    held_out: Sequence[bool],
    options: SolverOptions,
    mask: Callable[[Any], Array] | None = None,
    pre_scales: Mapping[str, Array] | None = None,
    act_scales: Mapping[str, Array] | None = None,
    store: Store | None = None,
    offload: bool | None = None,
    report: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], list[Solved]]:
    """Quantizes the weights of a function while executing it.

    Args:
      fn: of `(params, *batch)`.
      params: its float parameters.
      formats: format and layout of each weight, by path.
      batches: calibration data; a tuple of arguments each, or one argument.
      held_out: which batches only judge.
      options: of the solver.
      mask: function of a batch that says which tokens count, [B, T]; None: all.
      pre_scales: smoothing [*lead, K] of the inputs that stays at a weight, by path.
      act_scales: static steps [*lead] of activations' codes, by path.
      store: where finished weights are kept, so that an interrupted run can go on.
      offload: whether activations wait in host memory; None: unless the device is a CPU. Arrays
        over several devices stay where they are.
      report: called with a line for each weight.

    Returns:
      QTensors by path, and what was done, by weight or slice of a stack.

    Raises:
      CalibrationError: NaN or Inf inputs, or a weight that no data reaches.
      SegmentError: a weight in a loop or branch.
    """
    first = _args(batches[0])
    cut = Segments(fn, params, first, {path: layout for path, (_, layout) in formats.items()})
    if missing := sorted(set(formats) - {key.path for key in cut.keys}):
        raise CalibrationError(f"{missing[0]}: no product with it is reached.")
    named = {path_str(p): w for p, w in jax.tree_util.tree_flatten_with_path(params)[0]}
    floats = {key: segments.slice_of(named[key.path], key) for key in cut.keys}
    shared = cut.constants(params)
    state: list[Batch] = []
    for batch, is_held_out in zip(batches, held_out, strict=True):
        args = _args(batch)
        if jax.tree.map(jnp.shape, args) != jax.tree.map(jnp.shape, first):
            raise CalibrationError(
                f"batch {len(state) + 1} has shapes {jax.tree.map(jnp.shape, args)}, the first"
                f" {jax.tree.map(jnp.shape, first)}. Pad all to one shape and pass `mask`."
            )
        env = cut.start(args)
        exact = dict(env) if options.asymmetric else None
        state.append(Batch(env, exact, None if mask is None else mask(batch), is_held_out))

    if offload is None:
        offload = jax.default_backend() != "cpu"
    done: dict[Key, Any] = {}
    solved: list[Solved] = []
    progress = _Progress(floats, report)
    for number, level in enumerate(cut.levels):
        _make(cut, level, floats, done, state, shared, offload)
        keys = [key for key in level.keys if key not in done]
        if keys and store is not None and all(key in store for key in keys):
            for key in keys:
                done[key], what = store.load(key, floats[key])
                solved.append(what)
            progress.skip(keys, number, len(cut.levels))
        elif keys:
            seen = cut.owners(level, floats, shared | state[0].quantized, state[0].mask)
            keys = [key for key in keys if key in seen]
            train, judge = _statistics(cut, level, floats, state, shared)
            # An activation at a time: its moments, and copies of them, are what takes memory.
            together: dict[Key, list[Key]] = {}
            for key in keys:
                together.setdefault(seen[key], []).append(key)
            for owner, members in together.items():
                name = str(cut.read_keys(level).index(owner))
                items = [
                    Item(str(key), floats[key], *formats[key.path], _part(act_scales, key))
                    for key in members
                ]
                made = solve_weights(
                    items, train.pop(name), None if judge is None else judge.pop(name), options,
                    pre_scale=_part(pre_scales, owner),
                )  # fmt: skip
                for key, (qt, what) in zip(members, made, strict=True):
                    done[key] = qt
                    if store is not None:
                        store.save(key, qt, what)
                    solved.append(what)
                    progress.solved(key, what, number, len(cut.levels))
        for batch in state:
            for v in level.freed:
                batch.quantized.pop(v, None)
                if batch.exact is not None:
                    batch.exact.pop(v, None)
    if unseen := [key for key in cut.keys if key not in done]:
        raise CalibrationError(
            f"{unseen[0]}: no product with it reads data along all of K ({len(unseen)} such)."
        )
    out = {path: segments.stack_slices(done, path) for path in formats}
    return out, solved


def _args(batch: Any) -> tuple:
    return batch if isinstance(batch, tuple) else (batch,)


def _part(arrays: Mapping[str, Array] | None, key: Key) -> Array | None:
    """Returns what belongs to a weight or to a slice of it."""
    return segments.slice_of(arrays[key.path], key) if arrays and key.path in arrays else None


def _make(
    cut: Segments, level: Level, floats, done, state: Sequence[Batch], shared, offload: bool
) -> None:
    """Computes the values of a level, for every batch."""
    keep = _to_host if offload else lambda values: values
    packed = {key: done.get(key, floats[key]) for key in floats}
    for batch in state:
        made = keep(cut.run(level.make, packed, shared | batch.quantized))
        if batch.exact is not None:
            exact = made  # up to the first quantized weight the two models are one
            if done:
                exact = keep(cut.run(level.make, floats, shared | batch.exact))
            batch.exact.update(exact)
        batch.quantized.update(made)


def _to_host(values: dict[Any, Any]) -> dict[Any, Any]:
    return {
        v: a if isinstance(a, jax.Array) and len(a.devices()) > 1 else jax.device_get(a)
        for v, a in values.items()
    }


def _statistics(
    cut: Segments, level: Level, floats, state: Sequence[Batch], shared
) -> tuple[dict[str, Moments], dict[str, Moments] | None]:
    """Returns the moments of a level's inputs on the calibration batches and the held-out ones."""
    fold = cut.reader(level, _fold)
    sums: list[Any] = [None, None]
    for i, batch in enumerate(state):
        other = None if batch.exact is None else shared | batch.exact
        env = shared | batch.quantized
        sums[batch.held_out] = fold(sums[batch.held_out], floats, env, other, batch.mask)
        for name, m in sums[batch.held_out].items():
            if not np.isfinite(float(jnp.sum(m.total))):
                key = cut.read_keys(level)[int(name)]
                raise CalibrationError(
                    f"{key}: its input is NaN or Inf in calibration batch {i + 1}. Look at the"
                    " data, at the weights before it, or calibrate in float32."
                )
    return sums[False], sums[True]


class _Progress:
    """Says what was done, and how long the rest may take: by floating-point work, roughly."""

    def __init__(self, weights: Mapping[Key, Any], report: Callable[[str], None] | None):
        self.sizes = {key: float(w.size) for key, w in weights.items()}
        self.left = sum(self.sizes.values())
        self.done = 0.0
        self.report = report
        self.start = time.perf_counter()

    def skip(self, keys: Sequence[Key], level: int, levels: int) -> None:
        for key in keys:
            self.left -= self.sizes[key]
        if self.report is not None:
            names = ", ".join(map(str, keys))
            self.report(f"[{level + 1}/{levels}] {names}: solved in an earlier run")

    def solved(self, key: Key, what: Solved, level: int, levels: int) -> None:
        self.left -= self.sizes[key]
        self.done += self.sizes[key]
        if self.report is None:
            return
        elapsed = time.perf_counter() - self.start
        rest = elapsed * self.left / self.done
        self.report(f"[{level + 1}/{levels}] {what.line()}, {rest / 60:.1f} min left")
