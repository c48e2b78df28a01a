"""Times products on the GPU at hand: `python -m pallas_kernels.timing`.

Every product reads other weights than the one before, more of them than the L2 cache holds. A round
runs each contender once, in an order that changes, so that a clock that drifts hits all alike.
Results are written as they come, a line of JSON each; a contender that fails leaves a line that
says how, and the others go on. Each result is compared with a float32 product first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import e2m1, interleave, planes, reference
from pallas_kernels.bench import FORMS, SHAPES, Form, eight_bit_product
from pallas_kernels.nested import Nested, outer_of
from pallas_kernels.tuning import BYTES_PER_US, TILE_N

TOKENS = (1, 16, 64, 1024)
ENOUGH_US = 1500  # of products in a program, so that its own launch counts for little
L2_BYTES = 50e6  # of an H100; an A100 has 40, an RTX 4090 72


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to compute a product.

    Attributes:
      name: of the row.
      prepare: function (weight, scale, zero points if there are) -> the arrays that are kept.
      run: function (x, x_scale, *kept) -> y; x_scale is None for 16-bit activations.
    """

    name: str
    prepare: Callable[..., tuple[Array, ...]]
    run: Callable[..., Array]


def contenders(form: Form, capability: int | None) -> list[Contender]:
    """Returns the kernel of a form, if the GPU has one, bfloat16 and the best forms for XLA.

    Args:
      capability: of the GPU, such as 90; None if there is none.
    """
    found = _kernels(form, capability)
    found.append(Contender("bfloat16 dot", functools.partial(_in_bfloat16, form), _bfloat16_dot))
    keep = functools.partial(_packed, form)
    if form.is_weight_only:
        then_dot = functools.partial(_dequantize_then_dot, form)
        found.append(Contender("XLA, dequantize then dot", keep, then_dot))
        if form.bits >= 4 and not form.has_table and not form.zero_points:
            name = "XLA, dot then scale" if form.group is None else "XLA, dot per group then scale"
            found.append(Contender(name, keep, _dot_then_scale))
    else:
        name = "XLA, cuBLASLt where it can" if form.x.startswith("float8") else "XLA, int8 dot"
        found.append(Contender(name, keep, functools.partial(_quantized_dot, form)))
    return found


def _kernels(form: Form, capability: int | None) -> list[Contender]:
    if capability == 90:
        from pallas_kernels import weight_only

        def in_order(w, s, *more):
            s = s[:, ::TILE_N].T if form.in_blocks else s
            if form.w == "int4":
                are_bytes = form.has_table and not form.is_weight_only
                w = interleave.of_int4(w, looked_up=form.has_table, apart=are_bytes)
            else:
                w = _packed(form, w, s)[0]
            if form.bits == 8 and form.is_weight_only:
                w = interleave.interleaved_pairs(w)
            return w, s, *more

        def run(x, x_scale, w, s, *more):
            if x_scale is not None and form.for_tokens(x.shape[0]) is form:
                return in_bytes(x, x_scale, w, s, *more)
            z = more[0] if more else None
            x = x if x_scale is None else x.astype(jnp.bfloat16)
            return weight_only.matmul(x, w, s, codebook=_levels(form), zero=z, x_scale=x_scale)

        def in_bytes(x, x_scale, w, s, *more):
            return eight_bit_product(form)(x, w, x_scale, s, *more)

        found = [Contender("Mosaic kernel", in_order, run)]
        if form.for_tokens(max(TOKENS)) is not form:  # which is faster then, no GPU has told
            found.append(Contender("Mosaic kernel, bytes", in_order, in_bytes))
        return found
    in_triton = form.w == "int8" or (form.w == "int4" and form.is_weight_only)
    if capability is not None and 80 <= capability < 90 and in_triton and not form.has_table:
        from pallas_kernels.triton import eight_bit, packing, weight_only

        def prepare(w, s, *zero):
            if form.w == "int4":
                w = packing.pack((w.astype(jnp.int8) + 8).astype(jnp.uint8))
            middle = 128 if form.w == "int8" else 0  # those are not made unsigned
            return w, s, *(z.astype(form.x) - middle for z in zero)

        def run(x, x_scale, w, s, *more):
            if x_scale is not None:
                return eight_bit.matmul(x, w, x_scale[:, 0], s[0], out_dtype=jnp.bfloat16)
            codes, middle = ("uint4", 8.0) if form.w == "int4" else ("int8", 0.0)
            return weight_only.matmul(x, w, s, *(more or [middle]), codes=codes)

        return [Contender("Triton kernel", prepare, run)]
    return []


def _levels(form: Form) -> tuple[float, ...] | None:
    """Returns 16 values that bfloat16 has, as those of e2m1; what they are costs nothing."""
    return e2m1.LEVELS if form.has_table else None


def _packed(form: Form, w: Array, s: Any, *more: Array) -> tuple[Array, ...]:
    """Returns a weight in as many bits as the form has."""
    if form.bits < 4:
        w = planes.packed((w + 2 ** (form.bits - 1)).astype(jnp.uint8), form.bits)
    return w, s, *more


def _dequantized(form: Form, dtype: Any, w: Array, s: Any, *more: Array) -> Array:
    """Returns W [K, N] of a packed w [N, K] and s [G, N], by a broadcast that XLA can fuse."""
    middle = 2 ** (form.bits - 1)
    zero = more
    if form.scale == "multiples":
        s, zero = s * reference.float_multiples(more[0]), ()
    if form.bits < 4:
        w = planes.codes(w, form.bits).astype(jnp.int8) - middle
    w, s = reference.values(w, _levels(form), dtype), reference.float_scale(s)
    N, K = w.shape
    groups = w.astype(dtype).reshape(N, s.shape[0], -1)
    for z in zero:
        groups -= (z.astype(dtype) - middle).T[..., None]
    groups *= s.astype(dtype).T[..., None]
    return groups.reshape(N, K).T


def _in_bfloat16(form: Form, *weight: Any) -> tuple[Array, ...]:
    return (_dequantized(form, jnp.float32, *_packed(form, *weight)).astype(jnp.bfloat16),)


def _bfloat16_dot(x, x_scale, w):
    x = x if x_scale is None else x.astype(jnp.bfloat16)  # the product of its size, not its value
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(jnp.bfloat16)


def _dequantize_then_dot(form, x, x_scale, *weight):
    del x_scale
    y = jnp.dot(x, _dequantized(form, x.dtype, *weight), preferred_element_type=jnp.float32)
    return y.astype(jnp.bfloat16)


def _dot_then_scale(x, x_scale, w, s):
    del x_scale
    (M, K), G = x.shape, s.shape[0]
    xs, ws = x.reshape(M, G, K // G), w.astype(x.dtype).reshape(-1, G, K // G)
    y = jnp.einsum("mgk,ngk->gmn", xs, ws, preferred_element_type=jnp.float32)
    return jnp.sum(y * s.astype(jnp.float32)[:, None], axis=0).astype(jnp.bfloat16)


def _quantized_dot(form, x, x_scale, w, s, *multiples):
    (M, K), G = x.shape, s.shape[0]
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    if w.dtype == jnp.int4:
        w = reference.values(w, _levels(form), x.dtype).astype(x.dtype)
    for m in multiples:  # of 8 bits all the way: one product
        wide = jnp.repeat(reference.float_multiples(m), K // m.shape[0], axis=0)
        w *= wide.astype(w.dtype).T
    if G == 1:
        dims = (((1,), (1,)), ((), ()))
        y = lax.dot_general(x, w, dims, preferred_element_type=kind).astype(jnp.float32)
        return (y * x_scale * s).astype(jnp.bfloat16)
    xs, ws = x.reshape(M, G, K // G), w.reshape(-1, G, K // G)
    y = jnp.einsum("mgk,ngk->gmn", xs, ws, preferred_element_type=kind).astype(jnp.float32)
    return jnp.sum(y * x_scale.T[..., None] * s[:, None], axis=0).astype(jnp.bfloat16)


def operands(form: Form, M: int, K: int, N: int, seed: int) -> dict[str, Any]:
    """Returns normal x, weights and scales in a form's types; as `reference` takes them."""
    keys = jax.random.split(jax.random.key(seed), 4)
    G = form.groups(K)

    def values(key, shape, dtype):
        if dtype.startswith("int"):
            most = 2 ** (int(dtype[3:]) - 1)
            return jax.random.randint(key, shape, -most, most).astype(
                dtype if most >= 8 else "int8"
            )
        return jax.random.normal(key, shape).astype(dtype)

    uniform = functools.partial(jax.random.uniform, minval=0.5, maxval=1.5)
    if form.scale == "nested":
        codes = jax.random.randint(keys[2], (G, N), 0, 256).astype("uint8")
        of_blocks = (G, -(-N // 256))
        factor, offset = uniform(keys[3], of_blocks) / 256, uniform(keys[0], of_blocks)
        scale: Any = Nested(codes, outer_of(factor, offset), 256)
    elif form.scale == "uint8":
        scale = jax.random.randint(keys[2], (G, N), 124, 131).astype("uint8")
    elif form.scale == "multiples":
        scale = uniform(keys[2], (1, N))
    else:
        columns = TILE_N if form.in_blocks else 1
        scale = uniform(keys[2], (G, N // columns)).astype(form.scale)
        scale = jnp.repeat(scale, columns, axis=1)
    zero = jax.random.randint(keys[1], (G, N), 0, 2**form.bits).astype("uint8")
    multiples = jax.random.randint(keys[1], (G, N), 8, 16).astype(jnp.int8)
    if form.has_table:
        multiples = e2m1.bits_of(1 + jnp.abs(multiples - 12) % 3 / 4)
    return {
        "x": values(keys[0], (M, K), form.x),
        "w": values(keys[1], (N, K), form.w),
        "scale": scale,
        "zero": zero if form.zero_points else None,
        "multiples": multiples if form.scale == "multiples" else None,
        "x_scale": None if form.is_weight_only else uniform(keys[3], form.token_scale(M, K)),
        "codebook": _levels(form),
    }


@functools.partial(jax.jit, static_argnames="codebook")
def _exact(x, w, scale, zero, multiples, x_scale, codebook):
    if x_scale is None:
        return reference.weight_only(x, w, scale, codebook=codebook, zero=zero)
    w = reference.values(w, codebook, jnp.float32)
    return reference.eight_bit(x, w, x_scale, scale, multiples=multiples)


def error_of(y: Array, args: dict[str, Any]) -> float:
    """Returns the relative error of a product against `reference`, in float32."""
    exact, got = np.asarray(_exact(**args), np.float64), np.asarray(y, np.float64)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def beside_codes(args: dict[str, Any]) -> list[Any]:
    """Returns what there is beside the codes of a weight: scales; zero points or multiples."""
    return [a for a in (args["scale"], args["zero"], args["multiples"]) if a is not None]


def copies_of(nbytes: int, l2_bytes: float, most: int = 64) -> int:
    """Returns how many weights are rotated through: twice the cache in all, and two at least.

    Example:
      >>> copies_of(8_388_608, 50e6), copies_of(469_762_048, 50e6)
      (12, 2)
    """
    return min(most, max(2, math.ceil(2 * l2_bytes / nbytes)))


class _Prepared:
    """A compiled contender, its weights and its activations."""

    def __init__(
        self, contender: Contender, args: dict[str, Any], l2_bytes: float, enough_us: float
    ):
        prepare = jax.jit(contender.prepare)
        beside = beside_codes(args)
        first = prepare(args["w"], *beside)
        self.nbytes = sum(_nbytes(a) for a in jax.tree.leaves(first))
        count = copies_of(self.nbytes, l2_bytes)
        # Other values too: a compressing memory would like equal ones.
        roll = jax.jit(lambda w, i: jnp.roll(w, i, axis=0))
        self.weights = [first] + [prepare(roll(args["w"], i), *beside) for i in range(1, count)]
        (M, K), N = args["x"].shape, args["w"].shape[0]
        least_us = max(self.nbytes / BYTES_PER_US, 2 * M * K * N / 6e8)
        laps = max(1, min(16, math.ceil(enough_us / least_us / count)))
        self.xs = [jnp.roll(args["x"], i, axis=0 if laps < M else 1) for i in range(laps)]
        self.x_scale = args["x_scale"]
        self.products = laps * count
        # One program for all, as a launch from Python takes longer than a product; traced once.
        product = jax.jit(contender.run)
        self.run = jax.jit(
            lambda xs, x_scale, weights: [product(x, x_scale, *w) for x in xs for w in weights]
        )
        self.first = jax.block_until_ready(self.run(self.xs, self.x_scale, self.weights))[0]

    def seconds(self) -> float:
        """Returns the seconds of a product, launches included."""
        start = time.perf_counter()
        jax.block_until_ready(self.run(self.xs, self.x_scale, self.weights))
        return (time.perf_counter() - start) / self.products

    def kernels(self) -> dict[str, float] | None:
        """Returns the microseconds that each kernel takes for a product, as CUPTI counts them.

        The mean over all weights; None where it counts nothing. Kernels that differ in a number at
        the end of their names alone are one.
        """
        if jax.default_backend() != "gpu":
            return None
        run = profiler.measure(self.run, aggregate=False)
        _, found = run(self.xs, self.x_scale, self.weights)
        times: dict[str, float] = {}
        for name, ms in found or ():
            name = re.sub(r"[_.]*\d+$", "", name)
            times[name] = times.get(name, 0.0) + 1e3 * ms / self.products
        return times or None


def _nbytes(a: Array) -> int:
    return a.size // 2 if a.dtype.name in ("int4", "uint4") else a.nbytes


def measure(
    form: Form,
    M: int,
    K: int,
    N: int,
    *,
    entries: Sequence[Contender],
    rounds: int = 21,
    l2_bytes: float = L2_BYTES,
    enough_us: float = ENOUGH_US,
    alone: contextlib.AbstractContextManager | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields a row for every contender: its error, and the quartiles of its microseconds.

    The bfloat16 product with quantized activations has no scales of x, so no error either.

    Args:
      enough_us: how long the products of one program take at least.
      alone: entered while times are taken: a lock, where other processes use the GPU.
    """
    args = operands(form, M, K, N, seed=0)
    shape = {"form": form.name, "M": M, "K": K, "N": N}
    ready: dict[str, _Prepared] = {}
    errors: dict[str, float | None] = {}
    for entry in entries:
        try:
            ready[entry.name] = _Prepared(entry, args, l2_bytes, enough_us)
            has_value = form.is_weight_only or entry.run is not _bfloat16_dot
            errors[entry.name] = error_of(ready[entry.name].first, args) if has_value else None
        except Exception as e:
            ready.pop(entry.name, None)
            yield shape | {"contender": entry.name, "failed": f"{type(e).__name__}: {e}"[:500]}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    order = random.Random(0)
    with alone or contextlib.nullcontext():
        for _ in range(rounds):
            for name in order.sample(sorted(ready), len(ready)):
                seconds[name].append(ready[name].seconds())
        of_kernels = {name: one.kernels() for name, one in ready.items()}
    for name, one in ready.items():
        kernels = of_kernels[name]
        low, median, high = np.percentile(np.array(seconds[name]) * 1e6, [25, 50, 75])
        moved = one.nbytes + M * K * args["x"].dtype.itemsize + 2 * M * N
        yield shape | {
            "contender": name, "us": float(median), "us_25": float(low), "us_75": float(high),
            "gb_per_s": moved / median / 1e3, "tflop_per_s": 2 * M * K * N / median / 1e6,
            "kernel_us": kernels and sum(kernels.values()), "kernels": kernels,
            "error": errors[name], "weights": len(one.weights), "rounds": rounds,
        }  # fmt: skip


def capability_of(device: Any) -> int | None:
    """Returns the compute capability of a GPU, such as 90, or None."""
    if device.platform != "gpu":
        return None
    return int(str(getattr(device, "compute_capability", "0")).replace(".", ""))


def _line(row: dict[str, Any]) -> str:
    label = f"{row['form']} M={row['M']} {row['K']}x{row['N']}"
    text = row.get("failed")
    if text is None:
        text = f"{row['us']:9.1f} µs  {row['gb_per_s']:7.0f} GB/s  error {row['error'] or 0:.1e}"
        if row["kernels"]:
            own = ", ".join(f"{n[:40]} {us:.1f}" for n, us in row["kernels"].items())
            text += f"  kernels {row['kernel_us']:.1f}: {own}"
    return f"{label:38} {row['contender']:30} {text}"


def main(argv: Sequence[str] | None = None) -> None:
    """Times every form, model shape and number of tokens, and writes a line of JSON for each."""
    parser = argparse.ArgumentParser(description="Times products on the GPU at hand.")
    parser.add_argument("--out", type=Path, default=Path("timing.jsonl"), help="lines of JSON")
    parser.add_argument("--forms", nargs="*", default=[f.name for f in FORMS])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument(
        "--shapes", nargs="*", help="such as 4096x6144; default: Llama-3 8B and 70B"
    )
    parser.add_argument("--contenders", nargs="*", help="parts of names; default: all")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--l2-bytes", type=float, default=L2_BYTES, help="of the GPU's L2 cache")
    parser.add_argument("--workers", type=int, default=1, help="processes that compile at once")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--any-device", action="store_true", help="also where there is no GPU")
    args = parser.parse_args(argv)
    known = {f.name: f for f in FORMS}
    if unknown := set(args.forms) - set(known):
        parser.error(f"no form is called {', '.join(sorted(unknown))}; there are {list(known)}.")
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes or ()]
    shapes = shapes or [shape for model in SHAPES.values() for shape in model]
    if args.workers > 1:
        return _with_workers(list(sys.argv[1:] if argv is None else argv), args.workers)
    device = jax.devices()[0]
    capability = capability_of(device)
    if capability is None and not args.any_device:
        parser.error(f"no GPU, only {device.device_kind}: --any-device times XLA's forms there.")
    about = {"device": device.device_kind, "capability": capability, "jax": jax.__version__}
    timed = functools.partial(measure, rounds=args.rounds, l2_bytes=args.l2_bytes)
    jobs = [(name, K, N, M) for name in args.forms for K, N in shapes for M in args.tokens]
    which, of = map(int, (args.shard or "0/1").split("/"))
    with args.out.open("a", encoding="utf-8") as out:
        for name, K, N, M in jobs[which::of]:
            entries = [
                entry
                for entry in contenders(known[name], capability)
                if args.contenders is None or any(c in entry.name for c in args.contenders)
            ]
            lock = _Lock(args.out.with_suffix(".lock")) if of > 1 else None
            for row in timed(known[name], M, K, N, entries=entries, alone=lock):
                print(json.dumps(about | row), file=out, flush=True)
                print(_line(row), file=sys.stderr, flush=True)


class _Lock:
    """A file that one process at a time has locked."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


def _with_workers(argv: list[str], count: int) -> None:
    """Runs as many processes, each with its share of the products; they take turns to time."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "pallas_kernels.timing", *argv, "--workers", "1", "--shard",
             f"{i}/{count}"],
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        for i in range(count)
    ]  # fmt: skip
    if failed := [worker.args for worker in workers if worker.wait()]:
        raise SystemExit(f"{len(failed)} of {count} workers failed, the first: {failed[0]}")


if __name__ == "__main__":
    main()
