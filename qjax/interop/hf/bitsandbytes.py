"""bitsandbytes: NF4 and FP4 in blocks of the flattened weight, and LLM.int8()."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Self

import jax
import numpy as np

from qjax import numerics
from qjax.format import Format
from qjax.interop.hf import codec
from qjax.interop.hf.codec import KERNEL, Codec, Unfit
from qjax.layout import flattened
from qjax.qtensor import QTensor

_STATE = "weight.quant_state.bitsandbytes__"
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK = 256
# The scales of blocks, quantized again in one vector.
DOUBLE = Format(
    "dynamic8",
    group_size=_NESTED_BLOCK,
    flatten=True,
    remainder="ragged",
    rule="centered",
    offset="float32",
)


class BitsAndBytes(Codec):
    """`quant_method: bitsandbytes`.

    4 bits, for a weight [N, K] whose K is a multiple of the block size:

      weight                 uint8 [N K / 2, 1]   row-major; the even element in the high nibble
      weight.absmax          float32 [N K / block], or uint8 with double quantization
      weight.quant_map       float32 [16]         the levels
      weight.nested_absmax, weight.nested_quant_map   with double quantization
      weight.quant_state.bitsandbytes__nf4            JSON, as bytes

    w = levels[code] absmax; absmax = nested_map[code] nested_absmax + nested_offset. 8 bits:

      weight int8 [N, K], SCB float32 [N]:   w = weight SCB / 127

    A QTensor keeps SCB / 127. That is not invertible in float32: of an imported weight SCB comes
    back the same, of one in 127 of all others it is one unit in the last place off.
    """

    name = "bitsandbytes"

    def __init__(self, bits: int, element: str, block: int, *, double: bool, threshold: float):
        self.bits, self.element, self.block, self.double = bits, element, block, double
        self.threshold = threshold
        self._dtype = "float32"

    # ---- reading ----

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        four = config.get("load_in_4bit") or config.get("_load_in_4bit")
        eight = config.get("load_in_8bit") or config.get("_load_in_8bit")
        if bool(four) == bool(eight):
            raise ValueError("bitsandbytes: exactly one of load_in_4bit and load_in_8bit is true.")
        return cls(
            4 if four else 8,
            config.get("bnb_4bit_quant_type", "nf4"),
            64,
            double=bool(config.get("bnb_4bit_use_double_quant")),
            threshold=float(config.get("llm_int8_threshold", 6.0)),
        )

    def find(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        if self.bits == 8:
            return codec.find_parts(names, "SCB", ("weight", "SCB", "weight_format"))
        out = {}
        states = [f"{_STATE}{kind}" for kind in ("nf4", "fp4")]
        parts = ("weight", *(f"weight.{p}" for p in ("absmax", "quant_map", "nested_absmax",
                 "nested_quant_map")), *states)  # fmt: skip
        for state in states:
            out |= codec.find_parts(names, state, parts)
        return out

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        if "weight" not in parts:
            raise ValueError(f"weight {name!r}: has statistics, but no tensor of its own.")
        return self._decode8(name, parts) if self.bits == 8 else self._decode4(name, parts)

    def _decode8(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        w, absmax = parts["weight"], parts["SCB"]
        codec.require_dtype(name, w, np.int8)
        if int(np.asarray(parts.get("weight_format", 0)).reshape(-1)[0]) != 0:
            raise NotImplementedError(f"{name}: a tiled weight_format; only row-major is read.")
        codec.require_shape(f"{codec.module_of(name)}.SCB", absmax, w.shape[:1])
        fmt = Format("int8", activation="int8", outliers=self.threshold or None)
        scale = (absmax.astype(np.float32) / np.float32(127))[None]
        return QTensor(np.ascontiguousarray(w.T), scale, None, fmt, KERNEL, "float32", 0)

    def _decode4(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        element = next(kind for kind in ("nf4", "fp4") if _STATE + kind in parts)
        try:
            state = json.loads(parts[_STATE + element].tobytes())
            block, (N, K) = state["blocksize"], state["shape"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"tensor '{name}.quant_state…': its JSON is damaged.") from None
        if "weight.absmax" not in parts:
            raise ValueError(f"weight {name!r}: has no tensor '{name}.absmax'.")
        if K % block:
            raise NotImplementedError(
                f"{name}: its blocks of {block} cross rows of {K}, which a QTensor has no groups"
                " for."
            )
        levels = parts.get("weight.quant_map")
        ours = _levels(element)
        if levels is not None and not np.array_equal(levels, ours):
            raise NotImplementedError(f"{name}: its levels (quant_map) are not those of {element}.")
        # Storage in another type holds the same bytes.
        data = np.ascontiguousarray(parts["weight"]).reshape(-1).view(np.uint8)
        codec.require_shape(name, data, (N * K // 2,))
        data = ((data >> 4) | (data << 4)).reshape(N, K // 2).T
        G = K // block
        absmax = parts["weight.absmax"].reshape(-1)
        codec.require_shape(f"{name}.absmax", absmax, (N * G,))
        scale: Any = np.ascontiguousarray(absmax.reshape(N, G).T)
        if "weight.nested_absmax" in parts:
            scale = _nested(name, parts, state, N, G)
        kind = DOUBLE if isinstance(scale, QTensor) else "float32"
        fmt = Format(element, group_size=block, scale=kind)
        return QTensor(np.ascontiguousarray(data), scale, None, fmt, KERNEL, "float32", 0)

    # ---- writing ----

    @classmethod
    def check(cls, name: str, qt: QTensor) -> None:
        codec.refuse_extras(qt)
        fmt = qt.format
        *lead, K, N = qt.canonical_shape
        if lead:
            raise Unfit(f"its shape {(*lead, K, N)} is not [K, N]")
        if fmt.element == "int8":
            if fmt.activation != "int8" or fmt.activation_scale != "token" or fmt.zero_point:
                raise Unfit("LLM.int8() quantizes inputs to int8 with a step for each token")
            codec.plain_scale(fmt, "float32")
            if fmt.granularity != "channel":
                raise Unfit(f"LLM.int8() has one scale for each output, not {fmt.granularity}")
            return
        codec.refuse_activation(fmt)
        if fmt.element not in ("nf4", "fp4"):
            raise Unfit(f"its element is {fmt.element}, not nf4, fp4 or int8")
        if fmt.group_columns != 1 or (fmt.group_size or K) not in _BLOCKS:
            raise Unfit(f"its groups are not of a size that there is: {_BLOCKS}")
        if isinstance(fmt.scale, Format):
            # How scales were chosen is no matter of storage.
            if dict(fmt.scale.to_dict(), rule=0) != dict(DOUBLE.to_dict(), rule=0):
                raise Unfit(f"its scales are ({fmt.scale}), not in preset 'nf4-bnb's own way")
            offsets = np.asarray(qt.scale.zero)
            if not (offsets == offsets[:1]).all():
                raise Unfit("the scales of its scales have several offsets")
        else:
            codec.plain_scale(fmt, "float32", "bfloat16", "float16")

    @classmethod
    def of_weights(cls, weights: Mapping[str, QTensor]) -> Self:
        element = codec.common(weights, "element", lambda qt: qt.format.element)
        if element == "int8":
            threshold = codec.common(weights, "threshold", lambda qt: qt.format.outliers)
            return cls(8, "nf4", 64, double=False, threshold=threshold or 0.0)
        block = codec.common(weights, "block size", _block)
        double = codec.common(
            weights, "double quantization", lambda qt: isinstance(qt.format.scale, Format)
        )
        made = cls(4, element, block, double=double, threshold=6.0)
        made._dtype = codec.common(weights, "dtype", lambda qt: qt.dtype)
        return made

    def encode(self, name: str, qt: QTensor) -> dict[str, np.ndarray]:
        module = codec.module_of(name)
        if self.bits == 8:
            return {
                name: np.asarray(qt.data).T,
                f"{module}.SCB": _times_127(np.asarray(qt.scale)[0]),
                f"{module}.weight_format": np.asarray(0, np.uint8),
            }
        K, N = qt.canonical_shape
        data = np.asarray(qt.data).T
        state: dict[str, Any] = {
            "quant_type": self.element,
            "blocksize": self.block,
            "dtype": qt.dtype,
            "shape": [N, K],
        }
        out = {
            name: ((data >> 4) | (data << 4)).reshape(-1, 1),
            f"{name}.quant_map": _levels(self.element),
        }
        if self.double:
            scale = jax.tree.map(np.asarray, qt.scale)
            out[f"{name}.absmax"] = scale.data.reshape(-1)
            out[f"{name}.nested_absmax"] = scale.scale.reshape(-1)
            out[f"{name}.nested_quant_map"] = _levels("dynamic8")
            state |= {
                "nested_blocksize": _NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": float(scale.zero.reshape(-1)[0]),
            }
        else:
            out[f"{name}.absmax"] = np.asarray(qt.scale).astype(np.float32).T.reshape(-1)
        text = json.dumps(state).encode()
        out[f"{module}.{_STATE}{self.element}"] = np.frombuffer(text, np.uint8)
        return out

    def config(self, floats: Collection[str]) -> dict[str, Any]:
        four = self.bits == 4
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_quant_type": self.element,
            "bnb_4bit_use_double_quant": self.double,
            "bnb_4bit_compute_dtype": self._dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": self.threshold,
            "llm_int8_skip_modules": sorted(floats),
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }


def _levels(element: str) -> np.ndarray:
    # FP4 has two codes of zero, and the file no negative one.
    return np.asarray(numerics.get_element(element).levels, np.float32) + np.float32(0)


def _block(qt: QTensor) -> int:
    return qt.format.group_size or qt.canonical_shape[-2]


def _nested(name: str, parts: Mapping[str, np.ndarray], state: dict, N: int, G: int) -> QTensor:
    """Returns the scales [G, N] of which the file keeps 8-bit codes, column after column."""
    levels = _levels("dynamic8")
    theirs = parts.get("weight.nested_quant_map")
    # The table is made anew in float32 arithmetic by each writer.
    same = theirs is None or np.allclose(theirs, levels, rtol=0, atol=2.0**-23)
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not same or block != _NESTED_BLOCK or offset is None:
        raise NotImplementedError(
            f"{name}: its scales are quantized with another table or other blocks than of"
            f" {_NESTED_BLOCK}."
        )
    scale = parts["weight.nested_absmax"].reshape(-1, 1)
    codec.require_dtype(f"{name}.absmax", parts["weight.absmax"], np.uint8)
    codec.require_shape(f"{name}.nested_absmax", scale, (-(-N * G // block), 1))
    return QTensor(
        parts["weight.absmax"].reshape(-1, 1), scale, np.full_like(scale, np.float32(offset)),
        DOUBLE.fit(N * G), flattened(G), "float32", 0,
    )  # fmt: skip


def _times_127(scale: np.ndarray) -> np.ndarray:
    """Returns the float32 that divided by 127 is `scale`, where there is one; else the nearest."""
    n = np.float32(127)
    best = np.asarray(scale * n)
    for other in (np.nextafter(best, np.float32(np.inf)), np.nextafter(best, -np.float32(np.inf))):
        best = np.where((best / n != scale) & (other / n == scale), other, best)
    return best
