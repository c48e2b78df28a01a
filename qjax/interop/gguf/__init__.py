"""GGUF, the file format of llama.cpp."""

from qjax.interop.gguf.blocks import decode, from_qtensor, holding, to_qtensor, type_of
from qjax.interop.gguf.errors import GGUFError
from qjax.interop.gguf.mixes import MIXES
from qjax.interop.gguf.reader import GGUFFile, TensorInfo, open_gguf
from qjax.interop.gguf.types import BY_NAME, TENSOR_TYPES, TensorType
from qjax.interop.gguf.writer import Tensor, typed_metadata, write_gguf

__all__ = [
    "BY_NAME",
    "MIXES",
    "TENSOR_TYPES",
    "GGUFError",
    "GGUFFile",
    "Tensor",
    "TensorInfo",
    "TensorType",
    "decode",
    "from_qtensor",
    "holding",
    "open_gguf",
    "to_qtensor",
    "type_of",
    "typed_metadata",
    "write_gguf",
]
