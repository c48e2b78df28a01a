"""`qjax presets`: the policies that ship with qjax."""

from __future__ import annotations

import tomllib
from typing import Any

from qjax.cli import options
from qjax.cli.terminal import print_json, print_table


def presets(as_json: options.Json = False, debug: options.Debug = False):
    """List the policies that ship with qjax.

    [bold]Examples[/bold]

      qjax presets

      qjax presets --json
    """
    found = [{"name": name, **_describe(name)} for name in _names()]
    if as_json:
        print_json(found)
        return
    rows = [(p["name"], ", ".join(p["formats"]), p["description"]) for p in found]
    print_table(None, ("preset", "format", "what it is"), rows, is_text=True)


def _names() -> list[str]:
    from qjax import policy

    return policy.presets()


def _describe(name: str) -> dict[str, Any]:
    from qjax import policy

    source = (policy._preset_dir() / f"{name}.toml").read_text(encoding="utf-8")
    rules = policy.Policy.load(name).rules
    return {
        "description": tomllib.loads(source).get("description", ""),
        "formats": [str(rule.format) for rule in rules if rule.format is not None],
    }
