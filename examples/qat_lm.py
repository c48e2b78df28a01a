"""Quantization-aware training of SmolLM2-135M to 3 bits, distilled from its float self.

    uv run --extra demo python examples/qat_lm.py --out out/qat-lm

starts from the best that post-training quantization makes of a few windows of text (`w3a16-gptq`:
GPTQ, coordinate descent, refits), trains on the same windows to predict what the float model
predicts, packs the result, and judges both on held-out documents. What trains are the step sizes
and the norms; codes stay, as in the last phase of EfficientQAT (Chen et al., 2024), or move too,
with a `--weight-rate`. A run that is stopped, while it quantizes or while it trains, goes on where
it was, with the same result.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer

import qjax
from qjax import Policy, qat
from qjax.checkpoint import Resumable
from qjax.evaluate import evaluate, split_windows
from qjax.models import LoadedModel, load
from qjax.paths import path_str
from qjax.texts import load_text

WINDOW = 512  # tokens that PTQ reads at a time


class State(NamedTuple):
    """What training changes."""

    params: Any
    opt: Any


class Setting(NamedTuple):
    """What decides the result; two runs of one setting are the same."""

    policy: str = "w3a16-gptq"
    text: str = "wiki"
    samples: int = 64  # windows of 512 tokens that PTQ sees
    fresh: bool = False  # whether QAT goes on to others of the text, or stays with those
    steps: int = 100
    batch: int = 1
    length: int = 256
    step_rate: float = 3e-3  # of step sizes, relative to each
    norm_rate: float = 3e-3  # of the scales of norms, likewise
    weight_rate: float = 0.0  # of weights, in steps; 0: the codes stay
    seed: int = 0


def logits(loaded: LoadedModel) -> Any:
    return lambda params, tokens: loaded.model.apply({"params": params}, tokens)


def quantized(loaded: LoadedModel, policy: Policy, windows: np.ndarray, out: Path) -> Any:
    """Returns the model after PTQ, from `out` if it is there already."""
    if not (out / "ptq").exists():
        batches = [jnp.asarray(b) for b in windows.reshape(-1, 4, windows.shape[1])]
        solved, report = qjax.quantize(
            loaded.params, policy, fn=logits(loaded), calibration=batches, resume=out / "ptq-parts",
            report=typer.echo,
        )  # fmt: skip
        (out / "ptq.json").write_text(report.to_json())
        qjax.save(out / "ptq", solved)
    return qjax.load(out / "ptq")


def optimizer(setting: Setting) -> optax.GradientTransformation:
    """Returns Adam with rates of their own: of step sizes and norms, relative; of weights."""

    def adam(rate: float, *, relative: bool) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, rate, max(1, setting.steps // 10), setting.steps
        )
        scaled = optax.stateless(lambda moves, params: jax.tree.map(
            lambda move, p: move * jnp.abs(p), moves, params
        ))  # fmt: skip
        return optax.chain(
            optax.scale_by_adam(b2=0.95),
            scaled if relative else optax.identity(),
            optax.scale_by_learning_rate(schedule),
        )

    weight = adam(setting.weight_rate, relative=False) if setting.weight_rate else None
    return optax.multi_transform(
        {
            "step": adam(setting.step_rate, relative=True),
            "norm": adam(setting.norm_rate, relative=True),
            "weight": weight or optax.set_to_zero(),
            "kept": optax.set_to_zero(),
        },
        kinds,
    )


def kinds(params: Any) -> Any:
    """Returns how each leaf trains; the embedding, which is not quantized, stays as it is."""

    def one(path, label):
        name = path_str(path)
        return "norm" if "norm" in name else "kept" if "embed" in name else label

    return jax.tree_util.tree_map_with_path(one, qat.labels(params))


def trainer(loaded: LoadedModel, policy: Policy, setting: Setting) -> tuple[Any, Any]:
    """Returns `init(params) -> State` and the jitted `step(state, teacher, tokens)`."""
    fn = logits(loaded)
    fake = qjax.fake_quant(fn, policy)
    tx = optimizer(setting)

    def init(params):
        return State(jax.tree.map(jnp.copy, params), tx.init(params))  # `step` takes it over

    @partial(jax.jit, donate_argnums=0)
    def step(state, teacher, tokens):
        known = jax.nn.log_softmax(fn(teacher, tokens))

        def loss(params):
            student = jax.nn.log_softmax(fake(qat.from_steps(params, policy), tokens))
            return jnp.mean(jnp.sum(jnp.exp(known) * (known - student), -1))  # KL(float || it)

        value, grads = jax.value_and_grad(loss)(state.params)
        updates, opt = tx.update(grads, state.opt, state.params)
        return State(optax.apply_updates(state.params, updates), opt), value

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
      first: tree of Latents, in steps.
      pieces: training windows [W, T].
      every: steps between checkpoints.
      stop: ends after so many steps, as an interruption would.

    Returns:
      The trained tree and the losses of all steps, KL(float || quantized) in nats a token.
    """
    init, step = program
    order = np.random.default_rng(setting.seed).permutation(len(pieces))
    batches = np.resize(order, (setting.steps, setting.batch))
    with Resumable(out / "training", setting._asdict(), steps=setting.steps, every=every) as saved:
        done, state, losses = saved.latest(init(first), [])
        for i in range(done, setting.steps if stop is None else stop):
            begin = time.perf_counter()
            state, loss = step(state, loaded.params, jnp.asarray(pieces[batches[i]]))
            qat.check_finite(i, loss=loss)
            losses.append(float(loss))
            typer.echo(f"step {i + 1}: KL {losses[-1]:.4f}, {time.perf_counter() - begin:.1f} s")
            saved.save(i + 1, state, losses)
    qat.check_finite(params=state.params)
    return state.params, losses


def main(
    out: Annotated[Path, typer.Option(help="Checkpoints and results; a second run goes on.")],
    text: Annotated[str, typer.Option(help="To learn from: wiki, pydoc or a file.")] = "wiki",
    samples: Annotated[int, typer.Option(help="Windows of 512 tokens.")] = Setting().samples,
    fresh: Annotated[bool, typer.Option(help="Train on windows that PTQ did not see.")] = False,
    steps: int = Setting().steps,
    batch: int = Setting().batch,
    length: int = Setting().length,
    step_rate: float = Setting().step_rate,
    norm_rate: float = Setting().norm_rate,
    weight_rate: float = Setting().weight_rate,
    windows: Annotated[int, typer.Option(help="Windows of 1024 tokens to judge on.")] = 8,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
):
    setting = Setting(
        text=Path(text).name, samples=samples, fresh=fresh, steps=steps, batch=batch, length=length,
        step_rate=step_rate, norm_rate=norm_rate, weight_rate=weight_rate,
    )  # fmt: skip
    policy = Policy.load(setting.policy)
    loaded = load("smollm2", scan_layers=True)
    assert loaded.tokenizer is not None
    pieces = split_windows(loaded.tokenizer.encode(load_text(text, "calibration")), WINDOW)
    seen = np.linspace(0, len(pieces) - 1, samples).astype(int)
    solved = quantized(loaded, policy, pieces[seen], out)
    pieces = np.delete(pieces, seen, 0) if fresh else pieces[seen]

    floats = loaded.params if weight_rate else None
    first = qat.in_steps(qat.from_quantized(solved, floats), policy)
    program = trainer(loaded, policy, setting)
    pieces = pieces.reshape(-1, length)
    params, losses = train(program, loaded, setting, first, pieces, out, every=every)
    packed = qjax.quantize(qat.from_steps(params, policy), policy)
    qjax.save(out / "qat", packed, overwrite=True)

    test = split_windows(loaded.tokenizer.encode(load_text("wiki")), 1024, windows)
    fn = qjax.apply(logits(loaded))
    float_model = (logits(loaded), loaded.params)
    results: dict[str, Any] = {"setting": setting._asdict(), "losses": losses}
    results["bits_per_weight"] = qjax.summary(packed).totals["quantized_bits_per_weight"]
    for name, tree, reference in (
        ("ptq against float", solved, float_model),
        ("qat against float", packed, float_model),
        ("qat against ptq", packed, (fn, solved)),
    ):
        e = evaluate(fn, tree, test, reference=reference)
        results[name] = e.to_dict()
        typer.echo(
            f"{name}: perplexity {e.perplexity:.3f}, {e.reference_perplexity:.3f};"
            f" ΔNLL {e.delta_nll:+.4f} ± {e.delta_nll_se:.4f}"
        )
        (out / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    typer.run(main)
