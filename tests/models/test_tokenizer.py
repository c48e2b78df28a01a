"""Tokenizers built from GGUF metadata cut and merge as those they were written from."""

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from qjax.models import Tokenizer
from qjax.models.tokenizer import PRE_TOKENIZERS

TEXT = """It's 2024: the cat's 12345 naïve résumés — 東京, Ελλάδα, 🙂 — cost $9.99!
  Indented\tcode(x) = {1: 'a'}\r\n\r\n\nWE'LL SEE, she'd said...   done """


def byte_level(*, pattern):
    """A trained byte-level BPE, cut by `pattern`, as tokenizer.json would hold it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 2, trainer)
    return backend


def metadata_of(backend, pre):
    import json

    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3] + [1] * (len(tokens) - 1), np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }


@pytest.fixture(scope="module")
def metadata():
    (pattern,) = PRE_TOKENIZERS["gpt-2"]
    return metadata_of(byte_level(pattern=pattern), "gpt-2")


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2"])
def test_byte_level_bpe_equals_its_original(pre):
    (pattern,) = PRE_TOKENIZERS[pre]
    original = byte_level(pattern=pattern)
    tokenizer = Tokenizer.from_gguf(metadata_of(original, pre))
    ids = tokenizer.encode(TEXT)
    assert ids == original.encode(TEXT).ids
    assert tokenizer.decode(ids) == TEXT


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_any_text_round_trips(metadata, pre):
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": pre})
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", " 12345", " cats", "  \n"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", " cats", "  \n"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", " cats", "  \n"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", " cats", "  \n"]),
    ],
)
def test_text_is_cut_as_the_name_says(metadata, pre, words):
    backend = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": pre}).backend
    text = "It's 12345 cats  \n"
    cuts = [text[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert cuts == words


def test_control_tokens_are_one_token_and_hidden(metadata):
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("<|end|>") == [0]
    assert tokenizer.decode([0]) == ""
    assert tokenizer.decode([0], skip_special_tokens=False) == "<|end|>"
    assert tokenizer.eos_ids == (0,)


def test_bos_is_added_only_where_asked_and_wanted(metadata):
    wants = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": True}
    tokenizer = Tokenizer.from_gguf(metadata | wants)
    plain = tokenizer.encode("cat")
    assert tokenizer.encode("cat", add_special_tokens=True) == [0, *plain]
    unwanted = Tokenizer.from_gguf(metadata | wants | {"tokenizer.ggml.add_bos_token": False})
    assert unwanted.encode("cat", add_special_tokens=True) == plain


SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"]
    + [f"<0x{i:02X}>" for i in range(256)]
    + ["▁a", "ab", "▁ab", "▁", "a", "b", "c"],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
    "tokenizer.ggml.scores": np.array([0.0] * 259 + [-1, -2, -3, -4, -5, -6, -7], np.float32),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes():
    tokenizer = Tokenizer.from_gguf(SENTENCEPIECE)
    ids = {token: i for i, token in enumerate(SENTENCEPIECE["tokenizer.ggml.tokens"])}
    # "▁a" has the best score, and then joins "b"; "ab" wins only where no space precedes.
    expected = ["▁ab", "▁", "c", "ab"]
    assert tokenizer.encode("ab cab") == [ids[token] for token in expected]
    euro = [ids["▁"], ids["<0xE2>"], ids["<0x82>"], ids["<0xAC>"]]
    assert tokenizer.encode("€") == euro
    assert tokenizer.decode(tokenizer.encode("ab € cab")) == "ab € cab"
    assert tokenizer.encode("a", add_special_tokens=True)[0] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokenizer.ggml.pre": "poro"}, NotImplementedError, r"\.pre 'poro'.*smollm"),
        ({"tokenizer.ggml.model": "bert"}, NotImplementedError, r"\.model 'bert'.*gpt2 and llama"),
        ({"tokenizer.ggml.merges": None}, ValueError, "merges` is missing"),
        ({"tokenizer.ggml.merges": ["qq zz"]}, ValueError, "'qq zz' does not join"),
        ({"tokenizer.ggml.token_type": [1]}, ValueError, "1 entries for"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, ValueError, "eos_token_id` is 1000000"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, ValueError, "entries for 2 tokens"),
        ({"tokenizer.ggml.tokens": None}, ValueError, "holds no tokenizer"),
    ],
)
def test_what_cannot_be_right_is_named(metadata, change, error, message):
    with pytest.raises(error, match=message):
        Tokenizer.from_gguf(metadata | change)


def test_a_chat_needs_a_template(metadata):
    tokenizer = Tokenizer.from_gguf(metadata)
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "Hi"}])


def test_a_chat_is_written_by_the_template(metadata):
    pytest.importorskip("jinja2")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": template})
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == "user: Hi<|end|>"
