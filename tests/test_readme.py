"""The README's code runs as printed."""

import pathlib
import re

import pytest

import qjax

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TOML = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)


def test_the_first_block_runs_as_printed(capsys):
    names: dict = {}
    exec(compile(PYTHON[0], "README.md", "exec"), names)
    assert names["y"].shape == (4, 256)
    assert all(qjax.is_qtensor(leaf) for leaf in names["qparams"].values())
    out = capsys.readouterr().out
    assert "int4 g128 bf16" in out
    assert "x @ W" in out


def test_formats_in_the_readme_are_formats():
    block = next(b for b in PYTHON if b.startswith("qjax.Format("))
    exec(compile(block, "README.md", "exec"), {"qjax": qjax})


@pytest.mark.parametrize("text", TOML)
def test_policies_in_the_readme_are_policies(text):
    assert qjax.Policy.from_toml(text).rules
