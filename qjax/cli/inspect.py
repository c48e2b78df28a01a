"""`qjax inspect`: what a checkpoint or model file holds, reading next to none of its arrays."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from qjax.cli import options
from qjax.cli.terminal import megabytes, print_json
from qjax.summary import Row, Summary, row_of, summary

_LONGEST = 100  # characters of one metadata value


class Contents(NamedTuple):
    """What a file or directory holds."""

    kind: str
    summary: Summary
    metadata: dict[str, Any]


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="DIR|FILE",
            help="A qjax checkpoint, a Hugging Face directory, a GGUF or safetensors file.",
            show_default=False,
        ),
    ],
    every: Annotated[
        bool, typer.Option("--all", help="One line for each tensor; layers share one otherwise.")
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
):
    """Show the tensors, formats, sizes and metadata of a model without loading it.

    [bold]Examples[/bold]

      qjax inspect out/smollm2-w4a16

      qjax inspect model.gguf --all
    """
    contents = _read(path)
    totals = contents.summary.totals
    if as_json:
        tensors = contents.summary.to_dict()
        print_json(
            {
                "path": path,
                "kind": contents.kind,
                "metadata": contents.metadata,
                "tensors": tensors["rows"],
                "totals": tensors["totals"],
            }
        )
        return
    typer.echo(f"{path}: {contents.kind}, {megabytes(totals['nbytes'])}\n")
    for key, value in contents.metadata.items():
        typer.echo(f"  {key}: {_short(value)}")
    typer.echo(f"\n{contents.summary.table(collapse=not every)}")


def _read(name: str) -> Contents:
    from qjax.models.catalog import RESCALED, is_checkpoint
    from qjax.models.load import PACKAGES, package_file

    if name in PACKAGES:
        return _gguf(package_file(name))
    if name.removesuffix(RESCALED) in PACKAGES:
        raise ValueError(
            f"{name} is made when it is loaded; inspect {name.removesuffix(RESCALED)}."
        )
    path = Path(name)
    if path.is_dir():
        return _checkpoint(path) if is_checkpoint(path) else _directory(path)
    if not path.exists():
        raise FileNotFoundError(
            f"nothing at {name!r}: no directory, no file, and none of the names"
            f" {', '.join(PACKAGES)}."
        )
    return _safetensors(path) if path.suffix == ".safetensors" else _gguf(path)


def _checkpoint(path: Path) -> Contents:
    from qjax.checkpoint import read_manifest, read_metadata

    metadata = read_metadata(path)
    record = metadata.get("record", {})
    known = {row["path"]: row.get("sqnr_db") for row in record.get("summary", {}).get("rows", ())}
    # An infinite SQNR is kept as text.
    rows = [
        dataclasses.replace(row, sqnr_db=float(known[row.path]))
        if known.get(row.path) is not None
        else row
        for row in summary(read_manifest(path).abstract()).rows
    ]
    shown = {k: v for k, v in metadata.items() if k not in ("model", "record")}
    shown |= {k: v for k, v in record.items() if k != "summary"}
    if model := metadata.get("model"):
        shown |= {"dtype": model["dtype"], "has_tokenizer": model["tokenizer"] is not None}
        shown |= model["config"]
    return Contents("qjax checkpoint", Summary(tuple(rows)), shown)


def _gguf(path: Path) -> Contents:
    from qjax.interop.gguf import open_gguf

    file = open_gguf(path)
    rows = [
        _row(t.name, t.shape, t.kind.name, t.nbytes, t.kind.block > 1)
        for t in file.tensors.values()
    ]
    metadata = {k: _plain(v) for k, v in file.metadata.items()}
    return Contents(f"GGUF version {file.version}", Summary(tuple(rows)), metadata)


def _directory(path: Path) -> Contents:
    from qjax.interop.hf import open_hf

    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{path}: is neither a qjax checkpoint nor a Hugging Face model; it has no safetensors."
        )
    if not (path / "config.json").is_file():
        rows = [row for file in files for row in _safetensors(file).summary.rows]
        return Contents("Hugging Face model", Summary(tuple(rows)), {})
    opened = open_hf(path)
    rows, alike = [], {}
    for name in sorted(opened.names):
        stored = opened.stored(name)
        nbytes = sum(t.nbytes for t in stored)
        if name not in opened.quantized:
            (tensor,) = stored
            rows.append(_row(name, tensor.shape, tensor.kind, nbytes, False))
            continue
        # Weights whose tensors have the same shapes have the same format: one of them is read.
        shapes = tuple((t.kind, t.shape) for t in stored)
        if shapes not in alike:
            alike[shapes] = row_of(name, opened.read(name), None)
        bits = 8 * nbytes / math.prod(alike[shapes].shape)
        rows.append(
            dataclasses.replace(alike[shapes], path=name, nbytes=nbytes, bits_per_weight=bits)
        )
    kind = "Hugging Face model" + (f" ({opened.codec.name})" if opened.codec else "")
    return Contents(kind, Summary(tuple(rows)), opened.config)


_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16}


def _safetensors(path: Path) -> Contents:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as f:
            metadata = dict(f.metadata() or {})
            slices = {name: f.get_slice(name) for name in sorted(f.keys())}
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as e:
        raise ValueError(f"{path}: not a valid safetensors file ({e}).") from None
    rows = [
        _row(name, shape, dtype, math.prod(shape) * _BITS.get(dtype, 8) // 8, False)
        for name, (shape, dtype) in found.items()
    ]
    return Contents("safetensors", Summary(tuple(rows)), metadata)


def _row(path: str, shape: tuple[int, ...], kind: str, nbytes: int, is_quantized: bool) -> Row:
    bits = 8 * nbytes / max(math.prod(shape), 1)
    return Row(path, tuple(shape), kind, nbytes, bits, None, is_quantized)


def _plain(value: Any) -> Any:
    """Returns a GGUF value as plain data; of a long list only its length, as of the vocabulary."""
    values = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, list) and len(values) > 32:
        return f"[{len(values)} values]"
    return values


def _short(value: Any) -> str:
    text = (
        json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list) else str(value)
    )
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
