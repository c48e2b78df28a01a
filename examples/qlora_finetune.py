"""QLoRA: a 4-bit language model learns a new text through adapters; the base stays as it is.

    uv run --extra demo python examples/qlora_finetune.py --text pydoc --out runs/qlora

fine-tunes SmolLM2-135M, stored as NF4 with double quantization, on the docstrings of the standard
library, or on any file: `--text FILE`, of which the last tenth is held out. A step takes 8 seconds
of an idle core. A run that was stopped goes on where it was, with the same result bit for bit. It
writes `result.json`, and the adapters as a qjax checkpoint and as a directory that `peft` reads.
"""

from __future__ import annotations

import json
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer

import qjax
from qjax import lora
from qjax.checkpoint import Resumable
from qjax.evaluate import evaluate, split_windows
from qjax.models import load
from qjax.texts import TEXTS, load_text

TARGETS = "*_proj/kernel"  # q, k, v, o and the three of the MLP


def split_text(tokenizer: Any, text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns windows to train on and windows to judge on; documents or parts of their own."""
    encode = lambda split: split_windows(tokenizer.encode(load_text(text, split)), length)
    if text in TEXTS:
        return encode("calibration"), encode("evaluation")
    windows = encode("evaluation")
    held_out = max(1, len(windows) // 10)
    return windows[:-held_out], windows[-held_out:]


def checksum(tree: Any) -> int:
    """Returns a number that changes when a bit of the tree does."""
    return zlib.crc32(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree)))


def main(
    out: Annotated[Path, typer.Option(help="Where results and checkpoints go.")],
    text: Annotated[str, typer.Option(help="pydoc, wiki or a file.")] = "pydoc",
    model: Annotated[str, typer.Option(help="A name or a directory.")] = "smollm2",
    base: Annotated[str, typer.Option(help="A policy, or float.")] = "nf4-dq",
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.05,
    learning_rate: float = 1e-3,
    steps: int = 100,
    batch: int = 4,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 128,
    judged: Annotated[int, typer.Option(help="Held-out windows.")] = 32,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 25,
    remat: bool = True,
    host: Annotated[bool, typer.Option(help="Keep the optimizer's state on the host.")] = False,
    stop_after: Annotated[int, typer.Option(help="Stop early, to be resumed.")] = 0,
):
    out = out.absolute()
    loaded = load(model, scan_layers=True, remat=remat)
    assert loaded.tokenizer is not None
    train, test = split_text(loaded.tokenizer, text, length)
    test = test[np.linspace(0, len(test) - 1, min(judged, len(test))).astype(int)]
    setting = {
        "model": Path(model).name, "base": base, "text": Path(text).name, "rank": rank,
        "alpha": alpha, "dropout": dropout, "learning_rate": learning_rate, "steps": steps,
        "batch": batch, "length": length, "held_out_windows": len(test), "remat": remat,
        "jax": jax.__version__,
    }  # fmt: skip

    def fn(params, tokens):
        return loaded.model.apply({"params": params}, tokens)

    frozen = loaded.params if base == "float" else qjax.quantize(loaded.params, base)
    before = checksum(frozen)

    # ---- the optax loop, in which only the adapters are parameters ----

    adapters: Any = lora.init(jax.random.key(0), frozen, TARGETS, rank=rank, alpha=alpha)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(steps // 10, 1), steps)
    optimizer = lora.master_weights(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    )
    optimizer = lora.offload(optimizer) if host else optimizer

    @partial(jax.jit, donate_argnums=1)
    def step(frozen, state, tokens, i):
        key = jax.random.fold_in(jax.random.key(1), i)

        def loss_of(adapters):
            run = lora.apply(fn, dropout=dropout, key=key)
            logits = run(frozen, adapters, tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return jnp.mean(losses)

        loss, grads = jax.value_and_grad(loss_of)(state["adapters"])
        updates, opt = optimizer.update(grads, state["opt"], state["adapters"])
        adapters = optax.apply_updates(state["adapters"], updates)
        return {"adapters": adapters, "opt": opt, "losses": state["losses"].at[i].set(loss)}

    state: Any = {"adapters": adapters, "opt": optimizer.init(adapters), "losses": jnp.zeros(steps)}
    order = np.random.default_rng(0).permutation(-(-steps * batch // len(train)) * len(train))
    batches = train[order[: steps * batch] % len(train)].reshape(steps, batch, length)
    compiled = step.lower(frozen, state, batches[0], 0).compile()

    with Resumable(out / "checkpoints", setting, steps=steps, every=every) as saved:
        start, state, record = saved.latest(state, {"seconds": 0.0})
        for i in range(start, steps):
            began = time.perf_counter()
            state = compiled(frozen, state, batches[i], i)
            loss = float(state["losses"][i])
            lora.check_loss(loss, adapters=state["adapters"], base=frozen)
            record["seconds"] += time.perf_counter() - began
            if (i + 1) % max(every // 5, 1) == 0:
                typer.echo(f"step {i + 1}: loss {loss:.4f}, {record['seconds']:.0f} s")
            saved.save(i + 1, state, record)
            if stop_after and i + 1 >= stop_after:
                typer.echo(f"stopped after step {i + 1}; the same command goes on")
                return

    # ---- what came of it ----

    adapters = state["adapters"]
    lora.save(out / "adapters", adapters, metadata=setting, overwrite=True)
    reloaded = lora.load(out / "adapters")
    lora.save_peft(out / "peft", adapters, base_model=model, dropout=dropout)
    merged = lora.merge(frozen, adapters)

    def held_out(params: Any, run: Any = fn) -> float:
        return evaluate(qjax.apply(run), params, test).nll

    def adapted(params, tokens):
        return lora.apply(fn)(params["base"], params["adapters"], tokens)

    nll = {
        "float base": held_out(loaded.params),
        "base": held_out(frozen),
        "base + adapters": held_out({"base": frozen, "adapters": reloaded}, adapted),
        "merged": held_out(merged),
    }
    memory = compiled.memory_analysis()
    assert memory is not None
    result = (
        {"setting": setting}
        | record
        | {
            "held_out_nll": nll,
            "train_loss": [float(x) for x in state["losses"]],
            "base_unchanged": checksum(frozen) == before,
            "reloaded_adapters_identical": checksum(reloaded) == checksum(adapters),
            "bytes": {
                "float base": sum(x.nbytes for x in jax.tree.leaves(loaded.params)),
                "base": sum(x.nbytes for x in jax.tree.leaves(frozen)),
                "adapters": sum(x.nbytes for x in jax.tree.leaves(adapters)),
                "optimizer": sum(x.nbytes for x in jax.tree.leaves(state["opt"])),
                "temporaries of a step": memory.temp_size_in_bytes,
            },
            "trained_parameters": sum(x.size for x in jax.tree.leaves(adapters)),
        }
    )
    # The base lies on its 4-bit grid, the merged weights do not: rounding them again may cost more
    # than the adapters brought. In 8 bits it does not.
    formats: dict[str, Any] = {"merged, int8": qjax.Format("int8")}
    if base != "float":
        result["bits_per_weight"] = qjax.summary(frozen).totals["quantized_bits_per_weight"]
        formats["merged, as the base"] = None
    result["update_kept"] = {}
    for name, fmt in formats.items():
        requantized, report = lora.merge_quantized(frozen, adapters, fmt)
        nll[name] = held_out(requantized)
        result["update_kept"][name] = float(np.mean([row.kept for row in report]))
    (out / "result.json").write_text(json.dumps(result, indent=2))
    for name, value in nll.items():
        typer.echo(f"{name:24} held-out loss {value:.4f}, perplexity {np.exp(value):.2f}")


if __name__ == "__main__":
    typer.run(main)
