"""Recipe: how weights get their codes where there is data - what is smoothed, how it is rounded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

SCALINGS = ("none", "awq", "smoothquant")
ROUNDINGS = ("nearest", "gptq", "hqq")
MODES = ("sequential", "parallel")
UNSEEN = ("error", "nearest")
STATIC = ("absmax", "percentile")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The steps between a float model with calibration data and its codes. Frozen and hashable.

    Attributes:
      scaling: what moves between activations and weights first: "none"; "awq" (Lin et al., 2023)
        protects the weights of large inputs; "smoothquant" (Xiao et al., 2022) takes outliers out
        of activations that are quantized too. Folded into neighbouring parameters where that is
        exact, else kept at the weight as its `pre_scale`.
      alpha: of SmoothQuant, how much of an outlier the weight takes over; None: searched.
      rounding: "nearest"; "gptq", solved on second moments of the inputs; "hqq", by the weights
        alone.
      clip: whether rounding to nearest clips groups where that lowers their output error.
      mode: "sequential", each weight solved on inputs from the quantized model before it, or
        "parallel", all on inputs from the float model.
      asymmetric: whether a weight makes up for the errors before it (GPTQ, sequential).
      sweeps: rounds of coordinate descent after GPTQ; 0: GPTQ alone.
      refit: whether scales are refit between sweeps.
      act_order: whether GPTQ visits inputs by decreasing energy.
      damping: λ of GPTQ; None: chosen on held-out data for each weight.
      unseen: what becomes of a weight, or an expert, that no calibration token reaches: "error", or
        "nearest", rounding to nearest, which the report then says.
      static: what the static scale of an activation covers: "absmax", all values seen, or
        "percentile", 99.9 % of them (where nothing is smoothed).
    """

    scaling: str = "none"
    alpha: float | None = 0.5
    rounding: str = "gptq"
    clip: bool = False
    mode: str = "sequential"
    asymmetric: bool = True
    sweeps: int = 4
    refit: bool = True
    act_order: bool = True
    damping: float | None = None
    unseen: str = "error"
    static: str = "absmax"

    def __post_init__(self):
        choices = {"scaling": SCALINGS, "rounding": ROUNDINGS, "mode": MODES, "unseen": UNSEEN}
        choices["static"] = STATIC
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        for name in ("clip", "asymmetric", "refit", "act_order"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {getattr(self, name)!r}.")
        if type(self.sweeps) is not int or self.sweeps < 0:
            raise ValueError(f"`sweeps` must be an integer from 0 on, got {self.sweeps!r}.")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must be from 0 to 1 or None, got {self.alpha!r}.")
        if self.damping is not None and not 0 < self.damping < math.inf:
            raise ValueError(f"`damping` must be positive or None, got {self.damping!r}.")
        if self.clip and self.rounding != "nearest":
            raise ValueError(
                f"`clip` is for rounding to nearest; {self.rounding!r} chooses its own scales."
            )

    @property
    def needs_data(self) -> bool:
        """Whether it looks at activations."""
        return self.scaling != "none" or self.rounding == "gptq" or self.clip

    def to_dict(self) -> dict[str, Any]:
        """Returns a plain dict that `from_dict` reads back; defaults are left out."""
        out = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                out[field.name] = "search" if value is None else value
        return out

    @classmethod
    def from_dict(cls, spec: dict[str, Any], *, where: str = "recipe") -> Recipe:
        """Builds a Recipe from a dict, as found in TOML, which has no null: None is "search".

        Raises:
          ValueError: for an unknown key or a bad value; the message starts with `where`.
        """
        if not isinstance(spec, dict):
            raise ValueError(f"{where}: expected a table, got {spec!r}.")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(spec) - known):
            raise ValueError(
                f"{where}: unknown key {unknown[0]!r}. Known: {', '.join(sorted(known))}."
            )
        values: dict[str, Any] = {
            k: None if v == "search" and k in ("alpha", "damping") else v for k, v in spec.items()
        }
        try:
            return cls(**values)
        except (ValueError, TypeError) as e:
            raise ValueError(f"{where}: {e}") from None
