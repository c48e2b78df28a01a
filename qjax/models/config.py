"""The shape of a Llama-like decoder, whatever file it came from."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for long contexts; `rope.divisors` says by how much.

    Attributes:
      kind: `linear` divides all by `factor`, `llama3` by wavelength, `divisors` by given numbers.
      factor: of `linear` and `llama3`.
      low_freq_factor: `llama3`: wavelengths over `original_max_position / this` are divided.
      high_freq_factor: `llama3`: wavelengths under `original_max_position / this` are kept.
      original_max_position: `llama3`: the context the model was first trained with.
      divisors: `divisors`: one per frequency.
    """

    kind: Literal["linear", "llama3", "divisors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    divisors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in ("linear", "llama3", "divisors"):
            raise ValueError(
                f"`rope_scaling.kind` must be linear, llama3 or divisors, got {self.kind!r}."
            )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's hyperparameters. Hashable, and a plain JSON dict by `to_dict` and `from_dict`.

    Attributes:
      architecture: the family; it only decides names and row order in files.
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width inside the MLP.
      num_layers: blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: width of a head; even.
      max_position: the context the model was trained for.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how they are stretched, if they are.
      norm_eps: inside the RMS norms.
      tie_embeddings: whether the head is the transposed embedding.
      qkv_bias: biases on q, k and v.
      o_bias: a bias on the attention output.
      qk_norm: RMS norms on each head's q and k.
      sliding_window: a token sees this many last tokens, itself included; None for all.
      bos_id: begin of sequence, if the model has one.
      eos_ids: tokens that end a generation.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise NotImplementedError(
                f"architecture {self.architecture!r} is not supported, only"
                f" {', '.join(ARCHITECTURES)}."
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"`{field.name}` must be a positive integer, got {value!r}.")
            is_number = isinstance(value, float | int) and 0 < value < math.inf
            if field.type is float and not is_number:
                raise ValueError(f"`{field.name}` must be a positive number, got {value!r}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "`num_kv_heads` must divide `num_heads`, got"
                f" {self.num_kv_heads} and {self.num_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even to be rotated in halves, got {self.head_dim}."
            )

    def check_length(self, what: str, tokens: int, remedy: str) -> None:
        """Refuses a sequence with positions that the model was not made for.

        Nothing else would tell: rotary angles exist for any position, but past `max_position` the
        model has never seen them, and its logits soon mean nothing.

        Raises:
          ValueError: with `what` it is that is so long, both lengths and the remedy.
        """
        if tokens > self.max_position:
            raise ValueError(
                f"{what} take {tokens} positions, but the model was made for {self.max_position}"
                f" (`config.max_position`). {remedy}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict that JSON can hold and `from_dict` reads."""
        out: dict[str, Any] = dataclasses.asdict(self) | {"eos_ids": list(self.eos_ids)}
        if self.rope_scaling:
            out["rope_scaling"]["divisors"] = list(self.rope_scaling.divisors)
        return out

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` made.

        Raises:
          ValueError: if a field is unknown or missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown model config fields {unknown}; known are {sorted(known)}.")
        values = dict(fields)
        values["eos_ids"] = tuple(values.get("eos_ids", ()))
        try:
            if scaling := values.get("rope_scaling"):
                divisors = tuple(scaling.get("divisors", ()))
                values["rope_scaling"] = RopeScaling(**{**scaling, "divisors": divisors})
            return cls(**values)
        except TypeError as e:
            raise ValueError(f"incomplete or foreign model config: {e}.") from None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads a `config.json` of transformers.

        Raises:
          ValueError: if a key is missing.
          NotImplementedError: if the model computes something this decoder does not.
        """
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise NotImplementedError(
                f"config.json: model_type {kind!r} is not supported, only"
                f" {', '.join(ARCHITECTURES)}."
            )
        _require(config, "hidden_act", "silu", default="silu")
        _require(config, "mlp_bias", False, default=False)
        _require(config, "partial_rotary_factor", 1.0, default=1.0)
        num_heads = _get(config, "num_attention_heads")
        hidden_size = _get(config, "hidden_size")
        attention_bias = bool(config.get("attention_bias", False))
        theta, scaling = _hf_rope(config)
        return cls(
            architecture=kind,
            vocab_size=_get(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_get(config, "intermediate_size"),
            num_layers=_get(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or hidden_size // num_heads,
            max_position=config.get("max_position_embeddings", 2048),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or attention_bias,
            o_bias=kind != "qwen2" and attention_bias,
            qk_norm=kind == "qwen3",
            sliding_window=_hf_window(config),
            bos_id=config.get("bos_token_id"),
            eos_ids=_ids(config.get("eos_token_id")),
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns a `config.json` that `from_hf`, and transformers, read.

        Raises:
          NotImplementedError: if the architecture's config has no words for it.
        """
        kind = self.architecture
        biases = (True, False) if kind == "qwen2" else (self.qkv_bias,) * 2
        if (self.qkv_bias, self.o_bias) != biases or (kind == "mistral" and self.qkv_bias):
            raise NotImplementedError(
                f"config.json of {kind}: no words for qkv_bias={self.qkv_bias} with"
                f" o_bias={self.o_bias}."
            )
        if self.qk_norm != (kind == "qwen3"):
            raise NotImplementedError(f"config.json of {kind}: no word for qk_norm={self.qk_norm}.")
        window: dict[str, Any] = {"sliding_window": self.sliding_window}
        if kind == "llama":
            if self.sliding_window is not None:
                raise NotImplementedError("config.json of llama: no word for a sliding_window.")
            window = {}
        elif kind != "mistral":
            window |= {"use_sliding_window": self.sliding_window is not None}
            window |= {"max_window_layers": 0} if self.sliding_window is not None else {}
        return {
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "model_type": kind,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": _hf_scaling(self.rope_scaling),
            "attention_bias": self.qkv_bias and kind != "qwen2",
            "tie_word_embeddings": self.tie_embeddings,
            **window,
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids)
            if len(self.eos_ids) > 1
            else next(iter(self.eos_ids), None),
        }

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """Reads the metadata of a GGUF file.

        What the metadata does not say but the tensors do (a tied head, biases, rotary divisors) is
        left at the architecture's usual value; the loader corrects it.

        Raises:
          ValueError: if a key is missing.
          NotImplementedError: if the model computes something this decoder does not.
        """
        arch = metadata.get("general.architecture")
        if arch not in ("llama", "qwen2", "qwen3"):  # Mistral is stored as llama.
            raise NotImplementedError(
                f"GGUF: general.architecture {arch!r} is not supported, only llama, qwen2, qwen3."
            )
        if metadata.get(f"{arch}.expert_count", 0):
            raise NotImplementedError(
                f"GGUF: {arch}.expert_count = {metadata[f'{arch}.expert_count']}:"
                " only dense models are supported."
            )
        num_heads = _get(metadata, f"{arch}.attention.head_count")
        num_kv_heads = metadata.get(f"{arch}.attention.head_count_kv", num_heads)
        for heads in (num_heads, num_kv_heads):
            if not isinstance(heads, int):
                raise NotImplementedError(f"GGUF: the head counts differ by layer: {list(heads)}.")
        hidden_size = _get(metadata, f"{arch}.embedding_length")
        head_dim = metadata.get(f"{arch}.attention.key_length", hidden_size // num_heads)
        _require(metadata, f"{arch}.attention.value_length", head_dim, default=head_dim)
        _require(metadata, f"{arch}.rope.dimension_count", head_dim, default=head_dim)
        scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise NotImplementedError(
                f"GGUF: {arch}.rope.scaling.type {scaling!r} is not supported."
            )
        factor = metadata.get(f"{arch}.rope.scaling.factor", 1.0)
        tokens = metadata.get("tokenizer.ggml.tokens", ())
        return cls(
            architecture=arch,
            vocab_size=metadata.get(f"{arch}.vocab_size") or len(tokens),
            hidden_size=hidden_size,
            intermediate_size=_get(metadata, f"{arch}.feed_forward_length"),
            num_layers=_get(metadata, f"{arch}.block_count"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position=_get(metadata, f"{arch}.context_length"),
            rope_theta=metadata.get(f"{arch}.rope.freq_base", 10000.0),
            rope_scaling=RopeScaling("linear", factor) if scaling == "linear" else None,
            norm_eps=_get(metadata, f"{arch}.attention.layer_norm_rms_epsilon"),
            qkv_bias=arch == "qwen2",
            qk_norm=arch == "qwen3",
            sliding_window=metadata.get(f"{arch}.attention.sliding_window"),
            bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_ids=_ids(metadata.get("tokenizer.ggml.eos_token_id")),
        )


def _get(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(
            f"the model's config lacks `{key}`: the file is incomplete or of another kind."
        )
    return config[key]


def _require(config: Mapping[str, Any], key: str, value: Any, *, default: Any):
    if (got := config.get(key, default)) not in (value, None):
        raise NotImplementedError(f"`{key}` = {got!r} is not supported, only {value!r}.")


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _hf_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    # transformers 5 keeps all in `rope_parameters`; before, theta stood beside `rope_scaling`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    _require(rope, "partial_rotary_factor", 1.0, default=1.0)
    match kind := rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return theta, None
        case "linear":
            return theta, RopeScaling("linear", _get(rope, "factor"))
        case "llama3":
            return theta, RopeScaling(
                "llama3",
                factor=_get(rope, "factor"),
                low_freq_factor=_get(rope, "low_freq_factor"),
                high_freq_factor=_get(rope, "high_freq_factor"),
                original_max_position=_get(rope, "original_max_position_embeddings"),
            )
    raise NotImplementedError(f"rope_type {kind!r} is not supported, only default, linear, llama3.")


def _hf_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    match scaling:
        case None:
            return None
        case RopeScaling(kind="linear"):
            return {"rope_type": "linear", "factor": scaling.factor}
        case RopeScaling(kind="llama3"):
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    raise NotImplementedError(
        f"config.json has no word for rotary {scaling.kind}, only for linear and llama3 scaling."
    )


def _hf_window(config: Mapping[str, Any]) -> int | None:
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", True):
        return None
    layers = config.get("num_hidden_layers", math.inf)
    kinds = set(config.get("layer_types") or ())
    if kinds == {"full_attention"}:
        return None
    mixed = len(kinds) > 1 or (not kinds and 0 < config.get("max_window_layers", 0) < layers)
    if mixed or kinds - {"sliding_attention"}:
        raise NotImplementedError(
            "a `sliding_window` on some layers only is not supported, only on all or none."
        )
    if not kinds and config.get("max_window_layers", 0) >= layers:
        return None
    return window
