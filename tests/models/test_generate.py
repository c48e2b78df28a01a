"""Generation equals running the whole sequence anew for every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models import Decoder, ModelConfig, generate
from qjax.models.generate import bucket

CONFIG = ModelConfig(
    "llama",
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


@pytest.fixture(scope="module")
def model():
    model = Decoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))["params"]
    # Logits far apart: no tie that rounding could turn.
    return model, jax.tree.map(lambda x: 3 * x, params)


def greedy(model, params, prompt, n):
    apply = jax.jit(model.apply)
    tokens = list(prompt)
    for _ in range(n):
        padded = jnp.asarray([tokens + [0] * (32 - len(tokens))])
        tokens.append(int(apply({"params": params}, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_full_forwards(model):
    model, params = model
    prompt = [5, 1, 30, 7]
    out = generate(model.apply, params, prompt, config=CONFIG, max_new_tokens=12)
    assert out.tokens[0].tolist() == greedy(model, params, prompt, 12)
    assert out.lengths.tolist() == [12]
    assert out.prefill_tokens_per_s > 0
    assert out.decode_tokens_per_s > 0


def test_rows_of_other_lengths_change_nothing(model):
    model, params = model
    prompts = [[5, 1, 30, 7], [9], [3] * 19]
    out = generate(model.apply, params, prompts, config=CONFIG, max_new_tokens=6)
    for row, prompt in zip(out.tokens, prompts, strict=True):
        assert row.tolist() == greedy(model, params, prompt, 6)


def test_a_row_ends_at_its_end_token(model):
    model, params = model
    free = generate(model.apply, params, [5, 1, 30, 7], config=CONFIG, max_new_tokens=12)
    tokens = free.tokens[0].tolist()
    n = next(i for i in range(1, 12) if tokens[i] not in tokens[:i])
    out = generate(
        model.apply, params, [5, 1, 30, 7], config=CONFIG, max_new_tokens=12, eos_id=tokens[n]
    )
    assert out.tokens[0].tolist() == tokens[: n + 1]
    assert out.lengths.tolist() == [n + 1]


def test_nearby_lengths_share_a_compilation(model):
    model, params = model
    traces = []

    def apply(*args, **kwargs):
        traces.append(args[1].shape)
        return model.apply(*args, **kwargs)

    for n in (1, 7, 16):
        generate(apply, params, [4] * n, config=CONFIG, max_new_tokens=n)
    once = len(traces)
    generate(apply, params, [4] * 11, config=CONFIG, max_new_tokens=9)
    assert len(traces) == once


def test_sampling_is_reproducible_and_follows_the_key(model):
    model, params = model
    options = {"config": CONFIG, "max_new_tokens": 12, "temperature": 2.0}
    one = generate(model.apply, params, [5], key=jax.random.key(0), **options)
    same = generate(model.apply, params, [5], key=jax.random.key(0), **options)
    other = generate(model.apply, params, [5], key=jax.random.key(1), **options)
    np.testing.assert_array_equal(one.tokens, same.tokens)
    assert (one.tokens != other.tokens).any()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_from_one_token_is_greedy(model, options):
    model, params = model
    out = generate(
        model.apply,
        params,
        [5, 1],
        config=CONFIG,
        max_new_tokens=8,
        temperature=1.5,
        key=jax.random.key(0),
        **options,
    )
    assert out.tokens[0].tolist() == greedy(model, params, [5, 1], 8)


def test_sampled_frequencies_are_the_probabilities(model):
    model, params = model
    n = 4000
    out = generate(
        model.apply,
        params,
        [[5, 1]] * n,
        config=CONFIG,
        max_new_tokens=1,
        temperature=4.0,
        top_k=5,
        key=jax.random.key(0),
    )
    logits = model.apply({"params": params}, jnp.asarray([[5, 1]]))[0, -1] / 4.0
    values, ids = jax.lax.top_k(logits, 5)
    expected = np.zeros(CONFIG.vocab_size)
    expected[ids] = jax.nn.softmax(values)
    frequency = np.bincount(out.tokens[:, 0], minlength=CONFIG.vocab_size) / n
    # Five standard errors of a frequency.
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()


@pytest.mark.parametrize("n", [1, 5, 16, 17, 100, 1000, 5000])
def test_buckets_waste_at_most_a_quarter(n):
    assert n <= bucket(n) <= max(16, 1.25 * n)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "none of them empty"),
        ([[1], []], {}, "none of them empty"),
        ([37], {}, r"ids 37\.\.37, but the vocabulary is 0\.\.36"),
        ([1], {"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ([1], {"temperature": -1.0}, "`temperature` .* got -1.0"),
        ([1], {"temperature": 1.0}, "pass `key`"),
        ([1], {"top_k": 38}, r"`top_k` must be in 1\.\.37, got 38"),
        ([1], {"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
        ([[2], [1] * 2000], {"max_new_tokens": 49}, r"take 2049 .* made for 2048 .* at most 48 "),
        ([1] * 2048, {"max_new_tokens": 1}, r"take 2049 .* made for 2048 .*\. Shorten the prompt"),
    ],
)
def test_wrong_arguments_are_named(model, prompt, options, message):
    model, params = model
    with pytest.raises(ValueError, match=message):
        generate(model.apply, params, prompt, config=CONFIG, **options)


def test_a_context_can_be_filled_to_its_end(model):
    model, params = model
    config = dataclasses.replace(CONFIG, max_position=24)
    out = generate(model.apply, params, [5] * 20, config=config, max_new_tokens=4)
    assert out.tokens[0].tolist() == greedy(model, params, [5] * 20, 4)
