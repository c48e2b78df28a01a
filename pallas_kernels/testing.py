"""The laws of every product: the test class of a new kernel inherits `Laws`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from jax import Array

from pallas_kernels import interpreter
from pallas_kernels.tuning import Tuning

# Two CTAs, as few steps as show the ring of buffers at work. With several work items a CTA the
# interpreter reports a race between the loads of one and the reads of another also for JAX's own
# pipelines, so races are looked for with one item a CTA.
ONE_ITEM = {
    "decode": Tuning(8, 2, sms=2),
    "split_k": Tuning(8, 2, split_k=2, sms=4),
    "long steps": Tuning(16, 2, 256, sms=2),
}
SEVERAL_ITEMS = {"persistent": Tuning(8, 2, split_k=2, sms=2)}


class Laws:
    """Laws that hold for every kernel.

    A subclass has `formats`, which maps names to arguments of `make`; the first one meets all
    tunings. `budget` is the relative error that the sums' type allows.
    """

    formats: ClassVar[dict[str, dict[str, Any]]]
    budget = 2e-6  # float32 sums of exact products, in another order than NumPy's

    def make(self, M: int, K: int, N: int, seed: int = 0, **format: Any) -> dict[str, Any]:
        """Returns the kernel's arrays, and what else it takes, by name."""
        raise NotImplementedError

    def run(self, arrays: dict[str, Any], *, tuning: Tuning, interpret: Any) -> Array:
        """Runs the kernel with a float32 result."""
        raise NotImplementedError

    def exact(self, arrays: dict[str, Any]) -> np.ndarray:
        """Returns the result in float64."""
        raise NotImplementedError

    def error(self, arrays: dict[str, Any], tuning: Tuning) -> tuple[float, bool]:
        """Returns the relative error of the interpreted kernel and whether there was a race."""
        with interpreter.interpreting() as races:
            y = self.run(arrays, tuning=tuning, interpret=interpreter.PARAMS)
            y = np.asarray(y, np.float64)
        wanted = self.exact(arrays)
        assert y.shape == wanted.shape
        return float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted)), races.found

    def pytest_generate_tests(self, metafunc):
        if "name_of_format" in metafunc.fixturenames:
            metafunc.parametrize("name_of_format", self.formats)

    def test_agrees_with_float64_for_every_format(self, name_of_format):
        arrays = self.make(3, 256, 256, **self.formats[name_of_format])
        error, races = self.error(arrays, ONE_ITEM["decode"])
        assert error <= self.budget
        assert not races

    @pytest.mark.parametrize("name", ["split_k", "long steps"])
    def test_agrees_with_float64_for_every_tuning(self, name):
        first = next(iter(self.formats.values()))
        error, races = self.error(self.make(8, 512, 256, seed=1, **first), ONE_ITEM[name])
        assert error <= self.budget
        assert not races

    def test_ctas_that_walk_over_several_items_reuse_their_buffers(self):
        first = next(iter(self.formats.values()))
        error, _ = self.error(self.make(8, 512, 256, seed=2, **first), SEVERAL_ITEMS["persistent"])
        assert error <= self.budget
