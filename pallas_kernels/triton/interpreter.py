"""Runs kernels in Triton on the CPU, in its interpreter, on NumPy arrays.

Triton 3.9 interprets `tl.dot` of bfloat16 on the raw bits, and no PTX: kernels are run in float16
and with codes decoded in Triton.
"""

# `triton` is optional, and the type checker takes it for this folder.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
from triton import knobs
from triton.runtime.interpreter import (
    GridExecutor,
)

_PACKAGE = "pallas_kernels.triton"


class _Buffer:
    """What the interpreter wants of an array: an address and a type."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data


class _OnHost(GridExecutor):
    """Arrays are on the host already; Triton's own way there and back goes through torch."""

    def _init_args_hst(self, args_dev, kwargs):
        return list(args_dev), dict(kwargs)

    def _restore_args_dev(self, *_):
        pass


def interpreted(module: str) -> Any:
    """Returns a copy of a module of this package whose kernels can be interpreted.

    Functions decide at their definition whether they are compiled or interpreted, so the modules
    are imported once more, beside those that other code has.
    """
    package = importlib.import_module(_PACKAGE)
    names = [n for n in sys.modules if n.startswith(f"{_PACKAGE}.")]
    modules = {name: sys.modules.pop(name) for name in names}
    attributes = dict(vars(package))
    for name in names:  # `from package import module` looks here first
        vars(package).pop(name.rpartition(".")[2], None)
    before = knobs.runtime.interpret
    try:
        knobs.runtime.interpret = True
        return importlib.import_module(f"{_PACKAGE}.{module}")
    finally:
        knobs.runtime.interpret = before
        for name in [n for n in sys.modules if n.startswith(f"{_PACKAGE}.")]:
            del sys.modules[name]
            vars(package).pop(name.rpartition(".")[2], None)
        sys.modules.update(modules)
        vars(package).update(attributes)


def run(
    kernel: Any,
    *args: Any,
    out: tuple[tuple[int, ...], Any],
    grid: tuple[int, ...],
    **constants: Any,
) -> np.ndarray:
    """Returns what a kernel of an `interpreted` module writes.

    Args:
      *args: arrays and integers, its parameters up to the output.
      out: shape and type of the output, which starts as NaN or the least integer.
      grid: programs along each axis.
      **constants: its constexpr parameters.
    """
    shape, dtype = out
    poison = np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).min
    y = np.full(shape, poison, dtype)
    wrap = lambda a: _Buffer(np.ascontiguousarray(a)) if isinstance(a, np.ndarray) else a
    _OnHost(kernel.fn, kernel.arg_names, grid)(*map(wrap, args), _Buffer(y), **constants)
    return y
