"""AWQ: 4-bit codes packed along N, eight to a word in an order of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self

import numpy as np

from qjax.interop.hf import codec
from qjax.interop.hf.codec import Codec, Ints, Unfit
from qjax.qtensor import QTensor

# Nibble i of a word holds the column _ORDER[i] of its eight.
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_PARTS = ("qweight", "qzeros", "scales")


class AWQ(Codec):
    """`quant_method: awq`, version GEMM.

    Per linear layer with K inputs, N outputs and G groups:

      qweight  int32 [K, N / 8]
      qzeros   int32 [G, N / 8]
      scales   float16 [G, N]

    w[k, n] = (q[k, n] - z[k div g, n]) scales[k div g, n]. The scales that AWQ searched for are
    multiplied into the weights and divided out of what comes before. Weights whose zero points are
    8 everywhere, in the whole model, become signed codes without zero points.
    """

    name = "awq"

    def __init__(self, group_size: int | None):
        self.group_size = group_size
        self.sym = False

    # ---- reading ----

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        bits = config.get("bits", config.get("w_bit"))
        if bits != 4:
            raise NotImplementedError(f"AWQ has 4 bits, the config says {bits!r}.")
        version = config.get("version") or config.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise NotImplementedError(
                f"AWQ version {version!r} is the layout of another kernel; only 'gemm' is read."
            )
        return cls(codec.group_size_of(config.get("group_size", config.get("q_group_size"))))

    def find(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        return codec.find_parts(names, "qweight", _PARTS)

    def survey(self, weights: Mapping[str, Mapping[str, str]], read: codec.Read) -> None:
        # The config does not tell symmetric weights apart: their zero points do.
        middle = np.int32(-0x77777778)  # 0x88888888
        self.sym = all(
            "qzeros" in parts and (read(parts["qzeros"]) == middle).all()
            for parts in weights.values()
        )

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        if missing := set(_PARTS) - set(parts):
            raise ValueError(f"weight {name!r}: has no tensor {sorted(missing)[0]!r}.")
        qweight, scale = parts["qweight"], parts["scales"]
        codec.require_dtype(f"{name}: qweight", qweight, np.int32)
        codec.require_dtype(f"{name}: scales", scale, np.float16, "bfloat16", np.float32)
        K, words = qweight.shape
        G = K // (self.group_size or K)
        codec.require_shape(f"{name}: scales", scale, (G, 8 * words))
        codec.require_shape(f"{name}: qzeros", parts["qzeros"], (G, words))
        zero = None if self.sym else unpack(parts["qzeros"])
        return codec.from_ints(Ints(unpack(qweight), scale, zero), 4, self.group_size)

    # ---- writing ----

    @classmethod
    def check(cls, name: str, qt: QTensor) -> None:
        codec.refuse_extras(qt)
        codec.refuse_activation(qt.format)
        if (bits := codec.check_ints(qt.format)) != 4:
            raise Unfit(f"it has {bits} bits, not 4")
        codec.plain_scale(qt.format, "float16", "bfloat16")
        if qt.format.granularity not in ("group", "channel"):
            raise Unfit(f"its scales are shared by columns ({qt.format.granularity})")
        *lead, K, N = qt.canonical_shape
        if lead or N % 8:
            raise Unfit(f"its shape {(*lead, K, N)} is not [K, N] with N a multiple of 8")
        if codec.module_of(name) == "lm_head":
            raise Unfit("readers keep the head in float")

    @classmethod
    def of_weights(cls, weights: Mapping[str, QTensor]) -> Self:
        return cls(codec.common(weights, "group_size", lambda qt: qt.format.group_size))

    def encode(self, name: str, qt: QTensor) -> dict[str, np.ndarray]:
        module = codec.module_of(name)
        codes, scale, zero = codec.to_ints(qt, positive=True)
        zero = np.full(scale.shape, 8, np.uint8) if zero is None else zero
        return {
            f"{module}.qweight": pack(codes),
            f"{module}.qzeros": pack(zero),
            f"{module}.scales": scale,
        }

    def config(self, floats: Collection[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": sorted(floats) or None,
        }


def pack(codes: np.ndarray) -> np.ndarray:
    """Packs codes [R, N] below 16 along N: int32 [R, N / 8]."""
    fields = codes.reshape(len(codes), -1, 8)[..., _ORDER].astype(np.uint32)
    return np.bitwise_or.reduce(fields << (4 * np.arange(8, dtype=np.uint32)), axis=-1).view(
        np.int32
    )


def unpack(words: np.ndarray) -> np.ndarray:
    """Inverse of `pack`."""
    words = np.ascontiguousarray(words).view(np.uint32)
    fields = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    return fields[..., np.argsort(_ORDER)].astype(np.uint8).reshape(len(words), -1)
