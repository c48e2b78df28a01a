"""How well and how fast solvers quantize one layer: ours beside round-to-nearest and GPTQ.

  python -m qjax.ptq.bench --out solvers.json --torch-python PATH

PATH is a Python that has torch, here or in another environment: the loop of the GPTQ paper then
runs on the same weights and second moments (`qjax/ptq/bench_torch.py`).

Inputs are seeded: n = 2K rows for calibration and as many held out.

  correlated   x = z B + 0.3 e,   z [K / 8] and e [K] normal, B fixed
  outliers     the same, 1 % of the channels times 10 to 30
  independent  normal

Errors are squared and relative, ‖X(W-Q)‖² / ‖XW‖². Times are CPU seconds of the whole process,
since wall time says little on a busy machine, with BLAS held to one thread: idle threads of
OpenBLAS and OpenMP spin, and would count.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qjax.format import Format
from qjax.layout import Layout
from qjax.ptq import gptq
from qjax.qtensor import QTensor, dequantize_canonical, quantize_array
from qjax.tables import align

INPUTS = ("correlated", "outliers", "independent")
FORMATS: Mapping[str, Format] = {
    "int4": Format("int4", group_size=128, rule="absmax_full"),
    "int4-zp": Format("int4", group_size=128, zero_point=True),
    "int3": Format("int3", group_size=128, rule="absmax_full"),
    "int3-zp": Format("int3", group_size=128, zero_point=True),
}
SIZES = (1024, 2048, 4096)
GROUP = 128
# Up to where correlations hardly count: on independent inputs those of few rows are all chance.
_DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0)

# What others measured at int4 g128, to compare with.
PUBLISHED = (
    {"K": 1024, "method": "GPTQ, act-order", "calibration": 0.001391, "held_out": 0.001824,
     "cpu_s": {"IST-DASLab": 0.35, "llm-compressor": 0.37, "GPTQModel": 0.75}},
    {"K": 2048, "method": "GPTQ, act-order", "calibration": 0.001068, "held_out": 0.001860,
     "cpu_s": {"IST-DASLab": 1.6, "llm-compressor": 1.4, "GPTQModel": 2.9}},
    {"K": 4096, "method": "GPTQ, act-order", "calibration": 0.001137, "held_out": 0.001840,
     "cpu_s": {"IST-DASLab": 6.7, "llm-compressor": 6.6, "GPTQModel": 10.6}},
)  # fmt: skip


class Layer(NamedTuple):
    """A weight [K, N] and second moments [K, K]: of all rows, of parts of them, of others."""

    w: Array
    H: Array
    H_fit: Array
    H_judge: Array
    H_held_out: Array


@dataclasses.dataclass(frozen=True)
class Result:
    """One method on one layer.

    Attributes:
      K: rows and columns of the weight.
      inputs, format, method: see above.
      calibration, held_out: squared relative errors.
      cpu_s_compile: CPU seconds of tracing and compiling; None for torch.
      cpu_s_first: of the first call, compilation included.
      cpu_s_warm: of the fastest later call.
      peak_mb: memory of the program with its arguments; for torch, what the call added.
    """

    K: int
    inputs: str
    format: str
    method: str
    calibration: float
    held_out: float
    cpu_s_compile: float | None
    cpu_s_first: float
    cpu_s_warm: float
    peak_mb: float


def make(inputs: str, K: int, *, heavy_tails: bool, seed: int = 0) -> Layer:
    """Returns a layer with N = K.

    Args:
      inputs: one of `INPUTS`.
      K: size.
      heavy_tails: Student's t with 7 degrees of freedom for the weights, instead of a normal.
      seed: of everything.
    """
    rng = np.random.default_rng(seed)
    w = rng.standard_t(7, (K, K)) if heavy_tails else rng.standard_normal((K, K))
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    n = 2 * K
    if inputs == "independent":
        x = normal((2 * n, K))
    else:
        rank = K // 8
        mixing = normal((rank, K)) / np.float32(math.sqrt(rank))
        x = normal((2 * n, rank)) @ mixing
        x += np.float32(0.3) * normal((2 * n, K))
        if inputs == "outliers":
            channels = rng.choice(K, max(1, K // 100), replace=False)
            x[:, channels] *= rng.uniform(10, 30, len(channels)).astype(np.float32)

    moments = lambda x: jnp.asarray(x.T @ x / np.float32(len(x)))
    fit, judge = moments(x[: n * 4 // 5]), moments(x[n * 4 // 5 : n])
    return Layer(jnp.asarray(0.02 * w, jnp.float32), moments(x[:n]), fit, judge, moments(x[n:]))


# ---- methods -------------------------------------------------------------------------------------


def _clipped(fmt: Format) -> Format:
    return dataclasses.replace(fmt, rule="mse")


def _rtn(layer: Layer, fmt: Format) -> QTensor:
    return quantize_array(layer.w, fmt, importance=jnp.diagonal(layer.H))


def _gptq(layer: Layer, fmt: Format, options: gptq.Options, damping: Any) -> QTensor:
    layout = Layout.parse("kn", layer.w.shape)
    return gptq.solve(layer.w, layer.H, fmt, layout, options, damping=damping)[0]


def _chosen(layer: Layer, fmt: Format) -> QTensor:
    """A fifth of the calibration rows judges the dampings; then all rows are used."""
    dampings = jnp.asarray(_DAMPINGS)
    damping = gptq.choose_damping(layer.w, layer.H_fit, layer.H_judge, fmt, dampings)
    return _gptq(layer, fmt, gptq.Options(), damping)


_PLAIN = gptq.Options(act_order=False, sweeps=0)
_ORDERED = gptq.Options(sweeps=0)

METHODS: Mapping[str, Callable[[Layer, Format], QTensor]] = {
    "RTN": _rtn,
    "RTN, clipped": lambda layer, fmt: _rtn(layer, _clipped(fmt)),
    "GPTQ": lambda layer, fmt: _gptq(layer, fmt, _PLAIN, 0.01),
    "GPTQ, act-order": lambda layer, fmt: _gptq(layer, fmt, _ORDERED, 0.01),
    "GPTQ, clipped": lambda layer, fmt: _gptq(layer, _clipped(fmt), _PLAIN, 0.01),
    "GPTQ, both": lambda layer, fmt: _gptq(layer, _clipped(fmt), _ORDERED, 0.01),
    "ours": lambda layer, fmt: _gptq(layer, _clipped(fmt), gptq.Options(), 0.03),
    "ours, 4 sweeps": lambda layer, fmt: _gptq(layer, _clipped(fmt), gptq.Options(sweeps=4), 0.03),
    "ours, chosen damping": lambda layer, fmt: _chosen(layer, _clipped(fmt)),
}
# The paper's loop in torch, by the name in the results: whether it orders.
TORCH = {"torch GPTQ": False, "torch GPTQ, act-order": True}


@jax.jit
def _error(w: Float[Array, "K N"], q: Float[Array, "K N"], H: Float[Array, "K K"]) -> Array:
    def energy(a: Array) -> Array:
        return jnp.sum(a * jnp.dot(H, a, precision=lax.Precision.HIGHEST))

    return energy(w - q) / energy(w)


# Compiled programs by method, format and size, with the CPU seconds that compiling took.
_programs: dict[tuple[str, str, int], tuple[Any, float]] = {}


def _cpu_s(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    out = jax.block_until_ready(call())
    return out, time.process_time() - start


def _run(inputs: str, name: str, method: str, layer: Layer, repeats: int) -> Result:
    K = layer.w.shape[0]
    key = (method, name, K)
    if key not in _programs:
        run = jax.jit(lambda layer: METHODS[method](layer, FORMATS[name]))
        _programs[key] = _cpu_s(lambda: run.lower(layer).compile())
    program, compile_s = _programs[key]
    qt, first = _cpu_s(lambda: program(layer))
    warm = min(_cpu_s(lambda: program(layer))[1] for _ in range(repeats))
    memory = program.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    q = dequantize_canonical(qt)
    return Result(
        K, inputs, name, method,
        float(_error(layer.w, q, layer.H)), float(_error(layer.w, q, layer.H_held_out)),
        compile_s, compile_s + first, warm, peak / 2**20,
    )  # fmt: skip


def _run_torch(
    python: str, inputs: str, name: str, method: str, layer: Layer, repeats: int
) -> Result:
    fmt = FORMATS[name]
    script = Path(__file__).with_name("bench_torch.py")
    with tempfile.TemporaryDirectory() as folder:
        arrays, out = Path(folder, "layer.npz"), Path(folder, "out.npy")
        np.savez(arrays, w=np.asarray(layer.w), H=np.asarray(layer.H))
        bits = int(fmt.element.removeprefix("int"))
        command = [python, str(script), str(arrays), str(out)]
        command += ["--bits", str(bits), "--group", str(GROUP), "--repeats", str(repeats + 1)]
        command += ["--symmetric"] * (not fmt.zero_point) + ["--act-order"] * TORCH[method]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        q = jnp.asarray(np.load(out))
    said = json.loads(done.stdout)
    seconds = said["cpu_s"]
    return Result(
        layer.w.shape[0], inputs, name, method,
        float(_error(layer.w, q, layer.H)), float(_error(layer.w, q, layer.H_held_out)),
        None, seconds[0], min(seconds[1:]), said["peak_mb"],
    )  # fmt: skip


def solvers(
    sizes: Sequence[int] = SIZES,
    inputs: Sequence[str] = INPUTS,
    formats: Sequence[str] = tuple(FORMATS),
    methods: Sequence[str] = tuple(METHODS),
    *,
    repeats: int = 2,
    torch_python: str | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Runs every method on every layer and format.

    Args:
      sizes: K = N, multiples of 8.
      inputs: of `INPUTS`.
      formats: names in `FORMATS`.
      methods: names in `METHODS`.
      repeats: warm calls; the fastest counts.
      torch_python: a Python with torch and numpy, to run the paper's loop too.
      on_result: called with each result as it is there.

    Raises:
      ValueError: for an unknown name.
    """
    for what, names, known in (
        ("inputs", inputs, INPUTS), ("format", formats, FORMATS), ("method", methods, METHODS)
    ):  # fmt: skip
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"unknown {what} {unknown[0]!r}; there are {', '.join(known)}.")
    out: list[Result] = []

    def add(result: Result) -> None:
        out.append(result)
        if on_result is not None:
            on_result(result)

    for K in sizes:
        for kind in inputs:
            for zero_point in (False, True):
                names = [name for name in formats if FORMATS[name].zero_point == zero_point]
                if not names:
                    continue
                layer = make(kind, K, heavy_tails=zero_point)
                for name in names:
                    for method in methods:
                        add(_run(kind, name, method, layer, repeats))
                    for method in TORCH if torch_python else ():
                        assert torch_python is not None
                        add(_run_torch(torch_python, kind, name, method, layer, repeats))
    return out


def gains(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns, for each layer and format, how much less held-out error ours has than act-order."""
    cases: dict[tuple[int, str, str], dict[str, Result]] = {}
    for r in results:
        cases.setdefault((r.K, r.inputs, r.format), {})[r.method] = r
    out = []
    for (K, inputs, name), by_method in cases.items():
        best = [r.held_out for m, r in by_method.items() if m.endswith("GPTQ, act-order")]
        if not best:
            continue
        reference = min(best)
        for method, r in by_method.items():
            if method.startswith("ours"):
                gain = 1 - r.held_out / reference
                line = {"K": K, "inputs": inputs, "format": name, "method": method}
                out.append({**line, "less_held_out_error": gain, "cpu_s_warm": r.cpu_s_warm})
    return out


def environment() -> dict[str, Any]:
    """Returns what a reader needs to judge the times."""
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
    }


_HEAD = ("K", "inputs", "format", "method", "calibration", "held-out", "first", "warm", "MB")


def _line(r: Result) -> tuple[str, ...]:
    return (
        str(r.K), r.inputs, r.format, r.method, f"{r.calibration:.6f}", f"{r.held_out:.6f}",
        f"{r.cpu_s_first:.2f}", f"{r.cpu_s_warm:.2f}", f"{r.peak_mb:.0f}",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qjax.ptq.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=INPUTS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=tuple(FORMATS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--torch-python", help="a Python that has torch and numpy")
    parser.add_argument("--out", type=Path, help="JSON file")
    chosen = parser.parse_args(arguments)

    results = solvers(
        chosen.sizes, chosen.inputs, chosen.formats, chosen.methods, repeats=chosen.repeats,
        torch_python=chosen.torch_python, on_result=lambda r: print(*_line(r), flush=True),
    )  # fmt: skip
    print("\n".join(align([_HEAD, *map(_line, results)])))
    report = {
        "environment": environment(),
        "results": [dataclasses.asdict(r) for r in results],
        "gains": gains(results),
        "published": PUBLISHED,
    }
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if threads.items() <= os.environ.items():
        main()
    else:  # BLAS reads them when it is loaded, which importing jax does
        command = [sys.executable, "-m", "qjax.ptq.bench", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **threads})
