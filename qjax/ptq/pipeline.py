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
from qjax.ptq.store import Store, fingerprint
from qjax.recipe import Recipe
from qjax.tables import align
from qjax.transform.calibrate import Calibration, calibrate
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
    """

    solved: tuple[Solved, ...]
    smoothed: tuple[Smoothing, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "smoothed": [dataclasses.asdict(s) for s in self.smoothed],
            "solved": [dataclasses.asdict(s) for s in self.solved],
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
        if jax.process_count() > 1:
            raise NotImplementedError(
                f"`resume={str(resume)!r}` in {jax.process_count()} processes: finished weights are"
                " kept by programs of one process only. Leave it out here."
            )
        key = sorted((path, f.to_dict(), str(layout)) for path, (f, layout) in formats.items())
        store = Store(resume, fingerprint(params, list(batches), repr(key), repr(recipe)))

    train = judge = None
    wanted = _observers(recipe, formats)
    if wanted:
        train, judge = statistics(
            fn, params, batches, judged, list(formats), usage, mask, report, wanted
        )
    smoothed = Smoothed(params, {}, {}, ())
    if recipe.scaling != "none":
        assert train is not None
        first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
        smoothed = smooth(fn, params, formats, recipe, train, first, usage)
        if report is not None:
            for line in smoothed.lines:
                report(line.line())
    steps = {} if train is None else act_scales(formats, train, smoothed.divisors, recipe.static)

    if recipe.rounding == "gptq" and recipe.mode == "sequential":
        out, solved = sequential.quantize(
            fn, smoothed.params, formats, batches, held_out=judged, options=options, mask=mask,
            pre_scales=smoothed.pre_scales, act_scales=steps, store=store, report=report,
        )  # fmt: skip
        return out, smoothed.params, Report(tuple(solved), smoothed.lines)

    leaves = jax.tree_util.tree_flatten_with_path(smoothed.params)[0]
    named = {path_str(path): leaf for path, leaf in leaves}
    out, lines = {}, []
    for path, (fmt, layout) in formats.items():
        if store is not None and path in store:
            out[path], what = store.load(path)
            lines.append(what)
            continue
        folded = smoothed.divisors.get(path) if path not in smoothed.pre_scales else None
        if recipe.rounding == "gptq":
            assert train is not None
            item = Item(path, named[path], fmt, layout, steps.get(path))
            ((out[path], what),) = solve_weights(
                [item], moments(train, path, folded),
                None if judge is None else moments(judge, path, folded), options,
                pre_scale=smoothed.pre_scales.get(path),
            )  # fmt: skip
        else:
            h = None
            if train is not None and "hessian" in wanted:
                h = moments(train, path, folded).hessian
            out[path], what = round_weight(
                path, named[path], fmt, layout, h,
                method=recipe.rounding, clip=recipe.clip,
                pre_scale=smoothed.pre_scales.get(path), act_scale=steps.get(path),
            )  # fmt: skip
        if store is not None:
            store.save(path, out[path], what)
        if report is not None:
            report(what.line())
        lines.append(what)
    return out, smoothed.params, Report(tuple(lines), smoothed.lines)


def _observers(recipe: Recipe, formats: Mapping[str, tuple[Format, Layout]]) -> list[str]:
    """Returns the statistics of the float model that a recipe needs."""
    wanted = list(OBSERVERS[recipe.scaling])
    if recipe.clip or (recipe.rounding == "gptq" and recipe.mode == "parallel"):
        wanted.append("hessian")
    if any(f.activation and f.activation_scale == "static" for f, _ in formats.values()):
        wanted += ["absmax", recipe.static]
    return list(dict.fromkeys(wanted))


def moments(calibration: Calibration, path: str, divisor: Array | None = None) -> Moments:
    """Returns the second moments of a weight's input in the float model, after a division."""
    site = calibration[path]
    plain = Moments(site.stats["hessian"] * site.rows[..., None, None], None, site.rows)
    return plain if divisor is None else plain.scaled(1 / divisor)


def statistics(
    fn: Callable,
    params: Any,
    batches: Sequence[Any],
    judged: Sequence[bool],
    paths: Sequence[str],
    usage: Usage,
    mask: Callable[[Any], Array] | None,
    report: Callable[[str], None] | None,
    observers: Sequence[str] = ("hessian",),
) -> tuple[Calibration, Calibration | None]:
    """Returns the statistics of the calibration batches, and of the held-out ones if there are any.

    Raises:
      CalibrationError: no token reached a weight, or a part of one.
    """
    sets = [
        [b for b, j in zip(batches, judged, strict=True) if j is which] for which in (False, True)
    ]
    common: Mapping[str, Any] = {"usage": usage, "paths": list(paths), "mask": mask}
    train = calibrate(fn, params, sets[0], observers, report=report, **common)
    if not sets[1]:
        return train, None
    return train, calibrate(fn, params, sets[1], observers, report=None, **common)
