"""The tensor types of ggml: where in its block each type keeps which bits of which value.

A type is a qjax `Format` and the places of its codes and scales in a block. From those places both
directions follow, block to QTensor and back, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from qjax import kquants
from qjax.format import Format


class Piece(NamedTuple):
    """`width` bits of some values of a block, each in a byte of its own.

    Bits [to, to + width) of the values `values` are bits [shift, shift + width) of bytes `bytes`.
    """

    values: slice
    bytes: slice
    shift: int
    to: int
    width: int


class Bits(NamedTuple):
    """Values of a block that are put together from pieces.

    Attributes:
      size: values per block.
      bits: of a value.
      pieces: disjoint, and all bits of all values together.
      flip: bits to invert: the sign of a float16 that qjax keeps the other way round.
    """

    size: int
    bits: int
    pieces: tuple[Piece, ...]
    flip: int = 0

    def unpack(self, blocks: UInt8[np.ndarray, "B nbytes"]) -> np.ndarray:
        """Returns the values [B, size], uint8 or uint16."""
        dtype = np.uint8 if self.bits <= 8 else np.uint16
        out = np.zeros((len(blocks), self.size), dtype)
        for values, at, shift, to, width in self.pieces:
            piece = blocks[:, at]
            if shift:
                piece = piece >> np.uint8(shift)
            if shift + width < 8:
                piece = piece & np.uint8(2**width - 1)
            out[:, values] |= piece.astype(dtype) << dtype(to)
        return out ^ dtype(self.flip) if self.flip else out

    def pack(self, values: np.ndarray, blocks: UInt8[np.ndarray, "B nbytes"]) -> None:
        """Writes values [B, size] into blocks that are zero where they go."""
        values = values ^ values.dtype.type(self.flip) if self.flip else values
        for which, at, shift, to, width in self.pieces:
            piece = (values[:, which] >> to).astype(np.uint8) & np.uint8(2**width - 1)
            blocks[:, at] |= piece << np.uint8(shift)


class Trits(NamedTuple):
    """The codes of TQ1_0: bytes of up to five base-3 digits, as a fraction of 3^5.

    A byte holds ceil(256 v / 243), v = 81 t0 + 27 t1 + 9 t2 + 3 t3 + t4. Multiplying by 3^n brings
    digit n to the front: t_n = 3 (byte 3^n mod 256) >> 8.
    """

    size: int = 256
    # First byte, bytes, digits in each; digit n of byte m is value start + bytes n + m.
    runs: tuple[tuple[int, int, int, int], ...] = ((0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240))

    def unpack(self, blocks: UInt8[np.ndarray, "B nbytes"]) -> np.ndarray:
        out = np.empty((len(blocks), self.size), np.uint8)
        for first, length, digits, start in self.runs:
            piece = blocks[:, first : first + length]
            for n in range(digits):
                at = start + length * n
                shifted = (piece * np.uint8(3**n)).astype(np.uint16)
                out[:, at : at + length] = (shifted * 3) >> 8
        return out

    def pack(self, values: np.ndarray, blocks: UInt8[np.ndarray, "B nbytes"]) -> None:
        for first, length, digits, start in self.runs:
            v = np.zeros((len(values), length), np.uint16)
            for n in range(digits):
                at = start + length * n
                v += values[:, at : at + length] * np.uint16(3 ** (4 - n))
            blocks[:, first : first + length] = (v.astype(np.uint32) * 256 + 242) // 243


class Parts(NamedTuple):
    """The codes, scales and offsets of blocks as a QTensor nests them: places, or arrays."""

    codes: Bits | Trits | np.ndarray
    scale: Bits | Parts | np.ndarray
    zero: Bits | Parts | np.ndarray | None = None


class TensorType(NamedTuple):
    """How one ggml tensor type stores its values.

    Attributes:
      id: the number in the file.
      name: what ggml calls it.
      block: values per block.
      nbytes: bytes per block.
      format: what a QTensor of it is; None for plain floats, and for what is not supported.
      parts: where the format's arrays are in a block.
      dtype: of plain floats.
    """

    id: int
    name: str
    block: int
    nbytes: int
    format: Format | None = None
    parts: Parts | None = None
    dtype: str | None = None

    @property
    def is_supported(self) -> bool:
        """Whether its values can be read; integers and codebook types cannot."""
        return self.format is not None or self.dtype is not None

    def row_bytes(self, K: int) -> int:
        """Returns the bytes of a row of K values, in whole blocks."""
        return K // self.block * self.nbytes


# ---- places --------------------------------------------------------------------------------------


def _bytes(at: int, count: int) -> Bits:
    """`count` values of a byte each."""
    return Bits(count, 8, (Piece(slice(0, count), slice(at, at + count), 0, 0, 8),))


def _half(at: int, *, negated: bool = False) -> Bits:
    """One float16, little-endian."""
    low = Piece(slice(0, 1), slice(at, at + 1), 0, 0, 8)
    high = Piece(slice(0, 1), slice(at + 1, at + 2), 0, 8, 8)
    return Bits(1, 16, (low, high), flip=0x8000 if negated else 0)


def _nibbles(at: int, run: int, count: int) -> tuple[Piece, ...]:
    """4-bit codes: of every 2 `run` values, the first half in low, the second in high nibbles."""
    out = []
    for c in range(count // (2 * run)):
        where = slice(at + run * c, at + run * (c + 1))
        for half in (0, 1):
            start = run * (2 * c + half)
            out.append(Piece(slice(start, start + run), where, 4 * half, 0, 4))
    return tuple(out)


def _pairs(at: int, to: int) -> tuple[Piece, ...]:
    """Two bits of 256 values: value 128 c + 32 j + l at bits 2 j of byte 32 c + l."""
    return tuple(
        Piece(
            slice(128 * c + 32 * j, 128 * c + 32 * (j + 1)),
            slice(at + 32 * c, at + 32 * (c + 1)), 2 * j, to, 2,
        )
        for c in range(2) for j in range(4)
    )  # fmt: skip


def _single_bits(at: int, to: int) -> tuple[Piece, ...]:
    """One bit of 256 values: value 32 r + l is bit r of byte l."""
    return tuple(Piece(slice(32 * r, 32 * (r + 1)), slice(at, at + 32), r, to, 1) for r in range(8))


def _fifth_bits(at: int) -> tuple[Piece, ...]:
    """The fifth bit of 32 values: value i is bit i of a little-endian word."""
    return tuple(Piece(slice(b, 32, 8), slice(at, at + 4), b, 4, 1) for b in range(8))


def _block32(at: int, *, fifth: int | None = None) -> Bits:
    high = () if fifth is None else _fifth_bits(fifth)
    return Bits(32, 4 if fifth is None else 5, _nibbles(at, 16, 32) + high)


def _six_bit_scales(at: int, *, minima: bool) -> Bits:
    """The 8 scales, or the 8 minima, of Q4_K and Q5_K in their 12 bytes."""
    own, other = (at + 4, 4) if minima else (at, 0)
    return Bits(
        8, 6,
        (
            Piece(slice(0, 4), slice(own, own + 4), 0, 0, 6),
            Piece(slice(4, 8), slice(at + 8, at + 12), other, 0, 4),
            Piece(slice(4, 8), slice(own, own + 4), 6, 4, 2),
        ),
    )  # fmt: skip


def _q3_scales(at: int) -> Bits:
    low = _nibbles(at, 8, 16)
    high = tuple(
        Piece(slice(4 * i, 4 * i + 4), slice(at + 8, at + 12), 2 * i, 4, 2) for i in range(4)
    )
    return Bits(16, 6, low + high)


def _q6_codes() -> Bits:
    # Each 128 values have 64 bytes of low nibbles: the first 64 in low, the others in high ones.
    return Bits(256, 6, _nibbles(0, 64, 256) + _pairs(128, 4))


def _iq4_xs_scales() -> Bits:
    low = [Piece(slice(half, 8, 2), slice(4, 8), 4 * half, 0, 4) for half in (0, 1)]
    high = [
        Piece(slice(i, i + 1), slice(2 + i // 4, 3 + i // 4), 2 * (i % 4), 4, 2) for i in range(8)
    ]
    return Bits(8, 6, (*low, *high))


def _nested(codes: Bits, scale: int, *, negated: bool = False) -> Parts:
    return Parts(codes, _half(scale, negated=negated))


_F = kquants.FORMATS
_TERNARY = Format("ternary", group_size=256, scale="float16", rule="absmax")
_MXFP4 = Format("e2m1", group_size=32, scale="e8m0")
_NVFP4 = Format("e2m1", group_size=16, scale="e4m3")
_IQ4_NL = Format("iq4_nl", group_size=32, scale="float16", rule="mse")
_IQ4_XS = Format(
    "iq4_nl", group_size=32, scale=Format("int6", group_size=8, scale="float16"), rule="mse"
)


def _quantized(id: int, name: str, block: int, nbytes: int, parts: Parts, fmt=None) -> TensorType:
    return TensorType(id, name, block, nbytes, fmt or _F[name], parts)


# Q2_K, Q4_K and Q5_K subtract dmin m: a QTensor adds offsets, whose super-scale is -dmin.
TENSOR_TYPES: Mapping[int, TensorType] = {
    kind.id: kind
    for kind in (
        TensorType(0, "F32", 1, 4, dtype="float32"),
        TensorType(1, "F16", 1, 2, dtype="float16"),
        _quantized(2, "Q4_0", 32, 18, Parts(_block32(2), _half(0))),
        _quantized(3, "Q4_1", 32, 20, Parts(_block32(4), _half(0), _half(2))),
        _quantized(6, "Q5_0", 32, 22, Parts(_block32(6, fifth=2), _half(0))),
        _quantized(7, "Q5_1", 32, 24, Parts(_block32(8, fifth=4), _half(0), _half(2))),
        _quantized(8, "Q8_0", 32, 34, Parts(_bytes(2, 32), _half(0))),
        _quantized(
            10, "Q2_K", 256, 84,
            Parts(
                Bits(256, 2, _pairs(16, 0)),
                _nested(Bits(16, 4, (Piece(slice(0, 16), slice(0, 16), 0, 0, 4),)), 80),
                _nested(
                    Bits(16, 4, (Piece(slice(0, 16), slice(0, 16), 4, 0, 4),)), 82, negated=True
                ),
            ),
        ),
        _quantized(
            11, "Q3_K", 256, 110,
            Parts(Bits(256, 3, _pairs(32, 0) + _single_bits(0, 2)), _nested(_q3_scales(96), 108)),
        ),
        _quantized(
            12, "Q4_K", 256, 144,
            Parts(
                Bits(256, 4, _nibbles(16, 32, 256)),
                _nested(_six_bit_scales(4, minima=False), 0),
                _nested(_six_bit_scales(4, minima=True), 2, negated=True),
            ),
        ),
        _quantized(
            13, "Q5_K", 256, 176,
            Parts(
                Bits(256, 5, _nibbles(48, 32, 256) + _single_bits(16, 4)),
                _nested(_six_bit_scales(4, minima=False), 0),
                _nested(_six_bit_scales(4, minima=True), 2, negated=True),
            ),
        ),
        _quantized(14, "Q6_K", 256, 210, Parts(_q6_codes(), _nested(_bytes(192, 16), 208))),
        TensorType(16, "IQ2_XXS", 256, 66),
        TensorType(17, "IQ2_XS", 256, 74),
        TensorType(18, "IQ3_XXS", 256, 98),
        TensorType(19, "IQ1_S", 256, 50),
        _quantized(20, "IQ4_NL", 32, 18, Parts(_block32(2), _half(0)), _IQ4_NL),
        TensorType(21, "IQ3_S", 256, 110),
        TensorType(22, "IQ2_S", 256, 82),
        _quantized(
            23, "IQ4_XS", 256, 136,
            Parts(Bits(256, 4, _nibbles(8, 16, 256)), _nested(_iq4_xs_scales(), 0)), _IQ4_XS,
        ),
        TensorType(24, "I8", 1, 1),
        TensorType(25, "I16", 1, 2),
        TensorType(26, "I32", 1, 4),
        TensorType(27, "I64", 1, 8),
        TensorType(28, "F64", 1, 8),
        TensorType(29, "IQ1_M", 256, 56),
        TensorType(30, "BF16", 1, 2, dtype="bfloat16"),
        _quantized(34, "TQ1_0", 256, 54, Parts(Trits(), _half(52)), _TERNARY),
        _quantized(
            35, "TQ2_0", 256, 66, Parts(Bits(256, 2, _pairs(0, 0)), _half(64)), _TERNARY
        ),
        _quantized(39, "MXFP4", 32, 17, Parts(_block32(1), _bytes(0, 1)), _MXFP4),
        _quantized(
            40, "NVFP4", 64, 36, Parts(Bits(64, 4, _nibbles(4, 8, 64)), _bytes(0, 4)), _NVFP4
        ),
    )
}  # fmt: skip

BY_NAME: Mapping[str, TensorType] = {kind.name: kind for kind in TENSOR_TYPES.values()}
