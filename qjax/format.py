"""Format: how one array is stored - element type, granularity, scale type and scale rule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from qjax import numerics, packing

RULES = ("absmax", "absmax_full", "signed_absmax", "minmax", "mse", "absmean", "centered", "ggml")
REMAINDERS = ("error", "ragged", "shrink")
ACTIVATIONS = ("int8", "int4", "uint8", "uint4", "e4m3")
ACTIVATION_SCALES = ("token", "group", "tensor", "static")


@dataclasses.dataclass(frozen=True, repr=False)
class Format:
    """How one weight `[K, N]` is stored. Frozen and hashable: static under `jit`.

    A scale is shared by `group_size` consecutive rows of K and `group_columns` consecutive columns
    of N. So the usual granularities are

      per tensor     group_size=None, group_columns=None
      per channel    group_size=None                        (the default)
      groups of g    group_size=g
      2-D blocks     group_size=128, group_columns=128

    and the stored value is

      w = q * scale                    symmetric
      w = (q - zero_point) * scale     zero_point=True, an integer of the element's own type
      w = q * scale + offset           offset="float16" or a Format

    A `scale` (or `offset`) that is itself a `Format` is quantized again over the array `[G, N]` of
    scales: NF4's double quantization, NVFP4's global scale, the super-blocks of k-quants.

    Attributes:
      element: a name in `qjax.numerics.ELEMENTS`.
      group_size: rows of K that share a scale; None: all.
      group_columns: columns of N that share a scale; None: all.
      scale: "float32", "bfloat16", "float16", "e4m3", "e8m0", or a `Format`.
      zero_point: whether an integer zero point is stored beside every scale.
      offset: None, or the type (or Format) of a float offset beside every scale.
      rule: how scales are chosen, see `qjax.scales`, or "ggml", see `qjax.kquants`; None: "minmax"
        with a zero point or an offset, "absmean" for ternary, else "absmax".
      remainder: what to do when `group_size` does not divide K: "error"; "ragged", a last group
        that is shorter; "shrink", the largest divisor of K below `group_size`.
      activation: None (weight-only), or the element type to which the other operand of a matmul
        is quantized at run time: "int8" or "int4", with an int32 accumulator; "uint8" or "uint4",
        the same for activations that are never negative (after a ReLU), which spend no code on a
        sign: 0 is code 0, and what is below it becomes 0; or "e4m3".
      activation_scale: where the step of the activation's codes comes from: "token", the largest
        magnitude of each token; "group", that of each token in each group of rows of the weight
        (DeepSeek-AI, 2024, DeepSeek-V3, section 3.3.2: 1 x 128); "tensor", that of the whole
        activation; "static", the weight's `act_scale`, measured on calibration data.
      outliers: None, or the magnitude from which on an input channel counts as an outlier: it
        leaves the int8 product, in which it would set the step of every token, and is multiplied
        in float (Dettmers et al., 2022, LLM.int8(): 6.0).
      flatten: for a scale that is quantized again: its groups run through all scales of the first
        column of N, then of the second, as one vector, instead of along each column.
      outlier_capacity: outlier channels for which the float product has room. With more, the whole
        weight takes part in it: the result is the same, the time is not.
    """

    element: str
    group_size: int | None = None
    group_columns: int | None = 1
    scale: str | Format = "float32"
    zero_point: bool = False
    offset: str | Format | None = None
    rule: str | None = None
    remainder: str = "error"
    activation: str | None = None
    activation_scale: str = "token"
    outliers: float | None = None
    outlier_capacity: int = 32
    flatten: bool = False

    def __post_init__(self):
        element = numerics.get_element(self.element)
        for name in ("group_size", "group_columns"):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise ValueError(f"`{name}` must be a positive integer or None, got {value!r}.")
        for name in ("scale", "offset"):
            value = getattr(self, name)
            is_type = isinstance(value, Format) or value in numerics.SCALE_DTYPES
            if not is_type and not (name == "offset" and value is None):
                raise ValueError(
                    f"`{name}` must be a Format or one of {', '.join(numerics.SCALE_DTYPES)},"
                    f" got {value!r}."
                )
        for name in ("zero_point", "flatten"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {getattr(self, name)!r}.")
        if self.rule is not None and self.rule not in RULES:
            raise ValueError(f"`rule` must be one of {', '.join(RULES)}, got {self.rule!r}.")
        if self.remainder not in REMAINDERS:
            raise ValueError(
                f"`remainder` must be one of {', '.join(REMAINDERS)}, got {self.remainder!r}."
            )
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(
                f"`activation` must be None or one of {', '.join(ACTIVATIONS)},"
                f" got {self.activation!r}."
            )
        if self.zero_point and self.offset is not None:
            raise ValueError("`zero_point` and `offset` exclude each other; choose one.")
        centered = self.scale_rule == "centered"
        if (self.zero_point or self.offset is not None) and element.kind != "int" and not centered:
            raise ValueError(
                f"zero points and offsets need an integer element, got {self.element!r}."
            )
        if self.flatten and self.group_columns != 1:
            raise ValueError(
                f"`flatten` makes one column of all: set group_columns=1, got {self.group_columns}."
            )
        if self.offset is not None and element.qmin != 0 and not centered:
            raise ValueError(
                f"an offset is the value of code 0: it needs an unsigned element, got"
                f" {self.element!r}. Use 'uint{element.bits}'."
            )
        if self.zero_point and self.element == "ternary":
            raise ValueError("ternary has no zero point: its levels are -1, 0 and 1.")
        if self.offset == "e8m0":
            raise ValueError("`offset` has a sign; e8m0 holds only positive powers of two.")
        self._check_rule(element)
        self._check_activation(element)

    def _check_rule(self, element: numerics.Element) -> None:
        rule = self.scale_rule
        if rule == "centered":
            if self.offset is None or element.qmin >= 0:
                raise ValueError(
                    "`rule='centered'` keeps distances from a mean, of either sign: it needs an"
                    f" `offset` type and a signed element, got {self.element!r}."
                )
            return
        asymmetric = self.zero_point or self.offset is not None
        if asymmetric and rule not in ("minmax", "mse", "ggml"):
            raise ValueError(
                f"a zero point or an offset needs `rule='minmax'` or 'mse', got {rule!r}."
            )
        if not asymmetric and rule == "minmax":
            raise ValueError(
                "`rule='minmax'` needs somewhere to put the minimum: set `zero_point=True` or"
                " an `offset` type, or use `rule='absmax'`."
            )
        if rule in ("signed_absmax", "absmax_full") and not (
            element.kind == "int" and element.qmin < -element.qmax
        ):
            raise ValueError(
                f"`rule={rule!r}` uses the level that only the negative side has; {self.element!r}"
                " has none."
            )
        if rule == "signed_absmax" and not holds_sign(self.scale):
            raise ValueError(
                f"`rule='signed_absmax'` needs a signed scale; ({self.scale}) has no sign."
            )

    def _check_activation(self, element: numerics.Element) -> None:
        if self.activation is not None and numerics.get_element(self.activation).kind == "int":
            signed = element.kind == "int" and element.qmin < 0
            if not signed or self.zero_point or self.offset is not None:
                raise ValueError(
                    f"`activation={self.activation!r}` multiplies integers: it needs a signed"
                    f" integer element without zero point or offset, got {self.element!r}."
                )
        if self.activation is not None and (self.zero_point or self.offset is not None):
            raise ValueError(
                f"`activation={self.activation!r}` needs a weight without zero point or offset."
            )
        if self.activation_scale not in ACTIVATION_SCALES:
            raise ValueError(
                f"`activation_scale` must be one of {', '.join(ACTIVATION_SCALES)},"
                f" got {self.activation_scale!r}."
            )
        if self.activation is None and self.activation_scale != "token":
            raise ValueError(
                f"`activation_scale={self.activation_scale!r}` says how activations are quantized:"
                f" set `activation` too, to one of {', '.join(ACTIVATIONS)}."
            )
        if self.activation_scale == "group" and self.group_size is None:
            raise ValueError(
                "`activation_scale='group'` is a step for each group of the weight's rows: set"
                " `group_size` too, such as 128, or use activation_scale='token'."
            )
        capacity = self.outlier_capacity
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise ValueError(f"`outlier_capacity` must be a positive integer, got {capacity!r}.")
        if self.outliers is None:
            if capacity != type(self).outlier_capacity:
                raise ValueError(
                    "`outlier_capacity` is the room for outliers: set their threshold `outliers`"
                    " too, such as 6.0."
                )
            return
        number = isinstance(self.outliers, int | float) and not isinstance(self.outliers, bool)
        if not number or not 0 < self.outliers < math.inf:
            raise ValueError(
                "`outliers` must be None or a positive magnitude, such as 6.0,"
                f" got {self.outliers!r}."
            )
        if self.activation != "int8" or self.activation_scale != "token":
            raise ValueError(
                "`outliers` leave an int8 product: it needs `activation='int8'` with"
                f" `activation_scale='token'`, got {self.activation!r} with"
                f" {self.activation_scale!r}."
            )

    # ---- derived ----

    @property
    def _per_channel(self) -> Format:
        scale = "token" if self.activation_scale == "group" else self.activation_scale
        return dataclasses.replace(self, group_size=None, activation_scale=scale)

    @property
    def weight_only(self) -> Format:
        """The format of the same storage, whose products leave the activation as it is."""
        if self.activation is None:
            return self
        return dataclasses.replace(
            self,
            activation=None,
            activation_scale="token",
            outliers=None,
            outlier_capacity=type(self).outlier_capacity,
        )

    @property
    def scale_rule(self) -> str:
        """The rule in force: `rule`, or the element's default."""
        if self.rule is not None:
            return self.rule
        if self.zero_point or self.offset is not None:
            return "minmax"
        return "absmean" if self.element == "ternary" else "absmax"

    @property
    def granularity(self) -> str:
        """One of "tensor", "channel", "group", "block", for tables and messages."""
        if self.group_columns == 1:
            return "channel" if self.group_size is None else "group"
        if self.group_size is None and self.group_columns is None:
            return "tensor"
        return "block"

    def groups(self, K: int, N: int) -> tuple[int, int]:
        """Returns `(G, C)`, the shape of the scales of a `[K, N]` weight."""
        G = 1 if self.group_size is None else -(-K // self.group_size)
        C = 1 if self.group_columns is None else -(-N // self.group_columns)
        return G, C

    def fit(self, K: int) -> Format:
        """Returns the format with its remainder policy applied to a contraction of length K.

        Raises:
          ValueError: if `group_size` does not divide K and `remainder` is "error".
        """
        g = self.group_size
        if g is None or K % g == 0:
            return self
        if self.remainder == "ragged":
            # One group over all of K is per channel: its scale then shards like one.
            return self if g < K else self._per_channel
        if self.remainder == "shrink":
            divisor = next(d for d in range(min(g, K), 0, -1) if K % d == 0)
            return dataclasses.replace(self, group_size=divisor)
        best = next(d for d in range(min(g, K), 0, -1) if K % d == 0)
        raise ValueError(
            f"group_size={g} does not divide the contraction length {K}. Use a divisor"
            f" (the largest below is {best}), remainder='ragged' for a shorter last group of"
            f" {K % g}, remainder='shrink' to take {best}, or group_size=None for per channel."
        )

    def bits_per_weight(self, K: int, N: int) -> float:
        """Returns the storage cost per weight of a `[K, N]` array, padding included.

        Raises:
          ValueError: if `group_size` does not divide K and `remainder` is "error".
        """
        element = numerics.get_element(self.element)
        if self.flatten:
            K, N = K * N, 1
        G, C = self.fit(K).groups(K, N)
        bits = 8.0 * packing.packed_rows(K, element.bits) * N
        bits += _scale_bits(self.scale, G, C)
        if self.offset is not None:
            bits += _scale_bits(self.offset, G, C)
        if self.zero_point:
            bits += 8.0 * packing.packed_rows(G, element.bits) * C
        return bits / (K * N)

    # ---- text ----

    def __str__(self) -> str:
        """A short name for tables: `int4 g128 zp bf16`."""
        short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
        parts = [self.element]
        if self.granularity == "group":
            parts.append(f"g{self.group_size}")
        elif self.granularity == "block":
            k = "all" if self.group_size is None else self.group_size
            n = "all" if self.group_columns is None else self.group_columns
            parts.append(f"b{k}x{n}")
        else:
            parts.append("ch" if self.granularity == "channel" else "tensor")
        if self.zero_point:
            parts.append("zp")
        scale = self.scale
        parts.append(short.get(scale, scale) if isinstance(scale, str) else f"({scale})")
        if self.offset is not None:
            offset = self.offset
            parts.append("+" + (short.get(offset, offset) if isinstance(offset, str) else "q"))
        if self.activation:
            dynamic = self.activation_scale == "token"
            parts.append(f"a:{self.activation}" + ("" if dynamic else f"/{self.activation_scale}"))
        if self.outliers is not None:
            parts.append(f"o>={self.outliers:g}")
        return " ".join(parts)

    def __repr__(self) -> str:
        """The constructor call, without defaults."""
        fields = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        return f"Format({', '.join(f'{f.name}={v!r}' for f, v in fields if v != f.default)})"

    def to_dict(self) -> dict[str, Any]:
        """Returns a plain dict that `from_dict` reads back; defaults are left out."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, Format):
                value = value.to_dict()
            out[field.name] = "all" if field.name == "group_columns" and value is None else value
        return out

    @classmethod
    def from_dict(cls, spec: dict[str, Any], *, where: str = "format") -> Format:
        """Builds a Format from a dict, as found in TOML or in a checkpoint's manifest.

        Raises:
          ValueError: for an unknown key or a bad value; the message starts with `where`.
        """
        if not isinstance(spec, dict):
            raise ValueError(f"{where}: expected a table of Format fields, got {spec!r}.")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(spec) - known)
        if unknown:
            raise ValueError(
                f"{where}: unknown key {unknown[0]!r}. Known: {', '.join(sorted(known))}."
            )
        if "element" not in spec:
            raise ValueError(f"{where}: `element` is missing.")
        values = dict(spec)
        for name in ("scale", "offset"):
            if isinstance(values.get(name), dict):
                values[name] = cls.from_dict(values[name], where=f"{where}.{name}")
        for name in ("group_size", "group_columns"):
            if values.get(name) == "all":
                values[name] = None
        try:
            return cls(**values)
        except (ValueError, TypeError) as e:
            raise ValueError(f"{where}: {e}") from None


def _scale_bits(scale: str | Format, G: int, C: int) -> float:
    if isinstance(scale, Format):
        return scale.bits_per_weight(G, C) * G * C
    return {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0}.get(scale, 8.0) * G * C


def holds_sign(scale: str | Format) -> bool:
    """Whether a scale of either sign can be stored, in any mixture."""
    if isinstance(scale, Format):
        asymmetric = scale.zero_point or scale.offset is not None
        return asymmetric or (
            numerics.get_element(scale.element).qmin < 0 and holds_sign(scale.scale)
        )
    return scale != "e8m0"


def power_of_two_below(value: float) -> float:
    """Returns the largest power of two not above `value`: the exponent an e8m0 scale divides by."""
    return 2.0 ** math.floor(math.log2(value))
