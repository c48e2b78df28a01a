"""`qjax generate`: continues a prompt."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qjax.cli import models, options
from qjax.cli.terminal import print_json, step


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to continue.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample among so many tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among tokens of so much probability.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask the prompt as a user's message (needs jinja2).")
    ] = False,
    packed: options.Packed = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
):
    """Continue a prompt, on packed weights if the model is quantized (of GGUF with --packed).

    [bold]Examples[/bold]

      qjax generate out/smollm2-w4a16 "Once upon a time"

      qjax generate smollm2 "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9
    """
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("--top-k and --top-p only matter with --temperature above 0.")
    import jax

    run = models.open_runner(model, packed=packed)
    tokenizer = models.tokenizer_of(run, model)
    given = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else prompt
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    with step("Generating"):
        made = models.continue_text(
            run, model, given, max_tokens, key=jax.random.key(seed), **sampling
        )
    text = models.text_of(run, made)
    if not as_json:
        typer.echo(text if chat else prompt + text)
        typer.secho(
            f"{int(made.lengths[0])} tokens; prefill {made.prefill_tokens_per_s:.1f}, decode"
            f" {made.decode_tokens_per_s:.1f} tokens/s",
            err=True,
            dim=True,
        )
        return
    n = int(made.lengths[0])
    print_json(
        {
            "model": model,
            "prompt": given,
            "text": text,
            "tokens": made.tokens[0, :n].tolist(),
            "prefill_tokens_per_s": made.prefill_tokens_per_s,
            "decode_tokens_per_s": made.decode_tokens_per_s,
        }
    )
