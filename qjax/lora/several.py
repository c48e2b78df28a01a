"""Several adapters on one base: stacked to be picked from, or summed into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qjax.lora.adapter import Adapter, Adapters


def stack(several: Sequence[Adapters]) -> Adapters:
    """Returns adapters with a new leading axis on A and B, to be picked from with `select`.

    Raises:
      ValueError: if they differ in paths, ranks or scales.
    """
    first, *rest = several
    for i, other in enumerate(rest, 1):
        for path in sorted(set(first) ^ set(other)):
            raise ValueError(f"`several`: only one of number 0 and number {i} has {path!r}.")
        for path, adapter in first.items():
            theirs = other[path]
            if jax.tree.structure(adapter) != jax.tree.structure(theirs) or (
                adapter.a.shape != theirs.a.shape or adapter.b.shape != theirs.b.shape
            ):
                raise ValueError(
                    f"{path}: number 0 has rank {adapter.rank} and scale {adapter.scale:g}, number"
                    f" {i} rank {theirs.rank} and scale {theirs.scale:g}; only like adapters can be"
                    " stacked. `lora.combine` sums unlike ones."
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)


def select(stacked: Adapters, index: Any) -> Adapters:
    """Returns the adapters of number `index`, which may be traced, or an array of numbers.

    With an array [B], the result has that axis: under `jax.vmap` over it and over the rows of a
    batch, every row runs with its own adapters, and the products with the base remain one.

    Example:
      >>> from qjax import lora
      >>> params = {"w": jnp.ones((4, 4))}
      >>> made = [lora.init(jax.random.key(i), params, "w", rank=2) for i in range(3)]
      >>> select(stack(made), jnp.array([2, 0]))["w"].a.shape
      (2, 4, 2)
    """
    return jax.tree.map(lambda a: jnp.take(a, index, axis=0), stacked)


def combine(several: Sequence[Adapters], weights: Sequence[ArrayLike] | ArrayLike) -> Adapters:
    """Returns one set of adapters whose update is sum_i weights[i] * s_i * A_i @ B_i.

    Ranks add up: A = [A_1 A_2 ..], B = [w_1 s_1 B_1; w_2 s_2 B_2; ..] in float32, with scale 1.
    Ranks and scales may differ, and a weight may have an adapter in only some of the sets.

    Args:
      weights: a number for each set; they may be traced.
    """
    weights = list(jnp.asarray(weights, jnp.float32))
    if len(weights) != len(several):
        raise ValueError(f"`weights` has {len(weights)} numbers for {len(several)} adapters.")
    out = {}
    for path in dict.fromkeys(path for adapters in several for path in adapters):
        parts = [(w, ads[path]) for w, ads in zip(weights, several, strict=True) if path in ads]
        layout = parts[0][1].layout
        for _, other in parts:
            if other.layout != layout or other.a.shape[:-1] != parts[0][1].a.shape[:-1]:
                raise ValueError(f"{path}: the adapters are of weights of different shapes.")
        a = jnp.concatenate([ad.a.astype(jnp.float32) for _, ad in parts], axis=-1)
        b = jnp.concatenate([w * ad.scale * ad.b.astype(jnp.float32) for w, ad in parts], axis=-2)
        out[path] = Adapter(a, b, layout, alpha=float(a.shape[-1]))
    return out
