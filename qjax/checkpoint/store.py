"""save and load: a quantized tree as a directory of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from qjax.checkpoint.manifest import CheckpointError, resolve
from qjax.checkpoint.target import check_target

# orbax takes about a second to import: functions that need it import it, so that `import qjax` and
# reading a manifest do not.


class PendingSave:
    """A save that runs in the background; `wait_until_finished` raises if it failed."""

    def __init__(self, path: epath.Path, finish):
        self.path = path
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(finish,), name="qjax_save")
        self._thread.start()

    def _run(self, finish) -> None:
        try:
            finish()
        except BaseException as e:
            self._error = e

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait_until_finished(self) -> None:
        """Blocks until the checkpoint is complete at `path`.

        Raises:
          CheckpointError: if it could not be written.
        """
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(
                f"{self.path}: could not be saved: {error}. Nothing was left there; free space or"
                " choose another path, and save again."
            ) from error


def save(
    path: Any,
    qparams: Any,
    *,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Saves a tree of arrays and QTensors; `load` needs nothing but the path.

    The directory appears when it is complete: a save that is killed leaves nothing at `path`, or
    what was there before. In a multi-process program every process calls it.

    Args:
      path: a directory that does not exist, local or the URL of a cloud store.
      qparams: dicts, lists and tuples of arrays, QTensors, Latents (`qjax.qat`), Python numbers and
        None. Other pytree nodes (NamedTuples, dataclasses, `nnx.State`) are saved as dicts of their
        fields, boxes (`nnx.Param`, Linen `Partitioned`) as what is in them.
      overwrite: whether a checkpoint at `path` may be replaced. It is only removed when the new
        one is complete. Where `path` is a link, what it leads to is replaced.
      metadata: a dict that JSON can keep (a model's config, a tokenizer's text, a report); read
        it with `read_metadata`.

    Raises:
      ValueError: if `path` exists or cannot be made, or a leaf cannot be saved; names its path in
        the tree.
    """
    save_async(path, qparams, overwrite=overwrite, metadata=metadata).wait_until_finished()


def save_async(
    path: Any,
    qparams: Any,
    *,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> PendingSave:
    """Starts a `save`; returns when all arrays are copied and may be donated or deleted.

    Call `wait_until_finished()` on the result before the program ends.
    """
    with _quiet():
        import orbax.checkpoint as ocp

        from qjax.checkpoint.orbax import QTreeHandler, QTreeSave

        final = resolve(path)
        check_target(final, overwrite=overwrite)
        args = QTreeSave(qparams, metadata)
        exists = final.exists()
        if exists and "://" not in str(final):
            final = epath.Path(os.path.realpath(final))  # a link stays, to the new checkpoint
        target = final.with_name(final.name + ".qjax-new") if exists else final
        primary = ocp.multihost.is_primary_host(0)
        if exists and primary and target.exists():
            target.rmtree()
        checkpointer = ocp.AsyncCheckpointer(QTreeHandler())
        checkpointer.save(target, args=args)

    def finish() -> None:
        with _quiet():
            try:
                checkpointer.wait_until_finished()
                if exists and primary:
                    _replace(final, target)
                if exists:
                    ocp.multihost.sync_global_processes("qjax:replaced")
            finally:
                checkpointer.close()

    return PendingSave(final, finish)


def load(
    path: Any,
    *,
    shardings: Any = None,
    select: str | Sequence[str] | None = None,
    verify: bool = True,
) -> Any:
    """Loads what `save` saved, bit for bit, with no policy, template or model code.

    Arrays come back as `jax.Array` (as numpy where they have 64 bits and JAX is set to 32).

    Args:
      path: what was given to `save`, or an item that a `CheckpointManager` saved.
      shardings: where to put the arrays, None for the default device. A sharding for all; a
        function from path to sharding or None; or a tree of them with the checkpoint's structure.
        For a QTensor it is the NamedSharding of the float array it stands for: codes and scales
        follow (`qjax.sharding.shardings_of`); for a Latent that of its value, its steps go to all
        devices. It may be of another mesh than the saved one.
      select: one or more globs over paths ("layers/0", "*/attn/*"): only these are read. Dicts
        then have only the matching keys; lists and tuples have None in the other places.
      verify: whether to compare the files with their checksums first, which reads the directory
        once more. A part that `select` picks is loaded without.

    Raises:
      CheckpointError: if there is no readable checkpoint at `path`.
      ValueError: if `select` matches nothing, or a sharding does not fit.
    """
    with _quiet():
        from qjax.checkpoint.orbax import QTreeHandler, QTreeRestore

        handler = QTreeHandler()
        try:
            return handler.restore(resolve(path), QTreeRestore(shardings, select, verify))
        finally:
            handler.close()


def _replace(path: epath.Path, new: epath.Path) -> None:
    # Two renames: between them nothing is at `path`, and both checkpoints are whole beside it.
    old = path.with_name(path.name + ".qjax-old")
    if old.exists():
        old.rmtree()
    path.rename(old)
    new.rename(path)
    old.rmtree()


def _quiet():
    from qjax.checkpoint.orbax import quiet

    return quiet()
