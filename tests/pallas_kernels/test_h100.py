"""What the kernels are made of when compiled for an H100. Needs wheels, no GPU; nothing is run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    eight_bit,
    experts,
    four_bits,
    h100,
    hlo,
    hopper,
    lookup,
    quantize_rows,
    shares,
    transposed,
    tuning,
    weight_only,
)
from pallas_kernels.blocks import Blocks
from pallas_kernels.nested import Nested

pytestmark = pytest.mark.h100

K = N = 4096
# Budgets: instructions of the hot loop for each weight, all of them and those of the integer pipe.
# HBM brings 27.7 4-bit or 13.9 8-bit weights per clock and SM; an SM issues 128 and has 64 integer
# lanes. So 4.6 and 2.3, or 9.2 and 4.6, are where a kernel stops being bound by memory.
LEVELS = tuple(range(16))
WEIGHT_ONLY = {
    "nf4 g64 M=1": (1, "int4", 64, "bfloat16", 3.2, 1.5, "bfloat16", LEVELS),
    "nf4 g64 M=16": (16, "int4", 64, "bfloat16", 3.3, 1.5, "bfloat16", LEVELS),
    "nf4 g64 M=64": (64, "int4", 64, "bfloat16", 3.3, 1.5, "bfloat16", LEVELS),
    "nf4 g64 M=1024": (1024, "int4", 64, "bfloat16", 3.4, 1.3, "bfloat16", LEVELS),
    "nf4-dq g64 M=1": (1, "int4", 64, "bfloat16", 3.4, 1.6, "nested", LEVELS),
    "nf4-dq g64 M=16": (16, "int4", 64, "bfloat16", 3.5, 1.6, "nested", LEVELS),
    "nf4-dq g64 M=1024": (1024, "int4", 64, "bfloat16", 3.7, 1.3, "nested", LEVELS),
    "mxfp4 M=16": (16, "int4", 32, "bfloat16", 3.9, 1.8, "uint8", LEVELS),
    # 4.5 bits a weight, so that HBM gives time for 5.2 instructions and 2.6 of integers.
    "nvfp4 M=16": (16, "int4", 16, "bfloat16", 4.1, 1.8, "float8_e4m3fn", LEVELS),
    "nvfp4 M=64": (64, "int4", 16, "bfloat16", 4.1, 1.8, "float8_e4m3fn", LEVELS),
    # 2.125 bits a weight: time for 2.45 and 1.22; 2.5: for 2.9 and 1.4; 3.125: for 3.6 and 1.8.
    "int2 g128 M=1": (1, "int2", 128, "bfloat16", 2.0, 0.75),
    "int2 g128 M=16": (16, "int2", 128, "bfloat16", 2.1, 0.75),
    "int2 g128 M=64": (64, "int2", 128, "bfloat16", 2.4, 0.75),
    "int2 g128 M=1024": (1024, "int2", 128, "bfloat16", 2.7, 0.85),
    "int2 g128, float16 M=16": (16, "int2", 128, "float16", 2.1, 0.75),
    "int2 g32 M=16": (16, "int2", 32, "bfloat16", 2.5, 0.75),
    "int3 g128 M=1": (1, "int3", 128, "bfloat16", 2.75, 1.4),
    "int3 g128 M=16": (16, "int3", 128, "bfloat16", 2.85, 1.4),
    "int3 g128 M=64": (64, "int3", 128, "bfloat16", 3.2, 1.4),
    "int3 g128 M=1024": (1024, "int3", 128, "bfloat16", 3.5, 1.5),
    "int3 g64 M=64": (64, "int3", 64, "bfloat16", 3.2, 1.4),
    "int4 g128 M=1": (1, "int4", 128, "bfloat16", 2.05, 0.75),
    "int4 g128 M=16": (16, "int4", 128, "bfloat16", 2.1, 0.75),
    "int4 g128 M=64": (64, "int4", 128, "bfloat16", 2.45, 0.8),
    "int4 g64 M=16": (16, "int4", 64, "bfloat16", 2.45, 0.85),
    "int4 g32 M=1": (1, "int4", 32, "bfloat16", 2.5, 0.75),
    "int4 g32 M=16": (16, "int4", 32, "bfloat16", 2.5, 0.75),
    "int4 g32 M=64": (64, "int4", 32, "bfloat16", 2.5, 0.75),
    "int4 channels M=16": (16, "int4", K, "bfloat16", 1.85, 0.75),
    "int4 g128 M=1024": (1024, "int4", 128, "bfloat16", 2.75, 0.9),
    "int4 g128 M=1000": (1000, "int4", 128, "bfloat16", 2.75, 0.9),
    "int8 channels M=16": (16, "int8", K, "bfloat16", 2.3, 0.95),
    "int8 channels M=1024": (1024, "int8", K, "bfloat16", 2.65, 1.15),
    "int8 g128 M=16": (16, "int8", 128, "bfloat16", 2.5, 0.95),
    "int8 g128 M=64": (64, "int8", 128, "bfloat16", 2.9, 1.0),
    "int8 g128 M=1024": (1024, "int8", 128, "bfloat16", 3.2, 1.15),
    "fp8 weights M=16": (16, "float8_e4m3fn", 128, "bfloat16", 3.25, 1.25),
    "fp8 weights, float16 M=16": (16, "float8_e4m3fn", 128, "float16", 1.75, 0.7),
    "fp8 weights in blocks M=16": (16, "float8_e4m3fn", 128, "bfloat16", 3.25, 1.25, "blocks"),
    "fp8 weights in blocks M=1024": (1024, "float8_e4m3fn", 128, "bfloat16", 3.95, 1.4, "blocks"),
    "fp8 weights M=1024": (1024, "float8_e4m3fn", 128, "bfloat16", 3.95, 1.4),
}
# The same, with a zero point beside every scale.
ZERO_POINTS = {
    "zero points g128 M=1": (1, "int4", 128, "bfloat16", 2.1, 0.75),
    "zero points g128 M=16": (16, "int4", 128, "bfloat16", 2.2, 0.8),
    "zero points g128 M=64": (64, "int4", 128, "bfloat16", 2.6, 0.85),
    "zero points g128 M=1024": (1024, "int4", 128, "bfloat16", 2.9, 1.0),
    "zero points g64 M=16": (16, "int4", 64, "bfloat16", 2.6, 0.9),
    "zero points g32 M=1": (1, "int4", 32, "bfloat16", 2.9, 0.9),
    "zero points g32 M=16": (16, "int4", 32, "bfloat16", 2.9, 0.9),
    "zero points g32 M=64": (64, "int4", 32, "bfloat16", 2.9, 0.9),
    "zero points g32 M=1024": (1024, "int4", 32, "bfloat16", 3.3, 1.1),
    "zero points channels M=16": (16, "int4", K, "bfloat16", 1.95, 0.75),
    "zero points g128, float16 M=16": (16, "int4", 128, "float16", 2.2, 0.8),
    "int8 zero points g128 M=16": (16, "int8", 128, "bfloat16", 2.6, 1.0),
    # The most that shared memory holds beside the weights.
    "int8 zero points g32, float32 M=32": (32, "int8", 32, "bfloat16", 4.15, 1.05, "float32"),
    "int8 zero points channels M=16": (16, "int8", K, "bfloat16", 2.4, 0.95),
    "int8 zero points channels M=1024": (1024, "int8", K, "bfloat16", 2.75, 1.15),
    "int8 zero points g128 M=1024": (1024, "int8", 128, "bfloat16", 3.35, 1.2),
    "int8 zero points g32 M=1024": (1024, "int8", 32, "bfloat16", 3.7, 1.3),
    "int8 zero points channels, float16 M=16": (16, "int8", K, "float16", 2.4, 0.95),
    "int3 zero points g128 M=16": (16, "int3", 128, "bfloat16", 2.9, 1.45),
    "int3 zero points g64 M=64": (64, "int3", 64, "bfloat16", 3.35, 1.45),
    "int2 zero points g128 M=16": (16, "int2", 128, "bfloat16", 2.15, 0.8),
    "int2 zero points g64 M=16": (16, "int2", 64, "bfloat16", 2.6, 0.8),
}
BITS = {"int2": 2, "int3": 3, "int4": 4}
PREFILL = {"int2": 0.35, "int3": 0.45, "int4": 0.5, "int8": 0.46, "float8_e4m3fn": 0.49}
# Instructions for each weight, and cycles to issue the loop against those of the tensor core.
EIGHT_BIT = {
    "int8 M=16": (16, "int8", "int8", 1, 1.1, None),
    "int8 M=1024": (1024, "int8", "int8", 1, 1.1, 0.13),
    "int4 x int8 M=16": (16, "int4", "int8", K // 128, 1.6, None),
    "int4 x int8 M=64": (64, "int4", "int8", K // 128, 2.3, None),
    "int4 x int8, channels M=16": (16, "int4", "int8", 1, 1.2, None),
    "int4 x int8, channels M=1024": (1024, "int4", "int8", 1, 1.25, 0.31),
    "int4 x fp8 M=16": (16, "int4", "float8_e4m3fn", K // 128, 2.2, None),
    "int4 x fp8 M=64": (64, "int4", "float8_e4m3fn", K // 128, 2.6, None),
    "int4 x fp8, channels M=16": (16, "int4", "float8_e4m3fn", 1, 2.0, None),
    "int4 x fp8, channels M=1024": (1024, "int4", "float8_e4m3fn", 1, 2.0, 0.5),
    "fp8 M=16": (16, "float8_e4m3fn", "float8_e4m3fn", 1, 1.1, None),
    "fp8 M=1024": (1024, "float8_e4m3fn", "float8_e4m3fn", 1, 1.1, 0.13),
    "fp8 gradients M=1024": (1024, "float8_e4m3fn", "float8_e5m2", 1, 1.1, 0.13),
    "fp8 blocks M=16": (16, "float8_e4m3fn", "float8_e4m3fn", K // 128, 1.1, None),
    "fp8 blocks M=1024": (1024, "float8_e4m3fn", "float8_e4m3fn", K // 128, 1.85, 0.47),
    # A step for every 128 values of a token, too. With many of them, these are the rows.
    "fp8 1x128 M=16": (16, "float8_e4m3fn", "float8_e4m3fn", K // 128, 1.2, None),
    "fp8 1x128 M=1024": (1024, "float8_e4m3fn", "float8_e4m3fn", K // 128, 1.9, 0.47),
    "int4 x int8 1x128 M=16": (16, "int4", "int8", K // 128, 1.75, None),
}


# What weights of 4 bits are times multiples of a column's scale. Tokens, type, group, the same.
MULTIPLES = {
    "M=1": (1, "int8", 128, 1.5, None),
    "M=16": (16, "int8", 128, 1.5, None),
    "M=64": (64, "int8", 128, 1.5, None),
    "M=64 g32": (64, "int8", 32, 1.85, None),
    "M=1024": (1024, "int8", 128, 1.55, 0.39),
    "M=1024 g64": (1024, "int8", 64, 1.65, 0.42),
    "M=1024 g32": (1024, "int8", 32, 1.9, 0.47),
    "M=1024 channels": (1024, "int8", K, 1.55, 0.39),
    "fp4 x fp8 M=1": (1, "float8_e4m3fn", 128, 1.55, None),
    "fp4 x fp8 M=64": (64, "float8_e4m3fn", 128, 1.55, None),
    "fp4 x fp8 M=64 g64": (64, "float8_e4m3fn", 64, 1.65, None),
    "fp4 x fp8 M=1024": (1024, "float8_e4m3fn", 128, 1.6, 0.4),
    "fp4 x fp8 M=1024 g64": (1024, "float8_e4m3fn", 64, 1.75, 0.43),
    "fp4 x fp8 M=1024 g32": (1024, "float8_e4m3fn", 32, 2.0, 0.5),
}


def _array(dtype, *shape):
    if BITS.get(dtype, 8) < 4:
        dtype, shape = "uint8", (*shape[:-1], shape[-1] * BITS[dtype] // 8)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


@functools.cache
def compiled_weight_only(M, dtype, group, x, scale="bfloat16", codebook=None, zeros=False):
    operands = [_array(x, M, K), _array(dtype, N, K)]
    if scale == "nested":
        f = lambda x, w, *s: weight_only.matmul(x, w, Nested(*s, 256), codebook=codebook)
        pairs = _array("float32", N // 256, 2 * K // group)
        return h100.compile(f, *operands, _array("uint8", K // group, N), pairs)
    if scale == "blocks":
        f = lambda x, w, s: weight_only.matmul(x, w, Blocks(s), codebook=codebook)
        return h100.compile(f, *operands, _array("float32", N // 128, K // group))
    operands.append(_array(scale, K // group, N))
    if zeros:
        f = lambda x, w, s, z: weight_only.matmul(x, w, s, zero=z)
        return h100.compile(f, *operands, _array("uint8", K // group, N))
    return h100.compile(functools.partial(weight_only.matmul, codebook=codebook), *operands)


def compiled_eight_bit(M, w, x, groups, steps=1):
    in_blocks = steps > 1 and w != "int4"
    f = lambda x, w, sx, sw: eight_bit.matmul(x, w, sx, Blocks(sw) if in_blocks else sw)
    w_scale = _array("float32", *((N // 128, groups) if in_blocks else (groups, N)))
    return h100.compile(f, _array(x, M, K), _array(w, N, K), _array("float32", M, steps), w_scale)


def _check(program, mma):
    (kernel,) = program.kernels
    assert kernel.spills == kernel.stack == kernel.code["LDL"] == kernel.code["STL"] == 0
    assert not any("C7512" in w for w in kernel.warnings)  # wgmma serialized
    assert kernel.loop[mma] > 0
    assert not any(kernel.code[op] for op in h100.OLD_TENSOR_CORE)
    assert kernel.code["UTMALDG"] > 0
    assert kernel.loop["I2F"] == kernel.loop["F2F"] == 0
    if any(op.startswith("LDS") for op in kernel.loop):  # before TMA overwrites what was loaded
        assert kernel.loop["FENCE"] > 0
    assert kernel.smem <= tuning.SMEM_BYTES
    assert kernel.registers <= 168  # 65536 / 384, all there are if setmaxnreg is ignored
    return kernel


def _rows(M):
    return M if M <= hopper.TOKENS else -(-M // hopper.TOKENS) * hopper.TOKENS


def _workspace(t, M, out_bytes):
    """Bytes of the sums of every part of K, all that may be allocated."""
    parts = shares.most_parts(t, (M, K, N))
    return parts * _rows(M) * N * 4 if parts > 1 else (_rows(M) != M) * _rows(M) * N * out_bytes


@pytest.mark.parametrize("name", WEIGHT_ONLY | ZERO_POINTS)
def test_weight_only(name):
    M, dtype, group, x, total, integer, *stored = (WEIGHT_ONLY | ZERO_POINTS)[name]
    scale = stored[0] if stored else "bfloat16"
    has_zeros = name in ZERO_POINTS
    program = compiled_weight_only(M, dtype, group, x, *stored, zeros=has_zeros)
    kernel = _check(program, "HGMMA")
    t = tuning.weight_only(
        M, K, N, group, BITS.get(dtype, 8),
        table_bytes=four_bits.TABLE_BYTES if LEVELS in stored else 0,
        scale_bits={"nested": 16, "blocks": 32}.get(scale) or 8 * jnp.dtype(scale).itemsize,
        zero_points=has_zeros,
    )  # fmt: skip
    weights = 64 * t.tile_k
    assert kernel.per_weight(weights) <= total
    assert kernel.per_weight(weights, integer=True) <= integer
    narrow = sum(n for op, n in kernel.loop.items() if op.startswith(("LDS.U", "LDS.S")))
    # Those are the scales, and the zero points.
    assert narrow <= (2 + 2 * has_zeros) * max(1, t.tile_k // group)
    x_bytes = 2 * K * _rows(M) if _rows(M) != M else 0  # to whole eights
    assert program.temporaries <= _workspace(t, M, 2) + x_bytes
    if M >= 256:  # cycles to issue the loop, against those of the tensor core at 2048 products each
        assert kernel.loop.total() / (64 * t.tile_k * t.tile_m / 2048) <= PREFILL[dtype]


# Codes of activations in 16 bits, for 1024 tokens: weight, group, scale, more of it.
CODES = {
    "int4 g128": ("int4", 128, "bfloat16", {}),
    "int4 g64": ("int4", 64, "bfloat16", {}),
    "int8 g128": ("int8", 128, "float32", {}),
    "fp8 g128": ("float8_e4m3fn", 128, "float32", {}),
    "int3 g64": ("int3", 64, "bfloat16", {}),
    "int2 g128": ("int2", 128, "bfloat16", {}),
    "nf4 g64": ("int4", 64, "bfloat16", {"codebook": LEVELS}),
    "mxfp4": ("int4", 32, "uint8", {"codebook": LEVELS}),
}


@pytest.mark.parametrize("name", CODES)
def test_codes_in_sixteen_bits(name):
    """What bytes would have too much to do for."""
    dtype, group, scale, more = CODES[name]
    M = 1024
    f = lambda x, w, s, sx: weight_only.matmul(x, w, s, x_scale=sx, **more)
    operands = [_array("bfloat16", M, K), _array(dtype, N, K), _array(scale, K // group, N)]
    program = h100.compile(f, *operands, _array("float32", M, 1))
    kernel = _check(program, "HGMMA")
    t = tuning.weight_only(M, K, N, group, BITS.get(dtype, 8))
    assert kernel.loop.total() / (64 * t.tile_k * t.tile_m / 2048) <= 0.5
    assert program.temporaries == 0


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit(name):
    M, w, x, groups, total, prefill = EIGHT_BIT[name]
    steps = groups if "1x128" in name else 1  # of a token
    program = compiled_eight_bit(M, w, x, groups, steps)
    kernel = _check(program, "IGMMA" if x == "int8" else "QGMMA")
    t = tuning.eight_bit(M, K, N, 4 if w == "int4" else 8, K // groups, 16)
    assert kernel.per_weight(64 * t.tile_k) <= total
    if prefill:  # the tensor core has 4096 products of bytes a cycle
        assert kernel.loop.total() / (64 * t.tile_k * t.tile_m / 4096) <= prefill
    assert program.temporaries <= _workspace(t, M, 2)


@pytest.mark.parametrize("name", MULTIPLES)
def test_multiples(name):
    M, dtype, group, total, prefill = MULTIPLES[name]
    operands = [
        _array(dtype, M, K),
        _array("int4", N, K),
        _array("float32", M, 1),
        _array("float32", 1, N),
        _array("int8" if dtype == "int8" else "uint8", K // group, N),
    ]
    program = h100.compile(lambda *a: eight_bit.matmul(*a[:4], multiples=a[4]), *operands)
    kernel = _check(program, "IGMMA" if dtype == "int8" else "QGMMA")
    t = tuning.eight_bit(M, K, N, 4, group, 16, multiples=True)
    assert kernel.per_weight(64 * t.tile_k) <= total
    if prefill:
        assert kernel.loop.total() / (64 * t.tile_k * t.tile_m / 4096) <= prefill
    assert program.temporaries <= _workspace(t, M, 2)


def _check_rounding(program, loads):
    """Checks that a thread loads so many times 128 bits, and that XLA does nothing."""
    (kernel,) = program.kernels
    assert kernel.spills == kernel.stack == kernel.code["LDL"] == kernel.code["STL"] == 0
    assert kernel.code["LDG"] + kernel.code["LD"] == loads
    assert hlo.executed(program.hlo)["fusion"] == 0
    assert program.temporaries <= 64
    return kernel


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("x", "columns"), [("bfloat16", 14336), ("float32", 16384)])
def test_rows_are_read_once_to_round_them(x, columns, dtype):
    """XLA reads them twice, for the largest value and then for the codes, in three kernels."""
    f = functools.partial(quantize_rows.by_token, dtype=dtype)
    row = columns * jnp.dtype(x).itemsize
    _check_rounding(h100.compile(f, _array(x, 2048, columns)), row // 128 // 16)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("x", "M"), [("bfloat16", 2048), ("float32", 2048), ("bfloat16", 1)])
def test_blocks_are_read_once_to_round_them(x, M, dtype):
    f = functools.partial(quantize_rows.by_block, dtype=dtype)
    # A CTA has 16 KB, of one token 8 blocks.
    nbytes = 16384 if M > 1 else 8 * quantize_rows.BLOCK * jnp.dtype(x).itemsize
    kernel = _check_rounding(h100.compile(f, _array(x, M, 14336)), nbytes // 128 // 16)
    # An SM has registers for four such CTAs, with 64 KB in flight.
    assert kernel.registers <= 65536 // (4 * 128)


# Of a row that is looked up a value is 2 bytes to write and up to one to read: HBM takes as long as
# an SM does for 20 to 28 instructions. Budgets are for each value, of the whole kernel.
LOOKUPS = {
    "int4 g128": ("int4", 128, {}, 6.0),
    "int4 g32": ("int4", 32, {}, 6.6),
    "int4 g128, zero points": ("int4", 128, {"zeros": True}, 6.2),
    "nf4 g64": ("int4", 64, {"codebook": tuple(i * i for i in LEVELS)}, 7.6),
    "int3 g128": ("uint8", 128, {"bits": 3}, 6.8),
    "int2 g128": ("uint8", 128, {"bits": 2}, 5.9),
    "int8 channels": ("int8", K, {}, 6.0),
    "e4m3 channels": ("float8_e4m3fn", K, {}, 5.3),
}


@pytest.mark.parametrize("name", LOOKUPS)
@pytest.mark.parametrize("M", [16, 4096])
def test_rows_that_are_looked_up_are_read_by_words(name, M):
    dtype, group, options, budget = LOOKUPS[name]
    options = dict(options)
    bits = options.get("bits") or hopper.bits(dtype)
    columns = K if "bits" not in options else K * bits // 8
    zeros = [_array("uint8", K // group, N)] if options.pop("zeros", False) else []
    look_up = lambda i, w, s, *z: lookup.rows(i, w, s, zero=z[0] if z else None, **options)
    scale = _array("bfloat16", K // group, N)
    program = h100.compile(look_up, _array("int32", M), _array(dtype, N, columns), scale, *zeros)
    (kernel,) = program.kernels
    assert kernel.spills == kernel.stack == kernel.code["LDL"] == kernel.code["STL"] == 0
    # Of 64 rows of 128 columns a thread has 64 values; two rows' indices, scales and zero points.
    per_group = 2 * max(1, 128 // group)
    words = 2 + 64 * bits // 32 + (64 if "codebook" in options else 0)
    assert kernel.code["LDG"] + kernel.code["LD"] == words
    assert kernel.code["LDG.U16"] == per_group
    assert kernel.code["LDG.U8"] == (per_group if zeros else 0)
    assert kernel.code.total() / 64 <= budget
    assert kernel.registers <= 65536 // (4 * 128)  # of four CTAs on an SM
    assert hlo.executed(program.hlo)["fusion"] == 0
    assert program.temporaries <= 64  # a codebook


# A derivative has as many tokens as a batch: what counts are the cycles to issue the loop against
# those of the tensor core, at 2048 products each. Tokens, weight, group, scale, more, that share.
TRANSPOSED = {
    "int4 g128 M=64": (64, "int4", 128, "bfloat16", {}, 0.76),
    "int4 g128 M=1024": (1024, "int4", 128, "bfloat16", {}, 0.41),
    "int4 g32 M=1024": (1024, "int4", 32, "bfloat16", {}, 0.41),
    "int4 g128, zero points M=1024": (1024, "int4", 128, "bfloat16", {"zeros": True}, 0.45),
    "nf4 g64 M=1024": (1024, "int4", 64, "bfloat16", {"codebook": LEVELS}, 0.46),
    "mxfp4 M=1024": (1024, "int4", 32, "uint8", {"codebook": LEVELS}, 0.5),
    "int8 channels M=64": (64, "int8", K, "bfloat16", {}, 0.72),
    "int8 channels M=1024": (1024, "int8", K, "bfloat16", {}, 0.39),
    "int8 in its natural order M=1024": (1024, "int8", K, "bfloat16", {"natural": True}, 0.39),
    "int8 g128, zero points M=1024": (1024, "int8", 128, "bfloat16", {"zeros": True}, 0.44),
    "fp8 weights M=1024": (1024, "float8_e4m3fn", 128, "bfloat16", {}, 0.47),
    "fp8 weights, float32 M=1024": (1024, "float8_e4m3fn", 128, "float32", {}, 0.5),
    "fp8 weights, float16 M=1024": (1024, "float8_e4m3fn", 128, "float16", {}, 0.38),
    "int2 g128 M=64": (64, "int2", 128, "bfloat16", {}, 0.7),
    "int2 g128 M=1024": (1024, "int2", 128, "bfloat16", {}, 0.39),
    "int3 g128 M=1024": (1024, "int3", 128, "bfloat16", {}, 0.46),
    "int3 g128, zero points M=1024": (1024, "int3", 128, "bfloat16", {"zeros": True}, 0.49),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(name):
    M, dtype, group, scale, more, share = TRANSPOSED[name]
    codebook, has_zeros = more.get("codebook"), "zeros" in more
    bits = BITS.get(dtype, 8)

    def f(dy, w, s, *zeros):
        zero = zeros[0] if zeros else None
        few = bits if bits < 4 else None
        return transposed.matmul(
            dy, w, s, codebook=codebook, zero=zero, bits=few, natural="natural" in more
        )

    dy = _array("float16" if scale == "float16" else "bfloat16", M, N)
    zeros = [_array("uint8", K // group, N)] * has_zeros
    program = h100.compile(f, dy, _array(dtype, N, K), _array(scale, K // group, N), *zeros)
    kernel = _check(program, "HGMMA")
    assert kernel.loop["LDSM"] >= 2 * bits // 4  # weights come as they are multiplied
    table_bytes = four_bits.TABLE_BYTES if codebook else 0
    t = tuning.transposed(M, N, K, bits, table_bytes=table_bytes)
    assert kernel.loop.total() / (64 * t.tile_k * t.tile_m / 2048) <= share
    assert program.temporaries <= _workspace(t, M, 2)


# Tokens, transposed, instructions and those of integers for each weight: as without experts.
EXPERTS = {
    "M=2": (2, False, 2.6, 1.3),
    "M=32": (32, False, 2.6, 1.3),
    "M=2048": (2048, False, 3.3, 1.5),
    "zero points M=32": (32, False, 2.65, 1.3),
    "zero points M=2048": (2048, False, 3.4, 1.5),
    "M=2048, transposed": (2048, True, 6, 3),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name):
    M, is_transposed, total, integer = EXPERTS[name]
    E, width = 8, N if is_transposed else K
    f = lambda *a: experts.matmul(*a[:4], transposed=is_transposed, zero=a[4] if a[4:] else None)
    zeros = [_array("uint8", E, K // 128, N)] * ("zero points" in name)
    program = h100.compile(
        f, _array("bfloat16", M, width), _array("int4", E, N, K),
        _array("bfloat16", E, K // 128, N), _array("int32", E), *zeros,
    )  # fmt: skip
    kernel = _check(program, "HGMMA")
    tune = tuning.transposed if is_transposed else tuning.weight_only
    t = tune(2 * -(-M // E), K, N, experts=min(E, M))
    assert kernel.per_weight(64 * t.tile_k) <= total
    assert kernel.per_weight(64 * t.tile_k, integer=True) <= integer
    # Tiles of x and y, and the sums of the parts of K, for as many tiles as there can be.
    places = t.tile_m * experts.most_tiles(M, E, t.tile_m)
    each = 2 * K + 2 * N + (4 * N * t.split_k if t.split_k > 1 else 0)
    assert program.temporaries <= places * each + 4096
    # The table, the tokens in their tiles, the product, its sums, and its tokens in their order.
    kernels = sum(hlo.executed(program.hlo)[op] for op in ("fusion", "mosaic_gpu_v2"))
    assert kernels <= 5 + (t.split_k > 1)
