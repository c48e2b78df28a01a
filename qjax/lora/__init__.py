"""Low-rank adapters on a frozen base, packed or float: LoRA and QLoRA for unmodified functions."""

import importlib
from typing import TYPE_CHECKING, Any

from qjax.guard import NonFiniteError, check_loss
from qjax.lora.adapter import Adapter, init
from qjax.lora.merge import MergedRow, MergeReport, merge, merge_quantized
from qjax.lora.several import combine, select, stack
from qjax.lora.store import load, save
from qjax.lora.transform import apply, explain

if TYPE_CHECKING:
    from qjax.lora.optimizer import MasterWeights, master_weights, offload
    from qjax.lora.peft import load_peft, save_peft

__all__ = [
    "Adapter",
    "MasterWeights",
    "MergeReport",
    "MergedRow",
    "NonFiniteError",
    "apply",
    "check_loss",
    "combine",
    "explain",
    "init",
    "load",
    "load_peft",
    "master_weights",
    "merge",
    "merge_quantized",
    "offload",
    "save",
    "save_peft",
    "select",
    "stack",
]


# Names whose modules import optax or flax, which take a second: imported on their first use.
_LAZY = {
    "MasterWeights": "optimizer",
    "load_peft": "peft",
    "master_weights": "optimizer",
    "offload": "optimizer",
    "save_peft": "peft",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"qjax.lora.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
