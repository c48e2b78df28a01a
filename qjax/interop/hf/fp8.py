"""FP8 in blocks, as DeepSeek's checkpoints keep it: E4M3 codes, one multiplier for 128 x 128."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self

import ml_dtypes
import numpy as np

from qjax.format import Format
from qjax.interop.hf import codec
from qjax.interop.hf.codec import KERNEL, Codec, Unfit
from qjax.qtensor import QTensor

_E4M3, _E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
_BLOCK = (128, 128)


class FP8(Codec):
    """`quant_method: fp8`.

    Per linear layer with K inputs and N outputs:

      weight            E4M3 [N, K]
      weight_scale_inv  float32 [N / 128, K / 128], or E8M0; the multiplier, despite its name

    w[n, k] = weight[n, k] weight_scale_inv[n div 128, k div 128]. One scale for each row [N], and
    one for the whole weight, are read too. Readers quantize activations to E4M3 in groups of 128
    for each token, Format(activation_scale="group"); weights are read, and written, weight-only.
    """

    name = "fp8"

    def __init__(self, block: tuple[int, int] | None, *, powers_of_two: bool = False):
        self.block, self.powers_of_two = block, powers_of_two

    # ---- reading ----

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        if (fmt := config.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
            raise NotImplementedError(f"fmt {fmt!r} is not supported, only e4m3.")
        if (scheme := config.get("activation_scheme", "dynamic")) != "dynamic":
            raise NotImplementedError(
                f"activation_scheme {scheme!r} is not supported, only 'dynamic'."
            )
        block = config.get("weight_block_size")
        if block is not None and not (
            len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        ):
            raise ValueError(f"weight_block_size {block!r} is no pair of sizes.")
        return cls(block and (block[0], block[1]))

    def find(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        found = codec.find_parts(names, "weight_scale_inv", ("weight", "weight_scale_inv"))
        known = {tensor for parts in found.values() for tensor in parts.values()}
        odd = sorted(n for n in names if n.endswith("_scale_inv") and n not in known)
        if odd:
            raise NotImplementedError(f"tensor {odd[0]!r}: fused FP8 experts are not supported.")
        return found

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        if "weight" not in parts:
            raise ValueError(f"weight {name!r}: has a scale, but no tensor of its own.")
        w, scale = parts["weight"], parts["weight_scale_inv"]
        codec.require_dtype(name, w, _E4M3)
        codec.require_dtype(f"{name}_scale_inv", scale, np.float32, "bfloat16", _E8M0)
        N, K = w.shape
        sizes: dict[str, Any] = {}
        if scale.ndim == 2:
            if self.block is None:
                raise ValueError(f"weight {name!r} has block scales, but no weight_block_size.")
            rows, columns = self.block
            codec.require_shape(f"{name}_scale_inv", scale, (-(-N // rows), -(-K // columns)))
            sizes = {"group_size": columns, "group_columns": rows, "remainder": "ragged"}
        elif scale.size == 1 and scale.ndim < 2:
            scale, sizes = scale.reshape(1, 1), {"group_columns": None}
        else:
            codec.require_shape(f"{name}_scale_inv", scale, (N,))
            scale = scale[:, None]
        kind = scale.dtype.name
        if scale.dtype == _E8M0:
            kind, scale = "e8m0", scale.view(np.uint8)
        fmt = Format("e4m3", scale=kind, **sizes).fit(K)
        return QTensor(
            np.ascontiguousarray(w.T),
            np.ascontiguousarray(scale.T),
            None,
            fmt,
            KERNEL,
            "float32",
            0,
        )

    # ---- writing ----

    @classmethod
    def check(cls, name: str, qt: QTensor) -> None:
        codec.refuse_extras(qt)
        codec.refuse_activation(qt.format)
        fmt = qt.format
        if fmt.element != "e4m3":
            raise Unfit(f"its element is {fmt.element}, not e4m3")
        codec.plain_scale(fmt, "float32", "e8m0")
        if (fmt.group_columns, fmt.group_size) != _BLOCK:
            raise Unfit("its scales are not those of blocks of 128 x 128")
        *lead, K, N = qt.canonical_shape
        if lead or K % 128 or N % 128:
            raise Unfit(
                f"its shape {(*lead, K, N)} has ragged blocks, which common readers cut wrongly"
            )

    @classmethod
    def of_weights(cls, weights: Mapping[str, QTensor]) -> Self:
        kind = codec.common(weights, "scale type", lambda qt: qt.format.scale)
        return cls(_BLOCK, powers_of_two=kind == "e8m0")

    def encode(self, name: str, qt: QTensor) -> dict[str, np.ndarray]:
        scale = np.asarray(qt.scale)
        return {
            name: np.asarray(qt.data).T,
            f"{name}_scale_inv": (scale.view(_E8M0) if self.powers_of_two else scale).T,
        }

    def config(self, floats: Collection[str]) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(_BLOCK),
            "scale_fmt": "ue8m0" if self.powers_of_two else "float",
            "modules_to_not_convert": sorted(floats),
        }
