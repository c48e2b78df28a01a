"""Adapter: a low-rank update of one weight, and the making of adapters for a tree of weights."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qjax.layout import DEFAULT, Layout
from qjax.paths import path_str
from qjax.policy import Rule
from qjax.qtensor import QTensor, is_qtensor
from qjax.sharding import canonical_axes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["a", "b"],
    meta_fields=["layout", "alpha", "rank_stabilized"],
)
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trainable update of one frozen weight W [*lead, K, N] (Hu et al., 2021, LoRA, eq. 3).

    y = x @ W + s * (x @ A) @ B,   s = alpha / r, or alpha / sqrt(r) if rank-stabilized
                                   (Kalajdzievski, 2023, rsLoRA, eq. 4)

    Attributes:
      a: A [*lead, K, r]; the paper's A, transposed.
      b: B [*lead, r, N]; the paper's B, transposed.
      layout: static. How the weight's logical axes map to [*lead, K, N].
      alpha: static. The numerator of s.
      rank_stabilized: static. Whether s divides by sqrt(r).
    """

    a: Float[Array, "*lead K r"]
    b: Float[Array, "*lead r N"]
    layout: Layout
    alpha: float
    rank_stabilized: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def update(self) -> Float[Array, "*lead K N"]:
        """Returns s * A @ B in float32: what the adapter adds to the canonical weight."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        return self.scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


Adapters = dict[str, Adapter]


def init(
    key: Array,
    params: Any,
    targets: str | Sequence[str],
    *,
    rank: int,
    alpha: float = 16.0,
    rank_stabilized: bool = False,
    dtype: DTypeLike = jnp.bfloat16,
    usage: Any = None,
) -> Adapters:
    """Returns adapters that change nothing yet: A ~ U(-1/sqrt(K), 1/sqrt(K)), B = 0.

    They are a dict from the path of a weight to its `Adapter`, a pytree of its own to take
    gradients of, to optimize and to save; dicts of different ranks may be joined. On a mesh A and B
    lie as the weight's K and N do.

    Args:
      key: PRNG key; an adapter's draw depends on it and on its path alone.
      params: the base: a tree of QTensors or float arrays, as it will be given to `lora.apply`.
      targets: one or more patterns over paths, as in a `Rule`: "*/q_proj/kernel",
        "re:.*(up|down)_proj/kernel". Arrays of fewer than two axes never match.
      rank: r, at most the smaller of K and N.
      alpha: numerator of the update's scale.
      rank_stabilized: divide by sqrt(r) and not by r.
      dtype: of A and B.
      usage: what `qjax.usage(fn)(params, ...)` returned: how fn contracts the float leaves. Without
        it their last axis is N, the one before K and earlier ones are stacked. A QTensor knows.

    Raises:
      ValueError: if a pattern matches nothing, or what it matches has no product to add to.

    Example:
      >>> params = {"up": jnp.zeros((8, 32)), "bias": jnp.zeros(32)}
      >>> adapters = init(jax.random.key(0), params, "*", rank=4)
      >>> {path: (ad.a.shape, ad.b.shape) for path, ad in adapters.items()}
      {'up': ((8, 4), (4, 32))}
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    rules = [Rule(pattern) for pattern in patterns]
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
    named = {path_str(path): leaf for path, leaf in leaves}
    ndim = {path: len(getattr(leaf, "shape", ())) for path, leaf in named.items()}
    for pattern, rule in zip(patterns, rules, strict=True):
        if not any(rule.matches(path, ndim[path]) for path in named):
            small = [path for path in named if rule.matches(path, rule.min_ndim)]
            why = f"{_some(small)} has fewer than two axes." if small else ""
            raise ValueError(
                f"`targets`: {pattern!r} matches no weight of the base."
                f" {why or f'Its paths are {_some(list(named))}.'}"
            )
    matched = [path for path in named if any(rule.matches(path, ndim[path]) for rule in rules)]
    adapters = {}
    for path in matched:
        leaf = named[path]
        layout = layout_of(path, leaf, usage)
        *lead, K, N = canonical_shape(leaf, layout)
        if not 1 <= rank <= min(K, N):
            raise ValueError(
                f"{path}: `rank` must be from 1 to {min(K, N)}, the smaller side of this"
                f" [{K}, {N}] weight, got {rank}. Lower it, or leave this weight out."
            )
        draw = jax.random.fold_in(key, zlib.crc32(path.encode()))
        bound = 1 / math.sqrt(K)
        a = jax.random.uniform(draw, (*lead, K, rank), jnp.float32, -bound, bound).astype(dtype)
        b = jnp.zeros((*lead, rank, N), dtype)
        adapters[path] = Adapter(*_placed(a, b, leaf, layout), layout, alpha, rank_stabilized)
    return adapters


def layout_of(path: str, leaf: Any, usage: Any = None) -> Layout:
    """Returns the layout of a base weight: a QTensor's own, else from `usage`, else "kn".

    Raises:
      ValueError: if it is no float weight of a product; names the path.
    """
    if is_qtensor(leaf):
        return leaf.layout
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"{path}: `targets` match it, but its type is {leaf.dtype}, not float. Leave it out."
        )
    letters = DEFAULT
    if usage is not None:
        letters = usage.layout(path)
        if letters is None:
            raise ValueError(
                f"{path}: `targets` match it, but it is {usage.why_not(path)}. Leave it out."
            )
    return Layout.parse(letters, leaf.shape)


def canonical_shape(leaf: Any, layout: Layout) -> tuple[int, ...]:
    """Returns [*lead, K, N] of a base weight."""
    if isinstance(leaf, QTensor):
        return leaf.canonical_shape
    return jax.eval_shape(layout.to_canonical, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).shape


def _placed(a: Array, b: Array, leaf: Any, layout: Layout) -> tuple[Array, Array]:
    """Puts A and B on the mesh of a weight, K and N split as its own are."""
    is_packed = isinstance(leaf, QTensor)
    sharding = getattr(leaf.data if is_packed else leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return a, b
    if is_packed:
        *lead, k, n = (*sharding.spec, *[None] * (leaf.data.ndim - len(sharding.spec)))
    else:
        lead, k, n = canonical_axes(layout, leaf.shape, sharding)

    def place(x: Array, *axes: Any) -> Array:
        spec = PartitionSpec(*(axis or None for axis in axes))
        return jax.device_put(x, NamedSharding(sharding.mesh, spec))

    return place(a, *lead, k, None), place(b, *lead, None, n)


def _some(paths: list[str], most: int = 6) -> str:
    return ", ".join(map(repr, paths[:most])) + (
        f", ... ({len(paths)})" if len(paths) > most else ""
    )
