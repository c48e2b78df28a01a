"""Quantization with data: from a plan and calibration batches to QTensors and a report.

What a `Recipe` says, in order: smooth (AWQ, SmoothQuant), fix the static scales of activations,
round (to nearest, GPTQ and descent, HQQ).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from qjax.format import Format
from qjax.layout import Layout
from qjax.paths import path_str
from qjax.ptq import sequential
from qjax.ptq.moments import Moments
from qjax.ptq.smooth import OBSERVERS, Smoothed, Smoothing, act_scales, smooth
from qjax.ptq.solve import Item, Solved, SolverOptions, round_weight, solve_weights
from qjax.ptq.statistics import Group, Statistics
from qjax.ptq.store import Store, fingerprint
from qjax.recipe import Recipe
from qjax.tables import align
from qjax.transform import fold
from qjax.transform.calibrate import Calibration
from qjax.transform.usage import Usage


class Weight(NamedTuple):
    """A parameter that is to be quantized with data: `format` has been fit to it."""

    path: str
    value: Any
    format: Format
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Report:
    """What a quantization with data did. Prints as a table.

    Attributes:
      solved: a line for each weight, or slice of a stacked one.
      smoothed: a line for each activation that was smoothed.
      in_float: why parameters stayed in float to which the policy gives a format, by path.
    """

    solved: tuple[Solved, ...]
    smoothed: tuple[Smoothing, ...] = ()
    in_float: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "smoothed": [dataclasses.asdict(s) for s in self.smoothed],
            "solved": [dataclasses.asdict(s) for s in self.solved],
            "in_float": dict(self.in_float),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [("weight", "rtn", "gptq", "final", "held-out", "damping", "strength", "s", "note")]
        for s in self.solved:
            held = "-" if s.held_out is None else f"{s.held_out_rtn:.5f} > {s.held_out:.5f}"
            lines.append(
                (
                    s.path,
                    f"{s.rtn:.5f}",
                    f"{s.gptq:.5f}",
                    f"{s.final:.5f}",
                    held,
                    f"{s.damping:.3g}",
                    f"{s.strength:.2g}",
                    f"{s.seconds:.1f}",
                    s.note,
                )
            )
        text = "\n".join(align(lines))
        if any(min(s.final, s.held_out or 0.0) < 0 for s in self.solved):
            text += "\nErrors below 0: the weight makes up for errors of the weights before it."
        if self.in_float:
            text += "\nLeft in float:\n" + "\n".join(
                align([(path, why) for path, why in self.in_float.items()])
            )
        if not self.smoothed:
            return text
        head = [("input of", "method", "alpha", "rtn", "smoothed", "where")]
        for line in self.smoothed:
            alpha = "-" if line.alpha is None else f"{line.alpha:.2f}"
            errors = (f"{line.before:.5f}", f"{line.after:.5f}")
            head.append((", ".join(line.weights), line.method, alpha, *errors, line.where))
        return "\n".join(align(head)) + "\n\n" + text


def held_out(n: int) -> list[bool]:
    """Returns which of n batches only judge: every fifth, if there are two or more."""
    return [n > 1 and i % 5 == 1 for i in range(n)]


def options_of(recipe: Recipe) -> SolverOptions:
    return SolverOptions(
        damping=recipe.damping,
        sweeps=recipe.sweeps,
        refit=recipe.refit,
        act_order=recipe.act_order,
        asymmetric=recipe.asymmetric,
        unseen=recipe.unseen,
    )


def run(
    fn: Callable,
    params: Any,
    weights: Sequence[Weight],
    batches: Sequence[Any],
    recipe: Recipe,
    usage: Usage,
    *,
    mask: Callable[[Any], Array] | None,
    resume: Any,
    report: Callable[[str], None] | None,
) -> tuple[dict[str, Any], Any, Report]:
    """Quantizes weights by a recipe.

    Args:
      fn: of `(params, *batch)`.
      params: its float parameters.
      weights: what to quantize.
      batches: calibration data.
      recipe: how.
      usage: of fn.
      mask: function of a batch that says which tokens count.
      resume: directory of finished weights, or None.
      report: called with a line for each step.

    Returns:
      QTensors by path, the parameters with what was folded into them, and the report.
    """
    judged = held_out(len(batches))
    options = options_of(recipe)
    formats = {w.path: (w.format, w.layout) for w in weights}
    store = None
    if resume is not None:
        key = sorted((path, f.to_dict(), str(layout)) for path, (f, layout) in formats.items())
        store = Store(resume, fingerprint(params, list(batches), repr(key), repr(recipe)))

    first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    activations = _activations(fn, params, formats, recipe, usage, first)
    is_sequential = recipe.rounding == "gptq" and recipe.mode == "sequential"
    before, after = _observers(recipe, formats)
    seen = Statistics(
        fn, params, batches, judged, before if is_sequential else [*before, *after], usage=usage,
        mask=mask, report=report,
    )  # fmt: skip

    smoothed, steps = Smoothed(params, {}, {}, ()), {}
    for part in seen.passes(list(activations), before):
        if recipe.scaling != "none":
            groups = [g for a in part.groups if (g := activations[a]) is not None]
            n = len(smoothed.lines)
            smoothed = smooth(smoothed, groups, formats, recipe, part.train)
            if report is not None:
                for line in smoothed.lines[n:]:
                    report(line.line())
        mine = {path: formats[path] for path in part.paths}
        steps |= act_scales(mine, part.train, smoothed.divisors, recipe.static)

    if is_sequential:
        out, solved = sequential.quantize(
            fn, smoothed.params, formats, batches, held_out=judged, options=options, mask=mask,
            pre_scales=smoothed.pre_scales, act_scales=steps, store=store, report=report,
        )  # fmt: skip
        return out, smoothed.params, Report(tuple(solved), smoothed.lines)

    leaves = jax.tree_util.tree_flatten_with_path(smoothed.params)[0]
    named = {path_str(path): leaf for path, leaf in leaves}
    made: dict[str, tuple[Any, Solved]] = {}

    def solve(path: str, train: Calibration | None, judge: Calibration | None) -> None:
        if store is not None and path in store:
            made[path] = store.load(path, named[path])
            return
        fmt, layout = formats[path]
        pre_scale = smoothed.pre_scales.get(path)
        divisor = smoothed.divisors.get(path) if pre_scale is None else None
        h = None if train is None else moments(train, path, divisor)
        if recipe.rounding == "gptq":
            assert h is not None
            h_judge = None if judge is None else moments(judge, path, divisor)
            item = Item(path, named[path], fmt, layout, steps.get(path))
            (made[path],) = solve_weights([item], h, h_judge, options, pre_scale=pre_scale)
        else:
            made[path] = round_weight(
                path, named[path], fmt, layout, None if h is None else h.hessian,
                method=recipe.rounding, clip=recipe.clip, pre_scale=pre_scale,
                act_scale=steps.get(path),
            )  # fmt: skip
        if store is not None:
            store.save(path, *made[path])
        if report is not None:
            report(made[path][1].line())

    for part in seen.passes(list(activations), after):
        for path in part.paths:
            solve(path, part.train, part.judge)
    for path in formats:
        if path not in made:
            solve(path, None, None)
    return (
        {path: made[path][0] for path in formats},
        smoothed.params,
        Report(tuple(made[path][1] for path in formats), smoothed.lines),
    )


def _activations(
    fn: Callable,
    params: Any,
    formats: Mapping[str, tuple[Format, Layout]],
    recipe: Recipe,
    usage: Usage,
    first: Sequence[Any],
) -> dict[Group, fold.Group | None]:
    """Returns whose statistics to gather, and, where they are smoothed, where scales can go."""
    if recipe.scaling == "none":  # which of them share an activation `calibrate` will see
        leaves = {path_str(p): w for p, w in jax.tree_util.tree_flatten_with_path(params)[0]}
        shapes = {
            path: jax.eval_shape(layout.to_canonical, leaves[path]).shape[:-1]
            for path, (_, layout) in formats.items()
        }
        return {Group((path,), shape): None for path, shape in shapes.items()}
    found = fold.find(fn, usage=usage)(params, *first)
    out: dict[Group, fold.Group | None] = {}
    for group in found:
        if members := tuple(path for path in group.readers if path in formats):
            out[Group(members, group.shape)] = group
    return out


def _observers(
    recipe: Recipe, formats: Mapping[str, tuple[Format, Layout]]
) -> tuple[list[str], list[str]]:
    """Returns the statistics that smoothing and static steps need, and those for rounding."""
    before = list(OBSERVERS[recipe.scaling])
    if any(f.activation and f.activation_scale == "static" for f, _ in formats.values()):
        before += ["absmax", recipe.static]
    # SmoothQuant's errors are of activations too: its weights are rounded, and judged, as they are.
    judged = recipe.clip or recipe.scaling == "awq" or recipe.rounding == "gptq"
    # ggml's search weighs a weight's rows by the mean squares of their inputs.
    judged = judged or any(f.rule == "ggml" for f, _ in formats.values())
    return list(dict.fromkeys(before)), ["hessian"] if judged else []


def moments(calibration: Calibration, path: str, divisor: Array | None = None) -> Moments:
    """Returns the second moments of a weight's input in the float model, after a division."""
    site = calibration[path]
    plain = Moments(site.stats["hessian"] * site.rows[..., None, None], None, site.rows)
    return plain if divisor is None else plain.scaled(1 / divisor)
