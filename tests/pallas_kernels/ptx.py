"""PTX on words of four bytes, as its manual says."""

from __future__ import annotations

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np


def _prmt(a, b, selector):
    pair = (b.astype(np.uint64) << 32) | a
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & 15
        byte = (pair >> (8 * (nibble & 7)).astype(np.uint64)).astype(np.uint32) & 0xFF
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _lop3(a, b, c, table):
    out = np.zeros_like(a)
    for bit in range(8):
        if table >> bit & 1:
            term = [v if bit >> shift & 1 else ~v for v, shift in ((a, 2), (b, 1), (c, 0))]
            out |= term[0] & term[1] & term[2]
    return out


def _sub(dtype):
    return lambda a, b: (a.view(dtype) - b.view(dtype)).view(np.uint32)


def _add(dtype):
    return lambda a, b: (a.view(dtype) + b.view(dtype)).view(np.uint32)


def _pack(high, low):
    half = lambda a: a.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
    return half(high) << np.uint32(16) | half(low)


def _from_e4m3(a):
    half = lambda a: a.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    bits = lambda a: half(a).view(np.uint16).astype(np.uint32)
    return bits(a >> np.uint32(8)) << np.uint32(16) | bits(a & np.uint32(0xFF))


def _halves(a):
    return a & np.uint32(0xFFFF), a >> np.uint32(16)


def _max_halves(a, b):
    low, high = (np.maximum(*both) for both in zip(_halves(a), _halves(b), strict=True))
    return high << np.uint32(16) | low


def _rotated(a, b, by):
    del b  # the same
    return a >> (by & np.uint32(31)) | a << (-by & np.uint32(31))


def _lane_of_segment(a, first, clamp):
    """Of threads [.., 32, values]: lanes keep the bits of their number that `clamp` names."""
    kept = clamp.flat[0] >> 8
    lanes = np.arange(32) & kept | first.flat[0] & ~kept
    return np.take(a, lanes, axis=-2)


def _from_f16(a):
    return a.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)


def _fma(dtype):
    def fma(*operands):  # in float64, where products of two are exact, then rounded once
        a, b, c = (o.view(dtype).astype(np.float64) for o in operands)
        with np.errstate(invalid="ignore"):  # infinity times 0 is NaN
            return (a * b + c).astype(dtype).view(np.uint32)

    return fma


_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "prmt.b32": _prmt,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "shr.b32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "add.f16x2": _add(np.float16),
    "add.bf16x2": _add(ml_dtypes.bfloat16),
    "sub.f32": _sub(np.float32),
    "sub.f16x2": _sub(np.float16),
    "sub.bf16x2": _sub(ml_dtypes.bfloat16),
    "fma.rn.f16x2": _fma(np.float16),
    "fma.rn.bf16x2": _fma(ml_dtypes.bfloat16),
    "cvt.rn.bf16x2.f32": _pack,
    "cvt.f32.f16": _from_f16,
    "cvt.s32.s8": lambda a: a.astype(np.int8).astype(np.int32).view(np.uint32),
    "max.u16x2": _max_halves,
    "min.u32": np.minimum,
    "shf.r.wrap.b32": _rotated,
    "shfl.sync.idx.b32": lambda a, first, clamp, mask: _lane_of_segment(a, first, clamp),
    "cvt.rn.f16x2.e4m3x2": _from_e4m3,
}


def run(text: str, register: str, words: np.ndarray, **more: np.ndarray) -> dict[str, np.ndarray]:
    """Returns all registers after the PTX, given the first one and more, by name."""
    values = {register: words} | more

    def value(source):
        if source in values:
            return values[source]
        number = int(source[2:], 16) if source.startswith("0f") else int(source, 0)
        return np.full_like(words, number)

    for operation, operands in re.findall(r"^([a-z][\w.]*) (.*);$", text, re.M):
        if halves := re.fullmatch(r"\{(\w+), (\w+)\}, (\S+)", operands):
            values[halves[1]], values[halves[2]] = _halves(value(halves[3]))
            continue
        target, *sources = operands.split(", ")
        if operation == "lop3.b32":
            *sources, table = sources
            a, b, c = map(value, sources)
            values[target] = _lop3(a, b, c, int(table, 0))
        else:
            values[target] = _OPERATIONS[operation](*[value(source) for source in sources])
    return values
