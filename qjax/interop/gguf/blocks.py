"""Blocks of bytes to float values and to QTensors, and QTensors to blocks, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float32, UInt8

from qjax import numerics, packing
from qjax.format import Format
from qjax.interop.gguf.errors import GGUFError
from qjax.interop.gguf.types import TENSOR_TYPES, Parts, TensorType
from qjax.layout import DEFAULT, Layout
from qjax.qtensor import QTensor, pack_codes

_VALUES_AT_A_TIME = 1 << 20  # Decode in slices that stay in cache: the temporaries are a few MB.

_SCALES = {"float16": np.dtype("<f2"), "e8m0": np.dtype(np.uint8),
           "e4m3": np.dtype(ml_dtypes.float8_e4m3fn)}  # fmt: skip


# ---- floats --------------------------------------------------------------------------------------


def decode(raw: UInt8[np.ndarray, "*b row_bytes"], kind: TensorType) -> Float32[np.ndarray, "*b K"]:
    """Returns the values of rows of blocks, exactly as ggml dequantizes them.

    One difference: scales of MXFP4 and NVFP4 that are NaN by their definition (bytes 255 and 127)
    give NaN.

    Raises:
      GGUFError: if `kind` cannot be decoded here, or the rows are not whole blocks.
    """
    blocks = _blocks(raw, kind)
    values = np.empty((len(blocks), kind.block), np.float32)
    step = max(1, _VALUES_AT_A_TIME // kind.block)
    for i in range(0, len(blocks), step):
        part = blocks[i : i + step]
        if kind.format is None:
            values[i : i + step] = np.ascontiguousarray(part).view(_float_dtype(kind))
        else:
            values[i : i + step] = _values(unpack(part, kind), kind.format)
    return values.reshape(*raw.shape[:-1], raw.shape[-1] // kind.nbytes * kind.block)


def _blocks(raw: np.ndarray, kind: TensorType) -> UInt8[np.ndarray, "B nbytes"]:
    if not kind.is_supported:
        supported = ", ".join(k.name for k in TENSOR_TYPES.values() if k.is_supported)
        raise GGUFError(f"tensor type {kind.name} cannot be decoded. Supported are {supported}.")
    if raw.shape[-1] % kind.nbytes:
        raise GGUFError(
            f"{kind.name} rows are blocks of {kind.nbytes} bytes, got row_bytes={raw.shape[-1]}."
        )
    return raw.reshape(-1, kind.nbytes)


def _float_dtype(kind: TensorType) -> np.dtype:
    assert kind.dtype is not None
    return np.dtype(getattr(ml_dtypes, kind.dtype, kind.dtype))


def _values(parts: Parts, fmt: Format) -> Float32[np.ndarray, "B block"]:
    """Returns q * scale (+ offset) of every block. Products are exact: they have under 24 bits."""
    element = numerics.get_element(fmt.element)
    assert isinstance(parts.codes, np.ndarray)
    if element.levels:
        q = np.asarray(element.levels, np.float32)[parts.codes]
    else:
        q = parts.codes.astype(np.float32)
        if element.is_packed:
            q += np.float32(element.qmin)
    scale = _scale_values(parts.scale, fmt.scale)[..., None]
    B, G, _ = scale.shape
    with np.errstate(over="ignore", invalid="ignore"):  # scales in a file may be Inf or NaN
        w = q.reshape(B, G, -1) * scale
        if fmt.offset is not None:
            w += _scale_values(parts.zero, fmt.offset)[..., None]
    return w.reshape(B, -1)


def _scale_values(stored: Any, fmt: str | Format) -> Float32[np.ndarray, "B G"]:
    if isinstance(fmt, Format):
        return _values(stored, fmt)
    if fmt == "e8m0":
        e = np.where(stored == 255, 0, stored).astype(np.int32)
        return np.where(stored == 255, np.nan, np.ldexp(np.float32(1), e - 127)).astype(np.float32)
    return stored.astype(np.float32)


# ---- parts of blocks -----------------------------------------------------------------------------


def unpack(blocks: UInt8[np.ndarray, "B nbytes"], kind: TensorType) -> Parts:
    """Returns the arrays of a QTensor for every block, [B, values] each, codes not yet packed."""
    assert kind.parts is not None
    return _unpack(blocks, kind.parts, kind.format)


def _unpack(blocks: np.ndarray, places: Any, fmt: str | Format | None) -> Any:
    if places is None:
        return None
    if isinstance(fmt, Format):
        codes = places.codes.unpack(blocks)
        element = numerics.get_element(fmt.element)
        return Parts(
            codes if element.is_packed else codes.view(element.dtype),
            _unpack(blocks, places.scale, fmt.scale),
            _unpack(blocks, places.zero, fmt.offset),
        )
    assert fmt is not None
    return places.unpack(blocks).view(_SCALES[fmt])


def pack(parts: Parts, kind: TensorType) -> UInt8[np.ndarray, "B nbytes"]:
    """Returns the blocks that hold given arrays; the inverse of `unpack`."""
    assert kind.parts is not None
    assert isinstance(parts.codes, np.ndarray)
    blocks = np.zeros((len(parts.codes), kind.nbytes), np.uint8)
    _pack(blocks, kind.parts, parts)
    return blocks


def _pack(blocks: np.ndarray, places: Any, values: Any) -> None:
    if places is None:
        return
    if isinstance(places, Parts):
        for place, value in zip(places, values, strict=True):
            _pack(blocks, place, value)
        return
    unsigned = np.uint8 if values.dtype.itemsize == 1 else np.uint16
    places.pack(np.ascontiguousarray(values).view(unsigned), blocks)


# ---- QTensors ------------------------------------------------------------------------------------


def to_qtensor(
    raw: UInt8[np.ndarray, "*lead N row_bytes"],
    kind: TensorType,
    *,
    layout: str = DEFAULT,
    dtype: str = "float32",
) -> QTensor:
    """Returns the QTensor of rows of blocks, without dequantizing: codes and scales are moved.

    A row of the file is an output feature, its values are contracted: row n is column n of the
    canonical weight [*lead, K, N].

    Args:
      raw: rows of blocks.
      kind: a quantized type.
      layout: of the logical array: "kn" for a kernel [K, N], "nk" for a table [N, K].
      dtype: of the logical array.

    Raises:
      GGUFError: if `kind` has no Format, or the rows are not whole blocks.
    """
    if kind.format is None:
        raise GGUFError(f"tensor type {kind.name} is not a quantized type that qjax has.")
    parts = unpack(_blocks(raw, kind), kind)
    lead_and_rows = raw.shape[:-1]
    shape = (*lead_and_rows, raw.shape[-1] // kind.nbytes * kind.block)
    if layout == "kn":
        shape = (*shape[:-2], shape[-1], shape[-2])
    return _qtensor(parts, kind.format, lead_and_rows, Layout.parse(layout, shape), dtype)


def _qtensor(parts: Any, fmt: Format, rows: tuple[int, ...], layout: Layout, dtype: str) -> QTensor:
    element = numerics.get_element(fmt.element)

    def columns(a: np.ndarray) -> Array:
        return jnp.asarray(a.reshape(*rows, -1).swapaxes(-1, -2))

    def stored(part: Any, fmt: str | Format) -> Any:
        if not isinstance(fmt, Format):
            return columns(part)
        shape = (part.codes.size // rows[-1], rows[-1])
        return _qtensor(part, fmt, rows, Layout.parse(DEFAULT, shape), "float32")

    codes = columns(parts.codes)
    pad = packing.padding(codes.shape[-2], element.bits) if element.is_packed else 0
    zero = None if fmt.offset is None else stored(parts.zero, fmt.offset)
    return QTensor(
        pack_codes(codes, element), stored(parts.scale, fmt.scale), zero, fmt, layout, dtype, pad
    )


def storage(fmt: Format) -> Format:
    """Returns what a Format says about storage alone, without how its scales are chosen."""
    scale = storage(fmt.scale) if isinstance(fmt.scale, Format) else fmt.scale
    offset = storage(fmt.offset) if isinstance(fmt.offset, Format) else fmt.offset
    return dataclasses.replace(
        fmt.weight_only, rule=None, remainder="error", scale=scale, offset=offset
    )


# Of types with one Format the first: TQ1_0, the smaller of the ternary ones.
_BY_STORAGE: dict[Format, TensorType] = {}
for _kind in TENSOR_TYPES.values():
    if _kind.format is not None:
        _BY_STORAGE.setdefault(storage(_kind.format), _kind)


def type_of(fmt: Format) -> TensorType | None:
    """Returns the tensor type that stores a Format bit for bit; None if there is none."""
    return _BY_STORAGE.get(storage(fmt))


def from_qtensor(
    qt: QTensor, kind: TensorType | None = None
) -> tuple[UInt8[np.ndarray, "*lead N row_bytes"], TensorType]:
    """Returns the rows of blocks that hold a QTensor bit for bit, and their type.

    Args:
      qt: what to store.
      kind: the type to use, where two store the same Format: TQ1_0 and TQ2_0.

    Raises:
      GGUFError: if no tensor type can hold it; the message says why, and what can be done.
    """
    kind = holding(qt, kind)
    *lead, K, N = qt.canonical_shape
    count = K // kind.block * N
    for size in lead:
        count *= size
    return pack(_parts(qt, count), kind).reshape(*lead, N, kind.row_bytes(K)), kind


def holding(qt: QTensor, kind: TensorType | None = None) -> TensorType:
    """Returns the type that holds a QTensor bit for bit; args and errors are `from_qtensor`'s."""
    fitting = type_of(qt.format)
    if kind is None or fitting is None:
        kind = fitting
    elif kind.format is None or type_of(kind.format) != fitting:
        raise GGUFError(f"{kind.name} does not store ({qt.format}); {fitting.name} does.")
    if kind is None:
        raise GGUFError(
            f"no tensor type stores ({qt.format}). GGUF has"
            f" {', '.join(f'{k.name} ({f})' for f, k in _BY_STORAGE.items())}. Quantize the float"
            " weight to one of these, or dequantize this one and quantize it again."
        )
    for name, remedy in {
        "pre_scale": "quantize without smoothing, or where it folds into the layer before",
        "act_scale": "use a weight-only format: readers quantize activations their own way",
        "perm": "quantize with groups of neighbouring inputs (no act-order groups)",
    }.items():
        if getattr(qt, name) is not None:
            raise GGUFError(f"GGUF has no room for its `{name}`: {remedy}.")
    if qt.format.activation is not None:
        raise GGUFError(
            f"GGUF cannot say that activations are {qt.format.activation}: use a weight-only"
            " format; readers quantize activations their own way."
        )
    K = qt.canonical_shape[-2]
    if K % kind.block:
        raise GGUFError(f"{kind.name} is made of blocks of {kind.block}, and K={K} is no multiple.")
    return kind


def _parts(qt: QTensor, count: int) -> Parts:
    """Returns the arrays of a QTensor for every block of its rows, [count, values]."""

    def rows(a: Any) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(a).swapaxes(-1, -2)).reshape(count, -1)

    def stored(part: Any) -> Any:
        if part is None:
            return None
        return _parts(part, count) if isinstance(part, QTensor) else rows(part)

    codes = qt.data
    if qt.element.is_packed:
        codes = packing.unpack(jnp.asarray(codes), qt.element.bits, qt.pad)
    return Parts(rows(codes), stored(qt.scale), stored(qt.zero))
