"""Generating text: a prefill, then a decode loop, each compiled once for a shape."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qjax.models.cache import KVCache, init_cache, positions_of
from qjax.models.config import ModelConfig

Apply = Callable[..., Any]


class Generation(NamedTuple):
    """What `generate` made.

    Attributes:
      tokens: the new tokens, without the prompt; a row that ended early repeats its last token.
      lengths: how many of them are real, the end token included.
      prefill_tokens_per_s: prompt tokens of all rows over the time of the prefill.
      decode_tokens_per_s: tokens of all rows over the time of the decode loop; NaN if it never ran.
    """

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


class _State(NamedTuple):
    step: Int[Array, ""]
    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    done: Bool[Array, " B"]
    cache: KVCache
    key: Array


def bucket(n: int) -> int:
    """Returns the padded length of `n` tokens: at most a quarter more, and few different ones.

    Example:
      >>> [bucket(n) for n in (1, 17, 100, 1000, 1025)]
      [16, 20, 112, 1024, 1280]
    """
    step = max(4, 1 << max(0, n - 1).bit_length() - 3) if n > 16 else 16
    return -(-n // step) * step


def generate(
    apply_fn: Apply,
    params: Any,
    prompt_tokens: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
    *,
    config: ModelConfig,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    eos_id: int | Sequence[int] | None = None,
    cache_dtype: DTypeLike = jnp.float32,
) -> Generation:
    """Continues prompts.

    Lengths are rounded up to a `bucket`, so that nearby ones share a compilation. Compilations are
    kept for the same `apply_fn`: make `qjax.apply(model.apply)` once, not anew for each call.

    Args:
      apply_fn: `model.apply`, or any function that takes and returns the same.
      params: its parameters, in any form that `apply_fn` takes.
      prompt_tokens: one prompt, or a list of prompts of any lengths.
      config: the model's.
      max_new_tokens: stop after so many.
      temperature: 0 for the likeliest token.
      top_k: sample among the k likeliest tokens only.
      top_p: sample among the likeliest tokens that together have this probability only.
      key: for sampling; needed where `temperature > 0`.
      eos_id: token or tokens that end a row; those of `config` by default, `()` for none.
      cache_dtype: of the key-value cache.

    Raises:
      ValueError: if a prompt is empty or has an id outside the vocabulary, an argument is out of
        range, or a prompt and `max_new_tokens` pass the context that the model was made for.
    """
    prompts = _rows(prompt_tokens, config)
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    if temperature < 0:
        raise ValueError(
            f"`temperature` must be 0 (the likeliest token) or positive, got {temperature}."
        )
    if temperature > 0 and key is None:
        raise ValueError(f"{temperature=} samples, so pass `key`, e.g. `key=jax.random.key(0)`.")
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"`top_k` must be in 1..{config.vocab_size}, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be in (0, 1], got {top_p}.")
    check_length(config, max(map(len, prompts)), max_new_tokens)
    if eos_id is None:
        eos_id = config.eos_ids
    ends = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)

    # Padded on the left, so that the last position is the last token of every row.
    T, steps = bucket(max(map(len, prompts))), bucket(max_new_tokens)
    tokens, mask = np.zeros((len(prompts), T), np.int32), np.zeros((len(prompts), T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, T - len(prompt) :] = prompt
        mask[row, T - len(prompt) :] = 1

    params = jax.tree.map(jnp.asarray, params)
    sampling = _Sampling(temperature > 0, top_k, top_p is not None)
    signature = _Signature(
        apply_fn, config, sampling, ends, len(prompts), T, steps, np.dtype(cache_dtype)
    )
    prefill, decode = _compiled(signature, _Avals.of(params))
    knobs = _Knobs(jnp.float32(temperature or 1.0), jnp.float32(1.0 if top_p is None else top_p))
    key = jax.random.key(0) if key is None else key

    start = time.perf_counter()
    state = jax.block_until_ready(
        prefill(params, jnp.asarray(tokens), jnp.asarray(mask), knobs, key)
    )
    prefilled = time.perf_counter()
    state = jax.block_until_ready(decode(params, state, jnp.int32(max_new_tokens), knobs))
    decoded = time.perf_counter()

    lengths = np.asarray(state.lengths)
    n = int(state.step)
    return Generation(
        tokens=np.asarray(state.tokens)[:, :n],
        lengths=lengths,
        prefill_tokens_per_s=sum(map(len, prompts)) / (prefilled - start),
        decode_tokens_per_s=len(prompts) * (n - 1) / (decoded - prefilled)
        if n > 1
        else float("nan"),
    )


def check_length(config: ModelConfig, prompt: int, new: int) -> None:
    """Refuses to continue a prompt of so many tokens past the context that the model was made for.

    Raises:
      ValueError: with what there is room for.
    """
    room = config.max_position - prompt
    ask = f"Ask for at most {room} (`max_new_tokens`, --max-tokens), or s" if room > 0 else "S"
    config.check_length(
        f"a prompt of {prompt} tokens and {new} new ones", prompt + new, f"{ask}horten the prompt."
    )


class _Sampling(NamedTuple):
    sample: bool
    top_k: int | None
    top_p: bool


class _Knobs(NamedTuple):
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


class _Signature(NamedTuple):
    """All that a compilation depends on, but for the parameters."""

    apply_fn: Apply
    config: ModelConfig
    sampling: _Sampling
    ends: tuple[int, ...]
    batch: int
    prompt_len: int
    steps: int
    cache_dtype: np.dtype


class _Avals(NamedTuple):
    """The parameters' tree, shapes, dtypes and shardings, hashable."""

    structure: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, params: Any) -> "_Avals":
        leaves, structure = jax.tree.flatten(params)
        return cls(
            structure,
            tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves),
        )


@functools.lru_cache(maxsize=16)
def _compiled(
    signature: _Signature, avals: _Avals
) -> tuple[Callable[..., _State], Callable[..., _State]]:
    """Compiles both functions ahead of time, so that no timing includes a compilation."""
    s = signature
    params = jax.tree.unflatten(avals.structure, avals.leaves)
    tokens = jax.ShapeDtypeStruct((s.batch, s.prompt_len), jnp.int32)
    knobs = jax.eval_shape(lambda: _Knobs(jnp.float32(1), jnp.float32(1)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    prefill = jax.jit(functools.partial(_prefill, s))
    # The cache is donated: the loop writes into the buffers of the prefill.
    decode = jax.jit(functools.partial(_decode, s), donate_argnums=1)
    state = jax.eval_shape(prefill, params, tokens, tokens, knobs, key)
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    return (
        prefill.lower(params, tokens, tokens, knobs, key).compile(),
        decode.lower(params, state, limit, knobs).compile(),
    )


def _prefill(s: _Signature, params, tokens, mask, knobs, key) -> _State:
    cache = init_cache(s.config, s.batch, s.prompt_len + s.steps, s.cache_dtype)
    positions = positions_of(mask)
    logits, cache = s.apply_fn(
        {"params": params}, tokens, positions=positions, cache=cache, logits_at=-1
    )
    state = _State(
        step=jnp.int32(0),
        tokens=jnp.zeros((s.batch, s.steps), jnp.int32),
        lengths=jnp.zeros(s.batch, jnp.int32),
        done=jnp.zeros(s.batch, bool),
        cache=cache,
        key=key,
    )
    return _append(s, state, logits[:, -1], cache, knobs)


def _decode(s: _Signature, params, state: _State, limit, knobs) -> _State:
    def unfinished(state: _State):
        return (state.step < limit) & ~jnp.all(state.done)

    def step(state: _State) -> _State:
        last = lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        logits, cache = s.apply_fn({"params": params}, last, cache=state.cache, logits_at=-1)
        return _append(s, state, logits[:, -1], cache, knobs)

    return lax.while_loop(unfinished, step, state)


def _append(s: _Signature, state: _State, logits, cache: KVCache, knobs: _Knobs) -> _State:
    key, subkey = jax.random.split(state.key)
    token = _pick(s.sampling, logits, knobs, subkey)
    previous = lax.dynamic_index_in_dim(
        state.tokens, jnp.maximum(state.step - 1, 0), axis=1, keepdims=False
    )
    token = jnp.where(state.done, previous, token)
    return _State(
        step=state.step + 1,
        tokens=lax.dynamic_update_index_in_dim(state.tokens, token, state.step, axis=1),
        lengths=state.lengths + ~state.done,
        done=state.done | jnp.isin(token, jnp.asarray(s.ends, jnp.int32)),
        cache=cache,
        key=key,
    )


def _pick(
    sampling: _Sampling, logits: Float[Array, "B V"], knobs: _Knobs, key: Array
) -> Int[Array, " B"]:
    if not sampling.sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / knobs.temperature
    # Sorted, likeliest first: top-k cuts the list, top-p masks its tail, and the draw is a rank.
    values, ids = lax.top_k(logits, sampling.top_k or logits.shape[-1])
    if sampling.top_p:
        probability = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        values = jnp.where(before < knobs.top_p, values, -jnp.inf)  # The first always stays.
    rank = jax.random.categorical(key, values, axis=-1)
    return jnp.take_along_axis(ids, rank[:, None], axis=1)[:, 0].astype(jnp.int32)


def _rows(prompt_tokens: Any, config: ModelConfig) -> list[np.ndarray]:
    rows = list(prompt_tokens)
    if rows and np.ndim(rows[0]) == 0:
        rows = [rows]
    prompts = [np.asarray(row, np.int64) for row in rows]
    if not prompts or any(prompt.ndim != 1 or not len(prompt) for prompt in prompts):
        raise ValueError(
            "`prompt_tokens` must be one list of ids or a list of such lists, none of them empty."
        )
    for prompt in prompts:
        if prompt.min() < 0 or prompt.max() >= config.vocab_size:
            raise ValueError(
                f"`prompt_tokens` has ids {prompt.min()}..{prompt.max()}, but the vocabulary is"
                f" 0..{config.vocab_size - 1}. Is the tokenizer of another model?"
            )
    return prompts
