"""Low-rank adapters on a frozen base, packed or float: LoRA and QLoRA for unmodified functions."""

from qjax.lora.adapter import Adapter, init
from qjax.lora.several import combine, select, stack
from qjax.lora.transform import apply, explain

__all__ = ["Adapter", "apply", "combine", "explain", "init", "select", "stack"]
