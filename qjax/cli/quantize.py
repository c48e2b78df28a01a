"""`qjax quantize`: from a float model to a saved, reloaded and judged quantized one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjax.cli import models, options
from qjax.cli.terminal import megabytes, print_json, print_table, progress_lines, step

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
            "--recipe",
            "-p",
            metavar="PRESET|FILE.toml",
            help="How to store what, and how to get there; `qjax presets` lists the presets.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The checkpoint to write.", show_default=False)
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            metavar="NAME|FILE",
            help="Text to calibrate on: wiki, pydoc (documents that are not for evaluation), or a"
            " file. Needed by recipes with data, such as w4a16-gptq.",
        ),
    ] = None,
    calibration_windows: options.CalibrationWindows = 64,
    calibration_window: options.CalibrationWindow = 512,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and stop.")
    ] = False,
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
    A recipe with data keeps finished weights in OUT.unfinished: interrupted, it goes on from there.
    Both models run with their layers stacked, which compiles several times faster.

    [bold]Examples[/bold]

      qjax quantize smollm2 --policy w4a16 --out out/smollm2-w4a16

      qjax quantize smollm2 --recipe w4a16-gptq --calibration wiki --out out/smollm2-gptq

      qjax quantize ./Llama-3.2-1B -p my-policy.toml -o out/llama --dtype bfloat16 --no-eval

      qjax quantize smollm2 -p nf4 -o out/nf4 --full --json > nf4.json
    """
    import jax.numpy as jnp

    from qjax import Policy
    from qjax.models.store import load_model, save_model

    # Whatever can be known to be wrong is found before the model is loaded.
    chosen = Policy.of(policy)
    _check_out(out, overwrite)
    _check_calibration(chosen, calibration)
    data_text = models.read_text(calibration, "calibration") if calibration else ""
    evaluation_text = models.read_text(text) if evaluate else ""

    source = models.open_runner(model, dtype and dtype.value)
    models.check_float(source, model)
    pieces = None
    if evaluate:
        limit = None if full else windows
        pieces = models.text_windows(source, model, evaluation_text, window, limit)
        models.encoded(source, model, prompt, max_tokens)
    report, batches = None, []
    if calibration is None:
        if dry_run:
            return _print_sizes(source, chosen, as_json)
        with step(f"Quantizing by {chosen.name}"):
            qparams, summary = _quantize(source, chosen)
    else:
        batches = calibration_batches(
            source, model, data_text, calibration_windows, calibration_window
        )
        if dry_run:
            return _print_plan(source, chosen, batches, as_json)
        qparams, summary, report = _quantize_with_data(source, chosen, batches, out)
        if not as_json:
            typer.echo(f"\n{report}")
    if not as_json:
        typer.echo(f"\n{summary.table()}\n")

    record = {
        "source": Path(model).name,
        "policy": {"name": chosen.name, **chosen.to_dict()},
        "summary": summary.to_dict(),
    }
    if report is not None:
        record["calibration"] = {"text": calibration, "tokens": int(sum(b.size for b in batches))}
        record["report"] = report.to_dict()
    with step(f"Saving to {out}"):
        save_model(out, source.loaded._replace(params=qparams), record=record, overwrite=overwrite)
    del qparams
    if calibration is not None:
        shutil.rmtree(_unfinished(out), ignore_errors=True)
    result = {
        "model": model,
        "policy": chosen.name,
        "out": str(out),
        "bytes": summary.totals["nbytes"],
        "bytes_on_disk": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()),
        "source_bytes": models.total_nbytes(source.loaded.params),
        "summary": summary.to_dict(),
    } | ({"report": report.to_dict()} if report is not None else {})
    if pieces is not None:
        with step(f"Reloading {out}"):
            reloaded = models.runner(load_model(out))
        result |= _judge(source, reloaded, model, pieces, prompt, max_tokens)
    if as_json:
        print_json(result)
    else:
        _print(result, str(jnp.dtype(source.loaded.model.dtype)))


def _check_out(out: Path, overwrite: bool) -> None:
    from qjax.checkpoint.target import check_target

    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: exists. Pass --overwrite to replace it, or choose another.")
    check_target(out, overwrite=overwrite)


def _check_calibration(policy: Policy, calibration: str | None) -> None:
    if policy.needs_data and calibration is None:
        raise ValueError(
            f"the recipe {policy.name} looks at activations: pass a text to calibrate on, for"
            " example `--calibration wiki`."
        )


def _unfinished(out: Path) -> Path:
    return out.with_name(out.name + ".unfinished")


def calibration_batches(
    source: Runner, name: str, text: str, windows: int, window: int
) -> list[Any]:
    """Returns calibration tokens, in batches of four windows spread over the text."""
    import jax.numpy as jnp

    from qjax.evaluate import spread

    every = models.text_windows(source, name, text, window, None, "--calibration-window")
    if len(every) < windows:
        raise ValueError(
            f"the calibration text fills {len(every)} windows of {window} tokens, not {windows}."
            " Give a longer text, or ask for fewer with --calibration-windows."
        )
    size = next(n for n in (4, 2, 1) if windows % n == 0 and windows // n > 1)
    return [jnp.asarray(b) for b in spread(every, windows).reshape(-1, size, window)]


def _quantize_with_data(
    source: Runner, policy: Policy, batches: list[Any], out: Path
) -> tuple[Any, Summary, Any]:
    import qjax
    from qjax.summary import summary

    params = source.loaded.params
    with progress_lines(f"Quantizing by {policy.name}") as line:
        qparams, report = qjax.quantize(
            params, policy, fn=source.logits, calibration=batches,
            resume=_unfinished(out), report=line,
        )  # fmt: skip
    return qparams, summary(qparams, params), report


def _print_sizes(source: Runner, policy: Policy, as_json: bool) -> None:
    """Prints what rounding to nearest would make: that takes seconds, and no more memory."""
    import jax
    import jax.numpy as jnp

    import qjax

    params = source.loaded.params
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    used = qjax.usage(source.logits)(shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    _, summary = qjax.quantize(shapes, policy, usage=used, return_report=True)
    print_json(summary.to_dict()) if as_json else typer.echo(summary.table())


def _print_plan(source: Runner, policy: Policy, batches: list[Any], as_json: bool) -> None:
    from qjax import Recipe, usage
    from qjax.ptq import pipeline
    from qjax.ptq.plan import plan
    from qjax.quantize import assign

    params = source.loaded.params
    assigned = assign(params, policy, usage(source.logits)(params, batches[0]))
    formats = {a.path: (a.format, a.layout) for a in assigned if a.format and a.layout}
    options = pipeline.options_of(policy.recipe or Recipe())
    made = plan(source.logits, params, formats, batches, options)
    print_json(made.to_dict()) if as_json else typer.echo(str(made))


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
