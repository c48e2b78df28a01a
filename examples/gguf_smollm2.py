"""GGUF files of one real model: ggml's search, the same weighted by importance, and GPTQ.

    uv run --extra demo python examples/gguf_smollm2.py --calibration brown.txt --out out/gguf

writes SmolLM2-135M at Q4_K_M and Q3_K_M three times each, equal to the byte in size and in the type
of every tensor, and judges the files as they read back: perplexity, and KL from the float model, on
text of other documents. `importance` weighs the search by the mean squares of the inputs, as an
imatrix does; `gptq` starts there and solves codes and scales on the second moments. An hour on two
idle cores. Files and rows that are there already are not made again, and an interrupted GPTQ goes
on. Seconds are of CPU time, in the run that finished.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

import qjax
from qjax.evaluate import evaluate, recorded, split_windows, spread
from qjax.interop.gguf import open_gguf
from qjax.models import load, load_gguf
from qjax.models.gguf import policy, save_gguf
from qjax.texts import load_text

METHODS = {
    "search": ("ggml's search", None),
    "importance": ("with importance", {"rounding": "nearest"}),
    "gptq": ("GPTQ on its grid", {"rounding": "gptq"}),
}


def main(
    out: Annotated[Path, typer.Option(help="Directory of the files, and of gguf.json.")] = Path(
        "out/gguf"
    ),
    mixes: Annotated[str, typer.Option(help="By commas.")] = "Q4_K_M,Q3_K_M",
    methods: Annotated[str, typer.Option(help="By commas.")] = ",".join(METHODS),
    model: str = "smollm2",
    windows: Annotated[int, typer.Option(help="Windows of 1024 tokens to judge on.")] = 8,
    calibration: Annotated[str, typer.Option(help="wiki, pydoc or a file.")] = "wiki",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
):
    loaded = load(model, scan_layers=False)  # layers differ in their types
    assert loaded.tokenizer is not None

    def fn(params, tokens) -> Any:
        return loaded.model.apply({"params": params}, tokens)

    pieces = split_windows(loaded.tokenizer.encode(load_text(calibration, "calibration")), length)
    batches = [jnp.asarray(b) for b in spread(pieces, samples).reshape(-1, 4, length)]
    test = split_windows(loaded.tokenizer.encode(load_text("wiki")), 1024, windows)

    setting = {
        "model": model,
        "evaluation": f"{windows} x 1024 tokens of wiki",
        "calibration": f"{samples} x {length} tokens of {Path(calibration).name}",
        "jax": jax.__version__,
    }
    out.mkdir(parents=True, exist_ok=True)
    record_file = out / "gguf.json"
    record: dict[str, Any] = {"setting": setting, "rows": {}}
    if record_file.exists():
        record = json.loads(record_file.read_text())
        if record["setting"] != setting:
            raise typer.BadParameter(f"{record_file} is of another setting: {record['setting']}.")

    reference = recorded(fn, loaded.params, test)
    for mix in mixes.split(","):
        for method in methods.split(","):
            name = f"{mix}-{method}"
            if name in record["rows"]:
                continue
            path, start = out / f"{name}.gguf", time.process_time()
            if not path.exists():
                write(path, loaded, fn, mix, method, batches)
            seconds = time.process_time() - start
            packed = load_gguf(path, packed=True)
            apply = qjax.apply(lambda p, t, m=packed.model: m.apply({"params": p}, t))
            e = evaluate(apply, packed.params, test, reference=reference)
            record["rows"][name] = {
                "mix": mix,
                "method": METHODS[method][0],
                "bytes": path.stat().st_size,
                "types": types_in(path),
                "perplexity": e.perplexity,
                "reference_perplexity": e.reference_perplexity,
                "delta_nll": e.delta_nll,
                "delta_nll_se": e.delta_nll_se,
                "kl": e.kl,
                "top1": e.agreement,
                "seconds": seconds,
            }
            record_file.write_text(json.dumps(record, indent=2) + "\n")
            typer.echo(line(record["rows"][name]))
    typer.echo("\n" + table(record["rows"]))


def write(path: Path, loaded: Any, fn: Any, mix: str, method: str, batches: list[Any]) -> None:
    """Writes a file; embedding and head are searched without data in all of them."""
    params, recipe = loaded.params, METHODS[method][1]
    unfinished = path.with_suffix(".unfinished")
    if recipe is not None:
        keep = ("embed/*", "lm_head/*")
        made = policy(loaded.config, params, mix, keep=keep, **recipe)
        params, _ = qjax.quantize(
            params, made, fn=fn, calibration=batches, resume=unfinished, report=typer.echo
        )
    save_gguf(path, params, loaded.config, loaded.tokenizer, mix=mix, verify=True)
    shutil.rmtree(unfinished, ignore_errors=True)


def types_in(path: Path) -> dict[str, int]:
    """Returns how many tensors of two axes each type has."""
    count: dict[str, int] = {}
    for tensor in open_gguf(path).tensors.values():
        if len(tensor.shape) > 1:
            count[tensor.kind.name] = count.get(tensor.kind.name, 0) + 1
    return count


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['mix']} | {row['method']} | {row['bytes'] / 1e6:.2f} | {row['perplexity']:.3f} |"
        f" {row['delta_nll']:+.4f} ± {row['delta_nll_se']:.4f} | {row['kl']:.4f} |"
        f" {row['top1']:.2%} | {row['seconds']:.0f} |"
    )


def table(done: dict[str, dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    head = "| file | scales and codes | MB | perplexity | ΔNLL | KL | top-1 | s |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *map(line, done.values())])


if __name__ == "__main__":
    typer.run(main)
