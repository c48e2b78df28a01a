"""`qjax quantize`: from a float model to a saved, reloaded and judged quantized one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjax.cli import models, options
from qjax.cli.terminal import megabytes, print_json, print_table, step

if TYPE_CHECKING:
    from qjax import Policy, Summary
    from qjax.cli.models import Runner

PROMPT = "The capital of France is"


def quantize(
    model: options.Model,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            "-p",
            metavar="PRESET|FILE.toml",
            help="How to store what; `qjax presets` lists the presets.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The checkpoint to write.", show_default=False)
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a qjax checkpoint that is there.")
    ] = False,
    dtype: Annotated[
        options.Dtype | None,
        typer.Option(help="To compute in, and of what is not quantized.", show_default="float32"),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--eval/--no-eval", help="Judge the result against the float model, and run it."
        ),
    ] = True,
    text: options.Text = "wiki",
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text to judge on.")] = 4,
    full: options.Full = False,
    window: options.Window = 1024,
    prompt: Annotated[str, typer.Option(help="What the result shall continue.")] = PROMPT,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    as_json: options.Json = False,
    debug: options.Debug = False,
):
    """Quantize a model, save it, reload it, and judge what was reloaded.

    The checkpoint holds all that is needed to run it: parameters, config and tokenizer.
    Both models run with their layers stacked, which compiles several times faster.

    [bold]Examples[/bold]

      qjax quantize smollm2 --policy w4a16 --out out/smollm2-w4a16

      qjax quantize ./Llama-3.2-1B -p my-policy.toml -o out/llama --dtype bfloat16 --no-eval

      qjax quantize smollm2 -p nf4 -o out/nf4 --full --json > nf4.json
    """
    import jax.numpy as jnp

    from qjax import Policy
    from qjax.models.store import load_model, save_model

    # Whatever can be known to be wrong is found before the model is loaded.
    chosen = Policy.of(policy)
    _check_out(out, overwrite)
    evaluation_text = models.read_text(text) if evaluate else ""

    source = models.open_runner(model, dtype and dtype.value)
    models.check_float(source, model)
    pieces = None
    if evaluate:
        limit = None if full else windows
        pieces = models.text_windows(source, model, evaluation_text, window, limit)
    with step(f"Quantizing by {chosen.name}"):
        qparams, summary = _quantize(source, chosen)
    if not as_json:
        typer.echo(f"\n{summary.table()}\n")

    record = {
        "source": Path(model).name,
        "policy": {"name": chosen.name, **chosen.to_dict()},
        "summary": summary.to_dict(),
    }
    with step(f"Saving to {out}"):
        save_model(out, source.loaded._replace(params=qparams), record=record, overwrite=overwrite)
    del qparams
    result = {
        "model": model,
        "policy": chosen.name,
        "out": str(out),
        "bytes": summary.totals["nbytes"],
        "bytes_on_disk": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()),
        "source_bytes": models.total_nbytes(source.loaded.params),
        "summary": summary.to_dict(),
    }
    if pieces is not None:
        with step(f"Reloading {out}"):
            reloaded = models.runner(load_model(out))
        result |= _judge(source, reloaded, model, pieces, prompt, max_tokens)
    if as_json:
        print_json(result)
    else:
        _print(result, str(jnp.dtype(source.loaded.model.dtype)))


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: exists. Pass --overwrite to replace it, or choose another.")


def _quantize(source: Runner, policy: Policy) -> tuple[Any, Summary]:
    import jax
    import jax.numpy as jnp

    import qjax

    params = source.loaded.params
    used = qjax.usage(source.logits)(params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    qparams, summary = qjax.quantize(params, policy, usage=used, return_report=True)
    return jax.block_until_ready(qparams), summary


def _judge(
    source: Runner, reloaded: Runner, name: str, pieces: Any, prompt: str, max_tokens: int
) -> dict[str, Any]:
    evaluation = models.judge(reloaded, pieces, against=source)
    with step("Generating"):
        made = models.continue_text(reloaded, name, prompt, max_tokens)
        plain = models.continue_text(source, name, prompt, max_tokens)
    return {
        "evaluation": evaluation.to_dict(),
        "generation": {
            "prompt": prompt,
            "text": models.text_of(reloaded, made),
            "decode_tokens_per_s": made.decode_tokens_per_s,
            "source_text": models.text_of(source, plain),
            "source_decode_tokens_per_s": plain.decode_tokens_per_s,
        },
    }


def _print(result: dict[str, Any], dtype: str) -> None:
    totals = result["summary"]["totals"]
    size, nbytes, before = totals["parameters"], result["bytes"], result["source_bytes"]
    rows = [
        ("bytes in memory", megabytes(before), megabytes(nbytes)),
        ("  ratio", "1", f"{before / nbytes:.2f} x smaller"),
        ("bytes on disk", "", megabytes(result["bytes_on_disk"])),
        ("bits per weight", f"{8 * before / size:.2f}", f"{8 * nbytes / size:.2f}"),
        ("  where quantized", "", f"{totals['quantized_bits_per_weight']:.3f}"),
    ]
    if "evaluation" in result:
        e, g = result["evaluation"], result["generation"]
        typer.echo(f"{g['prompt']}|{g['text']}")
        rows = [
            ("perplexity", f"{e['reference_perplexity']:.3f}", f"{e['perplexity']:.3f}"),
            ("ΔNLL ± SE (nats)", "", f"{e['delta_nll']:+.4f} ± {e['delta_nll_se']:.4f}"),
            ("KL(float || it) (nats)", "", f"{e['kl']:.4f}"),
            ("top-1 agreement", "", f"{e['agreement']:.2%}"),
            *rows,
            (
                "prefill tokens/s",
                f"{e['reference_tokens_per_s']:.1f}",
                f"{e['tokens_per_s']:.1f}",
            ),
            (
                "decode tokens/s",
                f"{g['source_decode_tokens_per_s']:.1f}",
                f"{g['decode_tokens_per_s']:.1f}",
            ),
        ]
        title = f"{result['model']}, {e['targets']:,} targets in {e['windows']} windows"
    else:
        title = result["model"]
    print_table(title, ("", dtype, result["policy"]), rows)
