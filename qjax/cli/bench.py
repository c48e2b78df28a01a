"""`qjax bench`: how fast packed products and a packed model are, beside what they replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjax.cli import models, options
from qjax.cli.terminal import megabytes, print_json, print_table, progress, step

if TYPE_CHECKING:
    from qjax.bench import Decoding, Product


def bench(
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="int8, int4-g128 or nf4-g64; may be repeated.", show_default="all"
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape", metavar="KxN", help="May be repeated.", show_default="4096x4096, 4096x11008"
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            "-M", "--tokens", min=1, help="May be repeated.", show_default="1, 8, 16, 128"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds of all ways.")] = 15,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small shape and few rounds, to see that it works.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Time the decoding of this model instead.", show_default=False),
    ] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option("--policy", help="Of the model; may be repeated.", show_default="int4-g128"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write the JSON here.", show_default=False),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
):
    """Time packed products against float32, dequantize-then-dot and, if installed, Qwix.

    Where packed products run on a native kernel, plain JAX (xla) is timed beside it. Times are
    medians and minima over interleaved rounds; a ratio above 1 means that packed is faster. With
    --model, greedy decoding of a whole model is timed instead.

    [bold]Examples[/bold]

      qjax bench --out bench.json

      qjax bench --format int4-g128 --shape 4096x4096 -M 1 -M 16

      qjax bench --model smollm2 --policy int4-g128 --policy nf4
    """
    from qjax import bench as timing

    if model is None and policies:
        raise ValueError("--policy is of a model: name one with --model, or choose by --format.")
    result: dict[str, Any] = {"environment": timing.environment()}
    decoded, timed = [], []
    if model is not None:
        decoded = _decode(model, policies or ["int4-g128"], 1 if quick else 3)
        result["decoding"] = [d._asdict() for d in decoded]
    else:
        timed = _products(
            formats or list(timing.FORMATS),
            [_shape(s) for s in shapes or ()] or (timing.QUICK_SHAPES if quick else timing.SHAPES),
            tokens or (timing.QUICK_TOKENS if quick else timing.TOKENS),
            min(repeats, 3) if quick else repeats,
        )
        result["products"] = [p.to_dict() for p in timed]
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(result)
    elif model is not None:
        _print_decoding(model, decoded)
    else:
        _print_products(timed)


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) for p in parts):
        raise ValueError(f"--shape is KxN, like 4096x11008, got {text!r}.")
    return int(parts[0]), int(parts[1])


def _products(formats, shapes, tokens, repeats) -> list[Product]:
    from qjax import bench as timing

    total = len(formats) * len(shapes) * len(tokens)
    with progress("Timing products", total) as done:
        found: list[Product] = []

        def on_product(product: Product):
            found.append(product)
            done(len(found))

        return timing.products(formats, shapes, tokens, repeats=repeats, on_product=on_product)


def _print_products(products: list[Product]) -> None:
    ways = list(dict.fromkeys(way for p in products for way in p.timings))
    others = [way for way in ways if way != "packed"]
    rows = [
        (
            p.format,
            f"{p.K}x{p.N}",
            str(p.M),
            *(
                f"{p.timings[w].median_ms:.2f} ({p.timings[w].min_ms:.2f})"
                if w in p.timings
                else "-"
                for w in ways
            ),
            *(
                f"{p.ratios[w]:.2f} ({p.ratios_of_minima[w]:.2f})" if w in p.ratios else "-"
                for w in others
            ),
            f"{p.timings['packed'].temp_bytes / 1e6:.1f}",
            p.implementation,
        )
        for p in products
    ]
    columns = ("format", "KxN", "M", *(f"{w} ms" for w in ways), *(f"vs {w}" for w in others))
    print_table(
        "median (min) in ms; how many times faster packed is, by medians (by minima)",
        (*columns, "temp MB", "packed is"),
        rows,
    )


def _decode(name: str, policies: list[str], repeats: int) -> list[Decoding]:
    import jax

    import qjax
    from qjax import bench as timing

    chosen = {policy: qjax.Policy.of(policy) for policy in policies}
    run = models.open_runner(name)
    models.check_float(run, name)
    params = run.loaded.params
    trees = {"float": params}
    for policy_name, policy in chosen.items():
        with step(f"Quantizing by {policy_name}"):
            trees[policy_name] = jax.block_until_ready(qjax.quantize(params, policy))
    with step("Timing decoding"):
        return timing.decoding(run.apply, run.loaded.config, trees, repeats=repeats)


def _print_decoding(name: str, decoded: list[Decoding]) -> None:
    first = decoded[0].median_tokens_per_s
    rows = [
        (
            d.params,
            megabytes(d.nbytes),
            f"{d.median_tokens_per_s:.1f}",
            f"{d.max_tokens_per_s:.1f}",
            f"{d.median_tokens_per_s / first:.2f}",
            d.implementation,
        )
        for d in decoded
    ]
    columns = ("parameters", "bytes", "median tokens/s", "best tokens/s", "vs float", "packed is")
    print_table(f"{name}: greedy decoding of one row", columns, rows)
