"""The registry of quantization methods, by the names that users and configs give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qjax.interop.damage import naming
from qjax.interop.hf.awq import AWQ
from qjax.interop.hf.bitsandbytes import BitsAndBytes
from qjax.interop.hf.codec import Codec
from qjax.interop.hf.compressed_tensors import CompressedTensors
from qjax.interop.hf.fp8 import FP8
from qjax.interop.hf.gptq import GPTQ
from qjax.interop.hf.mxfp4 import MXFP4

# In the order in which one that holds a weight is proposed. The names are those of `quant_method`.
METHODS: Mapping[str, type[Codec]] = {
    c.name: c for c in (CompressedTensors, GPTQ, AWQ, BitsAndBytes, FP8, MXFP4)
}
ALIASES = {"bnb": "bitsandbytes"}


def method(name: str) -> type[Codec]:
    """Returns the codec of a method.

    Raises:
      ValueError: if there is none of that name.
    """
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise ValueError(
            f"no Hugging Face format is called {name!r}; there are {', '.join(METHODS)}."
        )
    return METHODS[name]


def reader(config: Mapping[str, Any]) -> Codec:
    """Returns the codec that a `quantization_config` describes.

    Raises:
      ValueError: if the config is damaged.
      NotImplementedError: if its method is not read here.
    """
    name = str(config.get("quant_method"))
    if name not in METHODS:
        raise NotImplementedError(
            f"quant_method {name!r} is not supported, only {', '.join(METHODS)}."
        )
    with naming(f"quantization_config ({name})"):
        return METHODS[name].of_config(config)
