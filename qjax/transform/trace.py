"""How a call of an unmodified function becomes a jaxpr over float arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax import _compat
from qjax.ops import weight
from qjax.paths import path_str
from qjax.qtensor import is_qtensor

# Operations that only call another jaxpr, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}


class Call(NamedTuple):
    """A call taken apart: what is traced, and how to put it together again."""

    leaves: list[Any]  # arrays and QTensors
    paths: list[tuple[Any, ...]]  # key paths in (args, kwargs)
    rebuild: Callable[[list[Any]], tuple[tuple, dict]]

    @property
    def names(self) -> list[str]:
        """Paths of the leaves from the position or the name of their argument on."""
        return [path_str(path[1:]) for path in self.paths]


def take_apart(args: tuple, kwargs: dict) -> Call:
    """Separates the arrays and QTensors of a call from everything else in it."""
    flat, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_qtensor)
    # Only arrays are traced. Python numbers, flags and strings stay what they are.
    dynamic = [i for i, (_, v) in enumerate(flat) if _is_array(v)]
    static = {i: v for i, (_, v) in enumerate(flat) if not _is_array(v)}

    def rebuild(leaves):
        at = dict(zip(dynamic, leaves, strict=True)) | static
        return jax.tree.unflatten(tree, [at[i] for i in range(len(flat))])

    return Call([flat[i][1] for i in dynamic], [flat[i][0] for i in dynamic], rebuild)


def _is_array(x: Any) -> bool:
    return is_qtensor(x) or isinstance(
        x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    )


def logical(leaf: Any, name: str = "") -> Any:
    """Returns the float shape, on its mesh, that a QTensor stands for; any other leaf as it is."""
    if not is_qtensor(leaf):
        return leaf
    spec = weight.partition(weight.as_view(leaf, name))
    return _compat.abstract_like(jax.tree.leaves(leaf), leaf.shape, jnp.dtype(leaf.dtype), spec)


def trace(fn: Callable, call: Call) -> tuple[Any, list[Any], Callable[[list[Any]], Any]]:
    """Traces `fn` with float shapes in place of QTensors.

    Returns:
      The jaxpr, its constants, and a function that puts what fn returns together again from the
      jaxpr's outputs. Results that are no arrays (flags, strings) come from the trace.
    """
    tree, fixed = None, {}

    def flat(*leaves):
        nonlocal tree, fixed
        args, kwargs = call.rebuild(list(leaves))
        out, tree = jax.tree.flatten(fn(*args, **kwargs))
        fixed = {i: v for i, v in enumerate(out) if not _is_array(v)}
        return [v for i, v in enumerate(out) if i not in fixed]

    closed = jax.make_jaxpr(flat)(*map(logical, call.leaves, call.names))
    jaxpr, consts = _compat.open_jaxpr(closed)

    def rebuild(out):
        rest = iter(out)
        assert tree is not None
        leaves = [fixed[i] if i in fixed else next(rest) for i in range(tree.num_leaves)]
        return jax.tree.unflatten(tree, leaves)

    return jaxpr, consts, rebuild
