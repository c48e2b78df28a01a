"""Options and arguments that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face directory, a GGUF file, a qjax checkpoint, or smollm2.",
        show_default=False,
    ),
]
Text = Annotated[
    str,
    typer.Option(
        metavar="FILE|wiki|pydoc",
        help="What to predict: a UTF-8 file, or a text that comes with a package.",
    ),
]
Window = Annotated[int, typer.Option(min=2, help="Tokens in a window; windows do not overlap.")]
Full = Annotated[bool, typer.Option("--full", help="All windows of the text.")]
CalibrationWindows = Annotated[
    int, typer.Option(min=2, help="Windows of that text; every fifth only judges.")
]
CalibrationWindow = Annotated[int, typer.Option(min=8, help="Tokens in each.")]
Packed = Annotated[
    bool,
    typer.Option(
        "--packed",
        help="Run GGUF files as they are stored: a fraction of the memory, but slower on a CPU, and"
        " where layers differ slower to compile. By default their weights become floats.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


class Dtype(StrEnum):
    """Types to compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
