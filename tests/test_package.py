"""The package as a stranger gets it: what the wheel holds, and what the repository says."""

import ast
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]
TEST_COMMAND = "uv run --extra demo pytest -n 2"

# `uv run` tells where uv is; a version manager's shim on PATH may work in some folders only.
UV = os.environ.get("UV") or shutil.which("uv")
needs_uv = pytest.mark.skipif(UV is None and not os.environ.get("CI"), reason="needs uv")


def sh(*command: str | Path, cwd: Path = ROOT) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = sh("git", "ls-files", "-z").split("\0")
    return [ROOT / n for n in names if n and (ROOT / n).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    sh(UV, "build", "--quiet", "--wheel", "--out-dir", out)
    (path,) = out.glob("qjax-*.whl")
    return path


@needs_uv
def test_wheel_holds_both_packages_and_the_presets(wheel):
    with zipfile.ZipFile(wheel) as z:
        held = {n for n in z.namelist() if ".dist-info/" not in n}
        (license_,) = (n for n in z.namelist() if n.endswith("/LICENSE"))
        assert z.read(license_) == (ROOT / "LICENSE").read_bytes()
    sources = {
        str(p.relative_to(ROOT))
        for package in ("qjax", "pallas_kernels")
        for p in (ROOT / package).rglob("*")
        if p.suffix in (".py", ".cc") or p.name == "py.typed"
    }
    presets = {f"qjax/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.toml")}
    assert {"qjax/__init__.py", "qjax/py.typed"} <= sources
    assert {"pallas_kernels/__init__.py", "pallas_kernels/py.typed"} <= sources
    assert presets
    assert sources | presets <= held
    assert {n.split("/")[0] for n in held} == {"qjax", "pallas_kernels"}


@needs_uv
def test_wheel_imports_in_a_clean_environment(wheel, tmp_path):
    # The versions of this very run, so that uv links them from its cache.
    pins = {d.name: d.version for d in importlib.metadata.distributions() if d.name != "qjax"}
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    python = tmp_path / "venv" / "bin" / "python"
    sh(UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    sh(UV, "pip", "install", "--quiet", "--python", python, "--constraint", constraints, wheel)
    code = """
        import importlib.metadata, importlib.resources
        import pallas_kernels, qjax
        configs = importlib.resources.files("qjax") / "configs"
        assert any(p.name.endswith(".toml") for p in configs.iterdir()), configs
        (script,) = importlib.metadata.entry_points(group="console_scripts", name="qjax")
        print(script.value, importlib.metadata.version("qjax"), qjax.__file__)
    """
    out = sh(python, "-I", "-c", textwrap.dedent(code), cwd=tmp_path)
    assert out.startswith("qjax.cli:main 0.1.0 ")
    assert str(tmp_path) in out


def test_kernels_import_jax_alone():
    allowed = {"jax", "jaxlib", "jax_triton", "numpy", "pallas_kernels"} | sys.stdlib_module_names
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        if path.name == "testing.py":  # for tests alone, which have pytest
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            here = allowed | {"triton"} if path.parent.name == "triton" else allowed
            wrong = {n.split(".")[0] for n in names} - here
            assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_tests_run_on_eight_cpu_devices():
    assert jax.default_backend() != "cpu" or jax.device_count() == 8


def test_ci_runs_the_readmes_test_command():
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text().splitlines()
    assert TEST_COMMAND in (ROOT / "README.md").read_text()


def test_constraints_are_exact_pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line


def test_no_tracked_file_names_a_registry_host_or_a_local_path():
    # Written so that this file does not hold what it looks for.
    hosts = [
        "pypi" + r"\.org",
        "python" + "hosted",
        "npm" + r"js\.(org|com)",
        "index" + r"-url\s*=?",
    ]
    paths = [r"(?<![\w.:*/-])/" + rf"{d}/[\w.]" for d in ("work", "root", "home", "Users")]
    pattern = re.compile("|".join(hosts + paths))
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # binary
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)
