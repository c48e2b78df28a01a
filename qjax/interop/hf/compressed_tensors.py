"""compressed-tensors: integers, FP8, NVFP4 and MX formats, a scheme for each group of modules."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np

from qjax.format import Format
from qjax.interop.hf import codec
from qjax.interop.hf.codec import KERNEL, Codec, Ints, Unfit
from qjax.qtensor import QTensor

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_FLOATS = ("float32", "bfloat16", "float16")
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point",
          "weight_global_scale", "weight_g_idx", "input_scale", "input_zero_point",
          "input_global_scale")  # fmt: skip
_LEGACY = ("sparse-24-bitmask", "sparse-bitmask", "marlin-24")
NVFP4 = Format("e2m1", group_size=16, scale=Format("e4m3", group_columns=None))
MXFP4 = Format("e2m1", group_size=32, scale="e8m0")
MXFP8 = Format("e4m3", group_size=32, scale="e8m0")


class Scheme(NamedTuple):
    """One entry of `config_groups`: how some modules are stored.

    Attributes:
      format: the library's name of the layout of tensors.
      weights: the arguments of the weights, as in the config.
      inputs: those of the activations, or None.
      targets: module paths, classes, or regular expressions after "re:".
    """

    format: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None
    targets: tuple[str, ...] = ()


class CompressedTensors(Codec):
    """`quant_method: compressed-tensors`.

    Per linear layer with K inputs, N outputs and G groups, by `format`:

      pack-quantized   weight_packed int32 [N, K b / 32], a stream of q + 2^(b-1) along K;
                       weight_scale [N, G]; weight_shape (N, K); weight_zero_point int32
                       [N b / 32, G], packed along N
      int-quantized    weight int8 [N, K], weight_scale [N, 1] or [1]
      float-quantized  weight E4M3 [N, K], weight_scale [N, 1], [1] or blocks [N / r, K / c]
      nvfp4-pack-quantized   weight_packed uint8 [N, K / 2], the even element in the low nibble;
                       weight_scale E4M3 [N, K / 16]; weight_global_scale float32 [1], a divisor
      mxfp4-pack-quantized, mxfp8-quantized   weight_scale uint8 [N, K / 32]: 2^(s - 127)
      naive-quantized  as int- or float-quantized, codes unpacked

    A QTensor keeps the reciprocal of NVFP4's global scale, which float32 inverts up to a unit in
    the last place.
    """

    name = "compressed-tensors"

    def __init__(self, schemes: tuple[Scheme, ...]):
        self.schemes = schemes

    # ---- reading ----

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        if transform := (config.get("transform_config") or {}).get("config_groups"):
            raise NotImplementedError(
                f"transform_config {json.dumps(transform)[:80]}: rotations are not applied here."
            )
        sparsity = config.get("sparsity_config") or {}
        if sparsity.get("format", "dense") != "dense":
            raise NotImplementedError(f"sparsity_config {sparsity['format']!r} is not supported.")
        if config.get("kv_cache_scheme"):
            raise NotImplementedError("a kv_cache_scheme is not supported: caches stay in float.")
        if (status := config.get("quantization_status", "compressed")) != "compressed":
            raise NotImplementedError(f"quantization_status {status!r}: only 'compressed' is read.")
        groups, top = config.get("config_groups"), config.get("format")
        if not isinstance(groups, Mapping):
            raise ValueError("its config_groups are missing.")
        schemes = []
        for group in groups.values():
            kind = str(group.get("format") or top)
            if kind in _LEGACY:
                raise NotImplementedError(f"format {kind!r} is a legacy one; compress it again.")
            if group.get("weights") is None:
                continue
            schemes.append(
                Scheme(kind, group["weights"], group.get("input_activations"),
                       tuple(group.get("targets", ())))
            )  # fmt: skip
        return cls(tuple(schemes))

    def find(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        return codec.find_parts(names, "weight_scale", _PARTS)

    def _scheme(self, module: str) -> Scheme:
        """Returns the scheme of a module: named exactly, or by an expression, or by class."""
        ranked = []
        for scheme in self.schemes:
            for target in scheme.targets:
                if target == module:
                    ranked.append((0, scheme))
                elif target.startswith("re:") and re.match(target[3:], module):
                    ranked.append((1, scheme))
                elif "." not in target and not target.startswith("re:"):
                    ranked.append((2, scheme))  # a class; every quantized module is a linear layer
        if not ranked:
            raise ValueError(
                f"{module}: has scales, but no group of the config has it as a target."
            )
        return min(ranked, key=lambda r: r[0])[1]

    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        scheme = self._scheme(codec.module_of(name))
        if "weight_packed" not in parts and "weight" not in parts:
            raise ValueError(f"weight {name!r}: has scales, but no tensor of codes.")
        kind, bits = scheme.weights.get("type", "int"), scheme.weights.get("num_bits", 8)
        if kind == "int":
            qt = self._decode_ints(name, parts, scheme)
        elif (kind, bits) == ("float", 8):
            qt = self._decode_fp8(name, parts, scheme)
        elif (kind, bits) == ("float", 4):
            qt = self._decode_fp4(name, parts)
        else:
            raise NotImplementedError(f"{name}: {bits}-bit {kind} weights are not supported.")
        return _with_inputs(name, qt, scheme.inputs, parts)

    def _decode_ints(self, name, parts, scheme: Scheme) -> QTensor:
        bits = scheme.weights.get("num_bits", 8)
        if bits not in range(2, 9):
            raise NotImplementedError(f"{name}: {bits!r}-bit integers; only 2 to 8 are read.")
        scale = parts["weight_scale"]
        codec.require_dtype(f"{name}_scale", scale, *_FLOATS)
        if "weight_packed" in parts:
            packed = parts["weight_packed"]
            codec.require_dtype(f"{name}_packed", packed, np.int32)
            if "weight_shape" not in parts:
                raise ValueError(f"weight {name!r}: has no tensor '{name}_shape'.")
            N, K = (int(n) for n in parts["weight_shape"].reshape(-1))
            codes = _unpack(name, packed, bits, N, K)
        else:
            codec.require_dtype(name, parts["weight"], np.int8)
            signed = parts["weight"].T.astype(np.int16)
            K, N = signed.shape
            codes = (signed + 2 ** (bits - 1)).astype(np.uint8)
        if (codes >= 2**bits).any():
            raise ValueError(f"weight {name!r}: has codes beyond its {bits} bits.")
        group_size, scale = _grouped(name, scale, N, K, scheme)
        G, C = scale.shape
        zero = None
        if scheme.weights.get("symmetric") is False:
            if "weight_zero_point" not in parts:
                raise ValueError(f"weight {name!r}: has no tensor '{name}_zero_point'.")
            stored = parts["weight_zero_point"]
            if stored.dtype == np.int32:
                zero = codec.unpack_words(stored, bits, N).T
            else:
                zero = (stored.astype(np.int16).reshape(C, G).T + 2 ** (bits - 1)).astype(np.uint8)
            codec.require_shape(f"{name}_zero_point", zero, (G, C))
        perm = None
        if "weight_g_idx" in parts:
            perm = codec.order_of(f"{name}_g_idx", parts["weight_g_idx"], K, group_size)
        ints = Ints(codec.in_order(codes, perm), scale, zero)
        columns = None if C == 1 and N > 1 else 1
        return codec.from_ints(ints, bits, group_size, group_columns=columns, perm=perm)

    def _decode_fp8(self, name, parts, scheme: Scheme) -> QTensor:
        if "weight" not in parts:
            raise ValueError(f"weight {name!r}: has no tensor of FP8 values.")
        w, scale = parts["weight"], parts["weight_scale"]
        codec.require_dtype(name, w, _E4M3)
        N, K = w.shape
        data = np.ascontiguousarray(w.T)
        if scale.dtype == np.uint8:
            codec.require_shape(f"{name}_scale", scale, (N, K // 32))
            scale = np.ascontiguousarray(scale.T)
            return QTensor(data, scale, None, MXFP8, KERNEL, "float32", 0)
        codec.require_dtype(f"{name}_scale", scale, *_FLOATS)
        sizes: dict[str, Any] = {}
        if scheme.weights.get("strategy") == "block":
            rows, columns = scheme.weights["block_structure"]
            codec.require_shape(f"{name}_scale", scale, (-(-N // rows), -(-K // columns)))
            scale = np.ascontiguousarray(scale.T)
            sizes = {"group_size": columns, "group_columns": rows, "remainder": "ragged"}
        else:
            sizes["group_size"], scale = _grouped(name, scale, N, K, scheme)
            sizes["group_columns"] = None if scale.shape[1] == 1 and N > 1 else 1
        fmt = Format("e4m3", scale=scale.dtype.name, **sizes).fit(K)
        return QTensor(data, scale, None, fmt, KERNEL, "float32", 0)

    def _decode_fp4(self, name, parts) -> QTensor:
        if "weight_packed" not in parts:
            raise ValueError(f"weight {name!r}: has no tensor '{name}_packed'.")
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        codec.require_dtype(f"{name}_packed", packed, np.uint8)
        N, K = packed.shape[0], 2 * packed.shape[1]
        data, stored = np.ascontiguousarray(packed.T), np.ascontiguousarray(scale.T)
        if scale.dtype == np.uint8:
            codec.require_shape(f"{name}_scale", scale, (N, K // 32))
            return QTensor(data, stored, None, MXFP4, KERNEL, "float32", 0)
        codec.require_dtype(f"{name}_scale", scale, _E4M3)
        codec.require_shape(f"{name}_scale", scale, (N, K // 16))
        if "weight_global_scale" not in parts:
            raise ValueError(f"weight {name!r}: has no tensor '{name}_global_scale'.")
        whole = np.float32(1) / parts["weight_global_scale"].astype(np.float32).reshape(1, 1)
        assert isinstance(NVFP4.scale, Format)
        nested = QTensor(stored, whole, None, NVFP4.scale, KERNEL, "float32", 0)
        return QTensor(data, nested, None, NVFP4, KERNEL, "float32", 0)

    # ---- writing ----

    @classmethod
    def check(cls, name: str, qt: QTensor) -> None:
        codec.refuse_extras(qt, act_scale=True)
        fmt = qt.format
        *lead, K, N = qt.canonical_shape
        if lead:
            raise Unfit(f"its shape {(*lead, K, N)} is not [K, N]")
        if fmt.outliers is not None:
            raise Unfit("outlier channels of its inputs are multiplied in float")
        if fmt.activation_scale == "group":
            raise Unfit("its inputs have a step for each group of them")
        if fmt.activation_scale == "static" and qt.act_scale is None:
            raise Unfit("its static step (`act_scale`) is missing")
        plain = fmt.weight_only
        if plain.element == "e2m1":
            codec.refuse_activation(fmt)
            if _same(plain, NVFP4):
                if (np.asarray(qt.scale.data).astype(np.float32) < 0).any():
                    raise Unfit("its E4M3 scales have signs, which FP4 kernels ignore")
            elif not _same(plain, MXFP4):
                raise Unfit("its groups and scales are neither NVFP4's nor MXFP4's")
            return
        if plain.element == "e4m3":
            if fmt.activation not in (None, "e4m3"):
                raise Unfit(f"FP8 weights go with FP8 inputs, not {fmt.activation}")
            if _same(plain, MXFP8):
                codec.refuse_activation(fmt)
                return
            codec.plain_scale(fmt, *_FLOATS)
            if fmt.granularity == "group":
                raise Unfit("FP8 has scales for channels, blocks or the tensor, not for groups")
            if fmt.granularity == "block" and None in (fmt.group_size, fmt.group_columns):
                raise Unfit("its blocks have no size of their own")
            return
        bits = codec.check_ints(fmt)
        codec.plain_scale(fmt, *_FLOATS)
        if fmt.granularity == "block":
            raise Unfit("integers have scales for groups, channels or the tensor, not for blocks")
        if fmt.activation is None:
            if fmt.granularity == "tensor" and codec.has_zeros(qt):
                raise Unfit("a scale for the whole tensor goes without zero points")
            return
        if (fmt.activation, bits) != ("int8", 8):
            raise Unfit(f"{bits}-bit integers with {fmt.activation} inputs are no scheme of it")
        if fmt.granularity == "group":
            raise Unfit("int8 products have scales for channels or the tensor, not for groups")
        if codec.has_zeros(qt):
            raise Unfit("its scales have signs; quantize with rule='absmax'")

    @classmethod
    def of_weights(cls, weights: Mapping[str, QTensor]) -> Self:
        groups: dict[str, tuple[Scheme, list[str]]] = {}
        for name, qt in weights.items():
            scheme = _scheme_of(qt)
            key = json.dumps(scheme)
            groups.setdefault(key, (scheme, []))[1].append(codec.module_of(name))
        if len(groups) == 1:
            ((scheme, _),) = groups.values()
            return cls((scheme._replace(targets=("Linear",)),))
        return cls(tuple(s._replace(targets=tuple(modules)) for s, modules in groups.values()))

    def encode(self, name: str, qt: QTensor) -> dict[str, np.ndarray]:
        fmt, module = qt.format, codec.module_of(name)
        K, N = qt.canonical_shape
        out: dict[str, np.ndarray] = {}
        scheme = _scheme_of(qt)
        if fmt.element == "e2m1":
            out["weight_packed"] = np.asarray(qt.data).T
            if isinstance(qt.scale, QTensor):
                out["weight_scale"] = np.asarray(qt.scale.data).T
                out["weight_global_scale"] = _reciprocal(np.asarray(qt.scale.scale).reshape(1))
            else:
                out["weight_scale"] = np.asarray(qt.scale).T
        elif fmt.element == "e4m3":
            out["weight"] = np.asarray(qt.data).T
            out["weight_scale"] = _scales(qt)
        else:
            bits = qt.element.bits
            codes, scale, zero = codec.to_ints(qt, positive=True)
            out["weight_scale"] = (
                scale.reshape(1) if scheme.weights["strategy"] == "tensor" else scale.T
            )
            if scheme.format == "int-quantized":
                out["weight"] = (codes ^ 0x80).view(np.int8).T
            else:
                out["weight_packed"] = codec.pack_words(codes, bits).T
                out["weight_shape"] = np.asarray([N, K], np.int64)
                if zero is not None:
                    out["weight_zero_point"] = codec.pack_words(zero.T, bits)
        if qt.act_scale is not None:
            out["input_scale"] = np.asarray(qt.act_scale, np.float32).reshape(1)
        return {f"{module}.{part}": values for part, values in out.items()}

    def config(self, floats: Collection[str]) -> dict[str, Any]:
        formats = {s.format for s in self.schemes}
        groups = {
            f"group_{i}": {
                "targets": list(s.targets),
                "format": s.format,
                "weights": dict(s.weights),
                "input_activations": s.inputs and dict(s.inputs),
                "output_activations": None,
            }
            for i, s in enumerate(self.schemes)
        }
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": sorted(floats),
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
            "config_groups": groups,
        }


# ---- schemes ------------------------------------------------------------------------------------


def _same(fmt: Format, other: Format) -> bool:
    """Whether two formats store the same; how scales were chosen is no matter."""

    def stored(f: Format) -> dict[str, Any]:
        out = f.to_dict()
        for scale in (out, out.get("scale")):
            if isinstance(scale, dict):
                scale.pop("rule", None)
                scale.pop("remainder", None)
        return out

    return stored(fmt) == stored(other)


def _arguments(bits: int, kind: str, strategy: str, **fields: Any) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "group_size": None,
        "strategy": strategy,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "scale_dtype": None,
        "zp_dtype": None,
        "observer": None,
        "observer_kwargs": {},
    } | fields


def _scheme_of(qt: QTensor) -> Scheme:
    """Returns the scheme of a weight that `check` let pass, without targets."""
    fmt = qt.format
    if fmt.element == "e2m1":
        if isinstance(fmt.scale, Format):
            weights = _arguments(
                4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"
            )
            return Scheme("nvfp4-pack-quantized", weights, None)
        weights = _arguments(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
        return Scheme("mxfp4-pack-quantized", weights, None)
    if fmt.scale == "e8m0":
        weights = _arguments(8, "float", "group", group_size=32, scale_dtype="torch.uint8")
        return Scheme("mxfp8-quantized", weights, None)
    strategy = fmt.granularity
    fields: dict[str, Any] = {}
    if strategy == "group":
        fields["group_size"] = fmt.group_size
    if strategy == "block":
        fields["block_structure"] = [fmt.group_columns, fmt.group_size]
    if fmt.element == "e4m3":
        weights = _arguments(8, "float", strategy, **fields)
        return Scheme("float-quantized", weights, _inputs_of(fmt))
    if codec.has_zeros(qt):
        fields |= {"symmetric": False, "zp_dtype": "torch.int8"}
    bits = qt.element.bits
    packed = fmt.activation is None and strategy != "tensor"
    kind = "pack-quantized" if packed or bits < 8 else "int-quantized"
    return Scheme(kind, _arguments(bits, "int", strategy, **fields), _inputs_of(fmt))


def _inputs_of(fmt: Format) -> dict[str, Any] | None:
    if fmt.activation is None:
        return None
    static = fmt.activation_scale == "static"
    strategy = "token" if fmt.activation_scale == "token" else "tensor"
    kind = "int" if fmt.activation == "int8" else "float"
    return _arguments(8, kind, strategy, dynamic=not static)


def _with_inputs(
    name: str, qt: QTensor, inputs: Mapping[str, Any] | None, parts: Mapping[str, np.ndarray]
) -> QTensor:
    """Returns the weight with what its scheme does to inputs, as far as a Format can say it."""
    if inputs is None:
        return qt
    kinds = {("int", 8): "int8", ("float", 8): "e4m3"}
    activation = kinds.get((inputs.get("type", "int"), inputs.get("num_bits", 8)))
    dynamic, strategy = inputs.get("dynamic", False), inputs.get("strategy")
    scale = None
    if strategy == "token" and dynamic is True:
        scale = "token"
    elif strategy == "tensor" and dynamic is True:
        scale = "tensor"
    elif strategy == "tensor" and dynamic is False and "input_scale" in parts:
        scale = "static"
    why = ""
    if activation is None or scale is None or inputs.get("symmetric") is False:
        why = f"{inputs.get('num_bits')}-bit {inputs.get('type')} inputs with strategy {strategy!r}"
    else:
        fields = qt.format.to_dict() | {"activation": activation, "activation_scale": scale}
        try:
            fmt = Format.from_dict(fields)
        except ValueError as e:
            why = str(e)
        else:
            step = None
            if scale == "static":
                step = np.asarray(parts["input_scale"], np.float32).reshape(())
            return QTensor(
                qt.data, qt.scale, qt.zero, fmt, qt.layout, qt.dtype, qt.pad, act_scale=step,
                perm=qt.perm,
            )  # fmt: skip
    warnings.warn(
        f"compressed-tensors: its readers quantize the inputs too, in a way that a Format cannot"
        f" say ({why}); here they stay in float. First met at {name}.",
        stacklevel=2,
    )
    return qt


# ---- tensors ------------------------------------------------------------------------------------


def _scales(qt: QTensor) -> np.ndarray:
    scale = np.asarray(qt.scale)
    return scale.reshape(1) if qt.format.granularity == "tensor" else scale.T


def _grouped(
    name: str, scale: np.ndarray, N: int, K: int, scheme: Scheme
) -> tuple[int | None, np.ndarray]:
    """Returns the group size, and the scales as [G, C]."""
    strategy = scheme.weights.get("strategy")
    if strategy in ("group", "tensor_group"):
        g = codec.group_size_of(scheme.weights.get("group_size"))
        codec.require_shape(f"{name}_scale", scale, (N, K // (g or K)))
        return g, np.ascontiguousarray(scale.T)
    if strategy == "tensor" or scale.size == 1:
        if scale.size != 1:
            raise ValueError(
                f"tensor '{name}_scale' has shape {scale.shape}, but one value is due."
            )
        return None, scale.reshape(1, 1)
    codec.require_shape(f"{name}_scale", scale.reshape(-1), (N,))
    return None, scale.reshape(1, N)


def _unpack(name: str, packed: np.ndarray, bits: int, N: int, K: int) -> np.ndarray:
    """Returns the unsigned codes [K, N] of dense words, or of those of older releases.

    Releases before 2026 kept floor(32 / b) codes in a word and left its last bits unused.
    """
    dense, per_word = -(-K * bits // 32), 32 // bits
    if packed.shape == (N, dense):
        return codec.unpack_words(packed.T, bits, K)
    codec.require_shape(f"{name}_packed", packed, (N, -(-K // per_word)))
    words = np.ascontiguousarray(packed).view(np.uint32)
    fields = (words[..., None] >> (bits * np.arange(per_word, dtype=np.uint32))) & (2**bits - 1)
    return fields.astype(np.uint8).reshape(N, -1)[:, :K].T


def _reciprocal(scale: np.ndarray) -> np.ndarray:
    """Returns the float32 whose reciprocal is `scale`, where there is one; else the nearest."""
    one = np.float32(1)
    best = one / scale
    for other in (np.nextafter(best, np.float32(np.inf)), np.nextafter(best, -np.float32(np.inf))):
        best = np.where((one / best != scale) & (one / other == scale), other, best)
    return best.astype(np.float32)
