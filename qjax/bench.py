"""How fast a product with a packed weight is, beside what it replaces, timed in one run.

Ways to the same product, x [M, K] times a weight [K, N]:

  packed      `qjax.apply` of `x @ w` on the QTensor: what a user runs
  xla         the same in plain JAX, where `packed` runs on a native kernel
  float32     `x @ w` on the float weight
  dequantize  `x @ qjax.dequantize(qw)`: the whole weight in float first
  qwix        `qwix.dot_general` on the same weight quantized by Qwix, where it is installed
              and the groups divide K

Repeats are interleaved, so that all ways share the machine's good and bad moments; a ratio is of
medians over the same repeats, or of minima, which say more on a busy machine.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax import qtensor
from qjax.format import Format
from qjax.ops import packed_dot
from qjax.transform.apply import apply, explain

FORMATS: Mapping[str, Format] = {
    "int8": Format("int8"),
    "int4-g128": Format("int4", group_size=128, scale="bfloat16", remainder="ragged"),
    "nf4-g64": Format("nf4", group_size=64, remainder="ragged"),
}
SHAPES = ((4096, 4096), (4096, 11008))
TOKENS = (1, 8, 16, 128)

QUICK_SHAPES = ((256, 384),)
QUICK_TOKENS = (1, 8)


class Timing(NamedTuple):
    """Times of one way, in ms, and the bytes its program allocates besides inputs and outputs."""

    median_ms: float
    min_ms: float
    temp_bytes: int


class Product(NamedTuple):
    """One format and one shape, timed in every way.

    Attributes:
      format: its name.
      M: tokens.
      K: rows of the weight.
      N: columns of the weight.
      implementation: of `packed`, as `qjax.explain` names it.
      timings: by way.
    """

    format: str
    M: int
    K: int
    N: int
    implementation: str
    timings: Mapping[str, Timing]

    @property
    def ratios(self) -> dict[str, float]:
        """Returns time over packed time for every other way: above 1, packed is faster."""
        return self._ratios(0)

    @property
    def ratios_of_minima(self) -> dict[str, float]:
        return self._ratios(1)

    def _ratios(self, i: int) -> dict[str, float]:
        packed = self.timings["packed"][i]
        return {way: t[i] / packed for way, t in self.timings.items() if way != "packed"}

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "M": self.M,
            "K": self.K,
            "N": self.N,
            "implementation": self.implementation,
            "timings": {name: timing._asdict() for name, timing in self.timings.items()},
            "speedup_of_packed_over": self.ratios,
            "speedup_of_minima": self.ratios_of_minima,
        }


def environment() -> dict[str, Any]:
    """Returns what a reader needs to judge the times."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "machine": platform.machine(),
        "jax": jax.__version__,
        "qwix": importlib.metadata.version("qwix") if has_qwix() else None,
        "inputs": "normal, standard deviation 1 (x) and 0.02 (w)",
    }


def has_qwix() -> bool:
    return importlib.util.find_spec("qwix") is not None


def products(
    formats: Sequence[str] = tuple(FORMATS),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    *,
    repeats: int = 15,
    on_product: Callable[[Product], None] | None = None,
) -> list[Product]:
    """Times every format at every shape.

    Args:
      formats: names in `FORMATS`.
      shapes: (K, N) of the weights.
      tokens: the values of M.
      repeats: how often each way is timed.
      on_product: called with each result as it is there.

    Raises:
      ValueError: for an unknown format or a number out of range.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"unknown format {unknown[0]!r}; there are {', '.join(FORMATS)}.")
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
    if any(n < 1 for n in (*tokens, *sum(shapes, ()))):
        raise ValueError(f"shapes and tokens must be positive, got {shapes=} and {tokens=}.")
    out = []
    for K, N in shapes:
        w = 0.02 * jax.random.normal(jax.random.key(0), (K, N))
        for name in formats:
            weights = _weights(w, name)
            packed = weights["packed"]
            (use,) = explain(_float32)(jax.ShapeDtypeStruct((1, K), jnp.float32), packed)
            if use.implementation.startswith("native"):
                weights["xla"] = packed
            for M in tokens:
                x = jax.random.normal(jax.random.key(1), (M, K))
                timings = _time(x, weights, repeats)
                out.append(Product(name, M, K, N, use.implementation, timings))
                if on_product is not None:
                    on_product(out[-1])
    return out


def _time(x: Array, weights: Mapping[str, Any], repeats: int) -> dict[str, Timing]:
    programs = {way: jax.jit(_WAYS[way]).lower(x, w).compile() for way, w in weights.items()}

    def call(way: str) -> Callable[[], Any]:
        return lambda: programs[way](x, weights[way])

    return {
        way: Timing(
            1e3 * statistics.median(seconds),
            1e3 * min(seconds),
            _temp_bytes(programs[way]),
        )
        for way, seconds in interleaved({way: call(way) for way in weights}, repeats).items()
    }


def _temp_bytes(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of every call, `repeats` rounds of all of them, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i:
                times[name].append(time.perf_counter() - start)
    return times


# ---- the ways ------------------------------------------------------------------------------------


def _float32(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    return jnp.dot(x, w, precision=lax.Precision.HIGHEST)


def _dequantize(x: Float[Array, "M K"], qw: qtensor.QTensor) -> Float[Array, "M N"]:
    return _float32(x, qtensor.dequantize_array(qw))


def _qwix(x: Float[Array, "M K"], qw: Any) -> Float[Array, "M N"]:
    import qwix  # pyright: ignore[reportMissingImports]: optional

    return qwix.dot_general(x, qw, (((1,), (0,)), ((), ())))


_WAYS: Mapping[str, Callable[..., Array]] = {
    "packed": apply(_float32),
    "xla": apply(_float32, implementation="xla"),
    "float32": _float32,
    "dequantize": _dequantize,
    "qwix": _qwix,
}


def _weights(w: Float[Array, "K N"], name: str) -> dict[str, Any]:
    qw = jax.jit(lambda w: qtensor.quantize_array(w, FORMATS[name]))(w)
    weights = {"packed": qw, "float32": w, "dequantize": qw}
    # Qwix has no shorter last group.
    if has_qwix() and w.shape[0] % (FORMATS[name].group_size or 1) == 0:
        weights["qwix"] = _qwix_weight(w, FORMATS[name])
    return weights


def _qwix_weight(w: Float[Array, "K N"], fmt: Format) -> Any:
    import qwix  # pyright: ignore[reportMissingImports]: optional

    qtype = "nf4" if fmt.element == "nf4" else jnp.dtype(fmt.element)
    tiled = {} if fmt.group_size is None else {0: fmt.group_size}
    return qwix.quantize(w, qtype, channelwise_axes=(1,), tiled_axes=tiled)


# ---- a whole model -------------------------------------------------------------------------------


class Decoding(NamedTuple):
    """Tokens/s of a model's greedy decode loop, one prompt, compilation left out.

    `implementation` is that of products with its packed weights, "" if it has none.
    """

    params: str
    nbytes: int
    implementation: str
    median_tokens_per_s: float
    max_tokens_per_s: float


def decoding(
    apply_fn: Callable[..., Any],
    config: Any,
    params: Mapping[str, Any],
    *,
    prompt: Sequence[int] = tuple(range(16)),
    new_tokens: int = 48,
    repeats: int = 3,
) -> list[Decoding]:
    """Times greedy decoding of one model with several parameter trees, in turns.

    Args:
      apply_fn: `qjax.apply(model.apply)`.
      config: the model's.
      params: trees by name.
      prompt: token ids.
      new_tokens: to decode in each repeat; an end token does not end it.
      repeats: rounds over all trees, after one to compile and warm up.
    """
    from qjax.models.generate import generate  # flax comes with it

    rates: dict[str, list[float]] = {name: [] for name in params}
    for i in range(repeats + 1):
        for name, tree in params.items():
            made = generate(
                apply_fn, tree, prompt, config=config, max_new_tokens=new_tokens, eos_id=()
            )
            if i:
                rates[name].append(made.decode_tokens_per_s)
    return [
        Decoding(
            name,
            sum(leaf.nbytes for leaf in jax.tree.leaves(tree)),
            ", ".join(_implementations(tree)),
            statistics.median(rates[name]),
            max(rates[name]),
        )
        for name, tree in params.items()
    ]


def _implementations(params: Any) -> list[str]:
    leaves = jax.tree.leaves(params, is_leaf=qtensor.is_qtensor)
    packed = [leaf for leaf in leaves if qtensor.is_qtensor(leaf)]
    return sorted({packed_dot.describe(leaf, "forward", None) for leaf in packed})
