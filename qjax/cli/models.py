"""Models as the commands use them: opened, fed with text, timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from qjax.cli.terminal import progress, step

if TYPE_CHECKING:
    import numpy as np

    from qjax.evaluate import Evaluation
    from qjax.models import Generation
    from qjax.models.load import LoadedModel
    from qjax.models.tokenizer import Tokenizer
    from qjax.texts import Split


class Runner(NamedTuple):
    """A model with the functions that run it, packed or not.

    Attributes:
      loaded: the model.
      apply: `model.apply` on packed parameters, for `generate`, which keeps compilations by it.
      logits: from params and tokens to logits, for `evaluate`.
    """

    loaded: LoadedModel
    apply: Callable[..., Any]
    logits: Callable[..., Any]


def open_runner(name: str, dtype: str | None = None, *, packed: bool = False) -> Runner:
    """Opens a model, its layers stacked if they can be: that compiles in a fraction of the time.

    Args:
      name, dtype: as for `open_model`.
      packed: whether to run a GGUF file as it is stored; else its weights become floats.
    """
    from qjax.models.catalog import open_model

    with step(f"Loading {name}"):
        return runner(open_model(name, dtype=dtype, scan_layers=None, packed=packed))


def runner(loaded: LoadedModel) -> Runner:
    import qjax

    apply = qjax.apply(loaded.model.apply)
    return Runner(loaded, apply, lambda params, tokens: apply({"params": params}, tokens))


def tokenizer_of(r: Runner, name: str) -> Tokenizer:
    if r.loaded.tokenizer is None:
        raise ValueError(f"{name}: has no tokenizer, so it can read no text.")
    return r.loaded.tokenizer


def read_text(name: str, split: Split = "evaluation") -> str:
    from qjax.texts import load_text

    return load_text(name, split)


def text_windows(
    r: Runner,
    name: str,
    text: str,
    window: int,
    windows: int | None,
    option: str = "--window",
) -> np.ndarray:
    """Returns a text as windows of tokens, as many as asked for; `option` says their length."""
    from qjax.evaluate import split_windows

    config = r.loaded.config
    remedy = f"Use {option} {config.max_position}, or less."
    config.check_length(f"{name}: windows of text", window, remedy)

    with step("Tokenizing the text"):
        return split_windows(tokenizer_of(r, name).encode(text), window, windows)


def judge(r: Runner, windows: np.ndarray, against: Runner | None) -> Evaluation:
    from qjax.evaluate import evaluate

    reference = None if against is None else (against.logits, against.loaded.params)
    with progress(f"Evaluating {len(windows)} windows", len(windows)) as done:
        return evaluate(r.logits, r.loaded.params, windows, reference=reference, on_window=done)


def encoded(r: Runner, name: str, prompt: str, max_tokens: int) -> list[int]:
    """Returns the tokens of a prompt: there must be some, and room for as many new ones."""
    from qjax.models.generate import check_length

    ids = tokenizer_of(r, name).encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; give at least one word.")
    check_length(r.loaded.config, len(ids), max_tokens)
    return ids


def continue_text(r: Runner, name: str, prompt: str, max_tokens: int, **options: Any) -> Generation:
    """Generates from a prompt."""
    from qjax.models import generate

    return generate(
        r.apply,
        r.loaded.params,
        encoded(r, name, prompt, max_tokens),
        config=r.loaded.config,
        max_new_tokens=max_tokens,
        **options,
    )


def text_of(r: Runner, made: Generation) -> str:
    assert r.loaded.tokenizer is not None
    return r.loaded.tokenizer.decode(made.tokens[0, : made.lengths[0]])


def total_nbytes(params: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def check_float(r: Runner, name: str) -> None:
    """Refuses a model that is quantized already."""
    import jax

    from qjax import is_qtensor

    if any(map(is_qtensor, jax.tree.leaves(r.loaded.params, is_leaf=is_qtensor))):
        raise ValueError(f"{name}: is quantized already. Start from the float model.")
