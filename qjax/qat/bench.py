"""Benchmark of training steps: fake quantization beside the float step of the same transformer."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qjax.format import Format
from qjax.policy import Policy, Rule
from qjax.transform.fake_quant import fake_quant

# Stored format of every matrix but the embedding, by name, and the most that a step may cost.
CASES = {
    "int8": (Format("int8"), 1.35),
    "int4 g128": (Format("int4", 128, scale="bfloat16"), 1.35),
    "nf4 g64": (Format("nf4", 64), 1.35),
    "w8a8": (Format("int8", activation="int8"), 1.7),
    "w4a8 g128": (Format("int4", 128, scale="bfloat16", activation="int8"), 1.7),
    "w4a4 g128": (Format("int4", 128, scale="bfloat16", activation="int4"), 1.7),
    "bitnet": (Format("ternary", None, None, activation="int8"), 1.7),
}


class Size(NamedTuple):
    """Width, hidden width, layers, heads, words; sequences and their length."""

    D: int = 256
    F: int = 1024
    L: int = 4
    H: int = 4
    V: int = 1024
    B: int = 8
    T: int = 128


def init(size: Size, seed: int = 0) -> dict[str, Any]:
    """Returns the parameters of a decoder, its layers stacked."""
    D, F, L, V = size.D, size.F, size.L, size.V
    shapes = {"q": (L, D, D), "k": (L, D, D), "v": (L, D, D), "o": (L, D, D)}
    shapes |= {"up": (L, D, F), "down": (L, F, D)}
    keys = iter(jax.random.split(jax.random.key(seed), len(shapes) + 2))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / shape[-2] ** 0.5
    layers = {name: normal(*shape) for name, shape in shapes.items()}
    return {"embed": normal(V, D), "layers": layers, "head": normal(D, V)}


def model(size: Size) -> Callable:
    """Returns the function `(params, tokens) -> logits` of a decoder under scan over layers."""

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    def layer(x, w):
        B, T, D = x.shape
        heads = lambda a: a.reshape(B, T, size.H, D // size.H)
        h = norm(x)
        q, k, v = (heads(h @ w[name]) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (D // size.H) ** 0.5
        seen = jnp.tril(jnp.ones((T, T), bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
        x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, T, D) @ w["o"]
        return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"], None

    def apply(params, tokens):
        x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
        return norm(x) @ params["head"]

    return apply


def step_of(fn: Callable, tx: optax.GradientTransformation) -> Any:
    """Returns the jitted training step of a language model."""

    @jax.jit
    def step(params, opt, tokens):
        def loss(params):
            logits, targets = fn(params, tokens[:, :-1]), tokens[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return step


def run(size: Size, rounds: int, cases: dict[str, tuple[Format, float]] = CASES) -> dict[str, Any]:
    """Returns the milliseconds of a step of every case, medians of interleaved rounds."""
    fn, tx = model(size), optax.adamw(1e-3)
    tokens = jax.random.randint(jax.random.key(1), (size.B, size.T + 1), 0, size.V)
    steps = {"float32": step_of(fn, tx)}
    for name, (fmt, _) in cases.items():
        policy = Policy([Rule("embed"), Rule("*", fmt)])
        steps[name] = step_of(fake_quant(fn, policy), tx)
    states, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        params = init(size)
        states[name] = step(params, tx.init(params), tokens)[:2]
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            out = jax.block_until_ready(step(*states[name], tokens))
            times[name].append(time.perf_counter() - begin)
            states[name] = out[:2]
    floats = statistics.median(times["float32"])
    rows = {}
    for name, step in steps.items():
        median = statistics.median(times[name])
        rows[name] = {
            "ms": 1e3 * median,
            "times_float": median / floats,
            "limit": None if name == "float32" else cases[name][1],
            "compilations": step._cache_size(),
        }
    return {
        "size": size._asdict(),
        "rounds": rounds,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    found = run(Size(), args.rounds)
    print(f"{'step':12} {'ms':>8} {'x float':>8} {'limit':>6} {'compiled':>9}")
    for name, row in found["rows"].items():
        limit = "" if row["limit"] is None else f"{row['limit']:.2f}"
        print(
            f"{name:12} {row['ms']:8.1f} {row['times_float']:8.2f} {limit:>6}"
            f" {row['compilations']:9d}"
        )
    if args.out:
        args.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
