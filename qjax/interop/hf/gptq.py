"""GPTQ: integer codes packed along K, zero points stored as they are or less one, act-order."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Self

import numpy as np

from qjax.interop.hf import codec
from qjax.interop.hf.codec import Codec, Ints, Unfit
from qjax.qtensor import QTensor

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_BITS = (2, 3, 4, 8)


class GPTQ(Codec):
    """`quant_method: gptq`, in the packing of AutoGPTQ and GPTQModel.

    Per linear layer with K inputs, N outputs, b bits and G groups:

      qweight  int32 [K b / 32, N]   each column a stream of codes, least significant bit first
      qzeros   int32 [G, N b / 32]   each row a stream of zero points: z - 1 in version 1, z in 2
      scales   float16 [G, N]
      g_idx    int32 [K]             the group of every row, in its original order

    w[k, n] = (q[k, n] - z[g_idx[k], n]) scales[g_idx[k], n], all unsigned. Symmetric weights have
    z = 2^(b - 1) everywhere, and become signed codes without zero points.
    """

    name = "gptq"

    def __init__(self, bits: int, group_size: int | None, *, sym: bool, version: int):
        self.bits, self.group_size, self.sym, self.version = bits, group_size, sym, version
        self._dynamic: dict[str, dict[str, Any]] = {}
        self._weights: dict[str, tuple[int, int | None]] = {}
        self._has_order = False

    # ---- reading ----

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        bits = config.get("bits")
        layout = config.get("checkpoint_format") or config.get("format") or "gptq"
        versions = {"gptq": 1, "gptq_v2": 2}
        if layout not in versions:
            raise NotImplementedError(
                f"checkpoint_format {layout!r} is the layout of one kernel; only 'gptq' and"
                " 'gptq_v2' are read."
            )
        if bits not in _BITS:
            raise NotImplementedError(f"{bits!r} bits are not supported, only 2, 3, 4 and 8.")
        made = cls(
            bits,
            codec.group_size_of(config.get("group_size")),
            sym=bool(config.get("sym", False)),
            version=versions[layout],
        )
        made._dynamic = dict(config.get("dynamic") or {})
        return made

    def find(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        return codec.find_parts(names, "qweight", _PARTS)

    def survey(self, weights: Mapping[str, Mapping[str, str]], read: codec.Read) -> None:
        """Finds out by the zero points which version they are of, and whether all are symmetric.

        Files of version 2 under the label of version 1 exist. A symmetric weight tells: its zero
        points are 2^(b - 1) - 1 in version 1, 2^(b - 1) in version 2, everywhere.
        """
        if not self.sym:
            return
        seen = set()
        for name, parts in weights.items():
            bits, _ = self._options(name)
            fields = _fields(read(parts["qzeros"]), bits)
            values = np.unique(fields).tolist()
            middle = 2 ** (bits - 1)
            seen |= {{middle - 1: 1, middle: 2}.get(v, 0) for v in values}
        if seen in ({1}, {2}):
            (version,) = seen
            if version != self.version:
                warnings.warn(
                    f"GPTQ: the config says version {self.version} of the zero points, but they are"
                    f" those of version {version} everywhere; read as version {version}.",
                    stacklevel=2,
                )
            self.version = version
        else:  # the label `sym` is wrong, or speaks of something else
            self.sym = False

    def _options(self, name: str) -> tuple[int, int | None]:
        """Returns bits and group size of a weight; `dynamic` rules override them."""
        bits, group_size = self.bits, self.group_size
        for pattern, fields in self._dynamic.items():
            if pattern.startswith("-:"):
                continue
            if re.match(pattern.removeprefix("+:"), codec.module_of(name)):
                bits = fields.get("bits", bits)
                if "group_size" in fields:
                    group_size = codec.group_size_of(fields["group_size"])
                break
        if bits not in _BITS:
            raise NotImplementedError(f"{name}: {bits!r} bits; only 2, 3, 4 and 8 are read.")
        return bits, group_size

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        bits, group_size = self._options(name)
        if missing := {"qweight", "qzeros", "scales"} - set(parts):
            raise ValueError(f"weight {name!r}: has no tensor {sorted(missing)[0]!r}.")
        qweight, scale = parts["qweight"], parts["scales"]
        codec.require_dtype(f"{name}: qweight", qweight, np.int32)
        codec.require_dtype(f"{name}: scales", scale, np.float16, "bfloat16", np.float32)
        rows, N = qweight.shape
        K = rows * 32 // bits
        G = K // (group_size or K)
        codec.require_shape(f"{name}: scales", scale, (G, N))
        codec.require_shape(f"{name}: qzeros", parts["qzeros"], (G, N * bits // 32))
        perm = None
        if "g_idx" in parts:
            perm = codec.order_of(f"{name}: g_idx", parts["g_idx"], K, group_size)
        codes = codec.in_order(codec.unpack_words(qweight, bits, K), perm)
        zero = None if self.sym else self._zeros(name, parts["qzeros"], bits)
        return codec.from_ints(Ints(codes, scale, zero), bits, group_size, perm=perm)

    def _zeros(self, name: str, qzeros: np.ndarray, bits: int) -> np.ndarray:
        stored = _fields(qzeros, bits)
        if self.version == 2:
            return stored
        if not (stored == 2**bits - 1).any():
            return stored + 1
        # A zero point of 0 was stored as all ones. Whoever subtracted one from whole words borrowed
        # from the next field, and adding to whole words gives that back.
        warnings.warn(
            f"{name}: has zero points of 0, for which version 1 of GPTQ has no code; they are read"
            " as its usual writer means them.",
            stacklevel=2,
        )
        if bits == 3:
            return (stored + 1) & 7
        ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
        return _fields((qzeros.view(np.uint32) + ones).view(np.int32), bits)

    # ---- writing ----

    @classmethod
    def check(cls, name: str, qt: QTensor) -> None:
        codec.refuse_extras(qt, perm=True)
        codec.refuse_activation(qt.format)
        bits = codec.check_ints(qt.format)
        if bits not in _BITS:
            raise Unfit(f"it has {bits} bits, not 2, 3, 4 or 8")
        codec.plain_scale(qt.format, "float16", "bfloat16")
        if qt.format.granularity not in ("group", "channel"):
            raise Unfit(f"its scales are shared by columns ({qt.format.granularity})")
        *lead, K, N = qt.canonical_shape
        if lead or K % 32 or N % 32:
            raise Unfit(f"its shape {(*lead, K, N)} is not [K, N] with both multiples of 32")

    @classmethod
    def of_weights(cls, weights: Mapping[str, QTensor]) -> Self:
        options = {n: (qt.element.bits, qt.format.group_size) for n, qt in weights.items()}
        (bits, group_size), _ = Counter(options.values()).most_common(1)[0]
        sym = not any(codec.has_zeros(qt) for qt in weights.values())
        # Version 1 has no code for a zero point of 0.
        lowest = 1 if sym else min(_lowest_zero(qt) for qt in weights.values())
        made = cls(bits, group_size, sym=sym, version=1 if lowest else 2)
        made._weights = options
        made._has_order = any(qt.perm is not None for qt in weights.values())
        return made

    def encode(self, name: str, qt: QTensor) -> dict[str, np.ndarray]:
        module = codec.module_of(name)
        bits = qt.element.bits
        K, _ = qt.canonical_shape
        codes, scale, zero = codec.to_ints(qt, positive=True)
        zero = np.full(scale.shape, 2 ** (bits - 1), np.uint8) if zero is None else zero
        stored = zero - (1 if self.version == 1 else 0)
        return {
            f"{module}.qweight": codec.pack_words(codec.from_order(codes, qt.perm), bits),
            f"{module}.qzeros": codec.pack_words(stored.T, bits).T,
            f"{module}.scales": scale,
            f"{module}.g_idx": codec.groups_of(qt.perm, K, qt.format.group_size),
        }

    def config(self, floats: Collection[str]) -> dict[str, Any]:
        dynamic: dict[str, Any] = {f"-:^{re.escape(m)}$": {} for m in floats if m != "lm_head"}
        for name, (bits, group_size) in self._weights.items():
            if (bits, group_size) != (self.bits, self.group_size):
                rule = f"+:^{re.escape(codec.module_of(name))}$"
                dynamic[rule] = {"bits": bits, "group_size": group_size or -1}
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size or -1,
            "sym": self.sym,
            "desc_act": self._has_order,
            "lm_head": "lm_head.weight" in self._weights,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": ["qjax"]},
        }

    def files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return {"quantize_config.json": config}


def _fields(qzeros: np.ndarray, bits: int) -> np.ndarray:
    """Returns the fields [G, N] of packed zero points [G, N b / 32]."""
    return codec.unpack_words(qzeros.T, bits, qzeros.shape[1] * 32 // bits).T


def _lowest_zero(qt: QTensor) -> int:
    zero = codec.positive_zeros(qt)
    return 2 ** (qt.element.bits - 1) if zero is None else int(zero.min())
