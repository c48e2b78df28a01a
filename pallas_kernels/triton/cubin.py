"""Compiles kernels in Triton to machine code, on any machine, to read what they are made of."""

# `triton` is optional, and the type checker takes it for this folder.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import collections
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.h100 import count_instructions
from pallas_kernels.triton import versions
from pallas_kernels.triton.tuning import Tuning

_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "i8", "int32": "i32"}


@dataclasses.dataclass(frozen=True)
class Cubin:
    """One kernel as it was assembled.

    Attributes:
      registers: of a thread.
      stack: bytes of a thread that lie in local memory, spills among them.
      smem: bytes of shared memory.
      threads: of a program.
      code, loop: opcode counts of the kernel and of its hot loop.
    """

    registers: int
    stack: int
    smem: int
    threads: int
    code: collections.Counter[str]
    loop: collections.Counter[str]

    def per_weight(self, weights: int) -> float:
        """Returns instructions of the hot loop for each of the weights of one step."""
        return self.threads * self.loop.total() / weights


def compile(
    kernel: Any, arrays: dict[str, Any], constants: dict[str, Any], tuning: Tuning, capability: int
) -> Cubin:
    """Compiles a kernel for a compute capability, as `versions.call` does.

    Args:
      kernel: what `triton.jit` made.
      arrays: the types of its arrays; all parameters that are neither here nor constants are
        integers, multiples of 16 but for M and `steps`.
      constants: its constexpr parameters.

    Raises:
      RuntimeError: if packages are missing or too old.
    """
    if why := versions.missing():
        raise RuntimeError(f"kernels in Triton: {why}.")
    signature, attributes = {}, {}
    for i, name in enumerate(p.name for p in kernel.params):
        if name in constants:
            signature[name] = "constexpr"
            continue
        is_array = name in arrays
        signature[name] = f"*{_TYPES[jnp.dtype(arrays[name]).name]}" if is_array else "i32"
        if is_array or name not in ("M", "steps"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": tuning.warps,
            "num_stages": tuning.stages,
            "enable_fp_fusion": True,
            "ptx_version": versions.PTX,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        listing, usage = _run("nvdisasm", "-c", file), _run("cuobjdump", "-res-usage", file)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    code, loop = count_instructions(listing)
    return Cubin(
        int(found[1]), int(found[2]), compiled.metadata.shared, 32 * tuning.warps, code, loop
    )


def _run(tool: str, *arguments: Any) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run(
        [path, *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout
