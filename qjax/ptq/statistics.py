"""Statistics of the inputs of a float model's weights, in as many passes as memory asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from qjax.observers import OBSERVERS
from qjax.transform.calibrate import Calibration, calibrate
from qjax.transform.usage import Usage

# Statistics held at once. The second moments of all inputs of a model take more than its weights;
# what does not fit is left for another pass over the data.
BYTES = 4 << 30


class Group(NamedTuple):
    """Weights that read one activation.

    Attributes:
      paths: of the weights.
      shape: (*lead, K) of the statistics.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]


class Pass(NamedTuple):
    """What one pass over the data saw.

    Attributes:
      groups: those observed.
      train, judge: statistics of the calibration batches and of the held-out ones, if there are.
    """

    groups: Sequence[Group]
    train: Calibration
    judge: Calibration | None

    @property
    def paths(self) -> list[str]:
        return [path for group in self.groups for path in group.paths]


class Statistics:
    """Gathers statistics of the float model, on demand."""

    def __init__(
        self,
        fn: Callable,
        params: Any,
        batches: Sequence[Any],
        judged: Sequence[bool],
        observers: Sequence[str],
        *,
        usage: Usage,
        mask: Callable[[Any], Array] | None,
        report: Callable[[str], None] | None,
    ):
        """Keeps what `calibrate` needs.

        Args:
          fn, params, usage, mask, report: as for `calibrate`.
          batches: calibration data.
          judged: which of them only judge.
          observers: all that will be asked for: gathered together if they fit.
        """
        self._calibrate = functools.partial(calibrate, fn, params, usage=usage, mask=mask)
        self._batches = [
            [b for b, j in zip(batches, judged, strict=True) if j is which]
            for which in (False, True)
        ]
        self._observers = tuple(dict.fromkeys(observers))
        self._report = report
        self._whole: Pass | None = None

    def passes(self, groups: Sequence[Group], observers: Sequence[str]) -> Iterator[Pass]:
        """Yields statistics of all groups, part after part.

        Args:
          groups: the same at each call.
          observers: what is needed of them.

        Raises:
          CalibrationError: no token reached a weight, or a part of one.
        """
        if not observers:
            return
        if self._nbytes(groups, self._observers) <= BYTES:
            if self._whole is None:
                self._whole = self._gather(groups, self._observers)
            yield self._whole
            return
        part: list[Group] = []
        for group in groups:
            if part and self._nbytes([*part, group], observers) > BYTES:
                yield self._gather(part, observers)
                part = []
            part.append(group)
        yield self._gather(part, observers)

    def _gather(self, groups: Sequence[Group], observers: Sequence[str]) -> Pass:
        paths = [path for group in groups for path in group.paths]
        train, judge = (
            self._calibrate(batches, observers, paths=paths, report=report) if batches else None
            for batches, report in zip(self._batches, (self._report, None), strict=True)
        )
        assert train is not None
        return Pass(groups, train, judge)

    def _nbytes(self, groups: Sequence[Group], observers: Sequence[str]) -> int:
        sets = sum(map(bool, self._batches))
        return sets * sum(_nbytes(group.shape, name) for group in groups for name in observers)


@functools.cache
def _nbytes(shape: tuple[int, ...], observer: str) -> int:
    init: Any = functools.partial(OBSERVERS[observer].init, shape[:-1], shape[-1])
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(init)))
