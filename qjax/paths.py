"""Parameter paths: how a leaf of a pytree is named in rules, tables and errors."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any


def key_str(key: Any) -> str:
    """Returns one step of a path: a dict key, a field name or an index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_str(key_path: tuple[Any, ...]) -> str:
    """Returns a key path as written in rules: its steps joined by `/`.

    The last step into the box of an `nnx.Variable` or a Linen `Partitioned`, its field `value`, is
    left out, so that a parameter has one name however it is boxed.

    Example:
      >>> import jax
      >>> path_str((jax.tree_util.DictKey("layers"), jax.tree_util.SequenceKey(0)))
      'layers/0'
    """
    if len(key_path) > 1 and getattr(key_path[-1], "name", None) == "value":
        key_path = key_path[:-1]
    return "/".join(key_str(k) for k in key_path) or "."


def check_unique(paths: Iterable[str]) -> None:
    """Refuses a tree in which two leaves have one path, as {"a/b": x, "a": {"b": y}} has.

    Raises:
      ValueError: naming the path.
    """
    for path, count in Counter(paths).items():
        if count > 1:
            raise ValueError(
                f"{path}: is the path of {count} parameters: a key that contains '/' reads like"
                " keys below one another. Rename it."
            )


# ---- patterns -----------------------------------------------------------------------------------


def check_pattern(pattern: str) -> None:
    """Refuses what `matches` cannot use.

    Raises:
      ValueError: if what stands after `re:` is no regular expression.
    """
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as e:
            raise ValueError(f"{pattern!r} is no regular expression: {e}.") from e


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches a whole path.

    It is a glob, in which `*` also matches `/`, or a regular expression after `re:`.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    return fnmatch.fnmatchcase(path, pattern)
