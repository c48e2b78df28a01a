"""GGUF, the file format of llama.cpp."""

from qjax.interop.gguf.blocks import decode, from_qtensor, to_qtensor, type_of
from qjax.interop.gguf.errors import GGUFError
from qjax.interop.gguf.reader import GGUFFile, TensorInfo, open_gguf
from qjax.interop.gguf.types import BY_NAME, TENSOR_TYPES, TensorType

__all__ = [
    "BY_NAME",
    "TENSOR_TYPES",
    "GGUFError",
    "GGUFFile",
    "TensorInfo",
    "TensorType",
    "decode",
    "from_qtensor",
    "open_gguf",
    "to_qtensor",
    "type_of",
]
