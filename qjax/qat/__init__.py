"""Quantization-aware training: everything beside `qjax.fake_quant` itself.

params = qat.init(params, policy)                      # learned steps, as leaves of the tree
tx = optax.chain(qat.scale_by_lsq(params, policy), optax.adamw(1e-4, mask=qat.decay_mask))
phase = qat.Schedule(start=100, freeze=900)(step)      # traced: compiles once
out, ranges = qat.tracked(fn, policy, phase=phase)(params, ranges, x)
qparams = qjax.quantize(qat.attach(params, policy, ranges), policy)
"""

import importlib
from typing import TYPE_CHECKING, Any

from qjax.guard import NonFiniteError, check_finite
from qjax.latent import Latent, is_latent, values
from qjax.qat.learned import attach, from_quantized, from_steps, in_steps, init
from qjax.qat.ranges import Range
from qjax.qat.schedules import Phase, Schedule
from qjax.qat.tracking import init_ranges, tracked

if TYPE_CHECKING:
    from qjax.qat.optim import (
        decay_mask,
        freeze_steps,
        gradient_scales,
        labels,
        scale_by_lsq,
        step_mask,
        train_only,
    )

__all__ = [
    "Latent",
    "NonFiniteError",
    "Phase",
    "Range",
    "Schedule",
    "attach",
    "check_finite",
    "decay_mask",
    "freeze_steps",
    "from_quantized",
    "from_steps",
    "gradient_scales",
    "in_steps",
    "init",
    "init_ranges",
    "is_latent",
    "labels",
    "scale_by_lsq",
    "step_mask",
    "tracked",
    "train_only",
    "values",
]

# Its module imports optax, which takes a second: imported on first use.
_OF_OPTAX = (
    "decay_mask", "freeze_steps", "gradient_scales", "labels", "scale_by_lsq", "step_mask",
    "train_only",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _OF_OPTAX:
        return getattr(importlib.import_module("qjax.qat.optim"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
