"""A decoder as the metadata and tensors of a GGUF file."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.format import Format
from qjax.interop.gguf import (
    BY_NAME,
    GGUFError,
    TensorType,
    from_qtensor,
    holding,
    open_gguf,
    type_of,
)
from qjax.interop.gguf.mixes import MIXES, types_of
from qjax.interop.gguf.writer import Tensor, write_gguf
from qjax.interop.holders import holders
from qjax.models import rope
from qjax.models.config import ModelConfig
from qjax.models.names import names_of
from qjax.models.tokenizer import PRE_TOKENIZERS, Tokenizer
from qjax.paths import path_str
from qjax.policy import Policy, Rule
from qjax.qtensor import QTensor, dequantize_array, is_qtensor, quantize_array

# Token types.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


# ---- tensors -------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """One tensor of the file, as it stands in the parameter tree.

    Attributes:
      path: of the parameter; of a layer of a stack "layers/...[i]".
      name: of the tensor.
      leaf: the array or QTensor that it is, or is a slice of.
      layer: index in a stack of layers; None if the leaf is no stack.
    """

    path: str
    name: str
    leaf: Any
    layer: int | None

    @property
    def value(self) -> Any:
        if self.layer is None:
            return self.leaf
        return jax.tree.map(lambda a: a[self.layer], self.leaf)

    @property
    def is_kernel(self) -> bool:
        """Whether the file holds the transposed array."""
        return self.path.partition("[")[0].endswith("/kernel")

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file."""
        shape = self.leaf.shape if self.layer is None else self.leaf.shape[1:]
        return tuple(reversed(shape)) if self.is_kernel else tuple(shape)


def parameters(params: Any) -> Iterator[Parameter]:
    """Yields the tensors of a decoder's parameters, layers in order.

    Raises:
      GGUFError: if a parameter is none of a decoder's.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
    out = []
    for key_path, leaf in leaves:
        path = path_str(key_path)
        head, _, rest = path.partition("/")
        stacked = head == "layers"
        for i in range(leaf.shape[0]) if stacked else [None]:
            try:
                name = names_of(path if i is None else f"layers_{i}/{rest}").gguf
            except (KeyError, ValueError):
                raise GGUFError(
                    f"{path}: is no parameter of a decoder, so it has no name in a GGUF file."
                    " `qjax.interop.gguf.write_gguf` writes tensors of any name."
                ) from None
            out.append(Parameter(path if i is None else f"{path}[{i}]", name, leaf, i))

    def order(p: Parameter) -> tuple[int, int]:
        layer = re.match(r"blk\.(\d+)\.", p.name)
        return (1, int(layer[1])) if layer else (0 if p.name.startswith("token_embd") else 2, 0)

    yield from sorted(out, key=order)


def mix_types(config: ModelConfig, params: Any, mix: str) -> dict[str, str]:
    """Returns the type that a mix gives every tensor of a model, by name."""
    return types_of(
        mix, {p.name: p.shape for p in parameters(params)}, num_layers=config.num_layers,
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
    )  # fmt: skip


def policy(
    config: ModelConfig, params: Any, mix: str, *, keep: Sequence[str] = (), **recipe: Any
) -> Policy:
    """Returns a mix as a Policy: a rule for each parameter of the model.

    With it `qjax.quantize` makes the QTensors of that file: by ggml's search; with calibration data
    by that search weighted by it, or by GPTQ on the grid that it finds.

    Args:
      config: of the model.
      params: its parameters, of layers that are not in a stack: layers differ in their types.
      mix: a name in `qjax.interop.gguf.MIXES`, such as "Q4_K_M".
      keep: patterns of parameters that stay floats until `save_gguf(..., mix=)` quantizes them
        without data: the embedding and the head, whose columns are many, as llama.cpp does.
      **recipe: fields of `qjax.Recipe`, such as rounding="gptq".

    Raises:
      GGUFError: if layers are in a stack but differ in their types.
    """
    from qjax.recipe import Recipe

    types = mix_types(config, params, mix)
    rules: dict[str, Rule] = {}
    for p in parameters(params):
        fmt = BY_NAME[types[p.name]].format
        path = p.path.partition("[")[0]
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in keep):
            fmt = None
        layout = None if p.layer is not None or p.is_kernel else "nk"
        rule = Rule("re:" + re.escape(path), fmt, layout if fmt else None, min_ndim=0)
        if rules.setdefault(path, rule) != rule:
            raise GGUFError(
                f"{path}: {mix} stores its layers in different types, and a stack has one. Load"
                " the model with scan_layers=False."
            )
    made = Recipe(**recipe) if recipe else None
    return Policy(tuple(rules.values()), name=f"gguf:{mix}", recipe=made)


def tensors(
    params: Any, config: ModelConfig, *, mix: str | None = None
) -> tuple[list[Tensor], int]:
    """Returns the tensors of a model, to be encoded when they are written, and the file type.

    QTensors are written as they are. Float arrays of two axes get the type that the mix has for
    them, by ggml's search; without a mix they stay floats.

    Args:
      params: of a `qjax.models.Decoder`, with or without QTensors.
      config: of the model.
      mix: a name in `qjax.interop.gguf.MIXES`.

    Raises:
      GGUFError: naming the parameter, if a QTensor has no tensor type.
    """
    types = None if mix is None else mix_types(config, params, mix)
    out = []
    for p in parameters(params):
        kind = _kind(p, types)
        out.append(Tensor(p.name, p.shape, kind, functools.partial(_encode, p, kind, config)))
    factors = rope.divisors(config.rope_scaling, _unscaled_frequencies(config))
    if config.rope_scaling is not None and config.rope_scaling.kind != "linear":
        raw = factors.astype("<f4").view(np.uint8)
        out.append(Tensor("rope_freqs.weight", factors.shape, BY_NAME["F32"], lambda: raw))
    return out, MIXES[mix].file_type if mix is not None else _file_type(out)


def _unscaled_frequencies(config: ModelConfig) -> np.ndarray:
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    return float(config.rope_theta) ** -exponent


def _kind(p: Parameter, types: Mapping[str, str] | None) -> TensorType:
    if is_qtensor(p.leaf):
        wanted = None if types is None else BY_NAME[types[p.name]]
        kind = type_of(p.leaf.format)
        if kind is not None and wanted is not None and wanted.format is not None:
            kind = wanted if type_of(wanted.format) == kind else kind
        if kind is None:
            with _naming(p):
                return holding(p.value)
        return kind
    if len(p.shape) < 2:  # Readers want vectors in full.
        return BY_NAME["F32"]
    if types is not None:
        return BY_NAME[types[p.name]]
    return BY_NAME[{"bfloat16": "BF16", "float16": "F16"}.get(jnp.dtype(p.leaf.dtype).name, "F32")]


@contextlib.contextmanager
def _naming(p: Parameter):
    """Puts a parameter's path before the message of a GGUFError, and after it what can hold it."""
    try:
        yield
    except GGUFError as e:
        able = ""
        if is_qtensor(p.leaf):
            name = "lm_head.weight" if p.name == "output.weight" else p.name
            able = f" As it is, it can be held by {', '.join(holders(name, p.value))}."
        raise GGUFError(f"{p.path}: {e}{able}") from None


def _encode(p: Parameter, kind: TensorType, config: ModelConfig) -> np.ndarray:
    """Returns the stored bytes of a tensor, rows in the file's order."""
    value = p.value
    with _naming(p):
        if is_qtensor(value):
            if value.shape != (tuple(reversed(p.shape)) if p.is_kernel else p.shape):
                raise AssertionError(p)
            if value.layout.letters != ("kn" if p.is_kernel else "nk"):
                raise GGUFError(
                    f"it is contracted along other axes ({value.layout.letters}) than the rows of"
                    f" the file; quantize it with the layout {'kn' if p.is_kernel else 'nk'}."
                )
            raw = from_qtensor(value, kind)[0]
        elif kind.format is not None:
            layout = "kn" if p.is_kernel else "nk"
            if not bool(jnp.all(jnp.isfinite(value))):
                raise GGUFError("holds NaN or Inf. Repair the checkpoint.")
            raw = from_qtensor(_quantizer(kind.format, layout)(value), kind)[0]
        else:
            rows = np.asarray(value)
            rows = np.ascontiguousarray(rows.T if p.is_kernel else rows)
            raw = rows.astype(_dtype(kind)).view(np.uint8)
    rows = _interleaved(p.name, config)
    return raw if rows is None else rope.interleave_rows(raw, rows)


def _dtype(kind: TensorType) -> np.dtype:
    return jnp.dtype(kind.dtype)


@functools.lru_cache(maxsize=64)
def _quantizer(fmt: Format, layout: str) -> Callable[[Any], QTensor]:
    return jax.jit(functools.partial(quantize_array, fmt=fmt, layout=layout))


def _interleaved(name: str, config: ModelConfig) -> int | None:
    """Returns the heads whose rows the llama graph wants interleaved; None for other tensors."""
    if architecture(config) != "llama":
        return None
    if ".attn_q." in name:
        return config.num_heads
    return config.num_kv_heads if ".attn_k." in name else None


def _file_type(written: Sequence[Tensor]) -> int:
    """Returns the file type of most weights."""
    sizes: dict[str, int] = {}
    for t in written:
        if len(t.shape) > 1:
            sizes[t.kind.name] = sizes.get(t.kind.name, 0) + math.prod(t.shape)
    name = max(sizes, key=sizes.__getitem__, default="F32")
    names = (name, f"{name}_M", f"{name}_S")
    return next((MIXES[n].file_type for n in names if n in MIXES), 1)


# ---- the whole file ------------------------------------------------------------------------------


def save_gguf(
    path: str | os.PathLike[str],
    params: Any,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    *,
    mix: str | None = None,
    name: str | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    verify: bool = False,
    report: Callable[[str], None] | None = None,
) -> None:
    """Writes a model as a GGUF file, one tensor at a time; the file appears when it is complete.

    QTensors are written bit for bit as they are: quantize with `qjax.models.gguf.policy` (and
    calibration data, if there are any), then save. Float weights get the types of `mix`, by ggml's
    search without importance; without a mix they stay floats.

    Args:
      path: where.
      params: of a `qjax.models.Decoder`, layers stacked or not.
      config: of the model.
      tokenizer: None: the file can turn no text into tokens.
      mix: a name in `qjax.interop.gguf.MIXES`, such as "Q4_K_M".
      name: `general.name`.
      extra: metadata to add, or to put in place of what is derived; keys `tokenizer.*` among them
        replace all that describes the tokenizer.
      overwrite: whether to replace a file that is there.
      verify: decode what was written and compare it, tensor by tensor, before it takes its place.
      report: called with a line for each tensor.

    Raises:
      GGUFError: naming the parameter, if no tensor type holds it.
      NotImplementedError: if readers would compute something else than the model, or the tokenizer
        cannot be described.
      FileExistsError: if there is a file and `overwrite` is false.
    """
    extra = dict(extra or {})
    written, file_type = tensors(params, config, mix=mix)
    keys = metadata(config, name=name, file_type=file_type)
    if "tokenizer.ggml.model" not in extra:
        pre = extra.pop("tokenizer.ggml.pre", None)
        keys |= tokenizer_metadata(tokenizer, config.vocab_size, pre=pre)
    by_name = {t.name: t for t in written}

    def line(name: str) -> None:
        if report is not None:
            report(f"{name}: {by_name[name].kind.name} {'x'.join(map(str, by_name[name].shape))}")

    write_gguf(
        path, keys | extra, written, overwrite=overwrite, on_tensor=line,
        check=(lambda at: compare(at, params, config)) if verify else None,
    )  # fmt: skip


def compare(path: str | os.PathLike[str], params: Any, config: ModelConfig) -> None:
    """Reads a file and compares it with the parameters that it was made of, tensor by tensor.

    QTensors must decode to exactly what `qjax.dequantize` gives. Of weights that were quantized on
    their way, the squared error must be below what the coarsest type has, a sixth of the weight.

    Raises:
      GGUFError: naming the first parameter that differs, and by how much.
    """
    file = open_gguf(path)
    for p in parameters(params):
        value, rows = p.value, _interleaved(p.name, config)
        got = file.read(p.name)
        got = got if rows is None else rope.split_rows(got, rows)
        wanted = np.asarray(dequantize_array(value) if is_qtensor(value) else value, np.float32)
        wanted = wanted.T if p.is_kernel else wanted
        kind = file.tensors[p.name].kind
        exact = is_qtensor(value) or kind.name == "F32"
        error = np.sum(np.square(got - wanted)) / max(np.sum(np.square(wanted)), 1e-30)
        if got.shape != wanted.shape or not (
            np.array_equal(got, wanted, equal_nan=True) if exact else error < 1 / 6
        ):
            raise GGUFError(
                f"{p.path}: what was written as {p.name!r} ({kind.name}) decodes to something else"
                f" (squared relative error {error:.3g}). This is a bug: please report it."
            )


# ---- metadata ------------------------------------------------------------------------------------


def architecture(config: ModelConfig) -> str:
    """Returns what GGUF calls the architecture: Mistral is a llama there."""
    return "llama" if config.architecture == "mistral" else config.architecture


def metadata(config: ModelConfig, *, name: str | None, file_type: int) -> dict[str, Any]:
    """Returns the keys that describe a model.

    Raises:
      NotImplementedError: if the architecture, in its readers, does not compute what it says.
    """
    arch = architecture(config)
    window = config.sliding_window
    if window is not None and window < config.max_position:
        raise NotImplementedError(
            f"readers of {arch} files attend to all tokens, and `sliding_window` is {window}."
            " Without it (None), the exported model is another one beyond that many tokens."
        )
    if config.qk_norm != (arch == "qwen3"):
        raise NotImplementedError(f"GGUF's {arch} has no place for qk_norm={config.qk_norm}.")
    out: dict[str, Any] = {
        "general.architecture": arch,
        "general.name": name or arch,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        f"{arch}.context_length": config.max_position,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": float(config.rope_theta),
        f"{arch}.vocab_size": config.vocab_size,
    }
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        out[f"{arch}.rope.scaling.type"] = "linear"
        out[f"{arch}.rope.scaling.factor"] = float(config.rope_scaling.factor)
    return out


def tokenizer_metadata(
    tokenizer: Tokenizer | None, vocab_size: int, *, pre: str | None = None
) -> dict[str, Any]:
    """Returns the keys that describe a tokenizer; holes in its vocabulary are filled.

    Args:
      tokenizer: byte-level BPE (GPT-2's kind) or SentencePiece BPE (Llama's); None: no text.
      vocab_size: rows of the embedding, of which every one needs a token.
      pre: how text is cut before merging, a name that llama.cpp knows; None: recognized.

    Raises:
      NotImplementedError: if it is of another kind, or cuts text in a way that is not recognized.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    spec = json.loads(tokenizer.backend.to_str())
    model = spec["model"]
    if model.get("type") != "BPE":
        raise NotImplementedError(
            f"a tokenizer of type {model.get('type')!r} cannot be written to GGUF, only BPE."
        )
    sentencepiece = bool(model.get("byte_fallback"))
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    tokens, types = _tokens(spec, vocab_size, sentencepiece)
    out: dict[str, Any] = {"tokenizer.ggml.model": "llama" if sentencepiece else "gpt2"}
    if sentencepiece:
        out["tokenizer.ggml.pre"] = pre or "default"
        out["tokenizer.ggml.tokens"] = tokens
        out["tokenizer.ggml.scores"] = _scores(tokens, merges)
        ids = tokenizer.backend.encode("a", add_special_tokens=False).tokens
        out["tokenizer.ggml.add_space_prefix"] = bool(ids) and ids[0].startswith("▁")
    else:
        out["tokenizer.ggml.pre"] = pre or _pre_tokenizer(spec)
        out["tokenizer.ggml.tokens"] = tokens
        out["tokenizer.ggml.merges"] = [" ".join(m) for m in merges]
    out["tokenizer.ggml.token_type"] = np.asarray(types, np.int32)
    ids = {"bos": tokenizer.bos_id, "eos": next(iter(tokenizer.eos_ids), None)}
    if sentencepiece and model.get("unk_token") in model["vocab"]:
        ids["unknown"] = model["vocab"][model["unk_token"]]
    out |= {f"tokenizer.ggml.{k}_token_id": int(i) for k, i in ids.items() if i is not None}
    around = tokenizer.backend.encode("a", add_special_tokens=True).ids
    out["tokenizer.ggml.add_bos_token"] = around[:1] == [tokenizer.bos_id]
    out["tokenizer.ggml.add_eos_token"] = bool(set(around[-1:]) & set(tokenizer.eos_ids))
    if tokenizer.chat_template is not None:
        out["tokenizer.chat_template"] = tokenizer.chat_template
    return out


def _tokens(spec: Mapping[str, Any], size: int, bytes_: bool) -> tuple[list[str], list[int]]:
    """Returns every token, and what it is."""
    added = {t["id"]: t for t in spec.get("added_tokens", ())}
    by_id = {i: token for token, i in spec["model"]["vocab"].items()}
    by_id |= {i: t["content"] for i, t in added.items()}
    if by_id and max(by_id) >= size:
        raise ValueError(
            f"the tokenizer has ids up to {max(by_id)}, but the embedding has {size} rows."
        )
    tokens, types = [], []
    for i in range(size):
        token = by_id.get(i)
        tokens.append(f"[PAD{i}]" if token is None else token)
        if token is None:
            types.append(_UNUSED)
        elif bytes_ and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types.append(_BYTE)
        elif bytes_ and token == spec["model"].get("unk_token"):
            types.append(_UNKNOWN)
        elif i in added:
            types.append(_CONTROL if added[i]["special"] else _USER_DEFINED)
        else:
            types.append(_NORMAL)
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns scores by which SentencePiece merges in the order of given merges: minus the rank."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    return np.asarray([-float(rank.get(t, len(merges))) for t in tokens], np.float32)


def _pre_tokenizer(spec: Mapping[str, Any]) -> str:
    """Returns the name of the rule that cuts text before merging."""
    pre = spec.get("pre_tokenizer") or {}
    cuts = pre.get("pretokenizers", [pre]) if pre.get("type") == "Sequence" else [pre]
    patterns = []
    for cut in cuts:
        match cut:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                if cut.get("use_regex", True):
                    patterns += PRE_TOKENIZERS["gpt-2"]
            case _:
                patterns.append(json.dumps(cut))
    for name, known in PRE_TOKENIZERS.items():
        if known == tuple(patterns):
            return name
    rule = " and ".join(patterns) if pre else "no rule"
    raise NotImplementedError(
        f"the tokenizer cuts text by {rule}, which is none of {', '.join(PRE_TOKENIZERS)}. Pass the"
        " name that llama.cpp has for it, `extra={'tokenizer.ggml.pre': NAME}` (--pre-tokenizer"
        " NAME): a wrong one would tokenize wrongly without a word."
    )
