"""Writing GGUF files: one tensor in memory at a time, and all or nothing.

The header names every tensor with its offset, so shapes and types come first and bytes are asked
for one tensor after the other. They go to a temporary file beside the destination, which takes its
place only when it is complete and on the disk.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qjax.interop.gguf.errors import GGUFError
from qjax.interop.gguf.reader import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    SCALARS,
    STRING,
    GGUFFile,
)
from qjax.interop.gguf.types import TensorType

VERSION = 3
# llama.cpp keeps names in 64 bytes with a terminator, and refuses longer ones.
MAX_NAME = 63
_MAX_KEY = 65535

_TYPE_IDS = {np.dtype(np.dtype(letter).str): id for id, (_, letter) in SCALARS.items()}


class Tensor(NamedTuple):
    """A tensor to write.

    Attributes:
      name: in the file.
      shape: row-major, rows of K values last.
      kind: how its values are stored.
      raw: returns the stored bytes as uint8, called once, when it is its turn.
    """

    name: str
    shape: tuple[int, ...]
    kind: TensorType
    raw: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor],
    *,
    overwrite: bool = False,
    on_tensor: Callable[[str], None] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes a GGUF file of version 3.

    Args:
      path: where.
      metadata: values by key, in order. A bool, str or list of str is what it is; an int is a u32,
        or an i32 or 64 bits wide if it must be; a float is an f32; numpy scalars and arrays keep
        their type. `general.alignment` is obeyed.
      tensors: in order.
      overwrite: whether to replace a file that is there.
      on_tensor: called with the name of each tensor when it is written.
      check: called with the complete file before it takes its place, which it does not if this
        raises.

    Raises:
      GGUFError: if something cannot be said in a GGUF file; then nothing is written.
      FileExistsError: if there is a file and `overwrite` is false.
      IsADirectoryError: if there is a directory.
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    if alignment < 1 or alignment & (alignment - 1):
        raise GGUFError(f"`general.alignment` must be a power of two, got {alignment}.")
    header = _header(metadata, tensors, alignment)
    with _replacing(path, check) as file:
        file.write(header)
        for tensor in tensors:
            file.write(bytes(-file.tell() % alignment))
            raw = np.ascontiguousarray(tensor.raw())
            if raw.dtype != np.uint8 or raw.nbytes != tensor.nbytes:
                raise GGUFError(
                    f"tensor {tensor.name!r}: {tensor.kind.name} of shape {tensor.shape} takes"
                    f" {tensor.nbytes} bytes, got {raw.nbytes} as {raw.dtype}."
                )
            file.write(raw.data)
            del raw  # before the next one is made
            if on_tensor is not None:
                on_tensor(tensor.name)
        file.write(bytes(-file.tell() % alignment))


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuses a path at which no file can be put, or one is that may not be overwritten.

    Raises:
      IsADirectoryError, FileExistsError: naming the path.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; a GGUF model is one file. Give its name.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Choose another name, or pass overwrite=True.")


@contextlib.contextmanager
def _replacing(path: Path, check: Callable[[Path], None] | None):
    """Opens a temporary file that becomes `path` if nothing is raised, and vanishes otherwise."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        # mkstemp makes files that only their owner may read.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _header(metadata: Mapping[str, Any], tensors: Sequence[Tensor], alignment: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        if not key or len(key.encode()) > _MAX_KEY:
            raise GGUFError(f"metadata key {key[:40]!r} must have 1 to {_MAX_KEY} bytes.")
        parts += [_string(key), _value(key, value)]
    offset, seen = 0, set()
    for tensor in tensors:
        _check(tensor, seen)
        dims = tuple(reversed(tensor.shape))
        parts += [
            _string(tensor.name),
            struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.kind.id, offset),
        ]
        offset += tensor.nbytes + -tensor.nbytes % alignment
    return b"".join(parts)


def _check(tensor: Tensor, seen: set[str]) -> None:
    what = f"tensor {tensor.name!r}"
    if not 1 <= len(tensor.name.encode()) <= MAX_NAME:
        raise GGUFError(f"{what}: its name must have 1 to {MAX_NAME} bytes.")
    if tensor.name in seen:
        raise GGUFError(f"{what} occurs twice.")
    seen.add(tensor.name)
    if not 1 <= len(tensor.shape) <= MAX_DIMS or 0 in tensor.shape:
        raise GGUFError(
            f"{what} has the shape {tensor.shape}; ggml has 1 to {MAX_DIMS} axes, none empty."
        )
    if tensor.shape[-1] % tensor.kind.block:
        raise GGUFError(
            f"{what}: rows of {tensor.shape[-1]} values are not whole {tensor.kind.name} blocks of"
            f" {tensor.kind.block}."
        )


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """Returns a value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list | tuple):
        if not all(isinstance(v, str) for v in value):
            raise GGUFError(
                f"metadata {key!r}: a list holds strings; give numbers as a numpy array."
            )
        strings = b"".join(map(_string, value))
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + strings
    # numpy's float64 is a float of Python's, too.
    if isinstance(value, bool | int | float) and not isinstance(value, np.generic):
        value = _scalar(key, value)
    if isinstance(value, np.ndarray | np.generic) and value.ndim <= 1:
        id = _TYPE_IDS.get(value.dtype)
        if id is not None:
            raw = value.astype(value.dtype.newbyteorder("<")).tobytes()
            if value.ndim == 0:
                return struct.pack("<I", id) + raw
            return struct.pack("<IIQ", ARRAY, id, len(value)) + raw
    raise GGUFError(
        f"metadata {key!r} is {type(value).__name__}, which GGUF has no type for. It has bool, int,"
        " float, str, lists of str, and numpy arrays of one axis."
    )


def _scalar(key: str, value: bool | int | float) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    for dtype in (np.uint32, np.int32, np.uint64, np.int64):
        if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return dtype(value)
    raise GGUFError(f"metadata {key!r}: {value} does not fit into 64 bits.")


def typed_metadata(file: GGUFFile) -> dict[str, Any]:
    """Returns the metadata of a file such that `write_gguf` writes them with the same types."""
    dtypes = {id: dtype for dtype, id in _TYPE_IDS.items()}
    return {
        key: value if file.metadata_types[key] in (STRING, ARRAY)
        else dtypes[file.metadata_types[key]].type(value)
        for key, value in file.metadata.items()
    }  # fmt: skip
