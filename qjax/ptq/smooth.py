"""The smoothing stage: scales of input channels, by AWQ or SmoothQuant, for a whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.format import Format
from qjax.layout import Layout
from qjax.numerics import get_element
from qjax.paths import path_str
from qjax.ptq import awq, smoothquant
from qjax.recipe import Recipe
from qjax.scale_range import check_act_scale
from qjax.transform import fold
from qjax.transform.calibrate import Calibration

# What each method looks at.
OBSERVERS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "awq": ("hessian", "moments"),
    "smoothquant": ("absmax", "sample"),
}


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """What was done to one activation. Errors are squared and relative to the squared output.

    Attributes:
      weights: the parameters that read it.
      method: "awq" or "smoothquant".
      alpha: the exponent, the mean over stacked layers; None: s = 1 was best.
      before, after: output error of rounding to nearest with s = 1 and with s.
      where: "folded into ..." or "kept at the weights: ..." and why.
    """

    weights: tuple[str, ...]
    method: str
    alpha: float | None
    before: float
    after: float
    where: str

    def line(self) -> str:
        return (
            f"{', '.join(self.weights)}: {self.method} {self.before:.5f} > {self.after:.5f},"
            f" {self.where}"
        )


class Smoothed(NamedTuple):
    """A function's parameters after smoothing.

    Attributes:
      params: with everything folded that could be; they compute what they computed before.
      divisors: s [*lead, K] by path: what the input of a weight is now divided by, wherever.
      pre_scales: 1/s [*lead, K] by path, for weights at which it has to stay.
      lines: what was done.
    """

    params: Any
    divisors: dict[str, Float[Array, "*lead K"]]
    pre_scales: dict[str, Float[Array, "*lead K"]]
    lines: tuple[Smoothing, ...]


def smooth(
    smoothed: Smoothed,
    groups: Sequence[fold.Group],
    formats: Mapping[str, tuple[Format, Layout]],
    recipe: Recipe,
    statistics: Calibration,
) -> Smoothed:
    """Finds the scales of activations that quantized weights read, and folds them.

    Args:
      smoothed: what was done to other activations; `Smoothed(params, {}, {}, ())` at first.
      groups: of `fold.find(fn)`, the activations to smooth.
      formats: format and layout of each weight that will be quantized, by path.
      recipe: with `scaling` other than "none".
      statistics: with `OBSERVERS[recipe.scaling]`, of the float model.
    """
    params, lines = smoothed.params, list(smoothed.lines)
    divisors, pre_scales = dict(smoothed.divisors), dict(smoothed.pre_scales)
    for group in groups:
        members = [path for path in group.readers if path in formats]
        if not members:
            continue
        if group.weights is None:
            where = f"not scaled: {group.why}"
            lines.append(Smoothing(tuple(members), recipe.scaling, None, 0.0, 0.0, where))
            continue
        leaves = {path_str(p): w for p, w in jax.tree_util.tree_flatten_with_path(params)[0]}
        weights = [formats[path][1].to_canonical(leaves[path]) for path in members]
        found = _search(weights, [formats[path][0] for path in members], recipe, statistics, group)
        s = found.scale
        for path in members:
            divisors[path] = s
        if group.targets is not None:
            params = fold.fold(params, group, s)
            where = f"folded into {', '.join(t.path for t in group.targets)}"
        else:
            for path in members:
                pre_scales[path] = 1 / s
            where = f"kept at the weights: {group.why}"
        alphas = np.asarray(found.alpha, np.float64)
        alpha = None if np.isnan(alphas).all() else float(np.nanmean(alphas))
        before, after = (found.rtn, found.final) if recipe.scaling == "awq" else found[3:]
        before, after = float(np.mean(np.asarray(before))), float(np.mean(np.asarray(after)))
        lines.append(Smoothing(tuple(members), recipe.scaling, alpha, before, after, where))
    return Smoothed(params, divisors, pre_scales, tuple(lines))


def _search(
    weights: Sequence[Array],
    formats: Sequence[Format],
    recipe: Recipe,
    statistics: Calibration,
    group: fold.Group,
) -> Any:
    stats = statistics[next(p for p in group.readers if p in statistics)].stats
    if recipe.scaling == "awq":
        return awq.search(
            weights, stats["hessian"], stats["moments"], tuple(formats), tied=group.tied
        )
    return smoothquant.search(
        weights,
        stats["absmax"],
        stats["sample"],
        formats[0],
        alpha=recipe.alpha,
        activation=formats[0].activation or "int8",
        activation_scale=formats[0].activation_scale,
        tied=group.tied,
    )


def act_scales(
    formats: Mapping[str, tuple[Format, Layout]],
    statistics: Calibration,
    divisors: Mapping[str, Array],
    observer: str,
) -> dict[str, Float[Array, "*lead"]]:
    """Returns the static steps of the activations that formats ask for.

    Weights that read one activation share its step: the largest magnitude, after smoothing, over
    qmax of the element.

    Args:
      formats: format and layout of each weight, by path.
      statistics: with "absmax", and with `observer`.
      divisors: of smoothed inputs, by path.
      observer: "absmax" or "percentile".
    """
    out = {}
    for path, (fmt, _) in formats.items():
        if fmt.activation is None or fmt.activation_scale != "static":
            continue
        stats = statistics[path].stats
        if observer == "percentile" and path not in divisors:
            largest = stats["percentile"]  # [*lead] already
        else:
            largest = jnp.max(stats["absmax"] / divisors.get(path, 1.0), -1)
        out[path] = largest / get_element(fmt.activation).qmax
        check_act_scale(path, out[path])
    return out
