"""Adapters as a directory of the `peft` package: adapter_config.json and safetensors."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.flax import save_file
from safetensors.numpy import load_file

from qjax.lora.adapter import Adapter, Adapters, canonical_shape, layout_of
from qjax.models.names import names_of
from qjax.paths import path_str
from qjax.qtensor import is_qtensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

Names = Callable[[str], str]


def hf_module(path: str) -> str:
    """Returns the Hugging Face module of a weight of the unrolled `qjax.models` decoder.

    Example:
      >>> hf_module("layers_3/attn/q_proj/kernel")
      'model.layers.3.self_attn.q_proj'
    """
    return names_of(path.removeprefix("params/")).hf.removesuffix(".weight")


def _unstacked(path: str, num_layers: int) -> list[str]:
    return [re.sub(r"(^|/)layers/", rf"\1layers_{i}/", path) for i in range(num_layers)]


def save_peft(
    directory: str | os.PathLike[str],
    adapters: Adapters,
    *,
    base_model: str | None = None,
    dropout: float = 0.0,
    names: Names = hf_module,
) -> None:
    """Writes adapters of a decoder so that `peft.PeftModel.from_pretrained` reads them.

    Stacked layers are written one by one. A and B are transposed, as PyTorch keeps them.

    Args:
      directory: made if there is none; the two files in it are replaced, when both are written.
      adapters: of kernels [K, N], or of stacks [L, K, N] below "layers/".
      base_model: the name of the model that they were trained on, for the reader.
      dropout: what they were trained with, likewise.
      names: from the path of a weight, unrolled ("layers_3/..."), to its module in the file.

    Raises:
      ValueError: for weights that `names` does not know.
      NotImplementedError: for weights that are no matrices, which have no place in the format.
    """
    tensors: dict[str, Any] = {}
    modules: dict[str, Adapter] = {}
    for path, adapter in adapters.items():
        for module, a, b in _matrices(path, adapter, names):
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.T
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.T
            modules[module] = adapter
    if not modules:
        raise ValueError("`adapters` is empty: there is nothing to write.")
    stabilized = {adapter.rank_stabilized for adapter in modules.values()}
    if len(stabilized) > 1:
        raise NotImplementedError(
            "some adapters are rank-stabilized and some are not; the format has one switch for all."
            " `lora.combine([adapters], [1.0])` writes the scale into B."
        )
    first = next(iter(modules.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": _number(first.alpha),
        "use_rslora": first.rank_stabilized,
        "lora_dropout": dropout,
        "target_modules": _targets(list(modules)),
        "rank_pattern": {m: ad.rank for m, ad in modules.items() if ad.rank != first.rank},
        "alpha_pattern": {
            m: _number(ad.alpha) for m, ad in modules.items() if ad.alpha != first.alpha
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: jnp.asarray(np.ascontiguousarray(x)) for name, x in tensors.items()}
    with tempfile.TemporaryDirectory(dir=directory, prefix=".adapter.") as made:
        save_file(contiguous, Path(made, WEIGHTS), metadata={"format": "pt"})
        Path(made, CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(made, name), directory / name)


def _targets(modules: list[str]) -> list[str]:
    """Returns how the format names modules: by their last name if all layers are alike, as usual.

    A last name stands for that module of every layer; else only full names say what there is.
    """
    layers: dict[int, set[str]] = {}
    for module in modules:
        found = re.search(r"\.layers\.(\d+)\.", module)
        if found is None:
            return sorted(modules)
        layers.setdefault(int(found[1]), set()).add(module.rpartition(".")[2])
    alike = all(names == layers.get(0) for names in layers.values())
    return sorted(layers[0]) if alike and max(layers) + 1 == len(layers) else sorted(modules)


def _number(x: float) -> int | float:
    return int(x) if x == int(x) else x


def _matrices(path: str, adapter: Adapter, names: Names) -> list[tuple[str, Any, Any]]:
    """Returns module, A [K, r] and B [r, N] of every matrix of a weight."""
    if adapter.layout.letters not in ("kn", "nk") or adapter.a.ndim > 3:
        raise NotImplementedError(
            f"{path}: an adapter with A {list(adapter.a.shape)} of a weight of layout"
            f" {adapter.layout.letters!r} has no place in the format, which knows matrices."
        )
    if adapter.a.ndim == 2:
        return [(_name(path, names), np.asarray(adapter.a), np.asarray(adapter.b))]
    paths = _unstacked(path, adapter.a.shape[0])
    if paths[0] == path:
        raise NotImplementedError(
            f"{path}: is a stack of {len(paths)}, but not of layers ('layers/...'): it has no place"
            " in the format."
        )
    a, b = np.asarray(adapter.a), np.asarray(adapter.b)
    return [(_name(p, names), a[i], b[i]) for i, p in enumerate(paths)]


def _name(path: str, names: Names) -> str:
    try:
        return names(path)
    except (KeyError, ValueError):
        raise ValueError(
            f"{path}: is no weight of `qjax.models`' decoder, so that its name in the file is not"
            " known. Pass `names`."
        ) from None


def load_peft(
    directory: str | os.PathLike[str],
    params: Any,
    *,
    dtype: DTypeLike | None = None,
    names: Names = hf_module,
) -> Adapters:
    """Reads adapters that `peft` or `save_peft` wrote, for a decoder of `qjax.models`.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors.
      params: the base: says which weights there are, and whether layers are stacked.
      dtype: of A and B; by default as stored.
      names: as for `save_peft`.

    Raises:
      ValueError: if files are damaged or the adapters are of another model.
      NotImplementedError: for what is not plain LoRA on linear layers.
    """
    directory = Path(directory)
    config, tensors = _read(directory)
    _check_plain(directory, config)
    rest = dict(tensors)

    def take(module: str) -> tuple[np.ndarray, np.ndarray] | None:
        found = [rest.pop(f"{_PREFIX}{module}.lora_{x}.weight", None) for x in "AB"]
        if found[0] is None and found[1] is None:
            return None
        if found[0] is None or found[1] is None:
            raise ValueError(f"{directory}: {module} has only one of lora_A and lora_B.")
        return found[0].T, found[1].T

    adapters = {}
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
    for key_path, leaf in leaves:
        path = path_str(key_path)
        shape = [int(n) for n in getattr(leaf, "shape", ())]
        is_stack = re.search(r"(^|/)layers/", path) is not None
        if not path.endswith("kernel") or len(shape) != (3 if is_stack else 2):
            continue
        modules = [names(p) for p in (_unstacked(path, shape[0]) if is_stack else [path])]
        found = {m: pair for m in modules if (pair := take(m)) is not None}
        if not found:
            continue
        if len(found) < len(modules):
            missing = next(m for m in modules if m not in found)
            raise ValueError(
                f"{directory}: has adapters for {len(found)} of {len(modules)} layers, none for"
                f" {missing}, but {path} is a stack of all. Load the model with scan_layers=False."
            )
        adapters[path] = _adapter(path, leaf, found, is_stack, config, dtype, directory)
    if rest:
        raise ValueError(
            f"{directory}: has tensors for modules that the base does not have:"
            f" {', '.join(sorted(rest)[:3])}, ... ({len(rest)}). It is of another model."
        )
    return adapters


def _adapter(
    path: str, leaf: Any, found: dict, is_stack: bool, config: dict, dtype: Any, directory: Path
) -> Adapter:
    specs = {
        (a.shape[1], _pattern(config.get("alpha_pattern"), m, config.get("lora_alpha", 8)))
        for m, (a, _) in found.items()
    }
    if len(specs) > 1:
        raise ValueError(
            f"{directory}: layers have different ranks or alphas {sorted(specs)}, but {path} is a"
            " stack of all. Load the model with scan_layers=False."
        )
    ((rank, alpha),) = specs
    join = np.stack if is_stack else lambda xs: xs[0]
    a, b = (jnp.asarray(join([pair[i] for pair in found.values()]), dtype) for i in (0, 1))
    layout = layout_of(path, leaf)
    *lead, K, N = canonical_shape(leaf, layout)
    if a.shape != (*lead, K, rank) or b.shape != (*lead, rank, N):
        raise ValueError(
            f"{directory}: the adapter of {path} has A {list(a.shape)} and B {list(b.shape)}, which"
            f" do not fit a weight [*lead, K, N] = {[*lead, K, N]}. It is of another model."
        )
    return Adapter(a, b, layout, float(alpha), bool(config.get("use_rslora")))


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that is, or ends, the name of a module."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory}: has no {name}, so it is no directory of adapters."
                " Only safetensors are read."
            )
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        return config, load_file(directory / WEIGHTS)
    except (ValueError, SafetensorError) as e:
        raise ValueError(f"{directory}: cannot be read ({e}). Copy it again.") from None


# What a config may hold that this module does not carry out, and the values that mean "not used".
_UNUSED = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None,),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    # Others change the base as well: their adapters mean nothing on the original one.
    "init_lora_weights": (True, False, "gaussian", None),
}


def _check_plain(directory: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise NotImplementedError(
            f"{directory}: holds adapters of type {config.get('peft_type')!r}; only LORA is read."
        )
    for key, unused in _UNUSED.items():
        if config.get(key) not in unused:
            raise NotImplementedError(
                f"{directory}: {CONFIG} has {key}={config[key]!r}; only plain LoRA on linear layers"
                " is read."
            )
