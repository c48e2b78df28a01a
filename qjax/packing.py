"""The bit order of packed codes: one dense little-endian bit stream along K for every column."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, UInt8


def unit(bits: int) -> int:
    """Returns the fewest codes that fill whole bytes: 2 at 4 bits, 4 at 2 bits, 8 at 3 bits."""
    return 8 // math.gcd(8, bits)


def packed_rows(K: int, bits: int) -> int:
    """Returns the bytes that a column of `K` codes takes, the last unit zero-padded."""
    return -(-K // unit(bits)) * unit(bits) * bits // 8


def padding(K: int, bits: int) -> int:
    """Returns how many zero codes `pack` appends to a column of `K` codes."""
    return -K % unit(bits)


def pack(codes: UInt8[Array, "*b K N"], bits: int) -> UInt8[Array, "*b B N"]:
    """Packs codes of `bits` bits along K, least significant bit first.

    Code k of a column occupies bits [k * bits, (k + 1) * bits) of the column's stream; bit j of the
    stream is bit j mod 8 of byte j div 8. Read as little-endian words this is the order of GPTQ's
    `qweight` and, per output row, of compressed-tensors' `weight_packed`.

    Example:
      >>> pack(jnp.arange(8, dtype=jnp.uint8)[:, None], 4)[:, 0]  # the word 0x76543210
      Array([ 16,  50,  84, 118], dtype=uint8)
    """
    if bits == 8:
        return codes
    *b, K, N = codes.shape
    n_codes, n_bytes = unit(bits), unit(bits) * bits // 8
    codes = jnp.pad(codes, [(0, 0)] * len(b) + [(0, padding(K, bits)), (0, 0)])
    codes = codes.reshape(*b, -1, n_codes, N)
    out = []
    for j in range(n_bytes):
        byte = jnp.zeros_like(codes[..., 0, :])
        for i in range(n_codes):
            shift = i * bits - 8 * j  # where code i starts, seen from byte j
            if -bits < shift < 8:
                code = codes[..., i, :]
                byte |= (code << shift) if shift >= 0 else (code >> -shift)
        out.append(byte)
    return jnp.stack(out, axis=-2).reshape(*b, -1, N)


def unpack(data: UInt8[Array, "*b B N"], bits: int, pad: int = 0) -> UInt8[Array, "*b K N"]:
    """Inverse of `pack`; `pad` codes at the end of each column are dropped.

    Example:
      >>> codes = jnp.array([[5], [0], [7]], jnp.uint8)
      >>> unpack(pack(codes, 3), 3, pad=padding(3, 3))[:, 0]
      Array([5, 0, 7], dtype=uint8)
    """
    if bits == 8:
        return data
    *b, _, N = data.shape
    n_codes, n_bytes = unit(bits), unit(bits) * bits // 8
    data = data.reshape(*b, -1, n_bytes, N)
    mask = jnp.uint8(2**bits - 1)
    out = []
    for i in range(n_codes):
        j, shift = divmod(i * bits, 8)
        code = data[..., j, :] >> shift
        if shift + bits > 8:  # the code straddles two bytes
            code |= data[..., j + 1, :] << (8 - shift)
        out.append(code & mask)
    codes = jnp.stack(out, axis=-2).reshape(*b, -1, N)
    return codes[..., : codes.shape[-2] - pad, :] if pad else codes


def unpack_rows(data: UInt8[Array, "B N"], bits: int, rows: Array) -> UInt8[Array, "*i N"]:
    """Returns the codes of the given rows k, reading only the bytes that hold them."""
    if bits == 8:
        return data[rows]
    start = rows * bits
    j, shift = start // 8, (start % 8).astype(jnp.uint16)[..., None]
    low = data[j].astype(jnp.uint16)
    # The last byte has no successor; the clamped read only fills bits that the mask drops.
    high = data[jnp.minimum(j + 1, data.shape[0] - 1)].astype(jnp.uint16)
    word = low | (high << 8)
    return ((word >> shift) & (2**bits - 1)).astype(jnp.uint8)
