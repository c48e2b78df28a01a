"""Texts to calibrate and to evaluate on, none of which needs a download at run time."""

import ast
import bz2
import functools
import html
import importlib.metadata
import os
import re
import sys
import sysconfig
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

Split = Literal["evaluation", "calibration"]

# Every fifth document is for evaluation, the first one included; the others are for calibration.
EVALUATION_STRIDE = 5

_WIKI_PACKAGE, _WIKI_VERSION = "gensim", "4.4.0"
_WIKI_FILE = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
_MEDIAWIKI = "{http://www.mediawiki.org/xml/export-0.10/}"


def load_text(name_or_path: str | os.PathLike[str], split: Split = "evaluation") -> str:
    """Returns a text.

    Args:
      name_or_path: `wiki` (106 English Wikipedia articles of 2016, from the package gensim, CC
        BY-SA), `pydoc` (the docstrings of this Python's standard library), or a UTF-8 file.
      split: which documents of a named text; the two splits share none. A file is one document and
        is returned whole: for calibration and evaluation give two files.

    Raises:
      FileNotFoundError: if there is no such text, or its package is not installed.
      ValueError: if the file is not UTF-8 or empty, or `split` is unknown.
    """
    if split not in ("evaluation", "calibration"):
        raise ValueError(f'`split` must be "evaluation" or "calibration", got {split!r}.')
    if (documents := TEXTS.get(str(name_or_path))) is None:
        return _read(Path(name_or_path))
    return "\n\n".join(
        text
        for i, text in enumerate(documents())
        if (i % EVALUATION_STRIDE == 0) == (split == "evaluation")
    )


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"no text {str(path)!r}: it is no file, and none of the names {sorted(TEXTS)}."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}).") from None
    if not text.strip():
        raise ValueError(f"{path}: the file holds no text.")
    return text


# ---- wiki ----------------------------------------------------------------------------------------


@functools.cache
def wiki() -> tuple[str, ...]:
    """Returns the articles as plain text, in the order of the dump, redirects left out.

    Raises:
      FileNotFoundError: if gensim, which carries the dump as test data, is not installed.
    """
    install = f"pip install --no-deps {_WIKI_PACKAGE}=={_WIKI_VERSION}"
    try:
        distribution = importlib.metadata.distribution(_WIKI_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"text 'wiki' comes with the package {_WIKI_PACKAGE}, which is not installed. Install"
            f" it with `{install}` (without its dependencies: only a data file is read)."
        ) from None
    path = Path(str(distribution.locate_file(_WIKI_FILE)))
    if not path.is_file():
        raise FileNotFoundError(
            f"package {_WIKI_PACKAGE} {distribution.version} has no file {_WIKI_FILE}."
            f" Install the version that does with `{install}`."
        )
    with bz2.open(path) as dump:
        pages = ET.parse(dump).getroot().iter(f"{_MEDIAWIKI}page")
        return tuple(
            plain_text(page.findtext(f"{_MEDIAWIKI}revision/{_MEDIAWIKI}text") or "")
            for page in pages
            if page.findtext(f"{_MEDIAWIKI}ns") == "0"
            and page.find(f"{_MEDIAWIKI}redirect") is None
        )


# Removed with all they hold, in this order.
_REMOVED = (
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"<ref[^>]*/>"),
    re.compile(r"<ref.*?</ref>", re.DOTALL),
    re.compile(r"<(math|gallery|timeline|nowiki|code|source|pre)\b[^>]*>.*?</\1>", re.DOTALL),
)
# Removed from the innermost outwards, as they nest: templates, tables, pictures and categories.
_NESTED = (
    re.compile(r"\{\{[^{}]*\}\}"),
    re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL),
    re.compile(
        r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", re.IGNORECASE
    ),
)
# Replaced by what they show: links to articles, links to the web, tags, bold and italics.
_SHOWN = (
    (re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]"), r"\1"),
    (re.compile(r"\[https?://\S+\s+([^\]]*)\]"), r"\1"),
    (re.compile(r"\[https?://\S+\]"), ""),
    (re.compile(r"<[^>]+>"), ""),
    (re.compile(r"'{2,}"), ""),
)
_NO_PROSE = "*#:;|!{"  # How lines of lists, indents and tables start.


def plain_text(markup: str) -> str:
    r"""Returns the prose and the headings of an article, a blank line between paragraphs.

    Example:
      >>> plain_text("== Use ==\nA '''[[cat|feline]]'''{{cn}} &amp; more.\n* a list")
      'Use\n\nA feline & more.'
    """
    text = html.unescape(markup)
    for pattern in _REMOVED:
        text = pattern.sub("", text)
    for pattern in _NESTED:
        n = 1
        while n:
            text, n = pattern.subn("", text)
    for pattern, shown in _SHOWN:
        text = pattern.sub(shown, text)
    lines = (line.strip() for line in text.split("\n"))
    return "\n\n".join(
        line.strip("= ") if line.startswith("=") else line
        for line in lines
        if line and line[0] not in _NO_PROSE
    )


# ---- pydoc ---------------------------------------------------------------------------------------


@functools.cache
def pydoc() -> tuple[str, ...]:
    """Returns the docstrings of each public module of the standard library, read without importing.

    They differ between versions of Python.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documents = (
        _docstrings(library / f"{name}.py")
        for name in sorted(sys.stdlib_module_names)
        if not name.startswith("_") and (library / f"{name}.py").is_file()
    )
    return tuple(text for text in documents if text)


def _docstrings(path: Path) -> str:
    found = (
        ast.get_docstring(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    )
    return "\n\n".join(text for text in found if text)


TEXTS: Mapping[str, Callable[[], tuple[str, ...]]] = {"wiki": wiki, "pydoc": pydoc}
