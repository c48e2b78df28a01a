"""`qjax plan`: what a decode step of a quantized model needs on GPUs, before there are weights."""

from __future__ import annotations

from typing import Annotated

import typer

from qjax.cli import options
from qjax.cli.terminal import print_json, print_table, step


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="llama-3-8b, llama-3-70b, a config.json of transformers or its directory.",
            show_default=False,
        ),
    ],
    policy: Annotated[
        str,
        typer.Option("--policy", "-p", help="A preset, a TOML file, or bfloat16."),
    ] = "int4-g128",
    device: Annotated[str, typer.Option(help="h100, a100, rtx3090 or rtx4090.")] = "h100",
    devices: Annotated[int, typer.Option(min=1, max=8, help="How many, tensor parallel.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens that the cache holds.")] = 1024,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Ask the compiler, or compute from shapes; the compiler if it is installed.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
):
    """Show memory, collectives and products of one decode step, without weights or a GPU.

    [bold]Examples[/bold]

      qjax plan llama-3-70b --policy int4-g128 --devices 2 --batch 16

      qjax plan path/to/config.json --policy fp8-dynamic --no-compile --json
    """
    from qjax.planning import plan

    with step("Compiling" if compile_ else "Planning"):
        result = plan(
            model,
            None if policy == "bfloat16" else policy,
            device=device,
            devices=devices,
            batch=batch,
            context=context,
            compiler=compile_,
        )
    if as_json:
        print_json(result.to_dict())
        return
    title = f"{model}, {policy}, {devices} x {device}, batch {batch}, context {context}"
    print_table(title, ("a decode step", "on each device"), result.rows(), is_text=True)
