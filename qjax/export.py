"""Exporting a language model to the files of other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.interop.hf.directory import read_json
from qjax.interop.hf.write import SHARD_BYTES, ExportError, Weight, verify_hf, write_hf
from qjax.models.config import ModelConfig
from qjax.models.gguf import save_gguf as gguf
from qjax.models.names import names_of
from qjax.paths import path_str
from qjax.qtensor import is_qtensor

if TYPE_CHECKING:
    from qjax.models.tokenizer import Tokenizer

__all__ = ["ExportError", "gguf", "hf"]


def hf(
    directory: str | os.PathLike[str],
    params: Any,
    config: ModelConfig | Mapping[str, Any],
    *,
    format: str | None,
    tokenizer: Tokenizer | None = None,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    verify: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a Hugging Face directory, its codes bit for bit.

    Everything is checked first: a weight that the format has no place for is an error that names
    the parameter and formats that hold it. Nothing is requantized or left out. Weights are written
    one at a time; the directory appears when it is complete.

    Scales of either sign (`rule="signed_absmax"`) become positive ones with zero points, which
    stand for the same values; symmetric integers need none.

    Args:
      directory: where to; must not exist unless `overwrite`.
      params: the parameters of a `qjax.models.Decoder`, of layers in a stack or not, with QTensors
        in place of the kernels that are quantized.
      config: the model's config, or the content of a config.json.
      format: "compressed-tensors", "gptq", "awq", "bitsandbytes" (or "bnb"), "fp8" or "mxfp4";
        None for a float model.
      tokenizer: written as tokenizer.json and tokenizer_config.json.
      source: a directory whose tokenizer and generation files are copied instead.
      overwrite: whether a model there may be replaced.
      verify: decode what was written and compare it weight by weight; what differs is removed.
      shard_bytes: bytes of tensors in one file, at most.

    Raises:
      FileExistsError: if `directory` exists, or is no model that may be replaced.
      ExportError: if the format cannot hold a parameter.
      NotImplementedError: if a config.json has no words for `config`.
    """
    content = dict(config.to_hf() if isinstance(config, ModelConfig) else config)
    content.pop("quantization_config", None)
    weights = list(weights_of(params))
    content["torch_dtype"] = _float_dtype(params)
    texts: dict[str, str] = {}
    if tokenizer is not None:
        texts = _tokenizer_files(tokenizer)
    if source is not None:
        theirs = read_json(Path(source) / "config.json")
        ours, other = ModelConfig.from_hf(content), ModelConfig.from_hf(theirs)
        if ours != other:
            raise ExportError(f"`source` {source} is of another model: {_difference(ours, other)}.")
        theirs.pop("quantization_config", None)
        content = theirs | {"torch_dtype": content["torch_dtype"]}
        content.pop("dtype", None)
    write_hf(
        directory, weights, content, format=format, source=source, texts=texts,
        overwrite=overwrite, shard_bytes=shard_bytes,
        check=(lambda made: verify_hf(made, weights)) if verify else None,
    )  # fmt: skip


def weights_of(params: Any) -> Iterator[Weight]:
    """Yields the weights of a decoder by their Hugging Face names, layer by layer if stacked.

    Raises:
      ExportError: if a parameter is none of a decoder's.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
    for key_path, leaf in leaves:
        path = path_str(key_path)
        head, _, rest = path.partition("/")
        if head != "layers":
            yield _weight(path, path, leaf)
            continue
        for i in range(leaf.shape[0]):
            part = lambda leaf=leaf, i=i: jax.tree.map(lambda a: a[i], leaf)
            yield _weight(path, f"layers_{i}/{rest}", leaf, part)


def _weight(path: str, unrolled: str, leaf: Any, part: Any = None) -> Weight:
    try:
        name = names_of(unrolled).hf
    except (KeyError, ValueError):
        raise ExportError(
            f"{path}: is no parameter of a decoder, so it has no name in a Hugging Face directory."
            " `qjax.interop.hf.write_hf` writes weights of any name."
        ) from None
    get = part or (lambda: leaf)
    is_kernel = path.endswith("/kernel")
    if is_kernel and not is_qtensor(leaf):
        return Weight(path, name, lambda: np.asarray(get()).T, False, True)
    return Weight(path, name, get, is_qtensor(leaf), is_kernel)


def _float_dtype(params: Any) -> str:
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    return next((jnp.dtype(a.dtype).name for a in leaves if not is_qtensor(a)), "float32")


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    special = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {k: tokenizer.backend.id_to_token(i) for k, i in special.items() if i is not None}
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return {
        "tokenizer.json": tokenizer.backend.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _difference(ours: ModelConfig, other: ModelConfig) -> str:
    a, b = ours.to_dict(), other.to_dict()
    return ", ".join(f"{k} {b[k]!r}, not {a[k]!r}" for k in a if a[k] != b[k])
