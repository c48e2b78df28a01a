"""`qjax convert`: a model from one tool's files to another's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from qjax.cli import models, options
from qjax.cli.terminal import megabytes, print_json, progress_lines, step

if TYPE_CHECKING:
    from qjax.models.load import LoadedModel


class Job(NamedTuple):
    """What a target is asked to write.

    Attributes:
      source: what the user called the model.
      model: the model, opened as the target asked for.
      out: where to.
      variant: what follows the colon in `--to`; None: nothing.
      overwrite, verify: as the user said.
      pre_tokenizer: llama.cpp's name of the rule that cuts text; None: found out.
      report: called with a line for each step.
    """

    source: str
    model: LoadedModel
    out: Path
    variant: str | None
    overwrite: bool
    verify: bool
    pre_tokenizer: str | None
    report: Callable[[str], None]


class Target(NamedTuple):
    """A kind of file that a model can be converted to.

    Attributes:
      write: does it.
      check: of a variant, raises ValueError if it cannot be.
      check_out: of a path that may be there already, raises if it is not for this to replace.
      opens_packed: of a variant, whether quantized weights are to be kept as they are stored.
      policy: of a variant, the model and fields of a Recipe, the Policy by which weights are
        quantized first if there are calibration data; None: the target quantizes nothing.
    """

    write: Callable[[Job], None]
    check: Callable[[str | None], None]
    check_out: Callable[[Path], None]
    opens_packed: Callable[[str | None], bool]
    policy: Callable[..., Any] | None = None


# ---- GGUF ----------------------------------------------------------------------------------------


def _check_gguf(variant: str | None) -> None:
    from qjax.interop.gguf import MIXES

    if variant is not None and variant not in MIXES:
        raise ValueError(f"no GGUF file is called {variant!r}. There are {', '.join(MIXES)}.")


def _gguf_policy(variant: str | None, model: LoadedModel, **recipe: Any) -> Any:
    from qjax.models.gguf import policy

    if variant is None:
        raise ValueError(
            "calibration data are for quantizing: say to what, for example --to gguf:Q4_K_M."
        )
    keep = ("embed/*", "lm_head/*")
    return policy(model.config, model.params, variant, keep=keep, **recipe)


def _write_gguf(job: Job) -> None:
    from qjax.models.gguf import save_gguf

    extra = _described(job.source)
    if job.pre_tokenizer is not None:
        extra["tokenizer.ggml.pre"] = job.pre_tokenizer
    save_gguf(
        job.out, job.model.params, job.model.config, job.model.tokenizer, mix=job.variant,
        extra=extra, name=Path(job.source).stem, overwrite=job.overwrite,
        verify=job.verify, report=job.report,
    )  # fmt: skip


def _described(source: str) -> dict[str, Any]:
    """Returns what a GGUF source says about itself and its tokenizer, to be said again."""
    from qjax.interop.gguf import open_gguf, typed_metadata
    from qjax.models.load import PACKAGES, package_file

    path = package_file(source) if source in PACKAGES else Path(source)
    if not path.is_file():
        return {}
    ours = ("general.architecture", "general.file_type", "general.quantization_version",
            "general.alignment")  # fmt: skip
    return {
        key: value
        for key, value in typed_metadata(open_gguf(path)).items()
        if key.startswith(("general.", "tokenizer.")) and key not in ours
    }


def _check_file(out: Path) -> None:
    from qjax.interop.gguf.writer import check_target

    check_target(out, overwrite=True)


# ---- Hugging Face --------------------------------------------------------------------------------


def _check_hf(variant: str | None) -> None:
    from qjax.interop.hf import methods

    if variant is None:
        raise ValueError(
            f"say how a directory is to hold the weights: --to hf:float, or hf: followed by one of"
            f" {', '.join([*methods.METHODS, *methods.ALIASES])}."
        )
    if variant != "float":
        methods.method(variant)


def _write_hf(job: Job) -> None:
    from qjax import export
    from qjax.models.catalog import is_checkpoint

    source = Path(job.source)
    is_hf = source.is_dir() and not is_checkpoint(source)
    export.hf(
        job.out, job.model.params, job.model.config,
        format=None if job.variant == "float" else job.variant,
        source=source if is_hf else None, tokenizer=None if is_hf else job.model.tokenizer,
        overwrite=job.overwrite, verify=job.verify,
    )  # fmt: skip


def _check_directory(out: Path) -> None:
    from qjax.interop.hf.write import check_target

    check_target(out, overwrite=True)


# ---- qjax checkpoints ----------------------------------------------------------------------------


def _check_orbax(variant: str | None) -> None:
    if variant is not None:
        raise ValueError(
            f"a qjax checkpoint keeps weights as they are: --to orbax, not orbax:{variant}."
        )


def _write_orbax(job: Job) -> None:
    import jax
    import numpy as np

    from qjax.models.store import load_model, save_model

    record = {"source": Path(job.source).name}
    save_model(job.out, job.model, record=record, overwrite=job.overwrite)
    if not job.verify:
        return
    back = load_model(job.out).params
    for a, b in zip(jax.tree.leaves(job.model.params), jax.tree.leaves(back), strict=True):
        if a.dtype != b.dtype or not np.array_equal(
            np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)
        ):
            shutil.rmtree(job.out)
            raise ValueError(f"{job.out}: differed from what was saved. This is a bug.")


def _check_checkpoint(out: Path) -> None:
    from qjax.checkpoint.target import check_target

    check_target(out, overwrite=True)


TARGETS: Mapping[str, Target] = {
    # A mix quantizes floats; without one, blocks are moved as they are.
    "gguf": Target(
        _write_gguf, _check_gguf, _check_file, lambda variant: variant is None, _gguf_policy
    ),
    "hf": Target(_write_hf, _check_hf, _check_directory, lambda variant: True),
    "orbax": Target(_write_orbax, _check_orbax, _check_checkpoint, lambda variant: True),
}


# ---- the command ---------------------------------------------------------------------------------


class Method(StrEnum):
    """What calibration data are for."""

    importance = "importance"
    gptq = "gptq"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A Hugging Face directory, a GGUF file, a qjax checkpoint, or smollm2.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="DST", help="What to write.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TARGET[:VARIANT]",
            help="gguf:Q4_K_M and other mixes of llama.cpp; gguf: weights as they are; orbax: a"
            " qjax checkpoint; hf:gptq, awq, compressed-tensors, bnb, fp8: a Hugging Face directory"
            " of weights as they are; hf:float.",
            show_default=False,
        ),
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", "-c", metavar="NAME|FILE",
            help="Text to calibrate on: wiki, pydoc, or a file.",
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="With calibration: importance weighs the search for scales by it, as an imatrix"
            " does; gptq also chooses the codes, by GPTQ and coordinate descent on their grid."
        ),
    ] = Method.gptq,
    calibration_windows: options.CalibrationWindows = 64,
    calibration_window: options.CalibrationWindow = 512,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What llama.cpp calls the rule by which the tokenizer cuts text, for a GGUF file;"
            " asked for where it cannot be found out.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Decode what was written, and compare every tensor.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
):  # fmt: skip
    """Convert a model to the files of another tool.

    [bold]Examples[/bold]

      qjax convert smollm2 out/smollm2.gguf --to gguf:Q4_K_M --verify

      qjax convert smollm2 out/smollm2.gguf --to gguf:Q4_K_M --calibration wiki

      qjax convert model.gguf out/model --to orbax
    """
    kind, _, variant = to.partition(":")
    if kind not in TARGETS:
        raise ValueError(f"--to {to}: no target {kind!r}. There are {', '.join(TARGETS)}.")
    target, variant = TARGETS[kind], variant or None
    target.check(variant)
    if calibration is not None and target.policy is None:
        raise ValueError(f"--calibration: the target {kind} keeps weights as they are.")
    if pre_tokenizer is not None and kind != "gguf":
        raise ValueError(f"--pre-tokenizer is for GGUF files; the target {kind} has no such name.")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: exists. Pass --overwrite to replace it, or choose another.")
    target.check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = models.read_text(calibration, "calibration") if calibration else ""
    with step(f"Loading {source}"):
        loaded = _open(source, packed=target.opens_packed(variant))
    unfinished = out.with_name(out.name + ".unfinished")
    if calibration is not None:
        models.check_float(models.runner(loaded), source)
        made = target.policy(variant, loaded, **_recipe(method))  # pyright: ignore[reportOptionalCall]
        loaded = _quantized(
            loaded, made, source, text, calibration_windows, calibration_window, unfinished
        )
    with progress_lines(f"Writing {out}") as line:
        target.write(Job(source, loaded, out, variant, overwrite, verify, pre_tokenizer, line))
    if calibration is not None:
        shutil.rmtree(unfinished, ignore_errors=True)
    files = [out] if out.is_file() else [f for f in out.rglob("*") if f.is_file()]
    nbytes = sum(f.stat().st_size for f in files)
    if as_json:
        print_json({"source": source, "out": str(out), "to": to, "bytes_on_disk": nbytes,
                    "verified": verify})  # fmt: skip
    else:
        note = ", verified" if verify else ""
        typer.echo(f"{out}: {to}, {megabytes(nbytes)}{note}")


def _recipe(method: Method) -> dict[str, Any]:
    return {"rounding": "gptq" if method is Method.gptq else "nearest"}


def _open(source: str, *, packed: bool) -> LoadedModel:
    """Opens a model, its layers apart: each may have types of its own."""
    from qjax.models.catalog import open_model
    from qjax.models.load import PACKAGES, load_gguf, package_file

    path = package_file(source) if source in PACKAGES else Path(source)
    if packed and path.is_file():
        return load_gguf(path, packed=True)
    return open_model(source, scan_layers=False)


def _quantized(
    loaded: LoadedModel, policy: Any, name: str, text: str, windows: int, window: int, resume: Path
) -> LoadedModel:
    import qjax
    from qjax.cli.quantize import calibration_batches

    source = models.runner(loaded)
    batches = calibration_batches(source, name, text, windows, window)
    with progress_lines(f"Quantizing by {policy.name}") as line:
        params, _ = qjax.quantize(
            loaded.params, policy, fn=source.logits, calibration=batches, resume=resume,
            report=line,
        )  # fmt: skip
    return loaded._replace(params=params)
