"""What decoding Llama-3 costs on an H100, predicted: `python -m pallas_kernels.bench --static`.

Every time is predicted, none is measured here: from bytes, from instructions of the compiled
machine code and from public peak rates ("at least"); or from what kernels of all forms were seen to
reach of those rates on an H100 ("expected", within a quarter of what was measured).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import eight_bit as eight_bit_kernel
from pallas_kernels import four_bits, h100, hopper, shares, tuning, weight_only
from pallas_kernels.blocks import Blocks
from pallas_kernels.nested import Nested
from pallas_kernels.tuning import SMS, TILE_N, Tuning

BANDWIDTH = 3.35e12  # bytes/s of HBM
CLOCK = 1.83e9  # Hz
# Seen on an H100 SXM: the share of its SM's issue slots that a kernel with two warpgroups fills,
# and the microseconds from its launch to its first data and after its last.
FILLED = 0.45
LAUNCH_US = 4.5
ISSUED = 128  # instructions of threads that an SM issues per clock
INTEGER = 64  # of those, to the integer pipe
PRODUCTS = {2: 2048, 1: 4096}  # multiply-adds per clock and SM, by bytes of an operand

SHAPES = {  # K, N of the linear layers; q, k, v and gate, up as one product each
    "Llama-3 8B": [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)],
    "Llama-3 70B": [(8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)],
}


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to store weights and multiply by them.

    Attributes:
      name: of the row.
      w, x: types; "int2" and "int3" are codes of so many bits in the order of `planes`.
      group: inputs with one scale; None: all.
      scale: type of the scales; "nested": uint8 with a factor and an offset for 256 features;
        "multiples": of float32 scales of the features, in bytes.
      has_table: whether codes are looked up.
      in_blocks: whether 128 features share a scale, and a token has one for every group; else for
        all of them.
      zero_points: whether there is a byte beside every scale, which its codes are less.
      of_codes: whether activations of 16 bits are codes, in steps of tokens.
    """

    name: str
    w: str
    x: str
    group: int | None
    scale: str = "bfloat16"
    has_table: bool = False
    in_blocks: bool = False
    zero_points: bool = False
    of_codes: bool = False

    def for_tokens(self, M: int) -> Form:
        """Returns the form in which so many are multiplied: maybe their codes in 16 bits."""
        if self.is_weight_only or self.in_blocks:
            return self
        element = lambda dtype: "e4m3" if dtype == "float8_e4m3fn" else dtype
        w = "e2m1" if self.has_table else element(self.w)
        are_multiples = self.scale == "multiples"
        if tuning.most_in_bytes(w, element(self.x), self.group, multiples=are_multiples) >= M:
            return self
        return dataclasses.replace(self, x="bfloat16", of_codes=True)

    @property
    def is_weight_only(self) -> bool:
        return hopper.bits(self.x) == 16

    @property
    def bits(self) -> int:
        return {"int2": 2, "int3": 3}.get(self.w) or hopper.bits(self.w)

    def weight(self, K: int, N: int) -> jax.ShapeDtypeStruct:
        if self.bits < 4:
            return jax.ShapeDtypeStruct((N, K * self.bits // 8), jnp.uint8)
        return jax.ShapeDtypeStruct((N, K), jnp.dtype(self.w))

    def groups(self, K: int) -> int:
        return 1 if self.group is None else K // self.group

    def token_scale(self, M: int, K: int) -> tuple[int, int]:
        return M, self.groups(K) if self.in_blocks else 1

    def scales(self, K: int, N: int) -> list[jax.ShapeDtypeStruct]:
        """Returns what is stored beside the codes: scales, and last zero points."""
        G = self.groups(K)
        if self.scale == "multiples":
            of_features = jax.ShapeDtypeStruct((1, N), jnp.float32)
            kind = jnp.uint8 if self.has_table else jnp.int8
            return [of_features, jax.ShapeDtypeStruct((G, N), kind)]
        if self.scale != "nested":
            zeros = [jax.ShapeDtypeStruct((G, N), jnp.uint8)] * self.zero_points
            shape = (N // TILE_N, G) if self.in_blocks else (G, N)
            return [jax.ShapeDtypeStruct(shape, jnp.dtype(self.scale)), *zeros]
        pairs = jax.ShapeDtypeStruct((-(-N // 256), 2 * G), jnp.float32)
        return [jax.ShapeDtypeStruct((G, N), jnp.uint8), pairs]


FORMS = (
    Form("W4A16 g128", "int4", "bfloat16", 128),
    Form("W4A16 g128, zero points", "int4", "bfloat16", 128, zero_points=True),
    Form("W4A16 g32", "int4", "bfloat16", 32),
    Form("W3A16 g128", "int3", "bfloat16", 128),
    Form("W2A16 g128", "int2", "bfloat16", 128),
    Form("NF4 g64", "int4", "bfloat16", 64, has_table=True),
    Form("NF4 g64, double quantization", "int4", "bfloat16", 64, "nested", has_table=True),
    Form("MXFP4", "int4", "bfloat16", 32, "uint8", has_table=True),
    Form("NVFP4", "int4", "bfloat16", 16, "float8_e4m3fn", has_table=True),
    Form("W8A16", "int8", "bfloat16", None),
    Form("W8A16 FP8", "float8_e4m3fn", "bfloat16", 128),
    Form("W4A8 g128", "int4", "int8", 128, "multiples"),
    Form("W4A8 g128, float scales", "int4", "int8", 128),
    Form("FP4 x FP8 g64", "int4", "float8_e4m3fn", 64, "multiples", has_table=True),
    Form("W4A8 FP8 g128, float scales", "int4", "float8_e4m3fn", 128),
    Form("W8A8", "int8", "int8", None, "float32"),
    Form("FP8", "float8_e4m3fn", "float8_e4m3fn", None, "float32"),
    Form("FP8 1x128", "float8_e4m3fn", "float8_e4m3fn", 128, "float32", in_blocks=True),
)


def tuning_of(form: Form, M: int, K: int, N: int) -> Tuning:
    """Returns the tuning that the kernel takes for a product."""
    form = form.for_tokens(M)
    if form.is_weight_only:
        return tuning.weight_only(
            M, K, N, form.group or K, form.bits,
            table_bytes=four_bits.TABLE_BYTES if form.has_table else 0,
            scale_bits=32 if form.scale == "nested" else 8 * jnp.dtype(form.scale).itemsize,
            zero_points=form.zero_points,
        )  # fmt: skip
    are_multiples = form.scale == "multiples"
    return tuning.eight_bit(M, K, N, form.bits, form.group, multiples=are_multiples)


def eight_bit_product(form: Form, tile: Tuning | None = None) -> Callable[..., jax.Array]:
    """Returns the product of an activation, a weight, steps of tokens, and `Form.scales`."""

    def product(x, w, x_scale, w_scale, multiples=None):
        x = eight_bit_kernel.ordered(x, w.dtype, multiples=multiples)
        w_scale = Blocks(w_scale) if form.in_blocks else w_scale
        return eight_bit_kernel.matmul(x, w, x_scale, w_scale, multiples=multiples, tuning=tile)

    return product


@functools.cache
def compiled(form: Form, tile: Tuning) -> h100.Kernel:
    """Returns the kernel as compiled, for small sizes: its loop depends on the tile alone."""
    M, K, N = tile.tile_m, 8 * tile.tile_k, TILE_N
    form = form.for_tokens(M)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    operands = [array(form.x, M, K), form.weight(K, N)]
    if form.is_weight_only:
        levels = tuple(map(float, range(16))) if form.has_table else None
        nested = lambda s: Nested(s[0], s[1], 256) if form.scale == "nested" else s[0]
        zero = lambda s: s[1] if form.zero_points else None
        steps = [array("float32", M, 1)] * form.of_codes
        f: Any = lambda x, w, *s: weight_only.matmul(
            x, w, nested(s), tuning=tile, codebook=levels, zero=zero(s),
            x_scale=s[-1] if form.of_codes else None,
        )  # fmt: skip
        operands += form.scales(K, N) + steps
    else:
        f = eight_bit_product(form, tile)
        operands += [array("float32", *form.token_scale(M, K)), *form.scales(K, N)]
    (kernel,) = h100.compile(f, *operands).kernels
    return kernel


def predict(form: Form, M: int, K: int, N: int) -> dict[str, Any]:
    """Returns bytes, instructions and the predicted microseconds of one product.

    The time is the longest of: bytes over the bandwidth; instructions, and those of the integer
    pipe, and multiply-adds, over their rates, on the busiest SM.
    """
    form, t = form.for_tokens(M), tuning_of(form, M, K, N)
    kernel = compiled(form, dataclasses.replace(t, split_k=1))
    x_bytes = hopper.bits(form.x) // 8
    weights = K * N * form.bits // 8
    weights += sum(math.prod(s.shape) * s.dtype.itemsize for s in form.scales(K, N))
    # Sums of the parts of K: written and read once, in L2 if they fit.
    parts = shares.most_parts(t, (M, K, N))
    workspace = 0 if parts == 1 else 4 * parts * M * N
    moved = weights + M * K * x_bytes + 2 * M * N
    items = -(-M // t.tile_m) * (N // TILE_N) * t.split_k
    busiest = -(-items // SMS) * (K // t.split_k)  # inputs that the busiest SM walks over
    per_weight = kernel.per_weight(64 * t.tile_k)
    integer = kernel.per_weight(64 * t.tile_k, integer=True)
    on_sm = busiest * TILE_N
    times = {
        "memory": moved / BANDWIDTH,
        "issue": on_sm * per_weight / ISSUED / CLOCK,
        "integer": on_sm * integer / INTEGER / CLOCK,
        "tensor core": on_sm * t.tile_m / PRODUCTS[x_bytes] / CLOCK,
    }
    bound = max(times, key=times.__getitem__)
    read = moved / tuning.BYTES_PER_US / 1e6
    busy = max(read, times["issue"] / FILLED, times["tensor core"])
    sums = 0.0 if parts == 1 else tuning.SUMS_US + workspace / tuning.BYTES_PER_US
    return {
        "form": form.name, "M": M, "K": K, "N": N, "bytes": moved, "workspace": workspace,
        "split_k": t.split_k, "items": items, "instructions": round(per_weight, 2),
        "integer": round(integer, 2), "registers": kernel.registers, "spills": kernel.spills,
        "us": 1e6 * times[bound], "expected us": LAUNCH_US + 1e6 * busy + sums, "bound": bound,
        "roofline": times["memory"] / times[bound],
        "issue/tensor core": times["issue"] / times["tensor core"], "tile": t.tile_m,
    }  # fmt: skip


def bfloat16_us(M: int, K: int, N: int) -> float:
    """Returns the least microseconds of a bfloat16 product: its bytes over the bandwidth."""
    return 1e6 * 2 * (K * N + M * K + M * N) / BANDWIDTH


def xla_us(form: Form, M: int, K: int, N: int) -> float:
    """Returns those of plain XLA, which writes grouped weights in bfloat16 and reads them again.

    Types of 8 bits with a scale for each channel it reads as they are.
    """
    stored = K * N * form.bits / 8
    if form.group is not None:
        stored += 4 * K * N
    return 1e6 * (stored + M * K * hopper.bits(form.x) / 8 + 2 * M * N) / BANDWIDTH


TOKENS = (1, 16, 64)  # of decoding
PROMPT = 1024


def static(tokens: tuple[int, ...] = TOKENS) -> list[dict[str, Any]]:
    """Returns a row for every model, form, shape and number of tokens."""
    return [
        {"model": model}
        | predict(form, M, K, N)
        | {"xla us": xla_us(form, M, K, N), "bfloat16 us": bfloat16_us(M, K, N)}
        for model, shapes in SHAPES.items()
        for form in FORMS
        for K, N in shapes
        for M in tokens
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as Markdown, one for every form and number of tokens, summed over a layer.

    The workspace, the largest of a layer, is all that products allocate: sums of the parts of K.
    """
    columns = (
        "model", "form", "M", "MB", "instructions (integer) a weight", "µs a layer, at least",
        "expected", "bound by", "of bandwidth", "workspace MB", "XLA µs, at least",
        "bfloat16 µs, at least",
    )  # fmt: skip
    lines = [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    keys = dict.fromkeys((r["model"], r["form"], r["M"]) for r in rows)
    for key in keys:
        own = [r for r in rows if (r["model"], r["form"], r["M"]) == key]
        total = sum(r["us"] for r in own)
        bounds = ", ".join(dict.fromkeys(r["bound"] for r in own))
        share = sum(r["us"] * r["roofline"] for r in own) / total
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {sum(r['bytes'] for r in own) / 1e6:.1f}"
            f" | {max(r['instructions'] for r in own):.2f} ({max(r['integer'] for r in own):.2f})"
            f" | {total:.1f} | {sum(r['expected us'] for r in own):.1f} | {bounds} | {share:.0%}"
            f" | {max(r['workspace'] for r in own) / 1e6:.1f}"
            f" | {sum(r['xla us'] for r in own):.1f} | {sum(r['bfloat16 us'] for r in own):.1f} |"
        )
    return "\n".join(lines)


def prompt_table(rows: list[dict[str, Any]]) -> str:
    """Returns what forms need for many tokens as Markdown, a row for each, of the largest product.

    A kernel that takes less than half of the tensor core's time to issue instructions can do so
    while products are multiplied.
    """
    columns = "form", "tokens of a tile", "instructions a weight", "issue / tensor core"
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    of_forms = {r["form"]: r for r in sorted(rows, key=lambda r: r["K"] * r["N"])}
    of_forms = {form.name: of_forms[form.name] for form in FORMS if form.name in of_forms}
    for form, row in of_forms.items():
        share = row["issue/tensor core"]
        lines.append(f"| {form} | {row['tile']} | {row['instructions']:.2f} | {share:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables, or all rows as JSON; with `--time`, runs `pallas_kernels.timing`."""
    parser = argparse.ArgumentParser(description="Predicted costs on an H100, or measured ones.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--static", action="store_true", help="predict, do not time")
    what.add_argument("--time", action="store_true", help="time on the GPU at hand")
    parser.add_argument("--json", action="store_true", help="every product, as JSON")
    args, rest = parser.parse_known_args()
    if args.time:
        from pallas_kernels import timing

        return timing.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    rows, prompt = static(), static((PROMPT,))
    if args.json:
        return print(json.dumps(rows + prompt, indent=1))
    print(table(rows), f"For {PROMPT} tokens:", prompt_table(prompt), sep="\n\n")


if __name__ == "__main__":
    main()
