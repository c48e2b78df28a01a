"""Store: finished weights on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from qjax.checkpoint.manifest import describe, rebuild
from qjax.ptq import columns
from qjax.ptq.solve import Solved
from qjax.qtensor import QTensor

# The entry of a file that says what the others are; no array's name begins like that.
_ABOUT = "~about"
# What a killed process may leave of a file.
_PART = ".part"


class StoreError(ValueError):
    """The directory belongs to another run, or cannot be read."""


class Store:
    """A directory with a file for each finished weight. A file is complete or absent.

    In a program of several processes all of them make the same calls; the first one writes and
    decides what is there, and all of them read: the directory must be one that they share.

    Args:
      directory: made if it is not there.
      fingerprint: of everything that decides the result, see `fingerprint`.

    Raises:
      StoreError: the directory holds the results of another run.
    """

    def __init__(self, directory: str | pathlib.Path, fingerprint: str):
        self.directory = pathlib.Path(directory)
        error = self._open(fingerprint) if jax.process_index() == 0 else None
        if not _as_first_says(error is None):
            raise error or StoreError(f"{self.directory}: refused, the first process says why.")

    def _open(self, fingerprint: str) -> Exception | None:
        """Makes the directory, or returns why it cannot be used."""
        about = self.directory / "run.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if about.exists():
                there = json.loads(about.read_text(encoding="utf-8")).get("fingerprint")
                if there != fingerprint:
                    return StoreError(
                        f"{self.directory}: holds the unfinished run of other parameters, data or"
                        f" policy ({there}, this one is {fingerprint}). Choose another directory,"
                        " or delete it."
                    )
            elif any(p.suffix != _PART for p in self.directory.iterdir()):
                return StoreError(
                    f"{self.directory}: is not empty, and no run to resume. Choose another"
                    " directory, or delete it."
                )
            else:
                _write(about, json.dumps({"fingerprint": fingerprint}).encode())
        except OSError as e:
            return e
        except (ValueError, AttributeError) as e:
            return StoreError(
                f"{about}: is damaged ({e}). Choose another directory, or delete this one."
            )
        return None

    def _file(self, key: Hashable) -> pathlib.Path:
        name = hashlib.sha256(str(key).encode()).hexdigest()[:24]
        return self.directory / f"{name}.npz"

    def __contains__(self, key: Hashable) -> bool:
        return _as_first_says(self._file(key).exists())

    def save(self, key: Hashable, qt: QTensor, what: Solved) -> None:
        """Writes a finished weight."""
        node, named = describe(qt)
        arrays = {name: columns.fetch(a).reshape(-1).view(np.uint8) for name, a in named.items()}
        if jax.process_index() != 0:
            return
        about = {"key": str(key), "node": node, "solved": dataclasses.asdict(what)}
        path = self._file(key)
        part = path.with_suffix(_PART)
        try:
            with open(part, "wb") as f:
                np.savez(f, **arrays | {_ABOUT: np.asarray(json.dumps(about))})  # pyright: ignore[reportArgumentType]
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise OSError(
                e.errno,
                f"{key}: cannot be kept in {self.directory} ({e.strerror}). What was finished"
                " before it is there; free some space and run again.",
            ) from e

    def load(self, key: Hashable, w: Any) -> tuple[QTensor, Solved]:
        """Returns a finished weight, on the devices of the float weight w that it stands for.

        Raises:
          StoreError: its file is damaged.
        """
        path = self._file(key)
        try:
            with np.load(path) as f:
                about = json.loads(str(f[_ABOUT]))

                def array(node):
                    if node["name"] is None:
                        return jnp.zeros(node["shape"], node["dtype"])
                    raw = f[node["name"]].view(jnp.dtype(node["dtype"]))
                    return jnp.asarray(raw.reshape(node["shape"]))

                qt = columns.placed(rebuild(about["node"], array), w)
                return qt, Solved(**about["solved"])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
            raise StoreError(
                f"{key}: {path} is damaged ({e}). Delete that file; its weight is then solved"
                " again."
            ) from e


def fingerprint(params: Any, *others: Any) -> str:
    """Returns a hash of parameters and of everything else that decides a result.

    Args:
      params: tree of arrays.
      others: trees of arrays, and plain values with a `repr` that tells them apart.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path((params, *others))[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        if hasattr(leaf, "dtype"):
            a = np.ascontiguousarray(columns.fetch(leaf))
            digest.update(f"{a.dtype}{a.shape}{zlib.crc32(a.view(np.uint8).reshape(-1))}".encode())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]


def _as_first_says(answer: bool) -> bool:
    """Returns the answer of the first process, in all of them."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def _write(path: pathlib.Path, data: bytes) -> None:
    part = path.with_suffix(_PART)
    part.write_bytes(data)
    os.replace(part, path)
