"""MXFP4 experts, as gpt-oss keeps them: E2M1 codes in blocks of 32 under a power of two."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self

import numpy as np

from qjax.format import Format
from qjax.interop.hf import codec
from qjax.interop.hf.codec import KERNEL, Codec, Unfit
from qjax.qtensor import QTensor


class MXFP4(Codec):
    """`quant_method: mxfp4`: the experts of a layer in two tensors, with N outputs and K inputs.

      X_blocks  uint8 [E, N, K / 32, 16]   element 2i in the low nibble of byte i
      X_scales  uint8 [E, N, K / 32]       2^(scale - 127)

    They are read as [E, K, N], as the float model keeps them. For gpt-oss's `gate_up_proj` gate and
    up alternate along N.
    """

    name = "mxfp4"

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        return cls()

    def find(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        names = set(names)
        return {
            n.removesuffix("_blocks"): {
                part: n.removesuffix("_blocks") + "_" + part
                for part in ("blocks", "scales")
                if n.removesuffix("_blocks") + "_" + part in names
            }
            for n in sorted(names)
            if n.endswith("_blocks")
        }

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        if "scales" not in parts:
            raise ValueError(f"weight {name!r}: has blocks, but no tensor '{name}_scales'.")
        blocks, scales = parts["blocks"], parts["scales"]
        codec.require_dtype(f"{name}_blocks", blocks, np.uint8)
        codec.require_dtype(f"{name}_scales", scales, np.uint8)
        if blocks.ndim < 3 or blocks.shape[-1] != 16:
            raise ValueError(
                f"tensor '{name}_blocks' must be [.., N, K / 32, 16], got {blocks.shape}."
            )
        codec.require_shape(f"{name}_scales", scales, blocks.shape[:-1])
        data = blocks.reshape(*blocks.shape[:-2], -1)
        return QTensor(
            np.ascontiguousarray(data.swapaxes(-1, -2)),
            np.ascontiguousarray(scales.swapaxes(-1, -2)),
            None, Format("e2m1", group_size=32, scale="e8m0"), KERNEL, "float32", 0,
        )  # fmt: skip

    @classmethod
    def check(cls, name: str, qt: QTensor) -> None:
        codec.refuse_extras(qt)
        codec.refuse_activation(qt.format)
        fmt = qt.format
        if (fmt.element, fmt.group_size, fmt.group_columns, fmt.scale) != ("e2m1", 32, 1, "e8m0"):
            raise Unfit("it is not e2m1 in groups of 32 with e8m0 scales")
        if len(qt.canonical_shape) != 3:
            raise Unfit(f"its shape {qt.canonical_shape} is not that of experts, [E, K, N]")

    @classmethod
    def of_weights(cls, weights: Mapping[str, QTensor]) -> Self:
        return cls()

    def encode(self, name: str, qt: QTensor) -> dict[str, np.ndarray]:
        data = np.asarray(qt.data).swapaxes(-1, -2)
        return {
            f"{name}_blocks": data.reshape(*data.shape[:-1], -1, 16),
            f"{name}_scales": np.asarray(qt.scale).swapaxes(-1, -2),
        }

    def config(self, floats: Collection[str]) -> dict[str, Any]:
        return {"quant_method": "mxfp4", "modules_to_not_convert": sorted(floats)}
