"""Reading GGUF files: the container.

The file is memory-mapped; a tensor's bytes are touched only when it is read. Every size and offset
in the header is checked against the file before anything is allocated, so a damaged or hostile file
ends in a `GGUFError` that names what is wrong, never in a crash or in unbounded memory.
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Float32, UInt8

from qjax.interop.gguf.blocks import decode, to_qtensor
from qjax.interop.gguf.errors import GGUFError
from qjax.interop.gguf.types import TENSOR_TYPES, TensorType
from qjax.layout import DEFAULT
from qjax.qtensor import QTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # Version 3 only added big-endian files to version 2; version 1 had other counts.
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

# Metadata value types: name and struct letter. 8 is a string, 9 an array.
STRING, ARRAY = 8, 9
SCALARS: Mapping[int, tuple[str, str]] = {
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
        part = self.data[info.offset : info.offset + info.nbytes]
        return part.reshape(*rows, info.kind.row_bytes(K))

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

    def qtensor(self, name: str, *, layout: str = DEFAULT, dtype: str = "float32") -> QTensor:
        """Returns a quantized tensor as it is stored, without dequantizing.

        Args:
          name: of the tensor, `[*lead, N, K]` in the file.
          layout: "kn": the transposed kernel `[*lead, K, N]`; "nk": as it is in the file.
          dtype: of the logical array.

        Raises:
          GGUFError: if there is no such tensor or its type is no quantized one that qjax has.
        """
        info = self._info(name)
        try:
            return to_qtensor(self.raw(name), info.kind, layout=layout, dtype=dtype)
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
        if type_id == STRING:
            return self.string(what)
        if type_id == ARRAY:
            element = self.scalar("I", f"the element type of {what}")
            count = self.scalar("Q", f"the length of {what}")
            if element == STRING:
                self.count(f"strings in {what}", count, at_least=8)
                return [self.string(what) for _ in range(count)]
            if element not in SCALARS:
                self.fail(
                    f"{what} is an array of type {element}, which is neither a scalar nor a string."
                )
            dtype = np.dtype(SCALARS[element][1]).newbyteorder("<")
            raw = self.take(
                self.count(f"values in {what}", count, dtype.itemsize) * dtype.itemsize, what
            )
            if element == 7:
                return np.frombuffer(raw, np.uint8) != 0
            return np.frombuffer(raw, dtype)
        if type_id not in SCALARS:
            self.fail(f"{what} has unknown value type {type_id}.")
        return self.scalar(SCALARS[type_id][1], what)

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
