"""Quantized Hugging Face directories: read into QTensors and written, one file a method."""

from qjax.interop.hf.codec import Codec, Unfit
from qjax.interop.hf.directory import HFDirectory, open_hf
from qjax.interop.hf.methods import METHODS
from qjax.interop.hf.write import ExportError, Weight, verify_hf, write_hf

__all__ = [
    "METHODS",
    "Codec",
    "ExportError",
    "HFDirectory",
    "Unfit",
    "Weight",
    "open_hf",
    "verify_hf",
    "write_hf",
]
