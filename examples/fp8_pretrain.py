"""FP8 pretraining: one small decoder, trained from scratch in bfloat16 and in FP8, on one text.

    uv run --extra demo --extra plot python examples/fp8_pretrain.py --out runs/fp8

trains a byte-level language model on Wikipedia articles several times from the same parameters on
the same batches: in bfloat16, and in FP8 with delayed, current and block scales. It writes losses
and held-out losses to `result.json`, and the curves to `result.png`. A run that was stopped goes on
where it was, with the same result bit for bit.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer

from qjax import Policy, fp8
from qjax.checkpoint import Resumable
from qjax.evaluate import spread
from qjax.models import Decoder, ModelConfig
from qjax.texts import TEXTS, load_text

RECIPES = {
    "bf16": None,
    "delayed": fp8.Fp8Recipe.of("delayed"),
    "current": fp8.Fp8Recipe.of("current"),
    "block": fp8.Fp8Recipe.of("block"),
    "block-e5m2": fp8.Fp8Recipe(Policy.of(fp8.BLOCK), gradient="e5m2"),
}


def windows(text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns UTF-8 bytes as tokens [n, length]: to train on, and of other documents to judge on.

    A file is one document; its last tenth is held out.
    """

    def read(split: Any) -> np.ndarray:
        data = np.frombuffer(load_text(text, split).encode(), np.uint8)
        return data[: len(data) // length * length].reshape(-1, length).astype(np.int32)

    if text in TEXTS:
        return read("calibration"), read("evaluation")
    data = read("evaluation")
    held_out = max(1, len(data) // 10)
    return data[:-held_out], data[-held_out:]


def cross_entropy(logits: Any, tokens: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def train(
    model: Decoder, name: str, data: Any, test: Any, setting: dict, out: Path, *,
    every: int, stop_after: int,
) -> dict[str, Any] | None:  # fmt: skip
    """Trains the model by one recipe; returns its record, or None if it was stopped."""
    steps, batch = setting["steps"], setting["batch"]

    def loss_of(params, tokens):
        return cross_entropy(model.apply({"params": params}, tokens[:, :-1]), tokens)

    # ---- the only lines that differ between bfloat16 and FP8 ----

    recipe = RECIPES[name]
    if recipe is None:
        init = lambda params, tokens: fp8.State({})
        plain = jax.value_and_grad(loss_of)

        def value_and_grad(state, params, tokens):
            loss, grads = plain(params, tokens)
            return (loss, state), grads

        evaluated = lambda state: loss_of
    else:
        init = fp8.init(loss_of, recipe)
        value_and_grad = fp8.value_and_grad(loss_of, recipe)
        evaluated = lambda state: fp8.apply(loss_of, recipe, state)

    # ---- an optax loop ----

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, setting["learning_rate"], max(steps // 20, 1), steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1)
    )

    @partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        (loss, scales), grads = value_and_grad(state["fp8"], state["params"], tokens)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        return {
            "params": optax.apply_updates(state["params"], updates),
            "opt": opt,
            "fp8": scales,
        }, loss

    @jax.jit
    def held_out(state, tokens):
        return evaluated(state["fp8"])(state["params"], tokens)

    order = np.random.default_rng(setting["seed"]).permutation(len(data))
    batches = data[np.resize(order, steps * batch)].reshape(steps, batch, -1)
    params = jax.jit(model.init)(jax.random.key(setting["seed"]), batches[0][:, :-1])["params"]
    state: Any = {
        "params": params,
        "opt": optimizer.init(params),
        "fp8": jax.jit(init)(params, batches[0]),
    }
    record: dict[str, Any] = {"loss": [], "held_out": {}, "seconds": 0.0}

    with Resumable(out / "checkpoints" / name, setting, steps=steps, every=every) as saved:
        start, state, record = saved.latest(state, record)
        for i in range(start, steps):
            began = time.perf_counter()
            state, loss = step(state, batches[i])
            record["loss"].append(float(loss))
            record["seconds"] += time.perf_counter() - began
            fp8.check_finite(i, loss=loss, fp8=state["fp8"])
            if (i + 1) % every == 0 or i + 1 == steps:
                losses = [held_out(state, test[j : j + batch]) for j in range(0, len(test), batch)]
                record["held_out"][str(i + 1)] = float(np.mean(losses))
                typer.echo(
                    f"{name:10} step {i + 1}: loss {np.mean(record['loss'][-every:]):.4f},"
                    f" held out {record['held_out'][str(i + 1)]:.4f}, {record['seconds']:.0f} s"
                )
            saved.save(i + 1, state, record)
            if stop_after and i + 1 >= stop_after and i + 1 < steps:
                typer.echo(f"{name:10} stopped after step {i + 1}; the same command goes on")
                return None
    return record


def plot(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the training loss of every recipe, smoothed over 20 steps, and the held-out losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, record in records.items():
        loss = np.asarray(record["loss"])
        width = max(1, min(20, len(loss) // 5))
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        left.plot(np.arange(len(smooth)) + width, smooth, label=name, linewidth=1)
        at = [int(s) for s in record["held_out"]]
        right.plot(at, list(record["held_out"].values()), label=name, linewidth=1)
    left.set_title("training loss (nats per byte)")
    right.set_title("held-out loss")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="Where results and checkpoints go.")],
    text: Annotated[str, typer.Option(help="wiki, pydoc or a file.")] = "wiki",
    recipes: Annotated[str, typer.Option(help="Which runs, by comma.")] = ",".join(RECIPES),
    hidden: int = 128,
    layers: int = 4,
    steps: int = 400,
    batch: int = 16,
    length: Annotated[int, typer.Option(help="Bytes in a window.")] = 65,
    learning_rate: float = 3e-3,
    judged: Annotated[int, typer.Option(help="Held-out windows.")] = 128,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Of parameters and order of batches.")] = 0,
    plotted: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the curves.")] = True,
    stop_after: Annotated[int, typer.Option(help="Stop early, to be resumed.")] = 0,
):
    out = out.absolute()
    wanted = recipes.split(",")
    if unknown := sorted(set(wanted) - set(RECIPES)):
        raise typer.BadParameter(f"no recipe is called {unknown[0]!r}, only {', '.join(RECIPES)}.")
    data, test = windows(text, length)
    test = spread(test, min(judged, len(test)))
    test = test[: max(1, len(test) // batch) * batch]
    config = ModelConfig(
        "llama", vocab_size=256, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_layers=layers, num_heads=hidden // 32, num_kv_heads=hidden // 32, head_dim=32,
    )  # fmt: skip
    model = Decoder(config, dtype=jnp.bfloat16, scan_layers=True)
    setting = {
        "model": config.to_dict(), "text": Path(text).name, "steps": steps, "batch": batch,
        "length": length, "learning_rate": learning_rate, "held_out_windows": len(test),
        "seed": seed, "jax": jax.__version__,
    }  # fmt: skip

    records = {}
    for recipe in wanted:
        record = train(model, recipe, data, test, setting, out, every=every, stop_after=stop_after)
        if record is not None:
            records[recipe] = record
    if len(records) < len(wanted):
        return

    # ---- what came of it ----

    tail = max(1, steps // 10)
    result: dict[str, Any] = {"setting": setting, "runs": {}}
    for name, record in records.items():
        final = float(np.mean(record["loss"][-tail:]))
        result["runs"][name] = {
            "final_loss": final,
            "final_held_out": record["held_out"][str(steps)],
            "seconds": record["seconds"],
            "loss": record["loss"],
            "held_out": record["held_out"],
        }
        line = (
            f"{name:8} last {tail} steps {final:.4f}, held out {record['held_out'][str(steps)]:.4f}"
        )
        if "bf16" in records:
            base = result["runs"]["bf16"]
            off = {
                k: result["runs"][name][k] / base[k] - 1 for k in ("final_loss", "final_held_out")
            }
            result["runs"][name]["against_bf16"] = off
            line += f", against bf16 {off['final_loss']:+.2%} and {off['final_held_out']:+.2%}"
        typer.echo(line)
    (out / "result.json").write_text(json.dumps(result, indent=2))
    if plotted:
        plot(records, out / "result.png")


if __name__ == "__main__":
    typer.run(main)
