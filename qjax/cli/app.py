"""The `qjax` program: its commands, and what all of them share at the top."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from qjax.cli.bench import bench
from qjax.cli.convert import convert
from qjax.cli.eval import evaluate
from qjax.cli.generate import generate
from qjax.cli.inspect import inspect
from qjax.cli.plan import plan
from qjax.cli.presets import presets
from qjax.cli.quantize import quantize
from qjax.cli.terminal import guarded, interruptible

app = typer.Typer(
    name="qjax",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool):
    if asked:
        try:
            version = importlib.metadata.version("qjax")
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            version = "(not installed)"
        typer.echo(f"qjax {version}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
):
    """Quantize, judge, run and inspect language models in JAX.

    MODEL is a Hugging Face directory, a GGUF file, a qjax checkpoint, or a name:
    [bold]smollm2[/bold] (SmolLM2-135M-Instruct, from its package), [bold]smollm2-rescaled[/bold].

    Results go to stdout, progress and errors to stderr.
    Exit codes: 0 done, 2 wrong usage or input, 1 any other failure.
    """


for _name, _command in {
    "quantize": quantize,
    "eval": evaluate,
    "generate": generate,
    "convert": convert,
    "inspect": inspect,
    "bench": bench,
    "plan": plan,
    "presets": presets,
}.items():
    app.command(_name)(guarded(_command))


def main() -> None:
    """Runs the program; what `qjax` on the command line calls."""
    with interruptible():
        app(prog_name="qjax")
