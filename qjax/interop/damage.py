"""Errors about files that hold what no reader expects: each names the file."""

from __future__ import annotations

import contextlib
import re

# What arithmetic and look-ups with a value of a wrong type or size raise.
_SYMPTOMS = (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)


@contextlib.contextmanager
def naming(where: object):
    """Puts a place before the errors of a block; a symptom of a wrong value is a ValueError then.

    Raises:
      ValueError, NotImplementedError: those of the block, with `where` before their message; a
        ValueError for what a wrong type in a JSON file, say, leads to.
    """
    try:
        yield
    except NotImplementedError as e:
        raise NotImplementedError(f"{where}: {e}") from None
    except (*_SYMPTOMS, re.error) as e:
        raise ValueError(
            f"{where}: holds a value of a type or size that nothing here expects"
            f" ({type(e).__name__}: {e}). The file is damaged, or newer than this reader."
        ) from e
    except ValueError as e:
        e.args = (f"{where}: {e}",)
        raise
