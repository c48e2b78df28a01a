"""Which formats hold a weight as it is: what an error proposes when one does not."""

from __future__ import annotations

import contextlib

from qjax.interop.gguf import GGUFError, holding
from qjax.interop.hf.codec import Unfit
from qjax.interop.hf.methods import METHODS
from qjax.qtensor import QTensor


def holders(name: str, qt: QTensor) -> list[str]:
    """Returns the targets of `qjax convert` that keep a weight's codes bit for bit.

    Args:
      name: of the weight, as in a Hugging Face directory.
      qt: the weight.
    """
    out = []
    for key, codec in METHODS.items():
        try:
            codec.check(name, qt)
        except Unfit:
            continue
        out.append(f"hf:{key}")
    with contextlib.suppress(GGUFError):
        out.append(f"gguf ({holding(qt).name})")
    return [*out, "orbax (a qjax checkpoint)"]
