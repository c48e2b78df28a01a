"""Building a parameter tree from a file's tensors, one tensor in memory at a time."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from qjax.models.decoder import Decoder
from qjax.qtensor import QTensor, is_qtensor

_ALIGNMENT = 64  # JAX adopts a host buffer so aligned on CPU without copying it.


class UnlikeLayersError(ValueError):
    """Layers that were to be one stack are stored in different formats."""


def shapes(model: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns path to shape of every parameter `model` has, from the model itself."""
    tree: Any = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    leaves: Any = flax.traverse_util.flatten_dict(tree["params"], sep="/")
    return leaves


def assemble(
    model: Decoder,
    names: Callable[[str], str],
    present: Collection[str],
    read: Callable[[str], np.ndarray | QTensor],
    source: str,
) -> dict[str, Any]:
    """Returns the parameters of `model`, read from a file.

    Peak memory is the parameters and one tensor, also for stacked layers of floats.

    Args:
      model: what to load for; its `param_dtype` is that of the result.
      names: from a path of the unrolled model to the tensor's name in the file.
      present: all tensors in the file that are weights; each must be used.
      read: from a name to its values, kernels as `[N, K]`; or to a QTensor of the parameter.
      source: the file's name, for errors.

    Raises:
      ValueError: if a tensor is missing, unexpected, or of another shape.
      UnlikeLayersError: if layers that are to be one stack are stored in different formats.
    """
    expected = shapes(model)
    files = {path: _files(path, names, model) for path in expected}
    wanted = {name for group in files.values() for name in group}
    if missing := sorted(wanted - set(present)):
        raise ValueError(
            f"{source}: lacks {len(missing)} of the tensors its config asks for: {_some(missing)}."
            " The download is incomplete or the config is of another model."
        )
    if unexpected := sorted(set(present) - wanted):
        raise ValueError(
            f"{source}: has {len(unexpected)} tensors this model does not use: {_some(unexpected)}."
            " It computes something else than its config says."
        )
    params = {}
    for path, leaf in expected.items():
        stacked = path.startswith("layers/")
        tensor = read(files[path][0])
        if is_qtensor(tensor):
            tensors = [tensor, *map(read, files[path][1:])]
            params[path] = _packed(tensors, path, leaf.shape, stacked, source)
            continue
        # Filled and handed to JAX leaf by leaf: an accelerator's host copy is freed at once.
        stack = _aligned_empty(leaf.shape, model.param_dtype)
        for i, name in enumerate(files[path]):
            tensor = tensor if i == 0 else read(name)
            if is_qtensor(tensor):
                raise UnlikeLayersError(_unlike(path, source))
            _copy(stack[i] if stacked else stack, tensor, path, f"{source}: tensor {name!r}")
        params[path] = jax.device_put(stack, may_alias=True)
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _packed(
    tensors: list[Any], path: str, shape: tuple[int, ...], stacked: bool, source: str
) -> QTensor:
    """Returns the QTensor of a parameter; those of stacked layers side by side."""
    if any(is_qtensor(t) and t.perm is not None for t in tensors):  # act-order in some layers
        tensors = [_ordered(t) if is_qtensor(t) else t for t in tensors]
    structures = [jax.tree.structure(t) for t in tensors]
    if not all(map(is_qtensor, tensors)) or len(set(structures)) > 1:
        raise UnlikeLayersError(_unlike(path, source))
    out = jax.tree.map(lambda *a: jnp.stack(a), *tensors) if stacked else tensors[0]
    if out.shape != shape:
        raise ValueError(
            f"{source}: `{path}` is stored as {out.shape}, but the config asks for {shape}."
        )
    return out


def _ordered(qt: QTensor) -> QTensor:
    if qt.perm is not None:
        return qt
    return dataclasses.replace(qt, perm=jnp.arange(qt.canonical_shape[-2], dtype=jnp.int32))


def _unlike(path: str, source: str) -> str:
    return (
        f"{source}: the layers of `{path}` are stored in different formats, so they cannot be one"
        " stack. Load them with scan_layers=False."
    )


def _files(path: str, names: Callable[[str], str], model: Decoder) -> list[str]:
    head, _, rest = path.partition("/")
    if head != "layers":
        return [names(path)]
    return [names(f"layers_{i}/{rest}") for i in range(model.config.num_layers)]


def _copy(out: np.ndarray, tensor: Any, path: str, what: str):
    if path.endswith("/kernel"):
        tensor = tensor.T
    if tensor.shape != out.shape:
        raise ValueError(
            f"{what} has shape {tensor.shape} as `{path}`, but the config asks for {out.shape}."
        )
    if not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype == ml_dtypes.bfloat16):
        raise ValueError(
            f"{what} holds {tensor.dtype}, not floats. Quantized checkpoints are not read here."
        )
    out[...] = tensor


def _aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _some(names: list[str], limit: int = 5) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
