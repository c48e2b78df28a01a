"""Compiles functions for an H100 on a machine without one, to read what the compiler made of them.

Needs the wheels `jax-cuda13-plugin` and `jax-cuda13-pjrt` of JAX's version, no driver and no CUDA;
to read machine code also `triton`, whose wheel brings NVIDIA's disassembler. Nothing is run:
memory, registers and instructions are facts, speed is not.

There are two assemblers. The plugin contains one, ptxas; where the wheel `nvidia-nvjitlink` is
installed too, as it is with `jax[cuda13]`, it takes nvJitLink, which ignores that warpgroups trade
registers: every thread gets 65536 / 384 = 168 at most. A kernel has to be good with both.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The plugin registers when JAX first looks for devices, and then asks for cuDNN, which is not used.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

TENSOR_CORE = ("HGMMA", "QGMMA", "IGMMA")  # Hopper's: 16-bit floats, FP8, int8
OLD_TENSOR_CORE = ("HMMA", "IMMA")  # those of earlier GPUs, at half the rate or less
# Instructions of the integer pipe, conversions included; which opcode uses which is an assumption.
INTEGER = ("LOP3", "PRMT", "SHF", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "MOV", "F2FP",
           "I2FP", "VIMNMX", "PLOP3")  # fmt: skip


_DISASSEMBLER = "a disassembler, `pip install triton` or nvdisasm on the PATH"


def missing(*, code: bool = True) -> str | None:
    """Returns what has to be installed to compile, or, with `code`, to read the code; or None."""
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        version = jax.__version__
        return f"`pip install jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}`"
    if code and _disassembler() is None:
        return _DISASSEMBLER
    return None


@functools.cache
def assembler() -> str:
    """Returns which assembler the plugin takes: "nvJitLink" where it finds that, else "ptxas"."""
    spec = importlib.util.find_spec("jax_cuda13_plugin")
    assert spec is not None
    assert spec.origin is not None
    name = "libnvJitLink.so.13"
    wheel = Path(spec.origin).parents[1] / "nvidia/cu13/lib" / name
    try:
        ctypes.CDLL(str(wheel) if wheel.exists() else name)
    except OSError:
        return "ptxas"
    return "nvJitLink"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Mosaic GPU kernel as it was assembled.

    Attributes:
      name: of its files.
      assembler: "ptxas" or "nvJitLink".
      registers: of a thread, before warpgroups trade them.
      stack, spills: bytes.
      smem: bytes of buffers in shared memory.
      warnings: of the assembler, such as "(C7512) ...": wgmma serialized.
      products: tensor core instructions of the PTX, by the types of sum and operands, as in
        "f32.bf16.bf16"; "mma.sync" are those of earlier GPUs.
      listing: opcode counts, see `code` and `loop`; None without a disassembler.
      ptx: what was assembled.
    """

    name: str
    assembler: str
    registers: int
    stack: int
    spills: int
    smem: int
    warnings: tuple[str, ...]
    products: collections.Counter[str]
    listing: tuple[collections.Counter[str], collections.Counter[str]] | None
    ptx: str = dataclasses.field(default="", repr=False)

    @property
    def code(self) -> collections.Counter[str]:
        """Opcode counts of the kernel; 8- and 16-bit accesses apart, as in "LDS.U8"."""
        return self._listing[0]

    @property
    def loop(self) -> collections.Counter[str]:
        """Those of its hot loop, the innermost one with tensor core instructions."""
        return self._listing[1]

    @property
    def _listing(self) -> tuple[collections.Counter[str], collections.Counter[str]]:
        if self.listing is None:
            raise RuntimeError(f"reading the code of {self.name} needs {_DISASSEMBLER}.")
        return self.listing

    def per_weight(self, weights: int, *, integer: bool = False) -> float:
        """Returns instructions of the hot loop, in one warpgroup, for each of its `weights`."""
        ops = INTEGER if integer else self.loop
        return 128 * sum(self.loop[op] for op in ops) / weights


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for one H100; sizes in bytes, of each device.

    Attributes:
      arguments, outputs, temporaries: memory of the program.
      hlo: the optimized program.
      kernels: the distinct Mosaic GPU kernels in it.
    """

    arguments: int
    outputs: int
    temporaries: int
    hlo: str
    kernels: tuple[Kernel, ...]


@functools.cache
def _devices(count: int) -> tuple[Any, ...]:
    target = Path(__file__).with_name("h100_sxm.txtpb").read_text()
    return tuple(
        topologies.get_topology_desc(
            "h100", "cuda", target_config=target, topology=f"1x1x{count}"
        ).devices
    )


def mesh(**axes: int) -> Mesh:
    """Returns a mesh of H100s to compile for, at most 8; without axes, of one."""
    axes = axes or {"x": 1}
    count = int(np.prod(list(axes.values())))
    return Mesh(np.array(_devices(count)).reshape(*axes.values()), tuple(axes))


def compile(fn: Callable, *args: Any, on: Mesh | None = None) -> Compiled:
    """Compiles `fn` for H100s.

    Args:
      fn: a function that is traced anew, or what `jax.jit` made of one.
      *args: pytrees of arrays or ShapeDtypeStructs; NamedShardings are taken over by the names of
        their axes, all else is replicated.
      on: `mesh(...)`; default: one H100.

    Raises:
      RuntimeError: if wheels are missing.
    """
    if need := missing(code=False):
        raise RuntimeError(f"compiling for an H100 needs {need}.")
    on = on or mesh()

    def struct(leaf):
        spec = getattr(getattr(leaf, "sharding", None), "spec", PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(on, spec))

    if hasattr(fn, "trace"):
        jax.clear_caches()
    else:  # a function of its own, so that nothing is cached for it
        fn = jax.jit(functools.wraps(fn)(functools.partial(fn)))
    with _dumps() as folder, jax.set_mesh(on):
        lowered = fn.trace(*jax.tree.map(struct, args)).lower(lowering_platforms=("cuda",))  # pyright: ignore[reportFunctionMemberAccess]
        program = lowered.compile()
        kernels = _kernels(folder)
    memory, hlo = program.memory_analysis(), program.as_text()
    assert memory is not None
    assert hlo is not None
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        hlo,
        kernels,
    )


def _disassembler() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm"
        if bundled.exists():
            return str(bundled)
    return shutil.which("nvdisasm")


@contextlib.contextmanager
def _dumps() -> Iterator[Path]:
    """Has Mosaic GPU write what it assembles to a folder."""
    import jax.experimental.pallas.mosaic_gpu  # noqa: F401  sets MOSAIC_GPU_CUDA_ROOT, so it is first

    names = ("MOSAIC_GPU_DUMP_TO", "MOSAIC_GPU_CUDA_ROOT")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        out, root = Path(temporary, "out"), Path(temporary, "cuda")
        out.mkdir()
        # The plugin looks for bin/nvdisasm below the CUDA root and nowhere else.
        (root / "bin").mkdir(parents=True)
        if (tool := _disassembler()) is not None:
            (root / "bin/nvdisasm").symlink_to(tool)
        nvvm = Path(before["MOSAIC_GPU_CUDA_ROOT"] or "", "nvvm")
        if nvvm.exists():
            (root / "nvvm").symlink_to(nvvm)
        os.environ.update(MOSAIC_GPU_DUMP_TO=str(out), MOSAIC_GPU_CUDA_ROOT=str(root))
        try:
            yield out
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = value


# A module is assembled, and written, once per process: module text -> kernel.
_assembled: dict[str, Kernel] = {}


def _kernels(folder: Path) -> tuple[Kernel, ...]:
    # JAX numbers the modules that it lowers, the plugin those that it assembles. Both are in order.
    def number(path: Path) -> int:
        found = re.search(r"(\d+)\.[^.]*(\.txt)?$", path.name)
        assert found is not None, path
        return int(found[1])

    smem = {}
    for path in sorted(folder.glob("*.before_layout_inference.txt"), key=number):
        module = re.sub(r'dump_basename = "[^"]*"', "", path.read_text())
        resources = path.with_name(path.name.replace("before_layout_inference", "resources"))
        found = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text())
        assert found is not None, resources
        smem[module] = int(found[1])
    logs = sorted(folder.glob("*.ptxas"), key=number)
    new = [m for m in smem if m not in _assembled]
    if len(logs) == len(smem):  # what differs in its surroundings only is assembled once more
        new = list(smem)
    for module, path in zip(new, logs, strict=True):
        _assembled[module] = _kernel(path, smem[module])
    return tuple(_assembled[module] for module in smem)


def _kernel(path: Path, smem: int) -> Kernel:
    log = path.read_text()
    code = next((p.read_text() for p in path.parent.glob(f"{path.stem}.sass*")), None)

    def most(pattern: str) -> int:
        return max(map(int, re.findall(pattern, log)), default=0)

    return Kernel(
        path.stem,
        "nvJitLink" if re.search(r"^info ", log, re.M) else "ptxas",  # the linker's own lines
        most(r"[Uu]sed (\d+) registers"),
        max(most(r"(\d+) bytes stack"), most(r"(\d+) stack"), most(r"(\d+) bytes lmem")),
        most(r"(\d+) bytes spill stores") + most(r"(\d+) bytes spill loads"),
        smem,
        tuple(sorted({m[0] for m in re.finditer(r"\(C\d+\).*", log)})),
        _products(ptx := path.with_suffix(".ptx").read_text()),
        None if code is None else count_instructions(code),
        ptx,
    )


def _products(ptx: str) -> collections.Counter[str]:
    found = re.findall(r"\b(?:wgmma\.mma_async\S*?\.m\d+n\d+k\d+\.(\S+)|(mma\.sync)\S*)", ptx)
    return collections.Counter(hopper or older for hopper, older in found)


def count_instructions(
    listing: str,
) -> tuple[collections.Counter[str], collections.Counter[str]]:
    r"""Returns opcode counts of a listing of machine code, and of its hot loop.

    That is the innermost loop (from a label to a branch back to it) with tensor core instructions;
    of several, the one with most of them, then the shortest. Waiting for a barrier is no loop,
    though it has a branch back: it lies behind the loop that waits, and branches into its middle.

    Example:
      >>> lines = ["/*0000*/ MOV R1, R2;", ".L_x_1:", "/*0010*/ HGMMA R1;", "/*0020*/ LDS.U8 R3;"]
      >>> code, loop = count_instructions("\n".join([*lines, "/*0030*/ @P0 BRA `(.L_x_1);"]))
      >>> code.total(), dict(loop)
      (4, {'HGMMA': 1, 'LDS.U8': 1, 'BRA': 1})
      >>> lines = [".L_x_1:", "/*0000*/ SYNCS R1;", ".L_x_2:", "/*0010*/ HGMMA R1;"]
      >>> lines += ["/*0020*/ @P0 BRA `(.L_x_1);", "/*0030*/ SYNCS R1;", "/*0040*/ BRA `(.L_x_2);"]
      >>> dict(count_instructions("\n".join(lines))[1])
      {'SYNCS': 1, 'HGMMA': 1, 'BRA': 1}
    """
    ops: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[str, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(ops)
        elif op := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)(.*)", line):
            narrow = re.match(r"(?:\.E)?(\.[US](?:8|16))\b", op[2])
            is_access = op[1] in ("LDG", "LDS", "STS")
            ops.append(op[1] + (narrow[1] if narrow and is_access else ""))
            if op[1] == "BRA" and (target := re.search(r"\.L_x_\d+", op[2])):
                branches.append((target[0], len(ops)))

    def work(loop: tuple[int, int]) -> int:
        return sum(op in TENSOR_CORE + OLD_TENSOR_CORE for op in ops[slice(*loop)])

    loops = [(labels[to], end) for to, end in branches if labels.get(to, end) < end]
    loops = [a for a in loops if not any(b[0] < a[0] < b[1] < a[1] for b in loops)]
    loops = [loop for loop in loops if work(loop)]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    hot = max(inner, key=lambda loop: (work(loop), loop[0] - loop[1]), default=(0, 0))
    return collections.Counter(ops), collections.Counter(ops[slice(*hot)])
