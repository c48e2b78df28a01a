"""A whole model as a qjax checkpoint: parameters, config, tokenizer and how they were made."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import tokenizers

from qjax import checkpoint
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.models.load import LoadedModel
from qjax.models.tokenizer import Tokenizer

VERSION = 1


def save_model(
    path: str | os.PathLike[str],
    loaded: LoadedModel,
    *,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a model so that `load_model` needs nothing but the path.

    The parameters are those of `qjax.checkpoint.save`; the rest travels in its metadata.

    Args:
      path: a directory that does not exist.
      loaded: the model; its params may hold QTensors.
      record: a JSON dict to keep with it, e.g. the policy and the summary of its quantization.
      overwrite: whether a checkpoint at `path` may be replaced.

    Raises:
      ValueError: if `path` exists.
    """
    model = loaded.model
    spec = {
        "version": VERSION,
        "config": loaded.config.to_dict(),
        "dtype": jnp.dtype(model.dtype).name,
        "param_dtype": jnp.dtype(model.param_dtype).name,
        "scan_layers": model.scan_layers,
        "tokenizer": None if loaded.tokenizer is None else _tokenizer_to_dict(loaded.tokenizer),
    }
    # Through JSON, which is where it goes: a reader then sees what was saved, lists for tuples.
    metadata = json.loads(json.dumps({"model": spec, "record": dict(record or {})}))
    checkpoint.save(path, loaded.params, overwrite=overwrite, metadata=metadata)


def load_model(path: str | os.PathLike[str]) -> LoadedModel:
    """Loads what `save_model` saved.

    Raises:
      CheckpointError: if there is no checkpoint at `path`, or one of parameters without a model.
    """
    spec = _spec(path)
    try:
        config = ModelConfig.from_dict(spec["config"])
        model = Decoder(
            config,
            dtype=jnp.dtype(spec["dtype"]),
            param_dtype=jnp.dtype(spec["param_dtype"]),
            scan_layers=spec["scan_layers"],
        )
        tokenizer = None if spec["tokenizer"] is None else _tokenizer_of_dict(spec["tokenizer"])
    except (KeyError, TypeError, ValueError) as e:
        raise checkpoint.CheckpointError(
            f"{path}: the model's description is damaged or of another version of qjax: {e}."
        ) from None
    return LoadedModel(config, model, checkpoint.load(path), tokenizer)


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the `record` that was given to `save_model`; {} if the checkpoint is no model's."""
    return checkpoint.read_metadata(path).get("record", {})


def _spec(path: str | os.PathLike[str]) -> dict[str, Any]:
    spec = checkpoint.read_metadata(path).get("model")
    if not isinstance(spec, dict) or "version" not in spec:
        raise checkpoint.CheckpointError(
            f"{path}: holds parameters without a model, so it cannot be run by its path alone."
            " Load it with `qjax.checkpoint.load` and run it with your own function."
        )
    if spec["version"] != VERSION:
        raise checkpoint.CheckpointError(
            f"{path}: its model was saved as version {spec['version']!r}; this qjax reads version"
            f" {VERSION}. Update qjax, or save it again with an older one."
        )
    return spec


def _tokenizer_to_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "json": tokenizer.backend.to_str(),
        "bos_id": tokenizer.bos_id,
        "eos_ids": list(tokenizer.eos_ids),
        "chat_template": tokenizer.chat_template,
    }


def _tokenizer_of_dict(spec: Mapping[str, Any]) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(spec["json"])
    except Exception as e:  # The library raises bare Exceptions.
        raise ValueError(f"its tokenizer cannot be read ({e})") from None
    return Tokenizer(backend, spec["bos_id"], tuple(spec["eos_ids"]), spec["chat_template"])
