"""Reading GGUF files: the container, and how its blocks decode to float32.

The file is memory-mapped; a tensor's bytes are touched only when it is read. Every size and offset
in the header is checked against the file before anything is allocated, so a damaged or hostile file
ends in a `GGUFError` that names what is wrong, never in a crash or in unbounded memory.
"""

import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np
from jaxtyping import Float32, UInt8

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # Version 3 only added big-endian files to version 2; version 1 had other counts.
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

_BLOCKS_AT_A_TIME = 1 << 15  # Decode in slices that stay in cache: the temporaries are a few MB.


class GGUFError(ValueError):
    """A GGUF file that cannot be read: the message names the file, the place and the remedy."""


# ---- tensor types: one table entry each ---------------------------------------------------------

Decode = Callable[[np.ndarray], np.ndarray]


class TensorType(NamedTuple):
    """How one ggml tensor type stores its values.

    Attributes:
      id: the number in the file.
      name: what ggml calls it.
      block: values per block.
      nbytes: bytes per block.
      decode: `UInt8[B, nbytes]` blocks to `Float32[B, block]` values; None if not supported here.
    """

    id: int
    name: str
    block: int
    nbytes: int
    decode: Decode | None = None


def _half(blocks: UInt8[np.ndarray, "B nbytes"], start: int) -> Float32[np.ndarray, "B 1"]:
    return blocks[:, start : start + 2].copy().view("<f2").astype(np.float32)


def _nibbles(qs: UInt8[np.ndarray, "B 16"]) -> UInt8[np.ndarray, "B 32"]:
    # Byte i holds element i in its low nibble and element i + 16 in its high one.
    return np.concatenate([qs & 0xF, qs >> 4], axis=-1)


def _fifth_bits(qh: UInt8[np.ndarray, "B 4"]) -> UInt8[np.ndarray, "B 32"]:
    return np.unpackbits(qh, axis=-1, bitorder="little") << 4


def _decode_f32(blocks):
    return blocks.view("<f4")


def _decode_f16(blocks):
    return blocks.view("<f2").astype(np.float32)


def _decode_bf16(blocks):
    return blocks.view(ml_dtypes.bfloat16).astype(np.float32)


def _decode_q4_0(blocks):  # x = d (q - 8)
    q = _nibbles(blocks[:, 2:18]).astype(np.float32)
    return _half(blocks, 0) * (q - 8)


def _decode_q4_1(blocks):  # x = d q + m
    q = _nibbles(blocks[:, 4:20]).astype(np.float32)
    return _half(blocks, 0) * q + _half(blocks, 2)


def _decode_q5_0(blocks):  # x = d (q - 16)
    q = (_nibbles(blocks[:, 6:22]) | _fifth_bits(blocks[:, 2:6])).astype(np.float32)
    return _half(blocks, 0) * (q - 16)


def _decode_q5_1(blocks):  # x = d q + m
    q = (_nibbles(blocks[:, 8:24]) | _fifth_bits(blocks[:, 4:8])).astype(np.float32)
    return _half(blocks, 0) * q + _half(blocks, 2)


def _decode_q8_0(blocks):  # x = d q
    return _half(blocks, 0) * blocks[:, 2:34].view(np.int8).astype(np.float32)


TENSOR_TYPES: Mapping[int, TensorType] = {
    kind.id: kind
    for kind in (
        TensorType(0, "F32", 1, 4, _decode_f32),
        TensorType(1, "F16", 1, 2, _decode_f16),
        TensorType(2, "Q4_0", 32, 18, _decode_q4_0),
        TensorType(3, "Q4_1", 32, 20, _decode_q4_1),
        TensorType(6, "Q5_0", 32, 22, _decode_q5_0),
        TensorType(7, "Q5_1", 32, 24, _decode_q5_1),
        TensorType(8, "Q8_0", 32, 34, _decode_q8_0),
        TensorType(10, "Q2_K", 256, 84),
        TensorType(11, "Q3_K", 256, 110),
        TensorType(12, "Q4_K", 256, 144),
        TensorType(13, "Q5_K", 256, 176),
        TensorType(14, "Q6_K", 256, 210),
        TensorType(16, "IQ2_XXS", 256, 66),
        TensorType(17, "IQ2_XS", 256, 74),
        TensorType(18, "IQ3_XXS", 256, 98),
        TensorType(19, "IQ1_S", 256, 50),
        TensorType(20, "IQ4_NL", 32, 18),
        TensorType(21, "IQ3_S", 256, 110),
        TensorType(22, "IQ2_S", 256, 82),
        TensorType(23, "IQ4_XS", 256, 136),
        TensorType(24, "I8", 1, 1),
        TensorType(25, "I16", 1, 2),
        TensorType(26, "I32", 1, 4),
        TensorType(27, "I64", 1, 8),
        TensorType(28, "F64", 1, 8),
        TensorType(29, "IQ1_M", 256, 56),
        TensorType(30, "BF16", 1, 2, _decode_bf16),
        TensorType(34, "TQ1_0", 256, 54),
        TensorType(35, "TQ2_0", 256, 66),
        TensorType(39, "MXFP4", 32, 17),
        TensorType(40, "NVFP4", 64, 36),
    )
}


def decode(raw: UInt8[np.ndarray, "*b row_bytes"], kind: TensorType) -> Float32[np.ndarray, "*b K"]:
    """Returns the values of rows of blocks, exactly as ggml dequantizes them.

    Raises:
      GGUFError: if `kind` has no decoder here, or the rows are not whole blocks.
    """
    if kind.decode is None:
        supported = ", ".join(k.name for k in TENSOR_TYPES.values() if k.decode)
        raise GGUFError(f"tensor type {kind.name} cannot be decoded. Supported are {supported}.")
    *b, row_bytes = raw.shape
    if row_bytes % kind.nbytes:
        raise GGUFError(f"{kind.name} rows are blocks of {kind.nbytes} bytes, got {row_bytes=}.")
    blocks = raw.reshape(-1, kind.nbytes)
    values = np.empty((len(blocks), kind.block), np.float32)
    step = max(1, _BLOCKS_AT_A_TIME * 32 // kind.block)
    for i in range(0, len(blocks), step):
        values[i : i + step] = kind.decode(np.ascontiguousarray(blocks[i : i + step]))
    return values.reshape(*b, row_bytes // kind.nbytes * kind.block)


# ---- the container -------------------------------------------------------------------------------

# Metadata value types: name and struct letter. 8 is a string, 9 an array.
_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, tuple[str, str]] = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}


class TensorInfo(NamedTuple):
    """Where one tensor lies.

    Attributes:
      name: of the tensor.
      shape: row-major, the file's dims reversed: `[N, K]` for a matrix.
      kind: how its values are stored.
      offset: from the start of the file.
      nbytes: stored bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: TensorType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file.

    Attributes:
      path: where it is.
      version: of the container.
      metadata: key to value, in file order: scalars as Python values, numeric arrays as numpy
        arrays, string arrays as lists.
      metadata_types: key to the id of its value type.
      tensors: name to where it lies, in file order.
      data: the whole file, memory-mapped.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    metadata_types: dict[str, int]
    tensors: dict[str, TensorInfo]
    data: np.ndarray

    def raw(self, name: str) -> UInt8[np.ndarray, "*b row_bytes"]:
        """Returns a tensor's stored bytes, one row of blocks per row: a view of the mapped file."""
        info = self._info(name)
        *rows, K = info.shape
        row_bytes = K // info.kind.block * info.kind.nbytes
        return self.data[info.offset : info.offset + info.nbytes].reshape(*rows, row_bytes)

    def read(self, name: str) -> Float32[np.ndarray, "*b K"]:
        """Returns a tensor's values.

        Raises:
          GGUFError: if there is no such tensor or its type cannot be decoded.
        """
        info = self._info(name)
        try:
            return decode(self.raw(name), info.kind)
        except GGUFError as e:
            raise GGUFError(f"{self.path}: tensor {name!r}: {e}") from None

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise GGUFError(f"{self.path}: no tensor {name!r}; it has {_some(self.tensors)}.")
        return self.tensors[name]


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Opens a little-endian GGUF file of version 2 or 3 and checks all of its header.

    Raises:
      GGUFError: if the file is truncated, damaged, of another version or byte order, or names a
        tensor type that is unknown (its size, hence the file's layout, cannot be checked).
      OSError: if the file cannot be opened.
    """
    path = Path(path)
    if path.stat().st_size < 24:
        raise GGUFError(
            f"{path}: {path.stat().st_size} bytes is too short for a GGUF file (24 at least)."
        )
    data = np.memmap(path, np.uint8, "r")
    # Indexing a plain ndarray view is several times faster than indexing the memmap subclass.
    return _Reader(path, data.view(np.ndarray)).file()


class _Reader:
    """A cursor over the header that refuses to leave the file."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path = path
        self.data = data
        self.buffer = memoryview(data)
        self.at = 0

    def fail(self, message: str) -> NoReturn:
        raise GGUFError(f"{self.path}: {message}")

    def file(self) -> GGUFFile:
        magic = bytes(self.take(4, "the magic number"))
        if magic != MAGIC:
            self.fail(f"not a GGUF file: it starts with {magic!r}, not {MAGIC!r}.")
        version = self.scalar("I", "the version")
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                self.fail("a big-endian file; convert it to little-endian (gguf-convert-endian).")
            self.fail(
                f"GGUF version {version} is not supported, only {VERSIONS}; convert it again."
            )
        n_tensors = self.count("tensors", self.scalar("Q", "the tensor count"), at_least=32)
        n_kv = self.count("metadata keys", self.scalar("Q", "the metadata count"), at_least=13)

        metadata, types = {}, {}
        for _ in range(n_kv):
            key = self.string("a metadata key")
            if key in metadata:
                self.fail(f"metadata key {key!r} occurs twice.")
            types[key] = self.scalar("I", f"the type of metadata key {key!r}")
            metadata[key] = self.value(types[key], f"metadata key {key!r}")

        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        valid = types.get("general.alignment", 4) == 4 and alignment > 0
        if not valid or alignment & (alignment - 1):
            self.fail(f"`general.alignment` must be a u32 power of two, got {alignment!r}.")

        infos = [self.info() for _ in range(n_tensors)]
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for info in infos:
            if info.name in tensors:
                self.fail(f"tensor {info.name!r} occurs twice.")
            if info.offset % alignment:
                self.fail(
                    f"tensor {info.name!r}: offset {info.offset} is no multiple of {alignment=}."
                )
            tensors[info.name] = info._replace(offset=start + info.offset)
        self.check_layout(tensors)
        return GGUFFile(self.path, version, metadata, types, tensors, self.data)

    def check_layout(self, tensors: Mapping[str, TensorInfo]):
        size, end, before = len(self.data), 0, ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                self.fail(f"tensors {before!r} and {info.name!r} overlap at byte {info.offset}.")
            end, before = info.offset + info.nbytes, info.name
            if end > size:
                self.fail(
                    f"tensor {info.name!r} ends at byte {end}, but the file has {size}."
                    " It is truncated: download or copy it again."
                )

    def info(self) -> TensorInfo:
        name = self.string("a tensor name")
        n_dims = self.scalar("I", f"the rank of tensor {name!r}")
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"tensor {name!r} has {n_dims} dimensions; ggml has 1 to {MAX_DIMS}.")
        dims = struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims, f"the dims of tensor {name!r}"))
        type_id = self.scalar("I", f"the type of tensor {name!r}")
        offset = self.scalar("Q", f"the offset of tensor {name!r}")
        if (kind := TENSOR_TYPES.get(type_id)) is None:
            self.fail(
                f"tensor {name!r} has unknown type {type_id}; known are"
                f" {', '.join(f'{k.id} {k.name}' for k in TENSOR_TYPES.values())}."
            )
        if 0 in dims:
            self.fail(f"tensor {name!r} has an empty dimension: {dims}.")
        if dims[0] % kind.block:
            self.fail(
                f"tensor {name!r}: rows of {dims[0]} values are not whole {kind.name} blocks"
                f" of {kind.block}."
            )
        nbytes = math.prod(dims) // kind.block * kind.nbytes
        if nbytes > len(self.data) or offset > len(self.data):
            self.fail(
                f"tensor {name!r} ({kind.name}, dims {dims}, offset {offset}) takes {nbytes} bytes,"
                f" but the file has {len(self.data)}. It is truncated or damaged: copy it again."
            )
        return TensorInfo(name, tuple(reversed(dims)), kind, offset, nbytes)

    def value(self, type_id: int, what: str) -> Any:
        if type_id == _STRING:
            return self.string(what)
        if type_id == _ARRAY:
            element = self.scalar("I", f"the element type of {what}")
            count = self.scalar("Q", f"the length of {what}")
            if element == _STRING:
                self.count(f"strings in {what}", count, at_least=8)
                return [self.string(what) for _ in range(count)]
            if element not in _SCALARS:
                self.fail(
                    f"{what} is an array of type {element}, which is neither a scalar nor a string."
                )
            dtype = np.dtype(_SCALARS[element][1]).newbyteorder("<")
            raw = self.take(
                self.count(f"values in {what}", count, dtype.itemsize) * dtype.itemsize, what
            )
            if element == 7:
                return np.frombuffer(raw, np.uint8) != 0
            return np.frombuffer(raw, dtype)
        if type_id not in _SCALARS:
            self.fail(f"{what} has unknown value type {type_id}.")
        return self.scalar(_SCALARS[type_id][1], what)

    def count(self, what: str, n: int, at_least: int) -> int:
        """Returns `n` if that many things of `at_least` bytes can still follow."""
        if n * at_least > len(self.data) - self.at:
            self.fail(
                f"claims {n} {what}, more than its {len(self.data)} bytes can hold:"
                " it is truncated or damaged, copy it again."
            )
        return n

    def string(self, what: str) -> str:
        raw = self.take(self.scalar("Q", f"the length of {what}"), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as e:
            self.fail(
                f"{what} at byte {self.at - len(raw)} is not UTF-8 ({e.reason}):"
                " the file is damaged, copy it again."
            )

    def scalar(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]

    def take(self, n: int, what: str) -> memoryview:
        if n > len(self.data) - self.at:
            self.fail(
                f"{what} at byte {self.at} needs {n} bytes, but the file has {len(self.data)}:"
                " it is truncated or damaged, copy it again."
            )
        self.at += n
        return self.buffer[self.at - n : self.at]


def _some(names, limit: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
