"""The native product for CPUs: `native.cc`, compiled when it is first needed, and called by XLA.

XLA has no lookup in a table of 16 entries on a CPU, and fuses no dot with what makes its operand.
The kernel does both. The system's C++ compiler builds it for the CPU at hand, once: the library
lies in the user's cache directory, under a name that says what it was made of and what it contains.

* Nothing happens at import. The first product that is lowered for a CPU, `qjax.explain` there, or
  `kernel()` builds or loads it; that takes a few seconds the first time.
* Where it cannot be had, products run in plain JAX, and `qjax.explain` says why.
* Only this process knows the kernel: an exported program (`jax.export`) holds plain JAX instead,
  and a program that is serialized with its machine code runs where `kernel()` was called before.

Environment variables: `QJAX_NATIVE=0` turns it off, `CXX` names the compiler, `XDG_CACHE_HOME` the
directory in which `qjax/native` holds the libraries.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxlib.version import __version__ as jaxlib_version
from jaxtyping import Array, Float

from qjax.numerics import Element
from qjax.ops import cpu

SOURCE = Path(__file__).with_suffix(".cc")
COMPILERS = ("c++", "g++", "clang++")
_SYMBOL = "qjax_packed_matmul"
_PATIENCE_S = 300  # a compiler takes a few seconds, or some more on a busy machine


class Unavailable(RuntimeError):
    """There is no native kernel here; the message says why and what to do."""


class Kernel(NamedTuple):
    """A kernel that XLA can call.

    Attributes:
      target: the name by which XLA knows it.
      isa: the instruction set of its vectors: "AVX-512", "AVX2", "NEON" or "portable".
      library: keeps it in memory.
    """

    target: str
    isa: str
    library: ctypes.CDLL


def kernel() -> Kernel:
    """Returns the kernel for this machine, which is built unless it has been before.

    Raises:
      Unavailable: if it is turned off, there is no compiler, or the compiler fails.
    """
    if os.environ.get("QJAX_NATIVE", "1").lower() in ("0", "off", "false", "no"):
        raise Unavailable(
            "the environment variable QJAX_NATIVE turns it off; unset it to have the kernel."
        )
    with _lock:
        found = _found()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


_lock = threading.Lock()


@functools.cache
def _found() -> Kernel | str:
    """Returns the kernel, or why there is none: one attempt a process."""
    try:
        return load(compiler(), native_flags(), cache_directory())
    except Unavailable as e:
        return str(e)
    except OSError as e:  # a full disk, say
        return f"its library cannot be written or read: {e}."


def why_not() -> str | None:
    """Returns None if there is a kernel, or the reason why there is none."""
    try:
        kernel()
    except Unavailable as e:
        return str(e)
    return None


# ---- building -----------------------------------------------------------------------------------


def compiler() -> list[str]:
    """Returns the command of the C++ compiler."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise Unavailable(
        f"there is no C++ compiler ({', '.join(COMPILERS)}) on PATH. Install one, or name it in"
        " the environment variable CXX."
    )


def native_flags() -> list[str]:
    """Returns flags for all instructions of the CPU at hand, if the system can say which it is.

    Else a library in a directory that machines share might meet a lesser CPU.
    """
    if not cpu.features():
        return []
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")
    return ["-march=native" if is_x86 else "-mcpu=native"]


def cache_directory() -> Path | None:
    """Returns a directory for libraries that nobody else can write to; None if there is none."""
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        is_mac = sys.platform == "darwin"
        base = os.path.expanduser("~/Library/Caches" if is_mac else "~/.cache")
    directory = Path(base) / "qjax" / "native"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError:
        return None
    if hasattr(os, "geteuid"):
        others = stat.S_IWGRP | stat.S_IWOTH
        if status.st_uid != os.geteuid() or status.st_mode & others:
            return None
    return directory if os.access(directory, os.W_OK) else None


def load(command: Sequence[str], flags: Sequence[str], directory: Path | None) -> Kernel:
    """Returns the kernel that a compiler makes with some flags, or made before.

    Args:
      command: of the compiler.
      flags: for it, besides those that make a shared library.
      directory: where libraries are kept; None: nowhere, this one serves this process.

    Raises:
      Unavailable: if the compiler fails, or what it makes cannot be loaded.
    """
    if directory is not None:
        return _open(built(command, flags, directory))
    with tempfile.TemporaryDirectory(prefix="qjax-") as temporary:
        return _open(built(command, flags, Path(temporary)))


def built(command: Sequence[str], flags: Sequence[str], directory: Path) -> Path:
    """Returns the file that `load` loads, built if it is not there.

    A file appears under its final name when it is complete. That name holds the hash of its
    content: what is damaged is built again, and processes do not disturb each other.
    """
    flags = ["-std=c++17", "-O3", *flags, "-shared", "-fPIC"]
    made_of = (
        SOURCE.read_bytes(), command, flags, jax.__version__, jaxlib_version,
        platform.platform(), platform.machine(), sorted(cpu.features()),
    )  # fmt: skip
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]
    for path in sorted(directory.glob(f"{key}-*.so")):
        try:
            if _finished(path, key) == path:
                return path
        except FileNotFoundError:
            continue  # another process has found it damaged, too
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=directory) as temporary:
        made = _compile(command, flags, Path(temporary) / "library")
        path = directory / _finished(made, key).name
        os.replace(made, path)
    return path


def _finished(path: Path, key: str) -> Path:
    """Returns under which path a complete library lies."""
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:24]
    return path.with_name(f"{key}-{content}.so")


def _compile(command: Sequence[str], flags: Sequence[str], out: Path) -> Path:
    # -isystem: XLA's headers are not ours to warn about.
    call = [*command, *flags, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(out)]
    try:
        done = subprocess.run(
            call, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Unavailable(f"the C++ compiler {shlex.join(command)} does not run: {e}.") from e
    if done.returncode or not out.exists():
        lines = done.stderr.splitlines()
        said = next((line for line in lines if "error" in line), (lines or ["nothing"])[-1])
        raise Unavailable(
            f"`{shlex.join(call)}` failed: {said.strip()}. Another compiler can be named in the"
            " environment variable CXX."
        )
    return out


def _open(path: Path) -> Kernel:
    try:
        opened = ctypes.CDLL(str(path))
        handler, isa = getattr(opened, _SYMBOL), opened.qjax_isa
    except (OSError, AttributeError) as e:
        raise Unavailable(f"{path} cannot be loaded: {e}.") from e
    isa.restype = ctypes.c_char_p
    # Kernels of different making have different names, also in caches of compiled programs.
    target = f"{_SYMBOL}_{path.stem.partition('-')[0]}"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    return Kernel(target, isa().decode(), opened)


# ---- calling ------------------------------------------------------------------------------------


def matmul(
    x: Float[Array, "L M K"],
    data: Array,
    scale: Float[Array, "L G N"],
    bias: Float[Array, "L G N"] | None = None,
    *,
    element: Element,
    group_size: int,
    kernel: Kernel,
) -> Float[Array, "L M N"]:
    """Returns x @ W in float32 for W[k, n] = q[k, n] * scale[k // g, n] + bias[k // g, n].

    Only for programs that run on a CPU of this process.

    Args:
      x: float32, bfloat16 or float16.
      data: packed codes [L, B, N], or the native type [L, K, N].
      scale: G = ceil(K / group_size).
      bias: None is 0.
      element: what the codes mean.
      group_size: g; the last group may be shorter.
      kernel: what `kernel` returned.
    """
    operands = [x.astype(jnp.float32), data, scale.astype(jnp.float32)]
    operands += [] if bias is None else [bias.astype(jnp.float32)]
    L, M, _ = x.shape
    is_packed_int = element.kind == "int" and element.is_packed
    call = jax.ffi.ffi_call(
        kernel.target, jax.ShapeDtypeStruct((L, M, data.shape[-1]), jnp.float32)
    )
    return call(
        *operands,
        bits=np.int64(element.bits),
        group_size=np.int64(group_size),
        lowest=np.int64(element.qmin if is_packed_int else 0),
        levels=_levels(element),
    )


@functools.cache
def _levels(element: Element) -> np.ndarray:
    """Returns the value of every code; nothing for integers."""
    if element.kind == "float":
        codes = np.arange(256, dtype=np.uint8)
        return codes.view(jnp.dtype(element.dtype)).astype(np.float32)
    return np.asarray(element.levels, np.float32)
