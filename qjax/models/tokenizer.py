"""Text to token ids and back, from a tokenizer.json or from the metadata of a GGUF file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from qjax.models.config import ModelConfig

# Token types in GGUF.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _llama3(digits: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# How text is cut before merging, by the name in `tokenizer.ggml.pre`: each pattern cuts further.
PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_llama3(r"\p{N}{1,3}"),),
    "llama3": (_llama3(r"\p{N}{1,3}"),),
    "qwen2": (_llama3(r"\p{N}"),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the special tokens of its model.

    Attributes:
      backend: the tokenizer of the `tokenizers` library that does the work.
      bos_id: begin of sequence, if any.
      eos_ids: tokens that end a generation.
      chat_template: the Jinja template of a conversation, if any.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of `text`; with BOS or EOS only if asked and if the model wants them."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as text, by the model's template.

        Args:
          messages: each with `role` and `content`.
          add_generation_prompt: whether to open the assistant's turn.

        Raises:
          ValueError: if the model has no template.
          ImportError: if jinja2 is not installed.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template: write the prompt as plain text.")
        try:
            from jinja2.sandbox import (  # pyright: ignore[reportMissingImports]: optional
                ImmutableSandboxedEnvironment,
            )
        except ImportError:
            raise ImportError("chat templates need jinja2: `pip install jinja2`.") from None

        def token(i: int | None) -> str:
            return "" if i is None else self.backend.id_to_token(i) or ""

        def fail(message: str):
            raise ValueError(f"the model's chat template refused the conversation: {message}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(self.chat_template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=token(self.bos_id),
            eos_token=token(self.eos_ids[0] if self.eos_ids else None),
            raise_exception=fail,
        )

    @classmethod
    def from_directory(cls, directory: Path, config: ModelConfig) -> Self:
        """Reads tokenizer.json, and the chat template where there is one."""
        path = directory / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # The library raises bare Exceptions.
            raise ValueError(f"{path}: not a valid tokenizer ({e}).") from None
        template = None
        if (path := directory / "chat_template.jinja").exists():
            template = path.read_text(encoding="utf-8")
        elif (path := directory / "tokenizer_config.json").exists():
            template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        return cls(
            backend, config.bos_id, config.eos_ids, template if isinstance(template, str) else None
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """Builds the tokenizer that the metadata of a GGUF file describes.

        Raises:
          NotImplementedError: if it is of a kind, or cuts text in a way, that is not supported.
          ValueError: if a key is missing or inconsistent.
        """
        vocab = _Vocab.of(metadata)
        match vocab.kind:
            case "gpt2":
                backend = _byte_level_bpe(vocab, metadata)
            case "llama":
                backend = _sentencepiece_bpe(vocab, metadata)
            case kind:
                raise NotImplementedError(
                    f"tokenizer.ggml.model {kind!r} is not supported, only gpt2 and llama."
                )
        backend.add_special_tokens([vocab.added(i) for i in vocab.of_type(_CONTROL, _UNKNOWN)])
        backend.add_tokens([vocab.added(i) for i in vocab.of_type(_USER_DEFINED)])
        bos = metadata.get("tokenizer.ggml.bos_token_id")
        eos = metadata.get("tokenizer.ggml.eos_token_id")
        # Llama files say that they want BOS by saying nothing.
        first = bos if metadata.get("tokenizer.ggml.add_bos_token", vocab.kind == "llama") else None
        last = eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None
        around = [(vocab.tokens[i], i) for i in (first, last) if i is not None]
        if around:
            before = [vocab.tokens[first]] if first is not None else []
            after = [vocab.tokens[last]] if last is not None else []
            backend.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after],
                pair=[*before, "$A", "$B", *after],
                special_tokens=around,
            )
        eos_ids = () if eos is None else (eos,)
        return cls(backend, bos, eos_ids, metadata.get("tokenizer.chat_template"))


@dataclass(frozen=True)
class _Vocab:
    kind: str
    tokens: list[str]
    types: Sequence[int]

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Self:
        kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
        if kind is None or not isinstance(tokens, list):
            raise ValueError(
                "the metadata holds no tokenizer: `tokenizer.ggml.model` or `.tokens` is missing."
            )
        types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
        if len(types) != len(tokens):
            raise ValueError(
                f"`tokenizer.ggml.token_type` has {len(types)} entries for {len(tokens)} tokens."
            )
        if len(set(tokens)) != len(tokens):
            raise ValueError(
                "`tokenizer.ggml.tokens` holds the same token twice: ids would be ambiguous."
            )
        for name in ("bos", "eos", "unknown"):
            i = metadata.get(f"tokenizer.ggml.{name}_token_id", 0)
            if not isinstance(i, int) or not 0 <= i < len(tokens):
                raise ValueError(
                    f"`tokenizer.ggml.{name}_token_id` is {i!r}, but there are"
                    f" {len(tokens)} tokens."
                )
        return cls(kind, tokens, types)

    def of_type(self, *types: int) -> list[int]:
        return [i for i, t in enumerate(self.types) if t in types]

    def added(self, i: int) -> AddedToken:
        return AddedToken(self.tokens[i], special=self.types[i] != _USER_DEFINED, normalized=False)

    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}


def _byte_level_bpe(vocab: _Vocab, metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise NotImplementedError(
            f"tokenizer.ggml.pre {pre!r} is not supported, only {', '.join(PRE_TOKENIZERS)}:"
            " another rule would tokenize wrongly without a word."
        )
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ValueError(
            "`tokenizer.ggml.merges` is missing, and a byte-level BPE is made of merges."
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    ids = vocab.ids()
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise ValueError(
                f"`tokenizer.ggml.merges`: {' '.join(pair)!r} does not join two tokens to a third."
            )
    # Llama 3 takes a word that is a token whole, even where no merges lead to it.
    backend = tokenizers.Tokenizer(
        models.BPE(ids, pairs, ignore_merges=pre in ("llama-bpe", "llama3"))
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(vocab: _Vocab, metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocab.tokens):
        raise ValueError(
            "`tokenizer.ggml.scores` is missing or incomplete, and a SentencePiece BPE merges by"
            " score."
        )
    ids = vocab.ids()
    unknown = vocab.tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = tokenizers.Tokenizer(
        models.BPE(ids, _merges(ids, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), spaces] if prefix else [spaces]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Returns the merges of a SentencePiece BPE, best first.

    SentencePiece stores no merges: it joins the two neighbours whose union is the token of the
    highest score. That is a merge for each way to cut a token in two, ranked by the token's score.
    """
    ranked = [
        (-float(scores[i]), i, token[:cut], token[cut:])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(ranked, key=lambda merge: merge[:2])]
