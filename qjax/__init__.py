"""qjax: functional quantization for JAX and Flax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qjax import fp8, lora, qat
from qjax.checkpoint import load, save
from qjax.errors import QuantizationError
from qjax.format import Format
from qjax.policy import Policy, Rule, presets
from qjax.prepare import prepare, restore
from qjax.qtensor import QTensor, is_qtensor
from qjax.quantize import dequantize, quantize
from qjax.recipe import Recipe
from qjax.summary import Summary, summary
from qjax.transform.apply import apply, explain
from qjax.transform.calibrate import Calibration, CalibrationError, calibrate
from qjax.transform.fake_quant import fake_quant
from qjax.transform.usage import usage

if TYPE_CHECKING:
    from qjax import export
    from qjax.planning import plan

__all__ = [
    "Calibration",
    "CalibrationError",
    "Format",
    "Policy",
    "QTensor",
    "QuantizationError",
    "Recipe",
    "Rule",
    "Summary",
    "apply",
    "calibrate",
    "dequantize",
    "explain",
    "export",
    "fake_quant",
    "fp8",
    "is_qtensor",
    "load",
    "lora",
    "plan",
    "prepare",
    "presets",
    "qat",
    "quantize",
    "restore",
    "save",
    "summary",
    "usage",
]


def __getattr__(name: str) -> Any:
    if name == "export":  # imports Flax and tokenizers, which nothing else here needs
        return importlib.import_module("qjax.export")
    if name == "plan":  # imports Flax
        return importlib.import_module("qjax.planning").plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
