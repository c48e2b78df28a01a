"""What a codec is: how one quantization method keeps a weight's codes in the tensors of a file."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, UInt8

from qjax import packing
from qjax.format import Format
from qjax.layout import Layout
from qjax.qtensor import QTensor

Read = Callable[[str], np.ndarray]
KERNEL = Layout.parse("kn", (1, 1))


class Unfit(ValueError):
    """A weight that a method has no place for; the message says why, without its name."""


class Codec(abc.ABC):
    """One quantization method, for the weights of one model.

    Made by `of_config` to read, by `of_weights` to write. A weight is a canonical QTensor [K, N] of
    a linear layer with K inputs and N outputs ([E, K, N] where a method keeps experts together).

    Attributes:
      name: what a user calls it.
    """

    name: ClassVar[str]

    # ---- reading ----

    @classmethod
    @abc.abstractmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        """Returns the codec that a `quantization_config` describes.

        Raises:
          ValueError: if a field is missing or wrong.
          NotImplementedError: if the method has options that are not read here.
        """

    @abc.abstractmethod
    def find(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """Returns, by the name of each quantized weight, its tensors by what they are.

        Decided by the tensors that are there, not by lists of modules: those are substrings,
        globs or regular expressions, depending on the tool that wrote them.
        """

    def survey(self, weights: Mapping[str, Mapping[str, str]], read: Read) -> None:  # noqa: B027
        """Looks through all weights for what the config leaves open, before any is decoded."""

    @abc.abstractmethod
    def decode(self, name: str, parts: Mapping[str, np.ndarray]) -> QTensor:
        """Returns a weight, its codes bit for bit; numpy arrays inside, dtype float32.

        Raises:
          ValueError: if the shapes of its tensors contradict each other or the config.
        """

    # ---- writing ----

    @classmethod
    @abc.abstractmethod
    def of_weights(cls, weights: Mapping[str, QTensor]) -> Self:
        """Returns the codec that holds these weights, each of which passed `check`.

        Raises:
          ValueError: if one config cannot describe them all.
        """

    @classmethod
    @abc.abstractmethod
    def check(cls, name: str, qt: QTensor) -> None:
        """Refuses a weight that the method has no place for, by its Format, shape and scales.

        Raises:
          Unfit: saying why.
        """

    @abc.abstractmethod
    def encode(self, name: str, qt: QTensor) -> dict[str, np.ndarray]:
        """Returns the tensors of a weight by their names in the file; numpy arrays inside."""

    @abc.abstractmethod
    def config(self, floats: Collection[str]) -> dict[str, Any]:
        """Returns the `quantization_config`.

        Args:
          floats: linear modules that stay in float.
        """

    def files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """Returns further JSON files that readers of this method look for."""
        return {}


def module_of(name: str) -> str:
    """Returns the module of a parameter: its name without `.weight`."""
    return name.removesuffix(".weight")


def find_parts(
    names: Collection[str], marker: str, parts: Collection[str]
) -> dict[str, dict[str, str]]:
    """Returns the weights `X.weight` of all modules X that have a tensor `X.<marker>`."""
    names = set(names)
    out = {}
    for name in sorted(names):
        if name.endswith("." + marker):
            module = name.removesuffix("." + marker)
            found = {part: f"{module}.{part}" for part in parts if f"{module}.{part}" in names}
            out[f"{module}.weight"] = found
    return out


def require_shape(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape than the others of its weight ask for."""
    if tensor.shape != shape:
        raise ValueError(f"tensor {name!r} has shape {tensor.shape}, but {shape} was expected.")


def require_dtype(name: str, tensor: np.ndarray, *dtypes: Any) -> None:
    """Refuses a tensor of another type than the method stores."""
    if tensor.dtype not in [np.dtype(d) for d in dtypes]:
        wanted = " or ".join(np.dtype(d).name for d in dtypes)
        raise ValueError(f"tensor {name!r} holds {tensor.dtype}, not {wanted}.")


# ---- what a weight has that most methods lack ---------------------------------------------------


def refuse_extras(qt: QTensor, *, act_scale: bool = False, perm: bool = False) -> None:
    """Refuses what only qjax's own checkpoints hold, and what this method has no place for.

    Raises:
      Unfit: for factors of the input, an order of rows, ragged groups, offsets.
    """
    fmt = qt.format
    K = qt.canonical_shape[-2]
    if qt.pre_scale is not None:
        raise Unfit(
            "its inputs are multiplied by factors (`pre_scale`), which readers would ignore"
        )
    if qt.act_scale is not None and not act_scale:
        raise Unfit("its inputs have a static step (`act_scale`)")
    if qt.perm is not None and not perm:
        raise Unfit("its groups are in an order of their own (act-order)")
    if fmt.offset is not None:
        raise Unfit("it has float offsets, not integer zero points")
    if fmt.group_size is not None and K % fmt.group_size and fmt.granularity != "block":
        raise Unfit(f"its last group is ragged: {K} rows in groups of {fmt.group_size}")


def refuse_activation(fmt: Format) -> None:
    """Refuses a format whose products quantize the input.

    Raises:
      Unfit: naming what would be ignored.
    """
    if fmt.activation is not None:
        raise Unfit(f"its inputs are quantized to {fmt.activation}, which readers would ignore")


def plain_scale(fmt: Format, *dtypes: str) -> str:
    """Returns the type of the scales.

    Raises:
      Unfit: if it is none of `dtypes`.
    """
    if not isinstance(fmt.scale, str) or fmt.scale not in dtypes:
        stored = fmt.scale if isinstance(fmt.scale, str) else f"({fmt.scale})"
        raise Unfit(f"its scales are {stored}, not {' or '.join(dtypes)}")
    return fmt.scale


# ---- integer codes ------------------------------------------------------------------------------


class Ints(NamedTuple):
    """A weight of integers: w[k, n] = (codes[k, n] - zero[k div g, n]) * scale[k div g, n].

    Attributes:
      codes: unsigned, below 2^bits; rows in the order of storage.
      scale: in their stored type.
      zero: unsigned; None: 2^(bits - 1) everywhere.
    """

    codes: UInt8[np.ndarray, "K N"]
    scale: Float[np.ndarray, "G C"]
    zero: UInt8[np.ndarray, "G C"] | None


_pack = jax.jit(packing.pack, static_argnums=1)
_unpack = jax.jit(packing.unpack, static_argnums=(1, 2))


def check_ints(fmt: Format) -> int:
    """Returns the bits of an integer format.

    Raises:
      Unfit: if the element is no integer of which a zero point makes a signed weight.
    """
    for bits in range(2, 9):
        if fmt.element == f"int{bits}" or (fmt.element == f"uint{bits}" and fmt.zero_point):
            return bits
    raise Unfit(f"its element {fmt.element} is no signed integer")


def to_ints(qt: QTensor, *, positive: bool) -> Ints:
    """Returns the codes of an integer QTensor of numpy arrays.

    Args:
      positive: write a group with a negative scale as the same values with a positive one:
        (q - z) s = ((2^b - 1 - q) - (2^b - 1 - z)) |s|.
    """
    K, _ = qt.canonical_shape
    bits = qt.element.bits
    codes, scale = _codes(qt.data, bits, K), np.asarray(qt.scale)
    if not positive:
        return Ints(codes, scale, _zeros(qt))
    flip = scale < 0
    if flip.any():
        rows = np.repeat(flip, qt.format.group_size or K, axis=0)[:K]
        codes = np.where(rows, np.uint8(2**bits - 1) - codes, codes)
    return Ints(codes, np.abs(scale), positive_zeros(qt))


def positive_zeros(qt: QTensor) -> UInt8[np.ndarray, "G C"] | None:
    """Returns the zero points of `to_ints(qt, positive=True)`."""
    bits, flip, zero = qt.element.bits, np.asarray(qt.scale) < 0, _zeros(qt)
    if not flip.any():
        return zero
    if zero is None:
        zero = np.full(flip.shape, 2 ** (bits - 1), np.uint8)
    return np.where(flip, np.uint8(2**bits - 1) - zero, zero)


def _zeros(qt: QTensor) -> UInt8[np.ndarray, "G C"] | None:
    if not qt.format.zero_point:
        return None
    return _codes(qt.zero, qt.element.bits, qt.scale.shape[-2])


def has_zeros(qt: QTensor) -> bool:
    """Whether `to_ints(qt, positive=True)` has zero points."""
    return qt.format.zero_point or bool((np.asarray(qt.scale) < 0).any())


def from_ints(
    ints: Ints,
    bits: int,
    group_size: int | None,
    *,
    group_columns: int | None = 1,
    perm: Int32[np.ndarray, " K"] | None = None,
    **fields: Any,
) -> QTensor:
    """Returns the QTensor of integer codes; inverse of `to_ints` on signed elements."""
    K, _ = ints.codes.shape
    fmt = Format(
        f"int{bits}",
        group_size=group_size,
        group_columns=group_columns,
        scale=ints.scale.dtype.name,
        zero_point=ints.zero is not None,
        **fields,
    )
    zero = None if ints.zero is None else _stored(ints.zero, bits)
    pad = packing.padding(K, bits) if bits < 8 else 0
    return QTensor(
        _stored(ints.codes, bits), ints.scale, zero, fmt, KERNEL, "float32", pad, perm=perm
    )


def _codes(stored: Any, bits: int, rows: int) -> UInt8[np.ndarray, "rows C"]:
    stored = np.asarray(stored)
    if bits == 8:
        return stored.view(np.uint8) ^ 0x80 if stored.dtype == np.int8 else stored
    return np.asarray(_unpack(jnp.asarray(stored), bits, packing.padding(rows, bits)))


def _stored(codes: UInt8[np.ndarray, "rows C"], bits: int) -> np.ndarray:
    if bits == 8:
        return (codes ^ 0x80).view(np.int8)
    return np.asarray(_pack(jnp.asarray(codes), bits))


# ---- words --------------------------------------------------------------------------------------


def pack_words(codes: UInt8[np.ndarray, "K N"], bits: int) -> Int32[np.ndarray, "W N"]:
    """Packs each column into ceil(K b / 32) little-endian words, least significant bit first."""
    K, N = codes.shape
    padded = np.pad(codes, ((0, -K % 32), (0, 0)))
    data = np.asarray(_pack(jnp.asarray(padded), bits))
    words = np.ascontiguousarray(data.reshape(-1, 4, N).transpose(0, 2, 1)).view("<i4")[..., 0]
    return words[: -(-K * bits // 32)]


def unpack_words(words: Int32[np.ndarray, "W N"], bits: int, K: int) -> UInt8[np.ndarray, "K N"]:
    """Inverse of `pack_words`."""
    W, N = words.shape
    data = np.ascontiguousarray(words.astype("<i4", copy=False)[..., None]).view(np.uint8)
    data = data.transpose(0, 2, 1).reshape(4 * W, N)
    data = np.pad(data, ((0, -len(data) % bits), (0, 0)))
    return np.asarray(_unpack(jnp.asarray(data), bits, 0))[:K] if bits < 8 else data[:K]


def order_of(
    name: str, g_idx: Int32[np.ndarray, " K"], K: int, group_size: int | None
) -> Int32[np.ndarray, " K"] | None:
    """Returns the order in which the groups of `g_idx` lie one after the other; None if they do.

    Raises:
      ValueError: if a group has not `group_size` rows.
    """
    require_shape(name, g_idx, (K,))
    g = group_size or K
    if np.array_equal(g_idx, np.arange(K) // g):
        return None
    perm = np.argsort(g_idx, kind="stable").astype(np.int32)
    if not np.array_equal(g_idx[perm], np.arange(K) // g):
        raise ValueError(
            f"tensor {name!r}: its groups have not {g} rows each, so they are not those of"
            f" group_size={group_size}. The file is damaged or its config is of another model."
        )
    return perm


def groups_of(perm: np.ndarray | None, K: int, group_size: int | None) -> Int32[np.ndarray, " K"]:
    """Returns the group of every row; inverse of `order_of`."""
    groups = (np.arange(K) // (group_size or K)).astype(np.int32)
    if perm is None:
        return groups
    out = np.empty_like(groups)
    out[np.asarray(perm)] = groups
    return out


def in_order(rows: np.ndarray, perm: np.ndarray | None) -> np.ndarray:
    """Returns rows of the weight in the order of storage."""
    return rows if perm is None else rows[perm]


def from_order(rows: np.ndarray, perm: np.ndarray | None) -> np.ndarray:
    """Inverse of `in_order`."""
    return rows if perm is None else rows[np.argsort(np.asarray(perm))]


def common(weights: Mapping[str, QTensor], what: str, of: Callable[[QTensor], Any]) -> Any:
    """Returns what all weights have in common.

    Raises:
      ValueError: naming two weights that differ.
    """
    values = {name: of(qt) for name, qt in weights.items()}
    first = next(iter(values))
    for name, value in values.items():
        if value != values[first]:
            raise ValueError(
                f"{name} has {what} {value!r}, {first} {values[first]!r}: this method has one for"
                " the whole model. Quantize them alike, or use compressed-tensors, which can tell."
            )
    return values[first]


def group_size_of(text: Any) -> int | None:
    """Returns the group size that a config's number means: -1 and null are whole columns.

    Raises:
      ValueError: if it is no size.
    """
    if text is None or text == -1:
        return None
    if type(text) is not int or text < 1:
        raise ValueError(f"group_size {text!r} is no positive integer, nor -1.")
    return text
