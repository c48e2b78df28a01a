"""Times decode steps of a model on the device at hand; weights are random, of its shapes and types.

    python examples/decode_llama.py llama-3-8b --policy int4-g128 --policy bfloat16 --batch 1
    python examples/decode_llama.py path/to/config.json --policy nf4 --json

The step is the one that `qjax plan` counts: `qjax.models.Decoder` in bfloat16 through `qjax.apply`,
layers under a scan, a cache that is written in place. No checkpoint is needed.
"""

from __future__ import annotations

import functools
import json
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

import qjax
from qjax.models.cache import init_cache
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.planning import read_config


def random_params(decoder: Decoder, policy: str) -> Any:
    """Returns parameters as `quantize` and `prepare` would make them, of random codes."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(decoder.init, key, tokens)["params"]
    if policy != "bfloat16":
        shapes = qjax.quantize(shapes, policy)
        shapes = jax.eval_shape(qjax.prepare, shapes)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def filled(key, shape, dtype):
        if jnp.issubdtype(dtype, jnp.integer):
            values = jax.random.bits(key, shape, "uint8")
            return values.astype(jnp.int8).astype(dtype)
        return (0.01 * jax.random.normal(key, shape, "bfloat16")).astype(dtype)

    def one(i: int, leaf: Any) -> Any:
        # A layer at a time, repeated: what is random is twice as large as what is kept.
        key, dtype = jax.random.key(i), jnp.dtype(leaf.dtype)
        if leaf.ndim < 3:
            return filled(key, leaf.shape, dtype)
        repeat = jax.jit(lambda a: jnp.broadcast_to(a, leaf.shape))
        return repeat(filled(key, leaf.shape[1:], dtype))

    leaves, treedef = jax.tree.flatten(shapes)
    return jax.tree.unflatten(treedef, [one(i, leaf) for i, leaf in enumerate(leaves)])


def time_steps(
    config: ModelConfig, policy: str, batch: int, *, context: int, steps: int
) -> dict[str, Any]:
    """Returns the milliseconds of a step, the best of three runs of `steps` one after another."""
    decoder = Decoder(config, jnp.bfloat16, jnp.bfloat16, scan_layers=True)
    params = random_params(decoder, policy)

    def step(params, cache, tokens):
        logits, cache = decoder.apply({"params": params}, tokens, cache=cache)
        return jnp.argmax(logits[:, -1:], axis=-1).astype(tokens.dtype), cache

    run = jax.jit(qjax.apply(step), donate_argnums=1)
    seconds = []
    for _ in range(3):
        cache = init_cache(config, batch, context, jnp.bfloat16)
        tokens = jnp.zeros((batch, 1), jnp.int32)
        tokens, cache = jax.block_until_ready(run(params, cache, tokens))
        start = time.perf_counter()
        for _ in range(steps):
            tokens, cache = run(params, cache, tokens)
        jax.block_until_ready(tokens)
        seconds.append((time.perf_counter() - start) / steps)
    nbytes = sum(a.size * jax.dtypes.itemsize_bits(a.dtype) for a in jax.tree.leaves(params)) // 8
    best = min(seconds)
    return {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "policy": policy,
        "batch": batch, "context": context, "ms": 1e3 * best, "runs_ms": [1e3 * s for s in seconds],
        "tokens_per_s": batch / best, "parameters_gb": nbytes / 1e9,
    }  # fmt: skip


def main(
    model: Annotated[str, typer.Argument(help="llama-3-8b, llama-3-70b or a config.json.")],
    policy: Annotated[list[str], typer.Option(help="A preset, or bfloat16; several times.")],
    batch: Annotated[list[int], typer.Option(help="Sequences; several times.")] = [1],  # noqa: B006
    context: Annotated[int, typer.Option(help="Tokens that the cache holds.")] = 1024,
    steps: Annotated[int, typer.Option(help="Of a run, one after another.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each.")] = False,
) -> None:
    """Times decode steps on the device at hand."""
    config = read_config(model)
    for name in policy:
        for size in batch:
            row = {"model": model} | time_steps(config, name, size, context=context, steps=steps)
            text = (
                f"{model} {name}, batch {size}: {row['ms']:.2f} ms,"
                f" {row['tokens_per_s']:,.0f} tokens/s, {row['parameters_gb']:.2f} GB"
            )
            print(json.dumps(row) if as_json else text, flush=True)


if __name__ == "__main__":
    typer.run(main)
