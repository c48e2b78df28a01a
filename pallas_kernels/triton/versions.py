"""The one place that knows versions of JAX, jax-triton and Triton: what works, and how to call."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
from jax._src.interpreters import partial_eval

# Lowest versions. 0.3 of jax-triton does not import without a GPU; Triton 3.7 is what 0.4.1 asks.
NEEDED = {"jax": (0, 11), "jax-triton": (0, 4, 1), "triton": (3, 7)}
# What the kernels were compiled and interpreted with.
TESTED = {"jax": "0.12.0.1", "jax-triton": "0.4.1", "triton": "3.9.0"}

# The PTX that kernels are handed over in: CUDA 12.4 and newer assemble it. Left alone, Triton
# writes as new a version as its own assembler reads, which the one that JAX brings may refuse.
PTX = 84


def missing(installed: Callable[[str], str] = importlib.metadata.version) -> str | None:
    """Returns what has to be installed or changed for kernels in Triton, or None.

    Args:
      installed: function from a distribution's name to its version.

    Example:
      >>> print(missing({"jax": "0.12.0.1", "jax-triton": "0.3.1", "triton": "3.9.0"}.__getitem__))
      jax-triton 0.3.1 is too old: 0.4.1 or newer is needed (tested: jax 0.12.0.1, jax-triton
      0.4.1, triton 3.9.0)
    """
    for name, least in NEEDED.items():
        wanted = ".".join(map(str, least))
        try:
            version = installed(name)
        except importlib.metadata.PackageNotFoundError:
            return f"`pip install '{name}>={wanted}'`"
        if tuple(map(int, re.findall(r"\d+", version)[: len(least)])) < least:
            tested = ", ".join(f"{n} {v}" for n, v in TESTED.items())
            return f"{name} {version} is too old: {wanted} or newer is needed (tested: {tested})"
    return None


@functools.cache
def _triton_call() -> Callable[..., Any]:
    if why := missing():
        raise RuntimeError(f"kernels in Triton: {why}.")
    import jax_triton  # pyright: ignore[reportMissingImports]: optional
    from jax_triton import triton_lib  # pyright: ignore[reportMissingImports]: optional

    # Since 0.12 rules of dead code take a third argument. jax-triton 0.4.1 has a rule of two, so
    # that every program with a kernel fails under `jit`. JAX's own, which takes its place, keeps
    # an equation if an output is used or it has effects.
    rules, primitive = partial_eval.dce_rules, triton_lib.triton_kernel_call_p
    arity = lambda rule: len(inspect.signature(rule).parameters)
    if primitive in rules and arity(rules[primitive]) != arity(partial_eval._default_dce_rule):
        del rules[primitive]
    return jax_triton.triton_call


def call(
    kernel: Any,
    *args: Any,
    out: jax.ShapeDtypeStruct,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    capability: int | None,
    **constants: Any,
) -> jax.Array:
    """Runs a kernel in Triton on arrays.

    Args:
      kernel: what `triton.jit` made.
      *args: arrays and integers, its parameters up to the output.
      out: its output.
      grid: programs along each axis.
      warps, stages: of one program; loads in flight.
      capability: what to compile for, such as 80 or 89; None: the GPU at hand.
      **constants: its constexpr parameters.

    Raises:
      RuntimeError: if packages are missing or too old; it names them.
    """
    return _triton_call()(
        *args,
        kernel=kernel,
        out_type=out,
        grid=grid,
        num_warps=warps,
        num_stages=stages,
        compute_capability=capability,
        backend_options={"enable_fp_fusion": True, "ptx_version": PTX},
        **constants,
    )
