"""`qjax eval`: how well a model predicts a text, alone or against another."""

from __future__ import annotations

from typing import Annotated

import typer

from qjax.cli import models, options
from qjax.cli.terminal import megabytes, print_json, print_table


def evaluate(
    model: options.Model,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Compare with this model, e.g. the float one.", show_default=False
        ),
    ] = None,
    text: options.Text = "wiki",
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text to use.")] = 8,
    full: options.Full = False,
    window: options.Window = 1024,
    packed: options.Packed = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
):
    """Measure perplexity, and against a reference ΔNLL, KL divergence and top-1 agreement.

    Windows do not overlap and get no begin-of-sequence token; each predicts its tokens from the
    second on. The standard error of ΔNLL is that of the differences at each token.

    [bold]Examples[/bold]

      qjax eval smollm2

      qjax eval out/smollm2-w4a16 --against smollm2 --text mine.txt --windows 16

      qjax eval out/smollm2-w4a16 --against smollm2 --full --json
    """
    content = models.read_text(text)
    one = models.open_runner(model, packed=packed)
    other = None if against is None else models.open_runner(against, packed=packed)
    pieces = models.text_windows(one, model, content, window, None if full else windows)
    if other is not None:
        _check_tokenizers(one, model, other, against or "")
    e = models.judge(one, pieces, other)
    nbytes = models.total_nbytes(one.loaded.params)
    other_nbytes = None if other is None else models.total_nbytes(other.loaded.params)
    if as_json:
        names = {"model": model, "text": text, "bytes": nbytes}
        if against is not None:
            names |= {"against": against, "against_bytes": other_nbytes}
        print_json(names | e.to_dict())
        return
    rows = [
        ("perplexity", f"{e.perplexity:.3f}"),
        ("NLL (nats)", f"{e.nll:.4f}"),
        ("bytes in memory", megabytes(nbytes)),
        ("prefill tokens/s", f"{e.tokens_per_s:.1f}"),
    ]
    columns = ["", model]
    if other_nbytes is not None:
        columns.append(f"against {against}")
        theirs = (
            f"{e.reference_perplexity:.3f}",
            f"{e.reference_nll:.4f}",
            megabytes(other_nbytes),
            f"{e.reference_tokens_per_s:.1f}",
        )
        rows = [(*row, cell) for row, cell in zip(rows, theirs, strict=True)]
        rows += [
            ("ΔNLL ± SE (nats)", f"{e.delta_nll:+.4f} ± {e.delta_nll_se:.4f}", ""),
            ("KL(other || it) (nats)", f"{e.kl:.4f}", ""),
            ("top-1 agreement", f"{e.agreement:.2%}", ""),
        ]
    print_table(f"{text}: {e.targets:,} targets in {e.windows} windows", columns, rows)


def _check_tokenizers(one: models.Runner, name: str, other: models.Runner, against: str) -> None:
    a, b = models.tokenizer_of(one, name), models.tokenizer_of(other, against)
    probe = "Two tokenizers agree: 1234 naïve words,\n\nline by line."
    if a.vocab_size != b.vocab_size or a.encode(probe) != b.encode(probe):
        raise ValueError(
            f"{name} and {against} cut text into different tokens: their losses cannot be compared."
        )
