"""Lanes read, with ldmatrix, the units and scales that x @ W^T takes from them: as compiled."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import across, h100, transposed
from pallas_kernels.tuning import TILE_K, TILE_N
from tests.pallas_kernels.test_across import registers

pytestmark = pytest.mark.h100(code=False)

WEIGHTS = {
    "int8": (128, None),
    "int4": (32, None),
    "int2": (64, 2),
    "int3": (128, 3),
}  # group, bits
LOAD = r"ldmatrix\.sync\.aligned\.m8n8\.x4(\.trans)?\.shared\.b16 \{[^}]*\}, \[(%\w+)(?:\+(\d+))?\]"


class Registers:
    """Integer registers of a kernel, of a thread; those of loops are 0, as at their start."""

    def __init__(self, ptx):
        self.definitions = {}
        for line in ptx.splitlines():
            line = re.sub(r"^\s*@!?%p\d+ ", "", line).strip()
            if found := re.match(r"([a-z][\w.:]*)\s+(%\w+)(?:\|%\w+)?, (.*);", line):
                sources = [s.strip() for s in found[3].split(",")]
                self.definitions.setdefault(found[2], []).append((found[1], sources))

    def value(self, register, thread):
        if re.fullmatch(r"-?\d+", register):
            return int(register)
        if register == "%tid.x":
            return thread
        if len(self.definitions.get(register, ())) != 1:  # of a loop, or a symbol
            return 0
        ((operation, sources),) = self.definitions[register]
        name, *_ = operation.split(".")
        if name == "shfl":  # all that are here read lane 0
            return self.value(sources[0], thread // 32 * 32)
        first, *rest = (self.value(source, thread) for source in sources)
        if name in ("mov", "cvt", "cvta"):
            return first
        wide = "wide" in operation or operation.endswith("64")
        values = {
            "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
            "mad": lambda a, b, c: a * b + c, "and": lambda a, b: a & b, "or": lambda a, b: a | b,
            "xor": lambda a, b: a ^ b, "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b,
            "bfe": lambda a, at, n: a >> at & (1 << n) - 1,
        }  # fmt: skip
        return values[name](first, *rest) & (2**64 - 1 if wide else 2**32 - 1)


def loads(ptx, transposes):
    """Returns of every word that lanes get the places of its halves, [2, 4, 32, words, 2].

    They are in bytes, of both warpgroups, from the first that is read. Lanes 8 i .. 8 i + 7 say
    where the rows of the i-th of four 8 x 8 matrices are (PTX ISA, "ldmatrix").
    """
    own, found = Registers(ptx), [f for f in re.findall(LOAD, ptx) if bool(f[0]) == transposes]
    at = np.array([
        [own.value(register, t) + int(offset or 0) for t in range(256)]
        for _, register, offset in found
    ]).reshape(-1, 2, 4, 4, 8)  # load, warpgroup, warp, matrix, row  # fmt: skip
    at -= at.min()
    banks = np.sort(at // 16 % 8, axis=-1)  # of 16 bytes: a matrix is read at once
    if transposes:
        np.testing.assert_array_equal(banks, np.broadcast_to(np.arange(8), banks.shape))
    lane, half = np.arange(32)[:, None], np.arange(2)
    row, column = np.broadcast_arrays(lane // 4, 2 * (lane % 4) + half)
    if transposes:
        row, column = column, row
    places = at[..., row] + 2 * column  # load, warpgroup, warp, matrix, lane, half
    return places.transpose(1, 2, 4, 0, 3, 5).reshape(2, 4, 32, -1, 2)


@pytest.mark.parametrize("name", WEIGHTS)
def test_lanes_read_what_they_multiply(name):
    group, bits = WEIGHTS[name]
    K, N, dtype = 1024, 256, "uint8" if bits else name
    columns = K * bits // 8 if bits else K
    struct = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    scale = struct("bfloat16", K // group, N)
    program = h100.compile(
        lambda *a: transposed.matmul(*a, bits=bits),
        struct("bfloat16", 1024, N), struct(dtype, N, columns), scale,
    )  # fmt: skip
    (kernel,) = program.kernels
    order = across.order_of(dtype)
    blocks = 3 if bits == 3 else 2  # of units, side by side in a row of the tile
    row, unit = np.divmod(np.arange(TILE_K * blocks * order.units), blocks * order.units)
    # Where TMA writes them: in tiles of 8 rows, their 16 bytes swizzled as the rows are long.
    nbytes = 2 * order.units
    tile = row // 8 * blocks + unit // order.units
    place = tile * 8 * nbytes + row % 8 * nbytes + unit % order.units * 2
    place ^= (place >> 7 & nbytes // 16 - 1) << 4
    places = place.reshape(TILE_K, blocks, order.units).transpose(1, 2, 0)
    weights, of_scales = (loads(kernel.ptx, transposes=is_w) for is_w in (True, False))
    for wg in range(2):
        taken = [places[wg]] + ([places[2]] if bits == 3 else [])
        wanted = [registers(block, order.layout.to_mgpu()) for block in taken]
        np.testing.assert_array_equal(weights[wg], np.concatenate(wanted, axis=2))
        groups, rows = max(1, 64 // group), max(1, TILE_N // group)
        scales = np.arange(rows * TILE_K).reshape(rows, TILE_K)[wg * (rows // 2) :][:groups]
        wanted = registers(scales, across.columns(groups).to_mgpu())
        np.testing.assert_array_equal(of_scales[wg], 2 * wanted)
