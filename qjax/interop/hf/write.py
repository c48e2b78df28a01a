"""Writing a Hugging Face directory: checked before, streamed, and in place only when complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.interop.hf import methods
from qjax.interop.hf.codec import Unfit, module_of
from qjax.interop.hf.directory import open_hf
from qjax.interop.hf.safetensors import DTYPES, INDEX, Writer
from qjax.interop.holders import holders
from qjax.qtensor import QTensor, dequantize_canonical, is_qtensor

SHARD_BYTES = 5_000_000_000
_HEADER_PER_TENSOR = 160  # bytes beside its weight's name: what it is, type, shape, offsets
_MOST_TENSORS = 6  # that one weight consists of
# Of a source directory: what is not weights, nor said by the config that is written.
_NOT_COPIED = ("config.json", INDEX, "quantize_config.json", "quant_config.json",
               "hf_quant_config.json")  # fmt: skip
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")


class Weight(NamedTuple):
    """One weight to write.

    Attributes:
      path: of the parameter, for errors.
      name: in the file, as a float checkpoint calls it.
      get: returns it: a float array as the file is to hold it, or a QTensor [K, N].
      is_quantized: whether it is a QTensor.
      is_linear: whether it is the kernel of a linear layer, which a method could quantize.
    """

    path: str
    name: str
    get: Callable[[], Any]
    is_quantized: bool
    is_linear: bool


class _Quantized(Mapping[str, QTensor]):
    """The quantized weights by their names, each made when it is asked for."""

    def __init__(self, weights: Iterable[Weight]):
        self._weights = {w.name: w for w in weights if w.is_quantized}

    def __getitem__(self, name: str) -> QTensor:
        return self._weights[name].get()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def path(self, name: str) -> str:
        return self._weights[name].path


class ExportError(ValueError):
    """A model that a format cannot hold; the message names the parameter and what can."""


def write_hf(
    directory: str | os.PathLike[str],
    weights: Iterable[Weight],
    config: Mapping[str, Any],
    *,
    format: str | None,
    source: str | os.PathLike[str] | None = None,
    texts: Mapping[str, str] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[Path], Any] | None = None,
) -> None:
    """Writes a directory that other tools load.

    All weights are checked before anything is written. One at a time is then encoded and written,
    into a directory beside the wanted one, which takes its place at the end.

    Args:
      directory: where to; must not exist unless `overwrite`.
      weights: in the order in which they are to lie.
      config: config.json, without `quantization_config`.
      format: a name in `qjax.interop.hf.METHODS`; None for a float model.
      source: a directory whose tokenizer and generation files are copied.
      texts: further files, by name.
      overwrite: whether a model there may be replaced.
      shard_bytes: bytes of tensors in one file, at most, unless one tensor is larger.
      check: called with the complete directory before it takes its place; may raise.

    Raises:
      FileExistsError: if `directory` exists, or is no model that may be replaced.
      ExportError: if the format cannot hold a weight.
    """
    directory = Path(directory)
    check_target(directory, overwrite=overwrite)
    weights = list(weights)
    codec = _checked(weights, format)
    floats = [module_of(w.name) for w in weights if w.is_linear and not w.is_quantized]
    if not any(module_of(w.name) == "lm_head" for w in weights):
        floats.append("lm_head")  # tied: readers still have a module for it
    files: dict[str, Any] = {"config.json": dict(config)}
    if codec is not None:
        quantization = codec.config(floats)
        files["config.json"]["quantization_config"] = quantization
        files |= codec.files(quantization)
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        made.chmod(0o755)
        if source is not None:
            _copy(Path(source), made)
        for name, content in files.items():
            (made / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, text in (texts or {}).items():
            (made / name).write_text(text, encoding="utf-8")
        room = 256 + sum(
            (_MOST_TENSORS if w.is_quantized else 1) * (len(w.name) + _HEADER_PER_TENSOR)
            for w in weights
        )
        with Writer(made, room, shard_bytes) as writer:
            for w in weights:
                for name, values in _encoded(w, codec):
                    writer.add(name, values)
        if check is not None:
            check(made)
        _put_in_place(made, directory)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def check_target(directory: Path, *, overwrite: bool) -> None:
    """Refuses a directory that is there, unless it may be overwritten and is a model or empty.

    Raises:
      FileExistsError: naming the directory.
    """
    if not directory.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{directory} exists. Give another name, or overwrite=True.")
    is_replaceable = directory.is_dir() and (
        (directory / "config.json").is_file() or not any(directory.iterdir())
    )
    if not is_replaceable:
        raise FileExistsError(
            f"{directory} exists and is no Hugging Face model, so it is not replaced. Remove it"
            " yourself, or give another name."
        )


def _checked(weights: list[Weight], format: str | None) -> Any:
    """Returns the codec for the weights, after checking that it holds them all."""
    names = [w.name for w in weights]
    if twice := {n for n in names if names.count(n) > 1} if len(set(names)) < len(names) else None:
        raise ExportError(f"two parameters are called {sorted(twice)[0]!r} in the file.")
    quantized = _Quantized(weights)
    if format is None:
        for name, qt in quantized.items():
            raise ExportError(
                f"{quantized.path(name)}: is quantized ({qt.format}); a float model has no place"
                f" for it. It can be held by {', '.join(holders(name, qt))}."
            )
        return None
    codec = methods.method(format)
    if not quantized:
        raise ExportError(
            f"no parameter is quantized, so {codec.name} would hold nothing. Quantize the model"
            " first (`qjax.quantize`, `qjax quantize`)."
        )
    linear = {w.name for w in weights if w.is_linear}
    for name, qt in quantized.items():
        path = quantized.path(name)
        if name not in linear:
            raise ExportError(
                f"{path}: is quantized ({qt.format}), but readers of {codec.name} keep in float"
                " what is no linear layer. Leave it in float by policy; a qjax checkpoint"
                " (`qjax.save`) holds it."
            )
        try:
            codec.check(name, qt)
        except Unfit as e:
            raise ExportError(
                f"{path}: {codec.name} cannot hold {qt.format} of {qt.shape}: {e}. It can be held"
                f" by {', '.join(holders(name, qt))}."
            ) from None
    try:
        return codec.of_weights(quantized)
    except ValueError as e:
        raise ExportError(f"{codec.name}: {e}") from None


def _host(leaf: Any) -> Any:
    return jax.tree.map(np.asarray, leaf)


def _encoded(w: Weight, codec: Any) -> Iterable[tuple[str, np.ndarray]]:
    leaf = _host(w.get())
    if is_qtensor(leaf):
        yield from codec.encode(w.name, leaf).items()
        return
    if leaf.dtype not in DTYPES.values():
        raise ExportError(f"{w.path}: holds {leaf.dtype}, for which files have no type.")
    yield w.name, leaf


def _copy(source: Path, to: Path) -> None:
    if not source.is_dir():
        raise FileNotFoundError(f"`source` {source} is no directory.")
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _COPIED and file.name not in _NOT_COPIED:
            shutil.copyfile(file, to / file.name)


def _put_in_place(made: Path, directory: Path) -> None:
    if not directory.exists():
        made.rename(directory)
        return
    old = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.old."))
    directory.rename(old / "it")
    try:
        made.rename(directory)
    except BaseException:
        (old / "it").rename(directory)
        raise
    shutil.rmtree(old)


# ---- reading back -------------------------------------------------------------------------------


def verify_hf(directory: str | os.PathLike[str], weights: Iterable[Weight]) -> dict[str, float]:
    """Decodes a directory and compares it with what was written, weight by weight.

    Returns:
      By parameter path, the largest error relative to the largest value: 0, or a unit in the last
      place of a scale for LLM.int8() and NVFP4, which store a multiple or the reciprocal of it.

    Raises:
      ExportError: if a weight is missing, or differs by more.
    """
    opened = open_hf(directory)
    out = {}
    for w in weights:
        if w.name not in opened.names:
            raise ExportError(f"{directory}: lacks {w.name!r}, which was {w.path}.")
        wanted, got = _floats(w.get()), _floats(opened.read(w.name))
        if wanted.shape != got.shape:
            raise ExportError(f"{w.path}: was {wanted.shape}, {w.name!r} is {got.shape}.")
        same = np.array_equal(wanted, got, equal_nan=True)
        error = 0.0 if same else float(np.max(np.abs(wanted - got)) / np.max(np.abs(wanted)))
        if not error <= 2.0**-22:
            raise ExportError(
                f"{w.path}: {w.name!r} decodes to other values, by {error:.3g} of the largest."
            )
        out[w.path] = error
    return out


def _floats(leaf: Any) -> np.ndarray:
    if is_qtensor(leaf):
        return np.asarray(dequantize_canonical(jax.tree.map(jax.numpy.asarray, leaf)))
    return np.asarray(leaf, np.float32)
