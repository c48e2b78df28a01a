"""Policy: ordered rules from parameter paths to Formats, in Python or in TOML."""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
import tomllib
from collections.abc import Sequence
from typing import Any

from qjax import paths
from qjax.format import Format
from qjax.layout import check_letters
from qjax.recipe import Recipe

_RULE_KEYS = {"match", "format", "skip", "layout", "min_ndim", "optional"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a policy.

    Attributes:
      match: a pattern, or several: a glob over the whole path (`*` also matches `/`), or a regular
        expression after `re:`, which must match the whole path.
      format: how to store what matches; None: leave it as it is.
      layout: which axes are contracted, e.g. "nk"; None: from the traced function if there is one,
        else the last axis is N and the one before it K.
      min_ndim: arrays with fewer axes do not match, so `*` takes kernels and leaves biases.
      optional: whether the rule may match nothing. A rule that is not optional must match.
    """

    match: str | tuple[str, ...]
    format: Format | None = None
    layout: str | None = None
    min_ndim: int = 2
    optional: bool = False

    def __post_init__(self):
        if isinstance(self.match, list):  # as TOML has it
            object.__setattr__(self, "match", tuple(self.match))
        is_some = isinstance(self.match, str | tuple) and len(self.match) > 0
        if not is_some or not all(isinstance(p, str) and p for p in self.patterns):
            raise ValueError(f"`match` must be one or more patterns, got {self.match!r}.")
        for pattern in self.patterns:
            try:
                paths.check_pattern(pattern)
            except ValueError as e:
                raise ValueError(f"`match`: {e}") from e
        if type(self.min_ndim) is not int or self.min_ndim < 0:
            raise ValueError(f"`min_ndim` must be an integer from 0 on, got {self.min_ndim!r}.")
        if not isinstance(self.optional, bool):
            raise ValueError(f"`optional` must be true or false, got {self.optional!r}.")
        if self.layout is not None:
            check_letters(self.layout)

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.match,) if isinstance(self.match, str) else tuple(self.match)

    def matches(self, path: str, ndim: int) -> bool:
        """Whether the rule applies to a leaf."""
        return ndim >= self.min_ndim and any(paths.matches(p, path) for p in self.patterns)

    def __str__(self) -> str:
        return f"{' | '.join(self.patterns)} -> {self.format or 'skip'}"


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which array gets which Format, and by which recipe: the first rule that matches decides.

    A leaf that no rule matches stays as it is.

    Attributes:
      rules: in order.
      name: for messages and tables.
      recipe: how weights get their codes; None: rounded to nearest, or by the default `Recipe` if
        there is calibration data.

    Example:
      >>> policy = Policy([Rule("*embed*"), Rule("*/kernel", Format("int4", group_size=64))])
      >>> policy.rule_for("mlp/kernel", ndim=2).format
      Format(element='int4', group_size=64)
    """

    rules: Sequence[Rule]  # a tuple, once made
    name: str = "custom"
    recipe: Recipe | None = None

    def __post_init__(self):
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules:
            raise ValueError(f"policy {self.name!r} has no rules; it would quantize nothing.")
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"policy {self.name!r}: expected a Rule, got {rule!r}.")

    def rule_for(self, path: str, ndim: int) -> Rule | None:
        """Returns the first rule that matches a leaf, or None."""
        return next((r for r in self.rules if r.matches(path, ndim)), None)

    # ---- from text ----

    @classmethod
    def of(cls, policy: Any) -> Policy:
        """Returns the policy that `policy` means.

        Args:
          policy: a Policy, a Format (for every array of two or more axes), the name of a preset or
            the path of a TOML file.
        """
        if isinstance(policy, Policy):
            return policy
        if isinstance(policy, Format):
            return cls((Rule("*", policy),), name=str(policy))
        if isinstance(policy, str | pathlib.Path):
            return cls.load(policy)
        raise TypeError(
            "expected a Policy, a Format, a preset name or a TOML path, got a"
            f" {type(policy).__name__}. Parameters, or the function, come before it."
        )

    @classmethod
    def load(cls, name_or_path: str | pathlib.Path) -> Policy:
        """Reads a policy from a TOML file, or a preset by its name.

        Raises:
          ValueError: if there is no such preset or file, or the file is not a policy.
        """
        path = pathlib.Path(name_or_path)
        if path.suffix == ".toml":
            if not path.is_file():
                raise ValueError(f"no policy file at {str(path)!r}.")
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as e:
                raise ValueError(f"{path}: is no text in UTF-8, so no policy ({e}).") from None
            return cls.from_toml(text, name=path.stem)
        source = _preset_dir() / f"{name_or_path}.toml"
        if str(name_or_path) not in presets():
            raise ValueError(
                f"no preset is called {str(name_or_path)!r}. Presets: {', '.join(presets())}."
                " For a file of your own give a path that ends in .toml."
            )
        return cls.from_toml(source.read_text(encoding="utf-8"), name=str(name_or_path))

    @classmethod
    def from_toml(cls, text: str, *, name: str = "custom") -> Policy:
        """Reads a policy from TOML text; unknown keys are errors."""
        try:
            return cls.from_dict(tomllib.loads(text), name=name)
        except tomllib.TOMLDecodeError as e:
            raise ValueError(f"policy {name!r} is not valid TOML: {e}.") from None

    @classmethod
    def from_dict(cls, spec: dict[str, Any], *, name: str = "custom") -> Policy:
        """Builds a policy from a plain dict, the inverse of `to_dict`."""
        where = f"policy {name!r}"
        known = {"rules", "description", "recipe"}
        if unknown := sorted(set(spec) - known):
            raise ValueError(
                f"{where}: unknown key {unknown[0]!r}. Known: {', '.join(sorted(known))}."
            )
        if not isinstance(spec.get("rules"), list):
            raise ValueError(f"{where}: `rules` is missing; a policy is a list of [[rules]].")
        rules = []
        for i, rule in enumerate(spec["rules"]):
            at = f"{where}, rule {i + 1}"
            if not isinstance(rule, dict):
                raise ValueError(f"{at}: expected a table with `match`, got {rule!r}.")
            unknown = sorted(set(rule) - _RULE_KEYS)
            if unknown:
                raise ValueError(
                    f"{at}: unknown key {unknown[0]!r}. Known: {', '.join(sorted(_RULE_KEYS))}."
                )
            if "match" not in rule:
                raise ValueError(f"{at}: `match` is missing.")
            skip = rule.get("skip", False)
            if not isinstance(skip, bool):
                raise ValueError(f"{at}: `skip` must be true or false, got {skip!r}.")
            if skip == ("format" in rule):
                raise ValueError(f"{at}: give either a `format` or `skip = true`.")
            values = {k: rule[k] for k in ("layout", "min_ndim", "optional") if k in rule}
            if "format" in rule:
                values["format"] = Format.from_dict(rule["format"], where=f"{at}, format")
            try:
                rules.append(Rule(rule["match"], **values))
            except ValueError as e:
                raise ValueError(f"{at}: {e}") from None
        recipe = spec.get("recipe")
        if recipe is not None:
            recipe = Recipe.from_dict(recipe, where=f"{where}, recipe")
        return cls(tuple(rules), name=name, recipe=recipe)

    @property
    def needs_data(self) -> bool:
        """Whether it cannot be carried out without calibration data."""
        is_static = any(r.format and r.format.activation_scale == "static" for r in self.rules)
        return is_static or (self.recipe is not None and self.recipe.needs_data)

    def to_dict(self) -> dict[str, Any]:
        """Returns a plain dict that `from_dict` reads back, for manifests and reports."""
        out = []
        for rule in self.rules:
            item: dict[str, Any] = {
                "match": rule.match if isinstance(rule.match, str) else list(rule.match)
            }
            if rule.format is None:
                item["skip"] = True
            else:
                item["format"] = rule.format.to_dict()
            if rule.layout is not None:
                item["layout"] = rule.layout
            if rule.min_ndim != 2:
                item["min_ndim"] = rule.min_ndim
            if rule.optional:
                item["optional"] = True
            out.append(item)
        return {"rules": out} | ({"recipe": self.recipe.to_dict()} if self.recipe else {})


def _preset_dir():
    packaged = importlib.resources.files("qjax") / "configs"
    if packaged.is_dir():
        return packaged
    return pathlib.Path(__file__).parent.parent / "configs"  # a source checkout


def presets() -> list[str]:
    """Returns the names of the presets that ship with qjax."""
    return sorted(p.name[:-5] for p in _preset_dir().iterdir() if p.name.endswith(".toml"))
