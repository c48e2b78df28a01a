"""QTensor: one stored array, and the quantization and dequantization of one array."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax import kquants, numerics, packing, scales
from qjax.format import Format
from qjax.layout import DEFAULT, Layout, flattened

PARTS = ("data", "scale", "zero", "pre_scale", "act_scale", "perm")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """One quantized array: a pytree of packed codes and scales, with its format as static data.

    With the canonical weight [*lead, K, N], `G, C = format.groups(K, N)`, and codes of b bits:

    Attributes:
      data: packed codes, uint8 [*lead, K * b / 8, N] (see `qjax.packing`), or the native 8-bit
        type [*lead, K, N].
      scale: [*lead, G, C] in the format's scale type, or a QTensor of that shape.
      zero: None; integer zero points packed like `data`, [*lead, G * b / 8, C]; or the float
        offsets [*lead, G, C], possibly a QTensor.
      format: static. Its group size divides K, or the last group is shorter.
      layout: static. How the logical axes map to [*lead, K, N].
      dtype: static. Name of the logical (dequantized) dtype.
      pad: static. Zero codes at the end of each packed column, 0 unless K is no multiple of
        `packing.unit(b)`.
      pre_scale: None; or float32 [*lead, K] that activations are multiplied by before they are
        quantized. The codes hold W' of y = (x * pre_scale) @ W', so that the logical weight is
        diag(pre_scale) @ W': smoothing that no neighbouring layer could absorb.
      act_scale: None; or float32 [*lead], the step of the codes of x * pre_scale, for formats with
        `activation_scale="static"`.
      perm: None; or int32 [*lead, K]: stored row i is row perm[i] of the weight. Groups are of rows
        that lie together in storage, which GPTQ's act-order chose by importance.

    All static fields stay true when `vmap` or `scan` takes away a leading axis and when a mesh
    shards K, N or a leading axis: shapes are read off `data`.

    A QTensor is no array and never turns into one by itself: run the function that uses it as
    `qjax.apply(fn)`, or call `qjax.dequantize`.
    """

    data: Any
    scale: Any
    zero: Any
    format: Format
    layout: Layout
    dtype: str
    pad: int
    pre_scale: Any = None
    act_scale: Any = None
    perm: Any = None

    # ---- pytree ----

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[Any, ...]]:
        key = jax.tree_util.GetAttrKey
        children = tuple((key(name), getattr(self, name)) for name in PARTS)
        return children, (self.format, self.layout, self.dtype, self.pad)

    @classmethod
    def tree_unflatten(cls, aux, children):
        data, scale, zero, *factors = children
        fmt, layout, dtype, pad = aux
        return cls(data, scale, zero, fmt, layout, dtype, pad, *factors)

    # ---- shapes ----

    @property
    def element(self) -> numerics.Element:
        return numerics.get_element(self.format.element)

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """`(*lead, K, N)`."""
        *lead, rows, N = self.data.shape
        K = rows * 8 // self.element.bits - self.pad
        return (*lead, K, N)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape: that of the array it stands for."""
        *lead, K, N = self.canonical_shape
        return self.layout.logical_shape(tuple(lead), K, N)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.size

    @property
    def data_axes(self) -> str:
        """The order in which `data` has the axes K and N, after the leading ones."""
        return "kn"

    @property
    def scale_axes(self) -> str:
        """The order in which an array of scales has the axes G and C, after the leading ones."""
        return "gc"

    def stored_scales(self) -> tuple[Any, Any]:
        """Returns scales and offsets as the checkpoint has them; see `canonical`."""
        return self.scale, self.zero

    def parts(self) -> tuple[int, int]:
        """Returns into how many parts K and N can be cut as far as a kernel cares."""
        *_, K, N = self.canonical_shape
        return K, N

    def canonical(self) -> QTensor:
        """Returns it with `data` as the checkpoint has it; only `qjax.prepare` changes that."""
        return self

    def check_codes(self, path: str = "") -> None:
        """Refuses codes that are no bytes any more: as numbers of another type they mean nothing.

        Raises:
          TypeError: naming the path, if there is one.
        """
        stored = {"codes": self.data, "zero points": self.zero if self.format.zero_point else None}
        for what, array in stored.items():
            dtype = getattr(array, "dtype", None)
            if dtype is not None and jnp.dtype(dtype).itemsize != 1:
                raise TypeError(
                    f"{path or 'a QTensor'}: its {what} are {dtype}, not bytes: something cast all"
                    " arrays of the tree. Cast float parameters before they are quantized, and"
                    " leave QTensors out: `jax.tree.map(..., is_leaf=qjax.is_qtensor)`."
                )

    @property
    def zero_unit(self) -> int:
        """The fewest groups whose integer zero points lie in bytes of their own."""
        return packing.unit(self.element.bits) if self.element.is_packed else 1

    def zero_codes(self) -> Array:
        """Returns the codes of integer zero points, each in an element of its own."""
        if not self.element.is_packed:
            return self.zero
        *_, K, N = self.canonical_shape
        G, _ = self.format.groups(K, N)
        bits = self.element.bits
        return packing.unpack(self.zero, bits, packing.padding(G, bits))

    def zero_points(self) -> Float[Array, "*b G C"]:
        """Returns the integer zero points in float32."""
        return numerics.decode(self.zero_codes(), self.element)

    def codes_of_rows(self, rows: Int[Array, " i"]) -> Array:
        """Returns the codes [i, N] of stored rows of a weight [K, N]."""
        return packing.unpack_rows(self.data, self.element.bits, rows)

    def columns(self, take: Callable[[Array, int], Array]) -> QTensor:
        """Returns columns of a weight every column of which has scales of its own.

        Args:
          take: function (array, axis) that cuts an axis of N entries.
        """
        cut = lambda a: None if a is None else take(a, a.ndim - 1)
        data = take(self.data, self.data.ndim - 2 + self.data_axes.index("n"))
        return dataclasses.replace(self, data=data, scale=cut(self.scale), zero=cut(self.zero))

    def __repr__(self) -> str:
        try:
            shape = "x".join(map(str, self.shape))
        except (AttributeError, TypeError, ValueError):  # in tree_map children are anything
            return f"QTensor({self.format}, children={type(self.data).__name__})"
        extra = "".join(f", {n}" for n in PARTS[3:] if getattr(self, n) is not None)
        return (
            f"QTensor({shape} {self.dtype} as {self.format}, {self.bits_per_weight:.3f} bpw{extra})"
        )

    # ---- refusing to be an array ----

    def _refuse(self, *_, **__):
        raise TypeError(
            f"{self!r} was used as an array. Quantized weights run inside"
            " `qjax.apply(fn)(qparams, ...)`, which leaves fn as it is; `qjax.dequantize` gives the"
            " float array."
        )

    __jax_array__ = __array__ = __iter__ = __len__ = __getitem__ = __contains__ = _refuse
    __bool__ = __int__ = __float__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __matmul__ = __rmatmul__ = __truediv__ = __rtruediv__ = __floordiv__ = _refuse
    __neg__ = __pos__ = __abs__ = __pow__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse

    if not TYPE_CHECKING:  # a checker knows the attributes there are

        def __getattr__(self, name: str):
            raise AttributeError(
                f"a QTensor has no {name!r}: it is no array. Run the function that uses it as"
                " `qjax.apply(fn)(qparams, ...)`, or call `qjax.dequantize`.",
                name=name,
                obj=self,
            )


def in_order[T](axes: str, g: T, c: T) -> tuple[T, T]:
    """Returns what belongs to G and C in the order of `scale_axes`; or from it, as G and C."""
    return (g, c) if axes == "gc" else (c, g)


def is_qtensor(x: Any) -> bool:
    """Whether `x` is a QTensor; the `is_leaf` of tree functions that treat it as one array."""
    return isinstance(x, QTensor)


# ---- one canonical array ------------------------------------------------------------------------


def store_scales(values: Float[Array, "*b G C"], fmt: str | Format) -> Any:
    """Stores scales in a plain type, or as a QTensor of their own.

    As integers of a scale those that would round to 0 are the least that is not: a group of small
    weights beside large ones keeps its levels, where 0 would take all of them.
    """
    stored = store_offsets(values, fmt)
    if not isinstance(fmt, Format) or fmt.zero_point or fmt.offset is not None:
        return stored
    if stored.element.kind != "int":
        return stored
    step, own = read_scales(stored)[0], stored.layout.to_canonical(values)
    least = jnp.abs(scales.spread(step, stored.format, *own.shape[-2:]))
    kept = jnp.where((own != 0) & (jnp.abs(own) < least), jnp.sign(own) * least, own)
    return quantize_array(stored.layout.from_canonical(kept), fmt, stored.layout, scale=step)


def store_offsets(values: Float[Array, "*b G C"], fmt: str | Format) -> Any:
    """Stores offsets in a plain type, or as a QTensor of their own."""
    if isinstance(fmt, Format):
        layout = flattened(values.shape[-2]) if fmt.flatten else DEFAULT
        return quantize_array(values, fmt, layout)
    return numerics.round_scale(values, fmt)


def _as_stored(found: Any, fmt: str | Format) -> Any:
    """Returns scales that a search has already stored: as they are, or as a QTensor."""
    if not isinstance(fmt, Format):
        return found
    codes, scale = found
    element = numerics.get_element(fmt.element)
    pad = packing.padding(codes.shape[-2], element.bits) if element.is_packed else 0
    layout = Layout.parse(DEFAULT, codes.shape)
    return QTensor(pack_codes(codes, element), scale, None, fmt, layout, "float32", pad)


def restore_scales(stored: Any, fmt: str | Format) -> Float[Array, "*b G C"]:
    """Returns what `store_scales` stored, in float32."""
    return dequantize_array(stored) if isinstance(fmt, Format) else numerics.read_scale(stored, fmt)


def pack_codes(codes: Array, element: numerics.Element) -> Array:
    """Returns codes as they are stored: packed along K, or in their native type."""
    return packing.pack(codes, element.bits) if element.is_packed else codes


def quantize_array(
    w: Float[Array, "*shape"],
    fmt: Format,
    layout: str | Layout = DEFAULT,
    *,
    importance: Float[Array, "*b K"] | None = None,
    scale: Float[Array, "*b G C"] | None = None,
    pre_scale: Float[Array, "*b K"] | None = None,
    act_scale: Float[Array, "*b"] | None = None,
) -> QTensor:
    """Quantizes one array; pure, works under `jit`, `vmap` and `eval_shape`.

    q = round(w / scale) (+ zero_point), with the scale already rounded to its stored type, so that
    the error of a value inside the range is at most half a step of the *stored* scale.

    Args:
      w: the weight, any float dtype.
      fmt: how to store it.
      layout: which axes are contracted, as letters ("kn", "nk", "kkn", see `Layout`).
      importance: weights of the error of row k for `rule="mse"`, e.g. a Hessian diagonal; with a
        `pre_scale`, of the row that is quantized.
      scale: scales to store instead of those that the format's rule chooses, e.g. learned ones.
      pre_scale: factors of the activation's channels, not 0: what is quantized is then
        w / pre_scale[:, None].
      act_scale: the static step of the activation's codes, after `pre_scale`.

    Raises:
      ValueError: if the group size does not divide K and `fmt.remainder` is "error", if a
        `scale`, `pre_scale` or `act_scale` does not fit the weight, or if a `scale` is given for a
        format with zero points or offsets.
    """
    if not isinstance(layout, Layout):
        layout = Layout.parse(layout, w.shape)
    dtype = jnp.dtype(w.dtype).name
    w = layout.to_canonical(w).astype(jnp.float32)
    *lead, K, N = w.shape
    pre_scale = _fitting("pre_scale", pre_scale, (*lead, K))
    act_scale = _fitting("act_scale", act_scale, tuple(lead))
    if pre_scale is not None:
        w = w / pre_scale[..., None]
    fmt = fmt.fit(K)
    element = numerics.get_element(fmt.element)
    pad = packing.padding(K, element.bits) if element.is_packed else 0
    if fmt.rule == "ggml" and scale is None:
        found = kquants.search(w, fmt, importance)
        return QTensor(
            pack_codes(found.codes, element), _as_stored(found.scale, fmt.scale),
            None if fmt.offset is None else _as_stored(found.offset, fmt.offset), fmt, layout,
            dtype, pad, pre_scale, act_scale,
        )  # fmt: skip
    minimum = None
    scale = _fitting("scale", scale, (*lead, *fmt.groups(K, N)))
    if scale is None:
        scale, minimum = scales.choose(w, fmt, importance)
    elif fmt.zero_point or fmt.offset is not None:
        raise ValueError(f"a given `scale` needs a format without zero point or offset, got {fmt}.")
    scale_stored = store_scales(scale, fmt.scale)
    scale = restore_scales(scale_stored, fmt.scale)
    zero_stored = zero = None
    if fmt.zero_point and minimum is not None:
        _, zero = scales.stored_pair(scale, minimum, fmt, element)
        zero_stored = pack_codes(numerics.encode(zero, element), element)
    elif fmt.offset is not None and minimum is not None:
        zero_stored = store_offsets(minimum, fmt.offset)
        zero = restore_scales(zero_stored, fmt.offset)

    codes = numerics.encode(scaled(w, scale, zero, fmt), element)
    return QTensor(
        pack_codes(codes, element), scale_stored, zero_stored, fmt, layout, dtype, pad, pre_scale,
        act_scale,
    )  # fmt: skip


_AXES = {"scale": "[*lead, G, C]", "pre_scale": "[*lead, K]", "act_scale": "[*lead]"}


def _fitting(name: str, a: Any, shape: tuple[int, ...]) -> Array | None:
    """Returns `a` in float32, after checking that it has the shape that the weight asks for."""
    if a is None:
        return None
    a = jnp.asarray(a, jnp.float32)
    if a.shape != shape:
        raise ValueError(
            f"`{name}` must have the shape {shape} of this weight's {_AXES[name]}, got {a.shape}."
        )
    return a


def scaled(w: Array, scale: Array, zero: Array | None, fmt: Format) -> Array:
    """Returns canonical `w` [*b, K, N] in units of its element: what `numerics.encode` rounds."""
    K, N = w.shape[-2:]
    s = scales.spread(scale, fmt, K, N)
    if zero is None:
        return scales.safe_divide(w, s)
    z = scales.spread(zero, fmt, K, N)
    if fmt.offset is not None:
        return scales.safe_divide(w - z, s)
    # Round before adding the zero point: round(w / s) + z is what "half a step" is about.
    return jnp.round(scales.safe_divide(w, s)) + z


def unscaled(q: Array, scale: Array, zero: Array | None, fmt: Format) -> Array:
    """Returns the canonical float32 weight of values `q` [*b, K, N]; the inverse of `scaled`."""
    K, N = q.shape[-2:]
    s = scales.spread(scale, fmt, K, N)
    if zero is None:
        return q * s
    z = scales.spread(zero, fmt, K, N)
    return q * s + z if fmt.offset is not None else (q - z) * s


def read_scales(qt: QTensor) -> tuple[Float[Array, "*b G C"], Float[Array, "*b G C"] | None]:
    """Returns the float32 scales, and the zero points or offsets, of a QTensor."""
    stored, offset = qt.stored_scales()
    scale = restore_scales(stored, qt.format.scale)
    if qt.format.offset is not None:
        return scale, restore_scales(offset, qt.format.offset)
    return scale, qt.zero_points() if qt.format.zero_point else None


def read_codes(qt: QTensor) -> Float[Array, "*b K N"]:
    """Returns the element values q of a QTensor in float32, unscaled."""
    qt.check_codes()
    qt = qt.canonical()
    codes = qt.data
    if qt.element.is_packed:
        codes = packing.unpack(codes, qt.element.bits, qt.pad)
    return numerics.decode(codes, qt.element)


def dequantize_canonical(qt: QTensor) -> Float[Array, "*b K N"]:
    """Returns the float32 weight in canonical order."""
    w = unscaled(read_codes(qt), *read_scales(qt), qt.format)
    if qt.perm is not None:
        w = jnp.take_along_axis(w, jnp.argsort(qt.perm, axis=-1)[..., None], axis=-2)
    return w if qt.pre_scale is None else qt.pre_scale[..., None] * w


def dequantize_rows(qt: QTensor, rows: Int[Array, " i"]) -> Float[Array, "i N"]:
    """Returns rows of the canonical float32 weight [K, N], reading only them.

    Args:
      qt: a weight without leading axes.
      rows: integers in range.
    """
    wanted = rows
    if qt.perm is not None:
        rows = jnp.argsort(qt.perm)[rows]
    g = qt.format.group_size
    at = jnp.zeros_like(rows) if g is None else rows // g

    def of_groups(stored, fmt):
        if isinstance(stored, QTensor) and not stored.format.flatten:
            return dequantize_rows(stored, at)
        return restore_scales(stored, fmt)[at]

    stored, offset = qt.stored_scales()
    zero = None
    if qt.format.offset is not None:
        zero = of_groups(offset, qt.format.offset)
    elif qt.format.zero_point:
        zero = qt.zero_points()[at]
    w = unscaled(
        numerics.decode(qt.codes_of_rows(rows), qt.element),
        of_groups(stored, qt.format.scale),
        zero,
        dataclasses.replace(qt.format, group_size=1),
    )
    return w if qt.pre_scale is None else qt.pre_scale[wanted][:, None] * w


def dequantize_columns(qt: QTensor, columns: Int[Array, " i"]) -> Float[Array, "i K"]:
    """Returns columns of the canonical float32 weight [K, N], each as a row, reading only them.

    Args:
      qt: a weight without leading axes, not prepared.
      columns: integers in range.
    """
    scale, zero = read_scales(qt)
    shared_by = qt.format.group_columns
    at = jnp.zeros_like(columns) if shared_by is None else columns // shared_by
    picked = dataclasses.replace(qt, data=jnp.take(qt.data, columns, axis=1, mode="clip"))
    w = unscaled(
        read_codes(picked),
        jnp.take(scale, at, axis=1, mode="clip"),
        None if zero is None else jnp.take(zero, at, axis=1, mode="clip"),
        dataclasses.replace(qt.format, group_columns=1),
    ).T
    if qt.perm is not None:
        w = w[:, jnp.argsort(qt.perm)]
    return w if qt.pre_scale is None else w * qt.pre_scale


def dequantize_array(qt: QTensor) -> Array:
    """Returns the logical array that `qt` stands for, in its dtype."""
    return qt.layout.from_canonical(dequantize_canonical(qt)).astype(qt.dtype)
