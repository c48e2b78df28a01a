"""Talking to a terminal: results to stdout, progress and errors to stderr, exit codes."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer

# The caller can mend these by another argument or file.
_BAD_INPUT = (
    ValueError,
    TypeError,
    NotImplementedError,
    ImportError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
BAD_INPUT, FAILURE = 2, 1


def guarded[**P](command: Callable[P, None]) -> Callable[P, None]:
    """Returns the command, its errors as one red line on stderr and an exit code.

    With `--debug` they are raised as they are.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if kwargs.get("debug"):
            return command(*args, **kwargs)
        try:
            return command(*args, **kwargs)
        except (BrokenPipeError, typer.Exit, typer.Abort):
            raise
        except _BAD_INPUT as e:
            _fail(str(e) or type(e).__name__, BAD_INPUT)
        except Exception as e:
            _fail(f"{type(e).__name__}: {e} (`--debug` shows where)", FAILURE)

    return run


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt later where Python had to drop it.

    An interrupt that arrives while garbage is collected is raised in whatever Python code runs
    first, and that is a callback of the collector, which JAX has one of. Nothing can be raised from
    there: Python says "Exception ignored", and the program would go on.
    """
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            return usual(unraisable)
        # By then the main thread is out of the callback; if it is in another one, once more.
        # Sent to that thread, as it may be waiting for something.
        main = threading.main_thread().ident
        again = threading.Timer(0.01, signal.pthread_kill, [main, signal.SIGINT])
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual


def _fail(message: str, code: int) -> None:
    line = " ".join(message.split())
    typer.secho(f"qjax: error: {line}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code)


def print_json(data: Any) -> None:
    """Prints plain data as JSON; infinities and NaN, which JSON lacks, become strings."""
    typer.echo(json.dumps(_finite(data), indent=2))


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(v) for v in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def print_table(
    title: str | None,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    is_text: bool = False,
) -> None:
    """Prints a table, its first column to the left and the others, unless text, to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title and Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for i, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if is_text or i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to wrap at
        console = Console(highlight=False, width=1000)
    console.print(table)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Shows a spinner while it runs, and afterwards how long it took."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    start = time.perf_counter()
    with console.status(Text(text)):
        yield
    console.print(Text.assemble(text, (f"  {time.perf_counter() - start:.1f} s", "dim")))


@contextlib.contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar while it runs; yields the function that sets how much is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    start = time.perf_counter()
    bar = Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)
    console.print(Text.assemble(text, (f"  {time.perf_counter() - start:.1f} s", "dim")))


@contextlib.contextmanager
def progress_lines(text: str) -> Iterator[Callable[[str], None]]:
    """Shows a spinner beside the last of many lines; yields the function that takes a line.

    Where stderr is no terminal the lines are printed, one in ten seconds at most.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    start = last = time.perf_counter()
    with console.status(Text(text)) as status:

        def line(message: str) -> None:
            nonlocal last
            status.update(Text(f"{text}: {message}"))
            if not console.is_terminal and time.perf_counter() - last > 10:
                last = time.perf_counter()
                console.print(Text(message), soft_wrap=True)

        yield line
    console.print(Text.assemble(text, (f"  {time.perf_counter() - start:.1f} s", "dim")))


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
