"""Laws of qjax.evaluate: what any measure of a model must satisfy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.evaluate import EvaluationError, evaluate, recorded, score, split_windows, spread

V, T = 37, 16


@pytest.fixture
def windows():
    return split_windows(np.random.default_rng(0).integers(0, V, 5 * T), T)


def bigram(params, tokens):
    """A language model whose logits depend on the last token only."""
    return params[tokens]


def table(seed, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), (V, V))


def test_a_model_is_no_different_from_itself(windows):
    e = evaluate(bigram, table(0), windows, reference=(bigram, table(0)))
    assert (e.kl, e.agreement, e.delta_nll, e.delta_nll_se) == (0, 1, 0, 0)
    assert e.nll == e.reference_nll
    assert e.perplexity == e.reference_perplexity


def test_the_perplexity_of_a_uniform_model_is_its_vocabulary(windows):
    e = evaluate(lambda params, tokens: jnp.full((*tokens.shape, V), 3.0), None, windows)
    assert e.perplexity == pytest.approx(V, rel=1e-5)  # float32 log
    assert e.reference_nll is None


def test_streaming_equals_one_batch(windows):
    p, q = table(0), table(1)
    e = evaluate(bigram, q, windows, reference=(bigram, p))
    s = score(q[windows[:, :-1]], windows[:, 1:], p[windows[:, :-1]])
    assert e.targets == s.nll.size == 5 * (T - 1)
    assert e.nll == pytest.approx(float(s.nll.mean()), rel=1e-6)
    assert e.nll_per_window == pytest.approx(s.nll.mean(axis=1).tolist(), rel=1e-6)
    assert e.kl == pytest.approx(float(s.kl.mean()), rel=1e-5)
    assert e.agreement == pytest.approx(float(s.agree.mean()))
    delta = np.asarray(s.nll - s.reference_nll, np.float64)
    assert e.delta_nll == pytest.approx(delta.mean(), rel=1e-5)
    assert e.delta_nll_se == pytest.approx(delta.std() / math.sqrt(delta.size), rel=1e-5)
    assert e.delta_nll == pytest.approx(e.nll - e.reference_nll, abs=1e-6)


def test_recorded_logits_are_those_of_the_reference(windows):
    reference = (bigram, table(0))
    live, again = (
        evaluate(bigram, table(1), windows, reference=r).to_dict()
        for r in (reference, recorded(*reference, windows))
    )
    for e in (live, again):
        del e["tokens_per_s"], e["reference_tokens_per_s"]
    assert live == again


def test_logits_that_were_not_recorded_are_refused(windows):
    reference = recorded(bigram, table(0), windows[1:])
    with pytest.raises(EvaluationError, match="the reference's logits of window 0 are NaN"):
        evaluate(bigram, table(1), windows, reference=reference)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_windows_are_spread_over_the_text(windows, count):
    picked = spread(windows, count)
    assert picked.shape == (count, T)
    np.testing.assert_array_equal(picked[0], windows[0])
    np.testing.assert_array_equal(picked[-1], windows[0 if count == 1 else -1])


def test_rows_of_the_vocabulary_are_scored_alike_in_any_number():
    # More rows than are scored at a time, and no multiple of them.
    long = split_windows(np.random.default_rng(1).integers(0, V, 300), 300)
    e = evaluate(bigram, table(0), long)
    assert e.nll == pytest.approx(float(score(table(0)[long[:, :-1]], long[:, 1:]).nll.mean()))


def test_kl_is_not_negative_and_not_symmetric(windows):
    ab = evaluate(bigram, table(0), windows, reference=(bigram, table(1, 2.0)))
    ba = evaluate(bigram, table(1, 2.0), windows, reference=(bigram, table(0)))
    assert ab.kl > 0
    assert ba.kl > 0
    assert ab.kl != pytest.approx(ba.kl, rel=1e-2)
    assert ab.delta_nll == pytest.approx(-ba.delta_nll)


def test_kl_is_the_sum_of_its_definition():
    r, p = jnp.log(jnp.array([0.5, 0.5, 0.0])), jnp.log(jnp.array([0.25, 0.25, 0.5]))
    s = score(p, jnp.array(0), r)
    assert float(s.kl) == pytest.approx(math.log(2))  # r = 0 adds nothing, though log r = -inf
    assert float(s.nll) == pytest.approx(math.log(4))


def test_a_shift_of_the_logits_changes_nothing_even_if_large(windows):
    a = evaluate(bigram, table(0), windows)
    b = evaluate(lambda params, tokens: params[tokens] + 500.0, table(0), windows)
    assert b.nll == pytest.approx(a.nll, rel=1e-4)  # 500 + x keeps x to 2^-15


def test_scores_are_float32_for_logits_of_16_bits(windows):
    e = evaluate(lambda params, tokens: jnp.zeros((*tokens.shape, V), jnp.bfloat16), None, windows)
    assert e.perplexity == pytest.approx(V, rel=1e-5)  # bfloat16 would be off by 1e-2


def test_nan_logits_name_the_window_and_the_model(windows):
    bad = windows.copy()
    bad[3, 4] = 36
    bad[:3][bad[:3] == 36] = bad[3, :4][bad[3, :4] == 36] = 0
    poisoned = table(0).at[36, 5].set(jnp.nan)
    with pytest.raises(EvaluationError, match=r"the model's logits of window 3 .* token 4"):
        evaluate(bigram, poisoned, bad)
    with pytest.raises(EvaluationError, match="the reference's logits of window 3"):
        evaluate(bigram, table(0), bad, reference=(bigram, poisoned))


def test_vocabularies_must_agree(windows):
    def other(params, tokens):
        return jnp.zeros((*tokens.shape, V + 1))

    with pytest.raises(ValueError, match="vocabulary of 37 and the reference of 38"):
        evaluate(bigram, table(0), windows, reference=(other, None))


def test_windows_do_not_overlap_and_drop_the_rest():
    w = split_windows(list(range(23)), 5)
    np.testing.assert_array_equal(w.ravel(), np.arange(20))
    assert split_windows(list(range(23)), 5, limit=2).shape == (2, 5)
    assert split_windows(list(range(23)), 5, limit=99).shape == (4, 5)


@pytest.mark.parametrize(
    ("tokens", "window", "limit", "message"),
    [
        ([1, 2], 3, None, "2 tokens, fewer than one window of 3"),
        ([], 3, None, "0 tokens"),
        ([1, 2, 3], 1, None, "`window` must be at least 2"),
        ([1, 2, 3], 2, 0, "at least 1, got 0"),
    ],
)
def test_windows_that_cannot_be(tokens, window, limit, message):
    with pytest.raises(ValueError, match=message):
        split_windows(tokens, window, limit)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="split_windows"):
        evaluate(bigram, table(0), np.arange(5))


def test_progress_counts_windows(windows):
    seen = []
    evaluate(bigram, table(0), windows, on_window=seen.append)
    assert seen == [1, 2, 3, 4, 5]


def test_to_dict_leaves_out_what_there_is_no_reference_for(windows):
    d = evaluate(bigram, table(0), windows).to_dict()
    assert {"nll", "perplexity", "targets", "tokens_per_s"} <= d.keys()
    assert not any(k.startswith(("reference", "delta", "kl", "agreement")) for k in d)
