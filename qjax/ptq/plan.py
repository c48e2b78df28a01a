"""plan: what a sequential quantization will take, in time and memory, before it starts."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.format import Format
from qjax.layout import Layout
from qjax.paths import path_str
from qjax.ptq.solve import SolverOptions
from qjax.transform.segments import Key, Segments

# Solves of trial columns that choose damping and strength, in units of a solve of as many columns.
_TRIALS = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What sequential quantization will take.

    Attributes:
      weights: weights, or slices of stacked ones, to solve.
      levels: rounds over the data.
      tokens: calibration rows of the input.
      flops: by step: "forward", "moments", "solve".
      bytes: by what: "parameters" in float, "packed" ones, "activations" at their highest over all
        batches, and the "moments" with the solver's copies, at the widest weight.
      seconds: estimate from the speed of a float32 matmul on this machine.
    """

    weights: int
    levels: int
    tokens: int
    flops: Mapping[str, float]
    bytes: Mapping[str, float]
    seconds: float

    @property
    def peak_bytes(self) -> float:
        return sum(self.bytes.values())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"peak_bytes": self.peak_bytes}

    def __str__(self) -> str:
        flops = ", ".join(f"{k} {v / 1e12:.2f}" for k, v in self.flops.items())
        sizes = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in self.bytes.items())
        return (
            f"{self.weights} weights in {self.levels} levels, {self.tokens} tokens\n"
            f"about {_duration(self.seconds)} on this machine (Tflop: {flops})\n"
            f"about {self.peak_bytes / 1e9:.2f} GB of arrays at the peak (GB: {sizes}), besides"
            " Python, XLA and its compiled programs"
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(v: Any) -> int:
    return math.prod(v.aval.shape) * v.aval.dtype.itemsize


def plan(
    fn: Callable,
    params: Any,
    formats: Mapping[str, tuple[Format, Layout]],
    batches: Sequence[Any],
    options: SolverOptions,
) -> Plan:
    """Plans `qjax.ptq.sequential.quantize`; nothing is computed but the machine's speed.

    Args:
      fn, formats, options: as for `quantize`.
      params, batches: as for `quantize`; ShapeDtypeStructs will do.
    """
    first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    cut = Segments(fn, params, first, {path: layout for path, (_, layout) in formats.items()})
    leaves = {path_str(p): w for p, w in jax.tree_util.tree_flatten_with_path(params)[0]}
    streams = 1 + options.asymmetric
    flops: dict[str, float] = {"forward": 0.0, "moments": 0.0, "solve": 0.0}
    packed = widest = peak = 0.0
    live = {v: _size(v) for v in cut.batch_inputs}
    for level in cut.levels:
        live |= {v: _size(v) for v in level.make.outputs}
        peak = max(peak, sum(live.values()))
        for v in level.freed:
            live.pop(v, None)
        rows = {v: math.prod(v.aval.shape[:-1]) for v in level.read.inputs}
        M = len(batches) * max(rows.values(), default=0)
        seen = set()
        for key in level.keys:
            *lead, K, N = _canonical_shape(leaves[key.path], key, formats[key.path][1])
            E = math.prod(lead)
            flops["forward"] += 2.0 * E * M * K * N * streams
            flops["solve"] += E * (K**3 / 3 + (1 + options.sweeps + _TRIALS) * 2.0 * K * K * N)
            packed += E * K * N * formats[key.path][0].bits_per_weight(K, N) / 8
            # The float weight, its error, target and order, and H with its factor.
            widest = max(widest, 4.0 * (5 * E * K * N + 6 * E * K * K))
            if (K, E) not in seen:  # at worst one activation for each width
                seen.add((K, E))
                flops["moments"] += 2.0 * E * M * K * K * streams
    nbytes = {
        "parameters": sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params)),
        "packed": packed,
        "activations": peak * len(batches) * streams,
        "moments": widest,
    }
    tokens = len(batches) * max((math.prod(v.aval.shape) for v in cut.batch_inputs), default=0)
    seconds = sum(flops.values()) / _flops_per_second()
    return Plan(len(cut.keys), len(cut.levels), tokens, flops, nbytes, seconds)


def _canonical_shape(leaf: Any, key: Key, layout: Layout) -> tuple[int, ...]:
    """Returns (*lead, K, N) of a weight or of a slice of a stacked one."""
    part = jax.ShapeDtypeStruct(leaf.shape[len(key.at) :], leaf.dtype)
    return jax.eval_shape(layout.to_canonical, part).shape


@functools.cache
def _flops_per_second() -> float:
    """Times a float32 matmul, the best of a few; half of it is what a mixed program reaches."""
    n = 1024
    x = jnp.ones((n, n), jnp.float32)
    dot = jax.jit(lambda x: x @ x)
    jax.block_until_ready(dot(x))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(dot(x))
        best = min(best, time.perf_counter() - start)
    return 0.5 * 2 * n**3 / best
