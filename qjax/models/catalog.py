"""Opening a model by what a user calls it: a name, a directory, a file or a qjax checkpoint."""

import os
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from qjax.checkpoint.manifest import FILE
from qjax.models.assemble import UnlikeLayersError
from qjax.models.load import PACKAGES, LoadedModel, load
from qjax.models.rescale import rescale
from qjax.models.store import load_model

RESCALED = "-rescaled"


def names() -> list[str]:
    """Returns the names of the models that packages carry, and of their rescaled variants."""
    return sorted([*PACKAGES, *(name + RESCALED for name in PACKAGES)])


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is the directory of a qjax checkpoint."""
    return (Path(path) / FILE).is_file()


def open_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    scan_layers: bool | None = False,
    packed: bool = False,
) -> LoadedModel:
    """Opens a model.

    Args:
      name_or_path: one of `names()`, a Hugging Face directory, a GGUF file, or what `save_model`
        saved. The name of a packaged model followed by "-rescaled" is the same function with its
        weights moved off the grid they were stored on (see `qjax.models.rescale`).
      dtype: to compute and keep parameters in, float32 by default; a qjax checkpoint has its own.
      scan_layers: whether the layers are one stack, None: if they are stored alike; a qjax
        checkpoint is as it was saved.
      packed: of a GGUF file, whether its weights stay packed, as those of a directory do.

    Raises:
      ValueError: if the files are damaged, or `dtype` is given for a qjax checkpoint.
      NotImplementedError: if the architecture is not supported.
      FileNotFoundError: if there is no such model.
    """
    if is_checkpoint(name_or_path):
        if dtype is not None:
            raise ValueError(
                f"{name_or_path}: a qjax checkpoint has its own dtype; `dtype` ({dtype}) can"
                " only be chosen when a model is loaded from its original files."
            )
        return load_model(name_or_path)
    if scan_layers is None:
        try:
            return open_model(name_or_path, dtype=dtype, scan_layers=True, packed=packed)
        except UnlikeLayersError:
            scan_layers = False
    dtype = jnp.float32 if dtype is None else dtype
    name = str(name_or_path)
    if name.endswith(RESCALED) and name.removesuffix(RESCALED) in PACKAGES:
        loaded = load(name.removesuffix(RESCALED), dtype=dtype, scan_layers=scan_layers)
        return loaded._replace(params=rescale(loaded.params, loaded.config))
    if not Path(name).exists() and name not in PACKAGES:
        raise FileNotFoundError(
            f"no model {name!r}: it is no directory, no file, and none of the names"
            f" {', '.join(names())}."
        )
    return load(name_or_path, dtype=dtype, scan_layers=scan_layers, packed=packed)
