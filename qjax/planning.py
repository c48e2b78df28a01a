"""plan: what one decode step of a quantized model needs on GPUs, before there are weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pallas_kernels import h100, hlo
from qjax import policy as policies
from qjax.models.cache import KVCache, init_cache
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.paths import path_str
from qjax.policy import Policy
from qjax.prepare import prepare
from qjax.qtensor import is_qtensor
from qjax.quantize import quantize
from qjax.sharding import shardings_of
from qjax.transform.apply import apply

# Bytes of memory and bytes per second of one.
DEVICES = {
    "h100": (80e9, 3.35e12),
    "a100": (80e9, 2.04e12),
    "rtx3090": (24e9, 0.94e12),
    "rtx4090": (24e9, 1.01e12),
}
# Tensor parallel, over heads and over the width of the MLP: outputs of the first are split, inputs
# of the second, whose partial sums an all-reduce adds.
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_ROWS = ("o_proj", "down_proj")
_AXIS = "x"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one decode step needs. Bytes are those of each device.

    Attributes:
      source: "compiler", or "shapes" for what was computed without one.
      model, policy, device, devices, batch, context: what was asked for.
      weights, cache: bytes of the parameters and of keys and values.
      arguments, outputs, temporaries: of the program; None where only a compiler knows.
      collectives: how many of each kind one step has; by shapes, those that it cannot do without.
      products: how many matrix products one step has of each kind: "mosaic_gpu_v2" are the kernels
        of qjax, "__cublas$lt$matmul$f8" FP8 ones of cuBLAS. None without a compiler.
      native_fp8: products that FP8 tensor cores multiply. None without a compiler, and where qjax's
        kernels are of both kinds.
      spilled: bytes of registers that kernels spill. None without a compiler.
      memory: bytes of a device, as sold.
      microseconds: for reading weights and caches once, at the peak bandwidth: no step is shorter.
    """

    source: str
    model: str
    policy: str
    device: str
    devices: int
    batch: int
    context: int
    weights: int
    cache: int
    arguments: int
    outputs: int | None
    temporaries: int | None
    collectives: dict[str, int]
    products: dict[str, int] | None
    native_fp8: int | None
    spilled: int | None
    memory: int
    microseconds: float

    @property
    def fits(self) -> bool:
        """Whether arguments and temporaries are within the memory of a device."""
        return self.arguments + (self.temporaries or 0) <= self.memory

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return dataclasses.asdict(self) | {"fits": self.fits}

    def rows(self) -> list[tuple[str, str]]:
        """Returns what a table shows."""
        gb = lambda n: "needs a compiler" if n is None else f"{n / 1e9:,.3f} GB"
        counts = lambda d: ", ".join(f"{n} x {kind}" for kind, n in d.items()) or "none"
        rows = [
            ("numbers from", "the compiler" if self.source == "compiler" else "shapes, computed"),
            ("weights", gb(self.weights)),
            ("keys and values", gb(self.cache)),
            ("arguments", gb(self.arguments)),
            ("temporaries", gb(self.temporaries)),
        ]
        if self.temporaries is not None:
            rows.append(("  of arguments", f"{self.temporaries / self.arguments:.2%}"))
        rows += [
            ("memory of a device", gb(self.memory)),
            ("fits", "yes" if self.fits else "no"),
            ("collectives", counts(self.collectives)),
        ]
        if self.products is not None:
            rows += [("products", counts(self.products)), ("  native FP8", str(self.native_fp8))]
        return [*rows, ("reading it once, computed", f"{self.microseconds:,.0f} µs")]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        title = (
            f"{self.model}, {self.policy}, {self.devices} x {self.device}, batch {self.batch},"
            f" context {self.context}"
        )
        return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in self.rows())])


def plan(
    model: str | ModelConfig,
    policy: str | Policy | None,
    *,
    device: str = "h100",
    devices: int = 1,
    batch: int = 1,
    context: int = 1024,
    compiler: bool | None = None,
) -> Plan:
    """Returns what one decode step of a model needs on GPUs.

    The step is that of `qjax.models.Decoder` in bfloat16 through `qjax.apply`, layers under a scan,
    on weights that are quantized and prepared in the abstract: none are needed. For an H100, and
    where the wheels of the extra `h100` are installed, it is compiled, without a GPU, and all
    numbers are the compiler's; else they are computed from shapes, and `Plan.source` says so.

    Several devices are tensor parallel: heads and the width of the MLP are split.

    Args:
      model: "llama-3-8b", "llama-3-70b"; a `config.json` of transformers, or its directory; or a
        config.
      policy: as for `qjax.quantize`; None: bfloat16.
      device: "h100", "a100", "rtx3090" or "rtx4090".
      devices: how many of them, 1 to 8.
      batch: sequences.
      context: tokens that the cache has room for.
      compiler: whether to compile; None: where it is possible.

    Raises:
      ValueError: for unknown names, or heads that devices do not divide.
      RuntimeError: with `compiler=True`, if there is none; it names what to install.
    """
    if device not in DEVICES:
        raise ValueError(f"`device` must be one of {', '.join(DEVICES)}, got {device!r}.")
    if not 1 <= devices <= 8 or batch < 1 or context < 1:
        raise ValueError(
            f"`devices` must be 1 to 8, `batch` and `context` at least 1, got {devices=},"
            f" {batch=}, {context=}."
        )
    config = model if isinstance(model, ModelConfig) else read_config(model)
    for name in ("num_kv_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % devices:
            raise ValueError(
                f"`devices` must divide {name}={getattr(config, name)} of the model, got {devices}."
            )
    why_not = f"only an H100's is here, not for {device}"
    if device == "h100":
        why_not = h100.missing(code=False)
    if compiler and why_not:
        raise RuntimeError(f"no compiler: {why_not}.")
    name = f"{config.num_layers} layers of {config.hidden_size}"
    name = name if isinstance(model, ModelConfig) else model
    program = _Program(name, config, policy, device, devices, batch, context)
    use = why_not is None if compiler is None else compiler
    return program.compiled() if use else program.computed()


def read_config(name: str) -> ModelConfig:
    """Returns a model's config by its name or from a `config.json`.

    Raises:
      ValueError: if there is neither.
    """
    folder = policies._preset_dir() / "models"
    named = {p.name[:-5]: p for p in folder.iterdir() if p.name.endswith(".json")}
    if name in named:
        return ModelConfig.from_hf(json.loads(named[name].read_text(encoding="utf-8")))
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"no model {name!r}: it is neither a config.json nor one of {', '.join(sorted(named))}."
        )
    return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))


@dataclasses.dataclass(frozen=True)
class _Program:
    """One decode step, abstract."""

    name: str
    config: ModelConfig
    policy: str | Policy | None
    device: str
    devices: int
    batch: int
    context: int

    @functools.cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.config, jnp.bfloat16, jnp.bfloat16, scan_layers=True)

    @functools.cached_property
    def mesh(self) -> AbstractMesh:
        return AbstractMesh((self.devices,), (_AXIS,))

    def step(self, params, cache: KVCache, tokens) -> tuple[Any, KVCache]:
        out: Any = self._decoder.apply({"params": params}, tokens, cache=cache)
        return out[0][:, 0], out[1]

    @functools.cached_property
    def arguments(self) -> tuple[Any, KVCache, Any]:
        """Parameters, cache and tokens, as shapes with shardings."""
        tokens = jax.ShapeDtypeStruct((self.batch, 1), jnp.int32)

        key = jax.eval_shape(lambda: jax.random.key(0))
        params = jax.eval_shape(self._decoder.init, key, tokens)["params"]
        if self.policy is not None:
            params = quantize(params, self.policy)
            params = jax.eval_shape(functools.partial(prepare, device=self.device), params)
        params = jax.tree_util.tree_map_with_path(self._split, params, is_leaf=is_qtensor)
        cache = jax.eval_shape(
            lambda: init_cache(self.config, self.batch, self.context, jnp.bfloat16)
        )
        heads = PartitionSpec(None, None, _AXIS)
        split = {"k": self._placed(cache.k, heads), "v": self._placed(cache.v, heads)}
        rest = jax.tree.map(lambda a: self._placed(a, PartitionSpec()), cache)
        return params, rest._replace(**split), self._placed(tokens, PartitionSpec())

    def _placed(self, leaf, spec: PartitionSpec):
        sharding = NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def _split(self, path, leaf):
        module = path_str(path).split("/")[-2]
        spec = PartitionSpec()
        if module in _COLUMNS:
            spec = PartitionSpec(*[None] * (len(leaf.shape) - 1), _AXIS)
        elif _is_split_by_rows(path):
            spec = PartitionSpec(*[None] * (len(leaf.shape) - 2), _AXIS, None)
        if not is_qtensor(leaf):
            return self._placed(leaf, spec)
        placed = shardings_of(leaf, NamedSharding(self.mesh, spec), name=path_str(path))
        struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
        return jax.tree.map(struct, leaf, placed)

    def _facts(self, **known: Any) -> Plan:
        params, cache, tokens = self.arguments
        weights, keys = _bytes(params), _bytes((cache.k, cache.v))
        memory, bandwidth = DEVICES[self.device]
        # An embedding is looked up, not read.
        read = weights - (0 if self.config.tie_embeddings else _bytes(params["embed"]))
        values: dict[str, Any] = {
            "model": self.name,
            "policy": "bfloat16" if self.policy is None else Policy.of(self.policy).name,
            "device": self.device, "devices": self.devices, "batch": self.batch,
            "context": self.context, "weights": weights, "cache": keys,
            "arguments": _bytes((params, cache, tokens)), "outputs": None, "temporaries": None,
            "products": None, "native_fp8": None, "spilled": None, "memory": int(memory),
            "microseconds": 1e6 * (read + keys) / bandwidth,
        }  # fmt: skip
        return Plan(**values | known)

    def computed(self) -> Plan:
        sums = self._all_reduces() if self.devices > 1 else 0
        return self._facts(source="shapes", collectives={"all-reduce": sums} if sums else {})

    def _all_reduces(self) -> int:
        """Counts the sums after each product whose inputs are split, and what comes before it.

        That is the largest activation, of every token or of all, where a step is taken from it.
        """
        flat, _ = jax.tree_util.tree_flatten_with_path(self.arguments[0], is_leaf=is_qtensor)
        total = 0
        for path, leaf in flat:
            if _is_split_by_rows(path):
                fmt = leaf.format if is_qtensor(leaf) else None
                has_step = fmt and fmt.activation and fmt.activation_scale in ("token", "tensor")
                total += leaf.shape[0] * (2 if has_step else 1)  # layers lie stacked
        return total

    def compiled(self) -> Plan:
        fn = jax.jit(apply(self.step), donate_argnums=1)
        program = h100.compile(fn, *self.arguments, on=h100.mesh(**{_AXIS: self.devices}))
        executed = hlo.executed(program.hlo)
        kinds = ("mosaic_gpu_v2", "triton gemm", *(k for k in executed if k.startswith("__cublas")))
        products = {kind: executed[kind] for kind in kinds if executed[kind]}
        native: int | None = sum(n for kind, n in products.items() if kind.endswith("$f8"))
        is_fp8 = [any(".e4m3" in kind for kind in k.products) for k in program.kernels]
        if is_fp8 and all(is_fp8):
            native += products["mosaic_gpu_v2"]
        elif any(is_fp8):  # which of the calls run which kernel is not in the program
            native = None
        return self._facts(
            source="compiler",
            arguments=program.arguments,
            outputs=program.outputs,
            temporaries=program.temporaries,
            collectives=hlo.collectives(program.hlo),
            products=products,
            native_fp8=native,
            spilled=sum(k.spills for k in program.kernels),
        )


def _is_split_by_rows(path: Any) -> bool:
    *_, module, name = path_str(path).split("/")
    return module in _ROWS and name == "kernel"


def _bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of arrays with shardings."""

    def one(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize

    return sum(map(one, jax.tree.leaves(tree)))
