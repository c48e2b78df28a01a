"""safetensors: a directory of files read tensor by tensor, and written in a stream.

The library of that name knows no 8-bit floats in numpy, and wants all tensors of a file at once.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the reference refuses more
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class TensorInfo(NamedTuple):
    """Where a tensor lies.

    Attributes:
      file: that holds it.
      dtype: of its values.
      shape: of the array.
      start: first byte, from the start of the file.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def kind(self) -> str:
        """What the file calls its type."""
        return _NAMES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of one file, after checking that its header is true of it.

    Raises:
      ValueError: if the file is truncated, damaged, or of an element type that is not known.
    """

    def fail(why: str):
        return ValueError(
            f"{path}: not a valid safetensors file ({why}). Download or copy it again."
        )

    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise fail(f"its {size} bytes hold no header of {length} bytes")
        try:
            entries = json.loads(f.read(length))
        except (ValueError, RecursionError) as e:
            raise fail(f"its header is no JSON: {e}") from None
    if not isinstance(entries, dict):
        raise fail("its header is no table of tensors")
    entries.pop("__metadata__", None)
    out, ends = {}, []
    for name, entry in entries.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            raise fail(f"the entry of tensor {name!r} is damaged") from None
        if not whole:
            raise fail(f"the entry of tensor {name!r} is damaged")
        if kind not in DTYPES:
            raise fail(f"tensor {name!r} has type {kind!r}; known are {', '.join(DTYPES)}")
        if end - begin != math.prod(shape) * DTYPES[kind].itemsize or 8 + length + end > size:
            raise fail(f"tensor {name!r}, {kind} {shape}, does not fit bytes {begin} to {end}")
        ends.append((begin, end, name))
        out[name] = TensorInfo(path, DTYPES[kind], tuple(shape), 8 + length + begin)
    at = 0
    for begin, end, name in sorted(ends):
        if begin != at:
            raise fail(f"tensor {name!r} begins at byte {begin}, the one before ends at {at}")
        at = end
    return out


class Directory:
    """The tensors of a model's directory, in one file or in shards; each read when asked for.

    Attributes:
      path: the directory.
      tensors: name to where it lies.

    Raises:
      FileNotFoundError: if there are no safetensors.
      ValueError: if a file is damaged, or the index names what is not there.
    """

    def __init__(self, path: Path):
        self.path = path
        index, single = path / INDEX, path / SINGLE
        if index.exists():
            self.tensors = _of_index(path, index)
        elif single.exists():
            self.tensors = read_header(single)
        else:
            raise FileNotFoundError(
                f"{path}: has neither {SINGLE} nor {INDEX}."
                " Only safetensors are read; convert other weights first."
            )

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor's values in an array of their own."""
        info = self.tensors[name]
        count = math.prod(info.shape)
        values = np.fromfile(info.file, info.dtype, count, offset=info.start)
        if values.size != count:
            raise ValueError(
                f"{info.file}: tensor {name!r} ends before its {count} values: the file was cut."
            )
        return values.reshape(info.shape)


def _of_index(path: Path, index: Path) -> dict[str, TensorInfo]:
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({*entries.values()})
        "".join(files)  # all are strings
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{index}: not a valid index ({e!r}). Copy it again.") from None
    found: dict[str, dict[str, TensorInfo]] = {}
    for file in files:
        if Path(file).name != file or not (path / file).is_file():
            raise ValueError(f"{index}: names the shard {file!r}, which is not in {path}.")
        found[file] = read_header(path / file)
    for name, file in entries.items():
        if name not in found[file]:
            raise ValueError(f"{index}: says that {name!r} is in {file}, which does not hold it.")
    return {name: found[file][name] for name, file in entries.items()}


class Writer:
    """Writes tensors one at a time; a context manager.

    The header stands before the data and is known last: room is left for it, and what is not used
    is filled with spaces, as the format allows.
    """

    def __init__(self, directory: Path, room: int, shard_bytes: int):
        """Begins to write.

        Args:
          directory: where to; it exists.
          room: bytes for the header of a shard, enough for all tensors.
          shard_bytes: bytes of data after which the next tensor goes to another file.
        """
        self._directory, self._shard_bytes = directory, shard_bytes
        self._room = -(-room // 8) * 8
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._at = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            if self._file is not None:
                self._file.close()
            return
        self._finish_shard()
        self._name_shards()

    def add(self, name: str, values: np.ndarray) -> None:
        """Appends a tensor."""
        values = np.asarray(values)
        if self._file is None or (self._at and self._at + values.nbytes > self._shard_bytes):
            self._finish_shard()
            self._file = self._part(len(self._shards)).open("wb")
            self._file.write(bytes(8 + self._room))
            self._shards.append({})
            self._at = 0
        shard = self._shards[-1]
        assert not any(name in s for s in self._shards), name
        shard[name] = {
            "dtype": _NAMES[values.dtype.newbyteorder("=")],
            "shape": list(values.shape),
            "data_offsets": [self._at, self._at + values.nbytes],
        }
        np.ascontiguousarray(values).reshape(-1).view(np.uint8).tofile(self._file)
        self._at += values.nbytes

    def _part(self, i: int) -> Path:
        return self._directory / f"part-{i}.tmp"

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        header = json.dumps(
            {"__metadata__": {"format": "pt"}, **self._shards[-1]}, separators=(",", ":")
        ).encode()
        assert len(header) <= self._room, (len(header), self._room)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.close()
        self._file = None

    def _name_shards(self) -> None:
        n = len(self._shards)
        if n == 1:
            self._part(0).rename(self._directory / SINGLE)
            return
        weight_map, total = {}, 0
        for i, shard in enumerate(self._shards):
            file = f"model-{i + 1:05}-of-{n:05}.safetensors"
            self._part(i).rename(self._directory / file)
            weight_map |= dict.fromkeys(shard, file)
            total += max(e["data_offsets"][1] for e in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self._directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
