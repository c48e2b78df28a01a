"""Reading a Hugging Face directory: arrays and QTensors, one at a time, of any architecture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.interop.damage import naming
from qjax.interop.hf.codec import Codec
from qjax.interop.hf.methods import reader
from qjax.interop.hf.safetensors import Directory, TensorInfo
from qjax.qtensor import QTensor

# Where tools keep the quantization config, if not in config.json.
_OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# What a quantized model's files hold beside its weights, and no product needs.
_RUNTIME = (".k_scale", ".v_scale", ".q_scale", ".output_scale")


class HFDirectory:
    """An open directory.

    Attributes:
      path: where it is.
      config: config.json.
      codec: reads the quantized weights; None for a float model.
      quantized: by the name of each quantized weight, the tensors that it consists of.
      names: of all weights, float and quantized, as a float checkpoint calls them.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = read_json(path / "config.json")
        self._files = Directory(path)
        tensors = self._files.tensors
        self.codec: Codec | None = None
        self.quantized: dict[str, dict[str, str]] = {}
        if quantization := _quantization(path, self.config):
            with naming(path):
                self.codec = reader(quantization)
                self.quantized = self.codec.find(tensors)
                self.codec.survey(self.quantized, self._files.read)
        parts = {tensor for found in self.quantized.values() for tensor in found.values()}
        odd = sorted(n for n in set(tensors) - parts if n.endswith(_RUNTIME))
        if odd and self.codec is not None:
            raise NotImplementedError(
                f"{path}: tensor {odd[0]!r} quantizes something else than weights and inputs of"
                " products, such as a cache of keys and values; that is not supported."
            )
        self.names = frozenset((set(tensors) - parts) | set(self.quantized))

    def stored(self, name: str) -> list[TensorInfo]:
        """Returns where the tensors of a weight lie."""
        parts = self.quantized.get(name)
        return [self._files.tensors[t] for t in (parts.values() if parts else (name,))]

    def read(self, name: str) -> np.ndarray | QTensor:
        """Returns a weight: an array as the file has it ([N, K]), or a QTensor [K, N].

        Codes are those of the file, bit for bit. The arrays inside are numpy's; the logical dtype
        is float32.

        Raises:
          KeyError: if there is no such weight.
          ValueError: if its tensors contradict each other.
          NotImplementedError: if a QTensor cannot say what they mean.
        """
        if name not in self.quantized:
            return self._files.read(name)
        parts = {part: self._files.read(t) for part, t in self.quantized[name].items()}
        assert self.codec is not None
        with naming(self.path):
            return self.codec.decode(name, parts)


def open_hf(path: str | os.PathLike[str]) -> HFDirectory:
    """Opens a directory of config.json and safetensors, of any architecture.

    Read are float models and, by `quant_method`, those of `qjax.interop.hf.METHODS`.

    Raises:
      FileNotFoundError: if it has no config.json or no safetensors.
      ValueError: if a file is damaged.
      NotImplementedError: if it is quantized in a way that is not read here.
    """
    return HFDirectory(Path(path))


def _quantization(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if found := config.get("quantization_config"):
        if not isinstance(found, dict):
            raise ValueError(f"{path / 'config.json'}: its quantization_config is no table.")
        return found
    for file, name in _OLD_CONFIGS.items():
        if (path / file).is_file():
            return {"quant_method": name, **read_json(path / file)}
    if (path / "hf_quant_config.json").is_file():
        raise NotImplementedError(
            f"{path}: has an hf_quant_config.json of ModelOpt, which is not supported."
        )
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON table.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no JSON, or no table.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent}: has no {path.name}, so it is no Hugging Face model."
        ) from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON ({e}).") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: holds no table, but {type(table).__name__}.")
    return table
