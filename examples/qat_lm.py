"""Quantization-aware training of SmolLM2-135M to 3 bits, distilled from its float self.

    uv run --extra demo python examples/qat_lm.py --out out/qat-lm

starts where GPTQ ends (int3 in groups of 128), trains step sizes and norms for a few short steps to
predict what the float model predicts, packs the result, and judges both on held-out text. Codes
stay those of GPTQ, as in the last phase of EfficientQAT (Chen et al., 2024): a few steps could only
disturb them (`--trained all` trains them too). A run that is stopped goes on from its checkpoint
with the same result.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer

import qjax
from qjax import Policy, Recipe, qat
from qjax.evaluate import evaluate, split_windows
from qjax.models import LoadedModel, load
from qjax.paths import path_str
from qjax.texts import load_text

SAMPLES = 12  # windows of 512 tokens for GPTQ


class State(NamedTuple):
    """What training changes."""

    params: Any
    opt: Any


class Setting(NamedTuple):
    """What decides the result; two runs of one setting are the same."""

    policy: str = "w3a16-gptq"
    steps: int = 200
    batch: int = 1
    length: int = 256
    learning_rate: float = 4e-3  # of the size of a leaf
    trained: str = "steps"  # or "all": weights too, from near the float ones
    seed: int = 0


def start(loaded: LoadedModel, policy: Policy, pieces: np.ndarray, out: Path) -> Any:
    """Returns the model after GPTQ, from `out` if it is there already."""
    if not (out / "ptq").exists():
        # One pass over little data, without a search: training follows.
        recipe = Recipe(mode="parallel", asymmetric=False, sweeps=0, damping=0.01)
        solver = dataclasses.replace(policy, recipe=recipe)
        picked = pieces[np.linspace(0, len(pieces) - 1, SAMPLES).astype(int)]
        batches = [jnp.asarray(b) for b in picked.reshape(-1, 2, pieces.shape[1])]
        solved, _ = qjax.quantize(loaded.params, solver, fn=logits(loaded), calibration=batches)
        qjax.save(out / "ptq", solved)
    return qjax.load(out / "ptq")


def logits(loaded: LoadedModel) -> Any:
    return lambda params, tokens: loaded.model.apply({"params": params}, tokens)


def trainer(loaded: LoadedModel, policy: Policy, setting: Setting) -> tuple[Any, Any]:
    """Returns `init(params) -> State` and the jitted `step(state, teacher, tokens)`."""
    fn = logits(loaded)
    fake = qjax.fake_quant(fn, policy)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, setting.learning_rate, max(1, setting.steps // 10), setting.steps
    )
    # Steps and norms are of all sizes: each leaf moves by a part of its own.
    tx = optax.chain(
        optax.scale_by_adam(b2=0.95),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(schedule),
    )

    def chosen(params):  # norms train as well; the embedding stays
        kinds = ("step", "weight") if setting.trained == "all" else ("step",)
        return jax.tree_util.tree_map_with_path(
            lambda path, kind: (
                (kind in kinds and "embed" not in path_str(path)) or "norm" in path_str(path)
            ),
            qat.labels(params),
        )

    def trained(params):
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(chosen(params)), strict=True)
        return [a for a, on in pairs if on]

    def with_trained(params, leaves):
        rest = iter(leaves)
        return jax.tree.map(lambda a, on: next(rest) if on else a, params, chosen(params))

    def init(params):
        return State(params, tx.init(trained(params)))

    @jax.jit
    def step(state, teacher, tokens):
        known = jax.nn.log_softmax(fn(teacher, tokens))

        def loss(leaves):
            student = jax.nn.log_softmax(fake(with_trained(state.params, leaves), tokens))
            return jnp.mean(jnp.sum(jnp.exp(known) * (known - student), -1))  # KL(float || it)

        leaves = trained(state.params)
        value, grads = jax.value_and_grad(loss)(leaves)
        updates, opt = tx.update(grads, state.opt, leaves)
        params = with_trained(state.params, optax.apply_updates(leaves, updates))
        return State(params, opt), value

    return init, step


def train(
    program: tuple[Any, Any],
    loaded: LoadedModel,
    setting: Setting,
    first: Any,
    pieces: np.ndarray,
    out: Path,
    *,
    every: int = 50,
    stop: int | None = None,
) -> tuple[Any, list[float]]:
    """Trains from `first`, or on from the last checkpoint in `out`.

    Args:
      program: what `trainer` returned.
      first: tree of Latents.
      pieces: training windows [W, T].
      every: steps between checkpoints.
      stop: ends after so many steps, as an interruption would.

    Returns:
      The trained tree and the losses of all steps, KL(float || quantized) in nats a token.
    """
    init, step = program
    state, losses, done = init(first), [], 0
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager((out / "training").resolve(), options=options) as manager:
        if (last := manager.latest_step()) is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            what = ocp.args.Composite(
                state=ocp.args.StandardRestore(like),
                losses=ocp.args.JsonRestore(),
            )
            restored = manager.restore(last, args=what)
            state, losses, done = restored["state"], restored["losses"], last
        order = np.random.default_rng(setting.seed).permutation(len(pieces))
        for i in range(done, setting.steps if stop is None else stop):
            begin = time.perf_counter()
            picked = order[np.arange(i * setting.batch, (i + 1) * setting.batch) % len(order)]
            state, loss = step(state, loaded.params, jnp.asarray(pieces[picked]))
            qat.check_finite(i, loss=loss)
            losses.append(float(loss))
            seconds = time.perf_counter() - begin
            typer.echo(f"step {i + 1}: KL {losses[-1]:.4f}, {seconds:.1f} s")
            if (i + 1) % every == 0 or i + 1 == setting.steps:
                qat.check_finite(i, params=state.params)
                what = ocp.args.Composite(
                    state=ocp.args.StandardSave(state), losses=ocp.args.JsonSave(losses)
                )
                manager.save(i + 1, args=what)
        manager.wait_until_finished()
    return state.params, losses


def main(
    out: Annotated[Path, typer.Option(help="Checkpoints and results; a second run goes on.")],
    steps: int = Setting().steps,
    batch: int = Setting().batch,
    length: int = Setting().length,
    learning_rate: float = Setting().learning_rate,
    trained: Annotated[str, typer.Option(help="steps, or all.")] = Setting().trained,
    windows: Annotated[int, typer.Option(help="Windows of 1024 tokens to judge on.")] = 8,
    text: Annotated[str, typer.Option(help="To train on: wiki, pydoc or a file.")] = "wiki",
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
):
    setting = Setting(
        steps=steps, batch=batch, length=length, learning_rate=learning_rate, trained=trained
    )
    policy = Policy.load(setting.policy)
    loaded = load("smollm2", scan_layers=True)
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode(load_text(text, "calibration"))
    solved = start(loaded, policy, split_windows(ids, 512), out)
    first = qat.from_quantized(solved, loaded.params if trained == "all" else None)
    pieces = split_windows(ids, length)
    program = trainer(loaded, policy, setting)
    params, losses = train(program, loaded, setting, first, pieces, out, every=every)
    packed = qjax.quantize(params, policy)
    qjax.save(out / "qat", packed)

    test = split_windows(loaded.tokenizer.encode(load_text("wiki")), 1024, windows)
    results: dict[str, Any] = {"setting": setting._asdict(), "losses": losses, "text": text}
    fn = qjax.apply(logits(loaded))
    results["bits_per_weight"] = qjax.summary(packed).totals["quantized_bits_per_weight"]
    for name, run, tree in (
        ("qat", fn, packed),
        ("ptq", fn, solved),
        ("float", logits(loaded), loaded.params),
    ):
        results[name] = evaluate(run, tree, test).to_dict()
        typer.echo(f"{name}: perplexity {results[name]['perplexity']:.3f}")
        (out / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    typer.run(main)
