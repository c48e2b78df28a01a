"""How well a language model predicts text, alone and against a reference, one window at a time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Logits = Callable[[Any, Int[Array, "B T"]], Float[Array, "B T V"]]

WINDOW = 1024
# Rows of logits whose log-softmax is alive at a time: 25 MB for 49152 words in float32.
_ROWS = 128


class EvaluationError(ArithmeticError):
    """A model whose logits are no numbers; the message names the model and the window."""


class Scores(NamedTuple):
    """What a model made of each target token.

    Attributes:
      nll: -log p(target), in nats.
      kl: sum_v r(v) (log r(v) - log p(v)), r the reference's distribution; 0 without a reference.
      agree: whether the reference's likeliest token is also the model's.
      reference_nll: -log r(target); 0 without a reference.
    """

    nll: Float[Array, "*b"]
    kl: Float[Array, "*b"]
    agree: Bool[Array, "*b"]
    reference_nll: Float[Array, "*b"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The scores of a model over all targets.

    Attributes:
      windows: how many.
      window: tokens in each.
      targets: predicted tokens, `windows * (window - 1)`.
      nll: mean -log p(target), in nats.
      perplexity: exp(nll).
      nll_per_window: the same for each window.
      tokens_per_s: of the forward pass over whole windows (prefill), compilation left out.
      reference_nll: of the reference; this and all below are None without one.
      reference_perplexity: of the reference.
      reference_tokens_per_s: of the reference.
      delta_nll: nll - reference_nll.
      delta_nll_se: standard error of `delta_nll` from the differences of the targets, which are
        paired and taken as independent: std(d) / sqrt(targets).
      kl: mean KL(reference || model), in nats.
      agreement: fraction of targets where both find the same token likeliest.
    """

    windows: int
    window: int
    targets: int
    nll: float
    perplexity: float
    nll_per_window: tuple[float, ...]
    tokens_per_s: float
    reference_nll: float | None = None
    reference_perplexity: float | None = None
    reference_tokens_per_s: float | None = None
    delta_nll: float | None = None
    delta_nll_se: float | None = None
    kl: float | None = None
    agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data; what there was no reference for is left out."""
        out = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return out | {"nll_per_window": list(self.nll_per_window)}


def split_windows(
    tokens: Sequence[int] | np.ndarray, window: int = WINDOW, limit: int | None = None
) -> Int[np.ndarray, "W T"]:
    """Cuts a text into windows that do not overlap; a shorter rest is dropped.

    No token is put before a window: its first token is context only, and each later one is
    predicted from those before it in the window.

    Args:
      tokens: ids of the whole text.
      window: tokens in a window, at least 2.
      limit: keep only so many windows; None for all.

    Raises:
      ValueError: if the text does not fill one window, or a number is out of range.

    Example:
      >>> split_windows(range(7), window=3)
      array([[0, 1, 2],
             [3, 4, 5]], dtype=int32)
    """
    if window < 2:
        raise ValueError(f"`window` must be at least 2 (one token predicts one), got {window}.")
    if limit is not None and limit < 1:
        raise ValueError(f"the number of windows must be at least 1, got {limit}.")
    ids = np.asarray(tokens, np.int32)
    n = len(ids) // window
    if n == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}. Give a longer text"
            " or a shorter window."
        )
    n = n if limit is None else min(n, limit)
    return ids[: n * window].reshape(n, window)


def spread(windows: Int[np.ndarray, "W T"], count: int) -> Int[np.ndarray, "n T"]:
    """Returns `count` of the windows, evenly spread from the first to the last.

    Example:
      >>> spread(split_windows(range(10), window=2), 3)[:, 0]
      array([0, 4, 8], dtype=int32)
    """
    return windows[np.linspace(0, len(windows) - 1, count).astype(int)]


def recorded(fn: Logits, params: Any, windows: Int[np.ndarray, "W T"]) -> tuple[Logits, Any]:
    """Returns a reference for `evaluate` that answers from logits of these windows, made once.

    For several models that are judged on the same text: the logits of all windows [W, T, V] stay in
    memory, and the reference does not run again.

    Args:
      fn, params: as for `evaluate`.
      windows: those that it will be asked for; logits of others are NaN, which `evaluate` refuses.
    """
    run = jax.jit(fn)
    known = {
        "windows": jnp.asarray(windows),
        "logits": jnp.concatenate([run(params, t[None]) for t in windows]),
    }

    def look_up(known, tokens):
        found = jnp.all(known["windows"] == tokens, 1)
        return jnp.where(jnp.any(found), known["logits"][jnp.argmax(found)], jnp.nan)[None]

    return look_up, known


def score(
    logits: Float[Array, "*b V"],
    targets: Int[Array, "*b"],
    reference: Float[Array, "*b V"] | None = None,
) -> Scores:
    """Scores logits against the tokens that came, and against a reference's logits.

    Log-softmax and sums are float32, whatever the logits are.
    """

    def nll_of(log_p):
        return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]

    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = nll_of(log_p)
    if reference is None:
        return Scores(nll, jnp.zeros_like(nll), jnp.ones_like(nll, bool), jnp.zeros_like(nll))
    log_r = jax.nn.log_softmax(reference.astype(jnp.float32))
    # r log r is 0 where r is; a difference of infinities would be NaN.
    term = jnp.where(log_r == -jnp.inf, 0.0, jnp.exp(log_r) * (log_r - log_p))
    agree = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_r, axis=-1)
    return Scores(nll, jnp.sum(term, axis=-1), agree, nll_of(log_r))


@jax.jit
def _score_window(
    logits: Float[Array, "1 T V"],
    window: Int[Array, "1 T"],
    reference: Float[Array, "1 T V"] | None = None,
) -> Scores:
    """Scores one window, a few rows of the vocabulary at a time."""
    x = (logits[0, :-1], window[0, 1:], None if reference is None else reference[0, :-1])
    return lax.map(lambda row: score(*row), x, batch_size=_ROWS)


class _Model:
    """A logits function, compiled for windows of one shape and timed."""

    def __init__(self, fn: Logits, params: Any, shape: tuple[int, int]):
        self.params, self.tokens, self.seconds = params, 0, 0.0
        window = jax.ShapeDtypeStruct(shape, jnp.int32)
        # Ahead of time, so that no window's time includes the compilation.
        self.run = jax.jit(fn).lower(params, window).compile()

    def __call__(self, window: Array) -> Array:
        start = time.perf_counter()
        logits = jax.block_until_ready(self.run(self.params, window))
        self.seconds += time.perf_counter() - start
        self.tokens += window.size
        return logits

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def evaluate(
    fn: Logits,
    params: Any,
    windows: Int[np.ndarray, "W T"],
    *,
    reference: tuple[Logits, Any] | None = None,
    on_window: Callable[[int], None] | None = None,
) -> Evaluation:
    """Scores a model on windows of text.

    One window is in memory at a time: its logits, and those of the reference, are scored and
    dropped. Both functions are compiled once.

    Args:
      fn: from parameters and tokens [1, T] to logits [1, T, V]. For packed parameters, wrap it:
        `qjax.apply(fn)`.
      params: its parameters.
      windows: from `split_windows`.
      reference: function and parameters of the model to compare with.
      on_window: called with the number of windows done after each.

    Raises:
      EvaluationError: if logits are NaN.
      ValueError: if there is no window, or the vocabularies differ.

    Example:
      >>> uniform = lambda params, tokens: jnp.zeros((*tokens.shape, 8))
      >>> round(evaluate(uniform, None, split_windows(range(8), 4)).perplexity, 3)
      8.0
    """
    windows = np.asarray(windows, np.int32)
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise ValueError(
            f"`windows` must be [W, T] with W >= 1 and T >= 2, got shape {windows.shape}."
            " `split_windows` makes them."
        )
    shape = (1, windows.shape[1])
    _check_vocabularies(fn, params, reference, shape)
    model = _Model(fn, params, shape)
    ref = None if reference is None else _Model(*reference, shape)

    scored: list[Scores] = []
    for i, window in enumerate(windows):
        tokens = jnp.asarray(window)[None]
        ref_logits = None if ref is None else ref(tokens)
        scores = jax.device_get(_score_window(model(tokens), tokens, ref_logits))
        _check("reference", scores.reference_nll, i)
        _check("model", scores.nll, i)
        scored.append(scores)
        if on_window is not None:
            on_window(i + 1)

    # Sums over many tokens are float64, on the host.
    nll, kl, agree, ref_nll = (np.stack(v).astype(np.float64) for v in zip(*scored, strict=True))
    mean = float(nll.mean())
    out = Evaluation(
        windows=len(windows),
        window=windows.shape[1],
        targets=nll.size,
        nll=mean,
        perplexity=_exp(mean),
        nll_per_window=tuple(float(v) for v in nll.mean(axis=1)),
        tokens_per_s=model.tokens_per_s,
    )
    if ref is None:
        return out
    delta, ref_mean = nll - ref_nll, float(ref_nll.mean())
    return dataclasses.replace(
        out,
        reference_nll=ref_mean,
        reference_perplexity=_exp(ref_mean),
        reference_tokens_per_s=ref.tokens_per_s,
        delta_nll=float(delta.mean()),
        delta_nll_se=float(delta.std() / math.sqrt(delta.size)),
        kl=float(kl.mean()),
        agreement=float(agree.mean()),
    )


def _check(name: str, nll: np.ndarray, window: int) -> None:
    is_nan = np.isnan(nll)
    if is_nan.any():
        raise EvaluationError(
            f"the {name}'s logits of window {window} are NaN from token {int(is_nan.argmax())} on"
            f" ({int(is_nan.sum())} of {nll.size} tokens). Its weights hold NaN, or overflow in its"
            " dtype."
        )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _check_vocabularies(fn, params, reference, shape) -> None:
    if reference is None:
        return
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    V = jax.eval_shape(fn, params, tokens).shape[-1]
    R = jax.eval_shape(reference[0], reference[1], tokens).shape[-1]
    if V != R:
        raise ValueError(
            f"the model has a vocabulary of {V} and the reference of {R}: their distributions"
            " cannot be compared."
        )
