"""The laws of every product: the test class of a new kernel inherits `Laws`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, interpreter
from pallas_kernels.hopper import Operand
from pallas_kernels.shares import Share
from pallas_kernels.tuning import Tuning

# Two CTAs at most, and as few steps as show the ring of buffers at work. In each but "decode" a CTA
# walks over several work items, or loads more blocks than it has buffers.
TUNINGS = {
    "decode": Tuning(8, 2, sms=2),
    "one buffer": Tuning(8, 1, sms=1),
    "split_k": Tuning(8, 2, split_k=2, sms=4),
    "long steps": Tuning(16, 1, 256, sms=2),
    "persistent": Tuning(8, 2, split_k=2, sms=2),  # with K = 768: three steps, two buffers
    "in turn": Tuning(8, 2, sms=1, in_turn=True),
    "few tokens left": Tuning(16, 2, split_k=2, sms=4),  # with 20: the last tile has 4
}
RUNS = 10  # on a GPU, more than the first


class Laws:
    """Laws that hold for every kernel.

    A subclass has `formats`, which maps names to arguments of `make`; the first one meets all
    tunings. `budget` is the relative error that the sums' type allows. `mutated` are formats and
    tunings that reach, together, all that is to be broken in the kernel; None: the first format.
    They have `inputs_when_mutated`, enough for several blocks of each operand.
    """

    formats: ClassVar[dict[str, dict[str, Any]]]
    mutated: ClassVar[tuple[tuple[str | None, Tuning], ...]] = ((None, Tuning(8, 2, sms=1)),)
    inputs_when_mutated = 384
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
        """Returns the relative error of the kernel and whether there was a race.

        It is interpreted. On a GPU it runs there: a race is any run that differs from the first.
        """
        with interpreter.interpreting() as races:
            run = lambda: np.asarray(
                self.run(arrays, tuning=tuning, interpret=interpreter.params()), np.float64
            )
            y = run()
        if interpreter.on_gpu():
            races.found = any(not np.array_equal(run(), y, equal_nan=True) for _ in range(RUNS))
        wanted = self.exact(arrays)
        assert y.shape == wanted.shape
        return float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted)), races.found

    def budget_of(self, name: str) -> float:
        """Returns the relative error that a format may have."""
        del name
        return self.budget

    def pytest_generate_tests(self, metafunc):
        if "name_of_format" in metafunc.fixturenames:
            metafunc.parametrize("name_of_format", self.formats)

    def test_agrees_with_float64_for_every_format(self, name_of_format):
        arrays = self.make(3, 256, 256, **self.formats[name_of_format])
        error, races = self.error(arrays, TUNINGS["one buffer"])
        assert error <= self.budget_of(name_of_format), error
        assert not races

    @pytest.mark.parametrize(
        "name", ["split_k", "long steps", "persistent", "in turn", "few tokens left"]
    )
    def test_agrees_with_float64_for_every_tuning(self, name):
        first = next(iter(self.formats.values()))
        M, K = {"persistent": (8, 768), "few tokens left": (20, 256)}.get(name, (8, 512))
        arrays = self.make(M, K, 256, seed=1, **first)
        error, races = self.error(arrays, TUNINGS[name])
        assert error <= self.budget, error
        assert not races

    def test_a_kernel_with_anything_broken_is_caught(self):
        if interpreter.on_gpu():
            pytest.skip("a broken kernel may never end on a GPU")
        broken, survivors = set(), []
        for name, tuning in self.mutated:
            format = self.formats[name or next(iter(self.formats))]
            arrays = self.make(8, self.inputs_when_mutated, 256, seed=2, **format)
            with mutation(None) as possible:
                error, races = self.error(arrays, tuning)
            assert error <= 2.0**-8
            assert not races
            new = [name for name in possible if name not in broken]
            broken.update(new)
            survivors += [name for name in new if not self.is_caught(name, arrays, tuning)]
        assert broken
        assert not survivors

    def is_caught(self, name: str, arrays: dict[str, Any], tuning: Tuning) -> bool:
        """Returns whether a mutation of the kernel is wrong, a race or refused."""
        with mutation(name):
            try:
                error, races = self.error(arrays, tuning)
            except Exception as e:
                # Copies that nothing waits for, phases of a barrier that somebody missed.
                if any(
                    what in str(e) for what in ("before kernel finished", "at phase", "phase 0")
                ):
                    return True
                raise
        return races or not error <= 0.05  # NaN: what was never written


_SYNCHRONIZATION = ("commit_smem", "wgmma_wait", "wait_smem_to_gmem", "barrier_wait")


@contextlib.contextmanager
def mutation(name: str | None) -> Iterator[list[str]]:
    """Breaks one thing in the kernels that are traced within; yields the names of all that can be.

    Every fence and wait that a kernel contains is one, left out; so is every operand, whose first
    block is read again and again; and the last tile and the last step of every tile, left out.
    """
    possible: list[str] = []

    def is_broken(what: str) -> bool:
        if what not in possible:
            possible.append(what)
        return what == name

    def unless_left_out(function: Callable) -> Callable:
        def run(*args, **kwargs):
            caller = sys._getframe(1)
            site = f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"
            if not is_broken(f"no {function.__name__} in {site}"):
                function(*args, **kwargs)

        return run

    class Stuck(Operand):
        def at(self, ref, tile, k, size, tile_k):
            return super().at(ref, tile * 0, k * 0, size, tile_k)

    def product(operands, *args, original=hopper.product, **kwargs):
        operands = [
            Stuck(**vars(o)) if is_broken(f"operand {i} stays at its first block") else o
            for i, o in enumerate(operands)
        ]
        return original(operands, *args, **kwargs)

    def share_of(*args, original=hopper.share_of):
        share = original(*args)
        if is_broken("the last tile is skipped"):
            return dataclasses.replace(share, tiles=share.tiles - 1)
        return share

    def step(share, i, original=Share.step):
        tile, k = original(share, i)
        if is_broken("the last step is that before it"):
            return tile, jnp.minimum(k, share.steps - 2)
        return tile, k

    with contextlib.ExitStack() as patches:
        for function in _SYNCHRONIZATION:
            broken = unless_left_out(getattr(plgpu, function))
            patches.enter_context(mock.patch.object(plgpu, function, broken))
        patches.enter_context(mock.patch.object(hopper, "product", product))
        patches.enter_context(mock.patch.object(hopper, "share_of", share_of))
        patches.enter_context(mock.patch.object(Share, "step", step))
        yield possible
