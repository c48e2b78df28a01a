"""Element types: the values a code can stand for, and the rounding from a value to its code."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from qjax import _compat

# Dettmers et al., 2023 (QLoRA), appendix E: quantiles of N(0, 1), scaled to [-1, 1].
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' FP4 magnitudes by code 0..7 (not the OCP order); code + 8 is the negative.
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
        0.3333333432674408, 0.5, 0.1666666716337204, 0.25)  # fmt: skip
# OCP Microscaling Formats v1.0, section 5.3.3: magnitudes of E2M1 by code 0..7.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# ggml's non-linear 4-bit type: integers, denser around 0, by code.
_IQ4_NL = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
           1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)  # fmt: skip


def _dynamic(exponents: int = 7) -> tuple[float, ...]:
    """Returns the levels of bitsandbytes' signed dynamic 8-bit type, ascending.

    For i < 7 the midpoints of the 2^i equal intervals between 0.1 and 1, times 10^(i - 6), with
    both signs; and 0 and 1 (Dettmers et al., 2022, 8-bit Optimizers via Block-wise Quantization).
    """
    magnitudes = []
    for i in range(exponents):
        # Rounded as there: both halves of the interval are counted from their own end, by a fused
        # multiply and add, which float64 gives for such small counts.
        n, low, high = np.arange(2**i + 1), np.float32(0.1), np.float32(1)
        step = np.float64((high - low) / np.float32(2**i))
        ends = np.where(n < (2**i + 1) // 2, low + step * n, high - step * n[::-1])
        ends = ends.astype(np.float32)
        middle = (ends[:-1] + ends[1:]) / np.float32(2)
        magnitudes.append(np.float32(10.0 ** (i - exponents + 1)) * middle)
    positive = np.concatenate(magnitudes)
    return tuple(float(v) for v in np.sort(np.concatenate([-positive, positive, [0.0, 1.0]])))


@dataclasses.dataclass(frozen=True)
class Element:
    """One element type: a finite set of values, each with a code of `bits` bits.

    Integer types hold `qmin .. qmax` and store the code `q - qmin`, except at 8 bits, where the
    native signed (or unsigned) integer is stored. Table types hold 16 or 256 arbitrary levels.
    Float types store the native 8-bit float.

    Attributes:
      name: as written in a `Format`.
      kind: "int", "table" or "float".
      bits: storage bits per code.
      qmin, qmax: smallest and largest value.
      levels: for tables, the value of every code.
      dtype: how codes are stored when `bits == 8`; sub-byte codes are packed in uint8.
    """

    name: str
    kind: str
    bits: int
    qmin: float
    qmax: float
    levels: tuple[float, ...] = ()
    # Sorted distinct levels, their codes, and the boundaries between neighbours: a value goes to
    # the upper neighbour iff it is strictly greater than the boundary.
    _sorted: tuple[float, ...] = ()
    _codes: tuple[int, ...] = ()
    _boundaries: tuple[float, ...] = ()
    dtype: str = "uint8"

    @property
    def is_packed(self) -> bool:
        return self.bits < 8


def _table(name: str, levels: tuple[float, ...], *, ties: str, bits: int = 4) -> Element:
    values = np.asarray(levels, np.float32)
    order = [int(i) for i in np.argsort(values, kind="stable")]
    # -0.0 and 0.0 are one level; keep the code of the positive zero.
    order = [i for i in order if not (values[i] == 0 and np.signbit(values[i]))]
    ranked = values[order]
    middle = ((ranked[1:].astype(np.float64) + ranked[:-1]) / 2).astype(np.float32)
    if ties == "even":  # an exact midpoint goes to the even magnitude index (IEEE round to even)
        for j in range(len(middle)):
            upper_is_even = (order[j + 1] & 7) % 2 == 0
            if upper_is_even:
                middle[j] = np.nextafter(middle[j], np.float32(-np.inf))
    return Element(
        name, "table", bits, float(ranked[0]), float(ranked[-1]),
        tuple(float(v) for v in values), tuple(float(v) for v in ranked), tuple(order),
        tuple(float(m) for m in middle),
    )  # fmt: skip


def _int(name: str, bits: int, qmin: int, qmax: int) -> Element:
    dtype = "int8" if bits == 8 and qmin < 0 else "uint8"
    return Element(name, "int", bits, qmin, qmax, dtype=dtype)


def _e4m3_for_e2m1() -> Element:
    """Returns those e4m3 whose product with any e2m1 is an e4m3, but for the very small.

    An e2m1 is 1 or 1.5 times a power of two, and an e4m3 has four significant bits: enough for 1.5
    times 1, 1.25 or 1.5, and for no other. Every product with one of these is a normal e4m3.

    Codes are their bits, whose lowest one, which is 0, is set for 1.25 and 1.5 times a power: with
    that the bits of 1.5 times as much are 4 more for all of them, `pallas_kernels.e2m1`.
    """
    levels = (*(2.0**e * m for e in range(-5, 6) for m in (1.0, 1.25, 1.5)), 64.0)
    few = _table("e4m3_for_e2m1", levels, ties="lower", bits=8)
    bits = np.asarray(few._sorted, ml_dtypes.float8_e4m3fn).view(np.uint8)
    codes = bits | (bits % 8 != 0)
    by_code = (np.arange(256) & 0xFE).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    return dataclasses.replace(
        few, levels=tuple(map(float, by_code)), _codes=tuple(map(int, codes))
    )


def _signed(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    return magnitudes + tuple(-m for m in magnitudes)


ELEMENTS: dict[str, Element] = {
    e.name: e
    for e in (
        *(_int(f"int{b}", b, -(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in range(2, 9)),
        *(_int(f"uint{b}", b, 0, 2**b - 1) for b in range(1, 9)),
        _int("ternary", 2, -1, 1),
        _int("int8_max15", 8, -15, 15),  # times an int4 it is an int8
        _table("nf4", _NF4, ties="lower"),
        _table("fp4", _signed(_FP4), ties="lower"),
        _table("e2m1", _signed(_E2M1), ties="even"),
        _table("iq4_nl", _IQ4_NL, ties="lower"),
        _table("dynamic8", _dynamic(), ties="lower", bits=8),
        Element("e4m3", "float", 8, -448.0, 448.0, dtype="float8_e4m3fn"),
        _e4m3_for_e2m1(),
        Element("e5m2", "float", 8, -57344.0, 57344.0, dtype="float8_e5m2"),
    )
}


def get_element(name: str) -> Element:
    """Returns the element type called `name`.

    Raises:
      ValueError: if there is none; the message lists those there are.
    """
    try:
        return ELEMENTS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"unknown element type {name!r}. Known: {', '.join(sorted(ELEMENTS))}."
        ) from None


def encode(x: Float[Array, "*shape"], element: Element) -> Array:
    """Rounds `x`, already divided by its scale, to the nearest element; returns its code.

    Integers and floats round half to even; NF4 and FP4 send an exact midpoint down, as
    bitsandbytes does; E2M1 sends it to the even code. Values outside the range saturate.

    Returns:
      uint8 codes of `element.bits` bits, or the native type if `element.bits == 8`.
    """
    if element.kind == "int":
        q = jnp.clip(jnp.round(x), element.qmin, element.qmax)
        if element.is_packed:
            return (q - element.qmin).astype(jnp.uint8)
        return q.astype(element.dtype)
    if element.kind == "float":
        # Clamp first: what a cast does beyond the largest finite value differs between libraries.
        return jnp.clip(x, element.qmin, element.qmax).astype(element.dtype)
    if len(element._boundaries) > 15:
        rank = _count_below(element._boundaries, x)
        return _compat.looked_up(jnp.asarray(element._codes, jnp.uint8), rank)
    # A sum of comparisons fuses into one elementwise loop; a sort or a gather does not.
    rank = sum((x > b).astype(jnp.uint8) for b in element._boundaries)
    if element._codes == tuple(range(len(element._codes))):
        return rank  # pyright: ignore[reportReturnType]
    return _compat.looked_up(jnp.asarray(element._codes, jnp.uint8), rank)


def _count_below(boundaries: tuple[float, ...], x: Float[Array, "*shape"]) -> Array:
    """Returns how many of ascending boundaries each x is above; by bisection, where x lies."""
    steps = 2 ** np.arange(len(boundaries).bit_length())[::-1]
    padded = np.full(2 * steps[0] - 1, np.inf)
    padded[: len(boundaries)] = boundaries
    table, rank = jnp.asarray(padded, x.dtype), jnp.zeros_like(x, jnp.int32)
    for step in steps.tolist():
        rank += step * (x > _compat.looked_up(table, rank + (step - 1))).astype(jnp.int32)
    return rank


def round_to_level(x: Float[Array, "*shape"], element: Element) -> Float[Array, "*shape"]:
    """Returns `decode(encode(x))`, bit for bit, as one elementwise expression without codes.

    This is the rounding of fake quantization and of scale search.
    """
    if element.kind == "int":
        # Rounding can leave -0.0 where decoding a code gives 0.0; XLA would fold `q + 0.0` away.
        q = jnp.clip(jnp.round(x), element.qmin, element.qmax)
        return jnp.where(q == 0, jnp.zeros_like(q), q)
    if element.kind == "float":
        return encode(x, element).astype(x.dtype)
    if len(element._boundaries) > 15:
        return decode(encode(x, element), element, x.dtype)
    value = jnp.full_like(x, element._sorted[0])
    for boundary, level in zip(element._boundaries, element._sorted[1:], strict=True):
        value = jnp.where(x > boundary, jnp.asarray(level, x.dtype), value)
    return value


def decode(codes: Array, element: Element, dtype=jnp.float32) -> Array:
    """Returns the values of `codes`, exact in `dtype` float32. Inverse of `encode` on levels."""
    if element.kind == "table":
        # Two levels of selects would also do; a 16-entry gather is the plain definition.
        return _compat.looked_up(jnp.asarray(element.levels, dtype), codes)
    if element.kind == "int" and element.is_packed:
        return codes.astype(dtype) + jnp.asarray(element.qmin, dtype)
    return codes.astype(dtype)


# ---- scales -------------------------------------------------------------------------------------

SCALE_DTYPES = ("float32", "bfloat16", "float16", "e4m3", "e8m0")


def largest_scale(dtype: str) -> float:
    """Returns the magnitude at which `round_scale` saturates; Inf where it does not."""
    return {"float16": 65504.0, "e4m3": ELEMENTS["e4m3"].qmax}.get(dtype, math.inf)


def round_scale(scale: Float[Array, "*shape"], dtype: str) -> Array:
    """Rounds positive or signed float32 scales to their stored type.

    `e8m0` keeps a power of two 2^e as the byte e + 127: values from 1.75 * 2^e on round up to
    2^(e+1), the rest down (compressed-tensors' rule: add 2^21 to the bit pattern, drop the
    mantissa), NaN is byte 255. `e4m3` and `float16` saturate instead of overflowing.
    """
    if dtype == "e8m0":
        bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
        exponent = jnp.minimum(((bits + jnp.uint32(1 << 21)) >> 23) & 0xFF, 254)
        return jnp.where(jnp.isnan(scale), 255, exponent).astype(jnp.uint8)
    if dtype == "e4m3":
        return encode(scale, ELEMENTS["e4m3"])
    if dtype == "float16":
        limit = largest_scale(dtype)
        return jnp.clip(scale, -limit, limit).astype(jnp.float16)
    return scale.astype(dtype)


def read_scale(stored: Array, dtype: str) -> Float[Array, "*shape"]:
    """Returns stored scales as float32; the inverse of `round_scale` up to its rounding."""
    if dtype == "e8m0":
        # 2^-127 (byte 0) is subnormal in float32, hence exp2 of an integer by bit pattern with
        # that one case apart; byte 255 is NaN by the OCP definition.
        e = stored.astype(jnp.uint32)
        bits = jnp.where(e == 0, jnp.uint32(0x00400000), e << 23)
        value = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(stored == 255, jnp.nan, value)
    return stored.astype(jnp.float32)


def power_of_two_above(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the smallest power of two not below each x >= 0, and 0 for 0."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = (bits + jnp.uint32(0x007FFFFF)) & jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@functools.cache
def half_step(element_name: str) -> float:
    """Largest distance from any value in `[qmin, qmax]` to its nearest level, in scale units.

    For floats it is relative to the top binade, whose spacing is the widest.
    """
    element = get_element(element_name)
    if element.kind == "int":
        return 0.5
    if element._sorted:
        return max(np.diff(element._sorted)) / 2
    mantissa = 3 if element.name == "e4m3" else 2
    return 2.0 ** (math.floor(math.log2(element.qmax)) - mantissa - 1)
