"""Resumable: the checkpoints of a training loop, from the last of which a stopped run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from qjax.checkpoint.manifest import CheckpointError
from qjax.checkpoint.target import check_name


class Resumable:
    """Keeps the newest state of a loop, and a record of its steps, in a directory.

        with Resumable(out, setting, steps=1000, every=50) as saved:
            start, state, record = saved.latest(state, {"losses": []})
            for i in range(start, 1000):
                state, loss = step(state, batches[i])
                record["losses"].append(float(loss))
                saved.save(i + 1, state, record)

    Killed at any time and started again, the loop goes on after the last step that was saved; if a
    step depends on the state and on `i` alone, what comes out is the same bit for bit. Saving is
    asynchronous and atomic: orbax's `CheckpointManager`, of which this is a thin cover.

    Args:
      directory: of this run and nothing else.
      setting: what decides the result, as JSON; a directory of another one is refused.
      steps: of the whole run; the last one is saved whatever `every` says.
      every: steps between checkpoints.

    Raises:
      ValueError: if there is less than one step, or a step between checkpoints.
      NotImplementedError: for a directory below a name with a bracket, where orbax loses arrays.
    """

    def __init__(
        self, directory: str | os.PathLike[str], setting: Any = None, *, steps: int, every: int = 1
    ):
        for name, value in {"steps": steps, "every": every}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self.directory = Path(directory).resolve()
        check_name(epath.Path(self.directory))
        self.setting = json.loads(json.dumps(setting))
        self.steps, self.every = steps, every
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Resumable:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until all is written."""
        self._manager.close()

    def latest(self, state: Any, record: Any = None) -> tuple[int, Any, Any]:
        """Returns how many steps are done, and state and record after them.

        Args:
          state: a pytree of arrays, as it is before the first step: returned if there is no
            checkpoint, otherwise the structure, types and shardings of what is.
          record: the same for the record, which may be any JSON.

        Raises:
          CheckpointError: if the checkpoint is of another setting; names what differs.
        """
        done = self._manager.latest_step()
        if done is None:
            return 0, state, record
        stored = self._manager.restore(done, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        self._check(stored["run"]["setting"])
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return done, self._manager.restore(done, args=args)["state"], stored["run"]["record"]

    def save(self, done: int, state: Any, record: Any = None) -> None:
        """Saves after every `every`-th step and the last one, else does nothing.

        Args:
          done: steps so far.
        """
        if done % self.every and done != self.steps:
            return
        # A copy: the loop may append to its record while a thread writes it.
        run = {"setting": self.setting, "record": json.loads(json.dumps(record))}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        self._manager.save(done, args=args)

    def _check(self, theirs: Any) -> None:
        ours = self.setting
        if theirs == ours:
            return
        if isinstance(theirs, dict) and isinstance(ours, dict):
            keys = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
            what = ", ".join(f"{k} {theirs.get(k)!r}, not {ours.get(k)!r}" for k in keys)
        else:
            what = f"{theirs!r}, not {ours!r}"
        raise CheckpointError(
            f"{self.directory} is of a run with another setting: {what}. Go on with that one, or"
            " give another directory."
        )
