"""Every post-training method on one real model, the same calibration and evaluation tokens for all.

    uv run --extra demo python examples/ptq_smollm2.py --out ptq.json

takes about an hour on two idle cores. Rows that the JSON file holds already are not run again, so
an interrupted run goes on; `--rows rtn-4,gptq-4` runs a few. The calibration text is the wiki
documents that are not for evaluation, or any file: `--calibration FILE`. Seconds are of CPU time.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

import qjax
from qjax import Format, Policy, Recipe, Rule
from qjax.evaluate import evaluate, recorded, split_windows, spread
from qjax.models import load
from qjax.texts import load_text

# Lookups, the tied head and norms stay in float, as in the presets.
KEPT = Rule(("*embed*", "*lm_head*", "*norm*", "*bias*"), min_ndim=0, optional=True)


def grouped(bits: int, rule: str) -> Format:
    return Format(f"int{bits}", group_size=128, scale="bfloat16", rule=rule, remainder="ragged")


def policy(fmt: Format, recipe: Recipe | None = None) -> Policy:
    return Policy([KEPT, Rule("*", fmt)], recipe=recipe)


PAPER = Recipe(asymmetric=False, sweeps=0, refit=False, damping=0.01)


def rows() -> dict[str, tuple[str, Policy]]:
    """Returns title and policy of every row, by a short name."""
    out = {}
    for bits in (4, 3):
        nearest, solved = grouped(bits, "signed_absmax"), grouped(bits, "mse")
        out |= {
            f"rtn-{bits}": ("RTN", policy(nearest)),
            f"gptq-{bits}": ("GPTQ", policy(solved, PAPER)),
            f"refined-{bits}": ("GPTQ + refinement", policy(solved, Recipe())),
            f"awq-{bits}": (
                "AWQ",
                policy(nearest, Recipe(scaling="awq", rounding="nearest", clip=True)),
            ),
            f"awq-refined-{bits}": (
                "AWQ + GPTQ + refinement",
                policy(solved, Recipe(scaling="awq")),
            ),
        }
    out["nf4"] = ("NF4, groups of 64", Policy.load("nf4"))
    out |= {
        "w8a8-tensor": ("W8A8 per tensor", Policy.load("w8a8-tensor")),
        "w8a8": ("W8A8 per channel, token", Policy.load("w8a8")),
        "smoothquant-tensor": (
            "SmoothQuant per tensor",
            dataclasses.replace(
                Policy.load("w8a8-tensor"),
                recipe=Recipe(scaling="smoothquant", alpha=None, rounding="nearest"),
            ),
        ),
        "smoothquant": ("SmoothQuant per channel, token", Policy.load("w8a8-smoothquant")),
        "llm-int8": ("LLM.int8()", Policy.load("llm-int8")),
        "fp8-dynamic": ("FP8, dynamic", Policy.load("fp8-dynamic")),
        "fp8-static": ("FP8, static", Policy.load("fp8-static")),
        "w4a8": ("W4A8, GPTQ + refinement", Policy.load("w4a8")),
        "w4a8-fp8": ("FP4 x FP8, GPTQ + refinement", Policy.load("w4a8-fp8")),
    }
    return out


def main(
    out: Annotated[Path, typer.Option(help="JSON to write, or to go on with.")] = Path("ptq.json"),
    wanted: Annotated[str, typer.Option("--rows", help="Names, by commas; all by default.")] = "",
    model: str = "smollm2",
    windows: Annotated[int, typer.Option(help="Windows of 1024 tokens to judge on.")] = 8,
    calibration: Annotated[str, typer.Option(help="wiki, pydoc or a file.")] = "wiki",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
):
    every = rows()
    names = wanted.split(",") if wanted else list(every)
    if unknown := [n for n in names if n not in every]:
        raise typer.BadParameter(f"{unknown[0]!r} is no row; there are {', '.join(every)}.")
    loaded = load(model, scan_layers=True)
    assert loaded.tokenizer is not None

    def fn(params, tokens) -> Any:
        return loaded.model.apply({"params": params}, tokens)

    ids = loaded.tokenizer.encode(load_text(calibration, "calibration"))
    pieces = split_windows(ids, length)
    batches = [jnp.asarray(b) for b in spread(pieces, samples).reshape(-1, 4, length)]
    test = split_windows(loaded.tokenizer.encode(load_text("wiki")), 1024, windows)

    setting = {
        "model": model,
        "evaluation": f"{windows} x 1024 tokens of wiki",
        "calibration": f"{samples} x {length} tokens of {Path(calibration).name}",
        "jax": jax.__version__,
    }
    record = {"setting": setting, "rows": {}}
    if out.exists():
        record = json.loads(out.read_text())
        if record["setting"] != setting:
            raise typer.BadParameter(f"{out} is of another setting: {record['setting']}.")

    reference = recorded(fn, loaded.params, test)
    for name in names:
        if name in record["rows"]:
            continue
        title, chosen = every[name]
        start = time.process_time()
        qparams, notes = quantized(fn, loaded.params, chosen, batches)
        seconds = time.process_time() - start
        e = evaluate(qjax.apply(fn), qparams, test, reference=reference)
        totals = qjax.summary(qparams).totals
        record["rows"][name] = {
            "title": title,
            "perplexity": e.perplexity,
            "reference_perplexity": e.reference_perplexity,
            "delta_nll": e.delta_nll,
            "delta_nll_se": e.delta_nll_se,
            "kl": e.kl,
            "top1": e.agreement,
            "bits_per_weight": totals["quantized_bits_per_weight"],
            "seconds": seconds,
            **notes,
        }
        out.write_text(json.dumps(record, indent=2))
        typer.echo(line(record["rows"][name]))
    typer.echo("\n" + table(record["rows"]))


def quantized(fn: Any, params: Any, chosen: Policy, batches: list[Any]) -> tuple[Any, dict]:
    """Returns the quantized tree, and what is worth noting about how it came about."""
    if not chosen.needs_data:
        used = qjax.usage(fn)(params, batches[0])
        return jax.block_until_ready(qjax.quantize(params, chosen, usage=used)), {}
    qparams, report = qjax.quantize(params, chosen, fn=fn, calibration=batches, report=None)
    solved = [s for s in report.solved if s.held_out is not None]
    notes: dict[str, Any] = {}
    if solved:
        notes["held_out_rtn"] = float(np.mean([s.held_out_rtn for s in solved]))
        notes["held_out"] = float(np.mean([s.held_out for s in solved]))
    if report.smoothed:
        notes["folded"] = sum(s.where.startswith("folded") for s in report.smoothed)
        notes["kept_at_weights"] = sum(s.where.startswith("kept") for s in report.smoothed)
    return jax.block_until_ready(qparams), notes


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['title']} | {row['bits_per_weight']:.3f} | {row['perplexity']:.3f} |"
        f" {row['delta_nll']:+.4f} ± {row['delta_nll_se']:.4f} | {row['kl']:.4f} |"
        f" {row['top1']:.2%} | {row['seconds']:.0f} |"
    )


def table(done: dict[str, dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    head = "| method | bits | perplexity | ΔNLL | KL | top-1 | s |\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *(line(done[name]) for name in rows() if name in done)])


if __name__ == "__main__":
    typer.run(main)
