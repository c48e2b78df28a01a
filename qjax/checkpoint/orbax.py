"""The orbax handler of a quantized tree: what a `CheckpointManager` saves and restores it with."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from orbax.checkpoint import future

from qjax.checkpoint import checksum
from qjax.checkpoint import manifest as mf
from qjax.checkpoint.manifest import CheckpointError, Manifest, Node
from qjax.checkpoint.target import check_name
from qjax.latent import Latent
from qjax.qtensor import PARTS, QTensor
from qjax.sharding import shardings_of

# A restore onto a mesh reads whole chunks: small enough that a shard reads little besides itself.
_CHUNK_BYTES = 16 << 20


class QTreeHandler(ocp.AsyncCheckpointHandler):
    """Saves a tree of arrays and QTensors with a manifest, from which alone it is restored.

    Arrays go through orbax's array store under names made from their paths. The manifest is written
    last: a directory without one is not a checkpoint.
    """

    def __init__(
        self,
        *,
        multiprocessing_options: ocp.options.MultiprocessingOptions | None = None,
    ):
        options = multiprocessing_options or ocp.options.MultiprocessingOptions()
        self._primary_host = options.primary_host
        self._arrays = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)

    async def async_save(self, directory: epath.Path, args: QTreeSave) -> list[future.Future]:
        """Copies the arrays, then returns the futures that write them."""
        check_name(directory)
        arrays, texts = _contents(args)
        commits: list[future.Future] = []
        if arrays is not None:
            commits += await self._arrays.async_save(directory, args=arrays) or []

        async def write() -> None:
            for commit in commits:
                await asyncio.to_thread(commit.result)
            self._write(directory, texts)

        last = future.CommitFutureAwaitingContractedSignals(write(), name="qjax_manifest")
        return [*commits, last]

    def save(self, directory: epath.Path, args: QTreeSave) -> None:
        """Copies and writes the arrays; blocks until all is written."""
        check_name(directory)
        arrays, texts = _contents(args)
        if arrays is not None:
            self._arrays.save(directory, args=arrays)
        self._write(directory, texts)

    def _write(self, directory: epath.Path, texts: dict[str, str]) -> None:
        if ocp.multihost.is_primary_host(self._primary_host):
            for name, text in texts.items():
                (directory / name).write_text(text)

    def finalize(self, directory: epath.Path) -> None:
        """Merges what each process wrote; called on one process when all have written."""
        if (directory / "_METADATA").exists():  # there is none if the tree has no arrays
            self._arrays.finalize(directory)
        checksum.write(directory)

    def metadata(self, directory: epath.Path) -> Manifest:
        """Returns what the checkpoint holds."""
        return mf.read_manifest(directory)

    def restore(self, directory: epath.Path, args: QTreeRestore | None = None) -> Any:
        """Reads the tree back, after checking that the stored arrays are those of the manifest.

        Raises:
          CheckpointError: if they are not, or cannot be read.
          ValueError: if `args` does not fit the tree.
        """
        args = args or QTreeRestore()
        node = mf.read_manifest(directory).tree
        if args.verify and args.select is None and ocp.multihost.is_primary_host(0):
            checksum.verify(directory)
        if args.select is not None:
            node = mf.select(node, args.select)
        placed = place(node, args.shardings)
        wanted = {a["name"]: a for a in mf.arrays_of(node) if a["name"] is not None}
        self._check(directory, wanted)
        found = self._read(directory, wanted, placed)

        def array(a: dict[str, Any]) -> Any:
            if a["name"] is not None:
                return found[a["name"]]
            return jnp.zeros(a["shape"], a["dtype"])

        return mf.rebuild(node, array)

    def _check(self, directory: epath.Path, wanted: dict[str, dict[str, Any]]) -> None:
        # orbax casts and pads in silence when a target differs from what is stored.
        if not wanted:
            return
        stored = _reading(directory, lambda: self._arrays.metadata(directory).tree)
        for name, a in wanted.items():
            if name not in stored:
                raise CheckpointError(
                    f"{directory}: the array {name!r} is missing. Restore the directory from a"
                    " copy, or save the model again."
                )
            shape, dtype = list(stored[name].shape), jnp.dtype(stored[name].dtype).name
            if shape != a["shape"] or dtype != a["dtype"]:
                raise CheckpointError(
                    f"{directory}: the array {name!r} is stored as {dtype}{shape}, but the manifest"
                    f" says {a['dtype']}{a['shape']}. The directory mixes two checkpoints; restore"
                    " it from a copy, or save the model again."
                )

    def _read(
        self,
        directory: epath.Path,
        wanted: dict[str, dict[str, Any]],
        placed: dict[str, Sharding],
    ) -> dict[str, Any]:
        if not wanted:
            return {}
        restore_args = {name: _restore_args(a, placed[name]) for name, a in wanted.items()}
        pytree = ocp.args.PyTreeRestore(
            item=dict.fromkeys(wanted, 0), restore_args=restore_args, partial_restore=True
        )
        return _reading(directory, lambda: self._arrays.restore(directory, args=pytree))

    def close(self) -> None:
        """Closes the array store."""
        self._arrays.close()


@ocp.args.register_with_handler(QTreeHandler, for_save=True)
@dataclasses.dataclass
class QTreeSave(ocp.args.CheckpointArgs):
    """What to save: `manager.save(step, args=ocp.args.Composite(params=QTreeSave(qparams)))`.

    Attributes:
      item: a pytree of arrays, QTensors, Python numbers and None.
      metadata: a dict that JSON can keep, saved beside.
    """

    item: Any
    metadata: Mapping[str, Any] | None = None

    def __post_init__(self):
        mf.check_metadata(self.metadata)
        mf.describe(self.item)  # so that a leaf that cannot be saved fails here, not in a thread


@ocp.args.register_with_handler(QTreeHandler, for_restore=True)
@dataclasses.dataclass
class QTreeRestore(ocp.args.CheckpointArgs):
    """What to restore, and where to; see `qjax.load` for the attributes."""

    shardings: Any = None
    select: str | Sequence[str] | None = None
    verify: bool = True


def _contents(args: QTreeSave) -> tuple[ocp.args.PyTreeSave | None, dict[str, str]]:
    """Returns what goes to the array store, if anything, and the texts beside it."""
    node, arrays = mf.describe(args.item)
    texts = {
        mf.METADATA_FILE: json.dumps(args.metadata or {}),
        mf.FILE: Manifest(node).to_json(),
    }
    if not arrays:
        return None, texts
    save_args = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
    return ocp.args.PyTreeSave(arrays, save_args=save_args), texts


def _restore_args(a: dict[str, Any], sharding: Sharding) -> ocp.RestoreArgs:
    if jax.dtypes.canonicalize_dtype(a["dtype"]) != jnp.dtype(a["dtype"]):
        return ocp.RestoreArgs(restore_type=np.ndarray)  # 64 bits, which JAX would cut to 32
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)


def _reading[T](directory: epath.Path, read: Callable[[], T]) -> T:
    """Returns `read()`; if that fails, says why in one line."""
    with _unfinished_reads_ignored():
        try:
            return read()
        except Exception as e:
            cause: BaseException = e
            while cause.__cause__ is not None:
                cause = cause.__cause__
            lines = str(cause).split(" [tensorstore_spec")[0].strip().splitlines()
            reason = f"{type(cause).__name__}: {lines[0][:300] if lines else ''}"
        del cause
        gc.collect()
    raise CheckpointError(
        f"{directory}: the stored arrays cannot be read. Restore the directory from a copy, or save"
        f" the model again. ({reason})"
    )


@contextlib.contextmanager
def _unfinished_reads_ignored():
    """Silences the reads that a failed one leaves unfinished: they complain when collected."""
    before = sys.unraisablehook

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and "orbax" in code.co_filename
        if not of_orbax and "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


# ---- placement ----------------------------------------------------------------------------------


def place(node: Node, shardings: Any) -> dict[str, Sharding]:
    """Returns the sharding of every stored array, by name; see `qjax.load` for `shardings`.

    Raises:
      ValueError: if a sharding is missing or does not fit its array; names the path.
    """
    default = jax.device_put(np.zeros(())).sharding  # wherever JAX puts arrays by default
    out: dict[str, Sharding] = {}
    _place(node, shardings, (), SingleDeviceSharding(next(iter(default.device_set))), out)
    return out


def _place(
    node: Node, spec: Any, path: tuple[str, ...], default: Sharding, out: dict[str, Sharding]
) -> None:
    if node is None or node["kind"] == "number":
        return
    whole = spec is None or isinstance(spec, Sharding) or callable(spec)
    for key, item in mf.children(node):
        below = (*path, str(key))
        _place(item, spec if whole else _child(spec, key, below), below, default, out)
    if node["kind"] in ("dict", "list", "tuple"):
        return
    at = "/".join(path) or "."
    if callable(spec) and not isinstance(spec, Sharding):
        spec = spec(at)
    _place_leaf(node, default if spec is None else spec, at, out)


def _child(spec: Any, key: str | int, path: tuple[str, ...]) -> Any:
    if isinstance(spec, Mapping) and key in spec:
        return spec[key]
    if isinstance(spec, list | tuple) and isinstance(key, int) and key < len(spec):
        return spec[key]
    if isinstance(key, str) and not isinstance(spec, Mapping) and hasattr(spec, key):
        return getattr(spec, key)
    raise ValueError(
        f"{'/'.join(path)}: `shardings` has no entry for it. Give the same structure as the"
        " checkpoint's, with None for the default device; a single sharding, or a function from"
        " path to sharding, applies to all."
    )


def _place_leaf(node: dict[str, Any], spec: Any, path: str, out: dict[str, Sharding]) -> None:
    if not isinstance(spec, Sharding | QTensor | Latent):
        raise ValueError(
            f"{path}: expected a jax.sharding.Sharding, got {spec!r}. A PartitionSpec needs its"
            " mesh: NamedSharding(mesh, spec)."
        )
    if node["kind"] == "latent":
        for part in mf.LATENT_PARTS:
            if node.get(part) is not None:
                _place_leaf(node[part], _part_of_latent(spec, part), f"{path}/{part}", out)
        return
    if isinstance(spec, Latent):
        raise ValueError(f"{path}: `shardings` has a Latent for what is no weight in training.")
    x = mf.abstract(node)
    if isinstance(x, QTensor):
        try:
            parts = _parts(x, spec)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        for part in PARTS:
            if node.get(part) is not None:
                _place_leaf(node[part], getattr(parts, part), f"{path}/{part}", out)
        return
    try:
        if isinstance(spec, QTensor):
            raise ValueError("`shardings` has a QTensor for a plain array")
        if isinstance(spec, NamedSharding) and len(spec.spec) > len(x.shape):
            raise ValueError(f"it names {len(spec.spec)} axes.")
        spec.shard_shape(x.shape)
    except ValueError as e:
        reason = str(e).splitlines()[0]
        raise ValueError(
            f"{path}: the sharding {spec} does not fit its shape {x.shape}: {reason} Replicate the"
            " axes that the mesh does not divide."
        ) from None
    array = node["data"] if node["kind"] == "key" else node
    if array["name"] is not None:
        out[array["name"]] = spec


def _part_of_latent(spec: Sharding | QTensor | Latent, part: str) -> Any:
    """Returns where a part of a Latent goes: its steps, which are few, to all devices."""
    if isinstance(spec, Latent):
        return getattr(spec, part)
    if part == "value" or not isinstance(spec, NamedSharding):
        return spec
    return NamedSharding(spec.mesh, PartitionSpec())


def _parts(qt: QTensor, spec: Sharding | QTensor) -> QTensor:
    if isinstance(spec, QTensor):
        return spec
    if isinstance(spec, NamedSharding):
        return shardings_of(qt, spec)
    if not spec.is_fully_replicated:
        raise ValueError(
            f"a quantized array takes a NamedSharding of its logical axes, got {spec!r}."
        )
    return jax.tree.map(lambda _: spec, qt)


# ---- logs ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet():
    """Keeps orbax's log records to itself: what goes wrong is raised, and said once."""
    logger = logging.getLogger("absl")
    drop = lambda record: "orbax" not in record.pathname
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
