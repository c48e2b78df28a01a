"""prepare: weights in the layout that a device's kernels read, derived once and reversibly."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import interleave, nested, planes, tuning
from pallas_kernels.triton import versions
from pallas_kernels.tuning import TILE_K, TILE_N
from qjax import _compat, numerics, packing
from qjax.format import Format
from qjax.paths import path_str
from qjax.qtensor import PARTS, QTensor, is_qtensor, read_scales

# Element -> bits that turn a stored byte into the kernel's. Kernels take signed codes of 4 and 8
# bits: an unsigned one minus the middle of its range is its bits with the highest flipped.
_FLIPPED = {
    **dict.fromkeys(("int2", "uint2", "ternary", "int3", "uint3"), 0),
    **dict.fromkeys(("int4", "uint4"), 0x88),
    "int8": 0,
    "uint8": 0x80,
    "e4m3": 0,
    **dict.fromkeys(("nf4", "fp4", "e2m1", "iq4_nl"), 0),  # looked up
}
# Element and quantized activation -> element of scales of groups, times which weights of 4 bits are
# what activations are, `Prepared.multiples`.
_MULTIPLES = {("int4", "int8"): "int8_max15", ("e2m1", "e4m3"): "e4m3_for_e2m1"}


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prepared(QTensor):
    """A QTensor whose codes and zero points lie as the Hopper kernels read them.

    Attributes:
      data: bytes [*lead, N', K' * b / 8], K contiguous: q minus the middle of an unsigned type's
        range, in two's complement, or the code of a table; two of 4 bits in a byte, the first in
        the lower half. Or e4m3. All are in the order of `pallas_kernels.interleave` and uint8, but
        what is multiplied as bytes by rounded activations: codes of 8 bits are as they are, int8 or
        e4m3, and those of a table int8, with their signs apart. Codes of 2 and 3 bits as stored, in
        the order of `pallas_kernels.planes`. N' and K' are N and K up to multiples of 128, and K'
        of the group size; the codes that were added are 0.
      scale: as it was; but [*lead, C, G] if blocks of 128 x 128 have one, and a `PreparedScale` if
        kernels decode what is nested.
      zero: None; integer zero points minus the least of their type, a byte each, uint8 [*lead, G,
        C]; or the offsets.
      extra: static. (K' - K, N' - N).
    """

    extra: tuple[int, int] = (0, 0)

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[Any, ...]]:
        key = jax.tree_util.GetAttrKey
        children = tuple((key(name), getattr(self, name)) for name in PARTS)
        return children, (self.format, self.layout, self.dtype, self.pad, self.extra)

    @classmethod
    def tree_unflatten(cls, aux, children):
        data, scale, zero, *factors = children
        fmt, layout, dtype, pad, extra = aux
        return cls(data, scale, zero, fmt, layout, dtype, pad, *factors, extra=extra)

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        *lead, N, K = self.data.shape
        return (*lead, K * 8 // self.element.bits - self.extra[0], N - self.extra[1])

    @property
    def data_axes(self) -> str:
        return "nk"

    @property
    def scale_axes(self) -> str:
        return scale_axes(self.format)

    def stored_scales(self) -> tuple[Any, Any]:
        return by_group(self.scale, self.format), self.zero

    def parts(self) -> tuple[int, int]:
        """Returns into how many parts K and N can be cut.

        K in whole groups and tiles of the kernel. N where columns share no scale; what is no whole
        tile then is padded on every call.
        """
        (*_, K, N), (extra_k, extra_n) = self.canonical_shape, self.extra
        G, C = self.format.groups(K, N)
        k_parts = K // TILE_K if G == 1 or G * (self.format.group_size or K) == K else 1
        k_parts = k_parts if G == 1 else math.gcd(k_parts, G)
        shared_by = [self.format.group_columns or N] if C > 1 else []
        if self._decoded == "nested":
            shared_by.append(self.scale.format.group_columns)
        n_parts = math.gcd(*(1 if N % n else N // n for n in shared_by)) if shared_by else N
        return 1 if extra_k else k_parts, 1 if extra_n else n_parts

    def canonical(self) -> QTensor:
        scale, _ = self.stored_scales()
        scale = scale.canonical() if is_qtensor(scale) else scale
        data = canonical_codes(self.data, self.format, self.extra)
        return QTensor(**fields_of(self, data=data, scale=scale, zero=stored_zeros(self)))

    @property
    def zero_unit(self) -> int:
        return 1

    def zero_codes(self) -> Array:
        return self.zero

    def zero_points(self) -> Float[Array, "*b G C"]:
        return read_zeros(self.zero, self.format)

    def float_scale(self) -> Float[Array, "*b g c"]:
        """Returns scales in float32 in the order of `scale_axes`."""
        if not isinstance(self.format.scale, str):
            return _swapped(read_scales(self)[0], self.format)
        return numerics.read_scale(self.scale, self.format.scale)

    def stored_scale(self) -> tuple[Array, Float[Array, "*b"] | None] | None:
        """Returns scales that the kernel decodes and the factor of the product, or None.

        They are powers of two (uint8), or e4m3 with or without one scale of their own. Their order
        is that of `scale_axes`.
        """
        if self._decoded != "stored":
            return None
        if isinstance(self.scale, QTensor):
            codes = _swapped(self.scale.data, self.format)
            return codes, read_scales(self.scale)[0][..., 0, 0]
        return self.scale, None

    def nested_scale(self) -> tuple[Array, Float[Array, "*b C g"]] | None:
        """Returns uint8 codes [*b, G, N] of scales that the kernel decodes, or None.

        And second, of every block of their columns factors, and maybe offsets, `Nested.outer`.
        """
        if self._decoded != "nested":
            return None
        return self.scale.data, self.scale.scale

    def multiples(self) -> tuple[Array, Float[Array, "*b 1 N"]] | None:
        """Returns codes [*b, G, N] of what kernels multiply codes by, and scales of columns.

        None is for scales that are no such multiples.
        """
        if self._decoded != "multiples":
            return None
        return self.scale.data, read_scales(self.scale)[0]

    @property
    def most_in_bytes(self) -> float:
        """For how many tokens rounded activations are multiplied as bytes."""
        return most_in_bytes(self.format, self.canonical_shape[-2])

    @property
    def _decoded(self) -> str | None:
        return _decoded_by_kernels(self.format, self.canonical_shape[-2])

    def in_front(self, *, transposed: bool) -> str:
        """Returns what XLA does beside the kernel on every call, for `qjax.explain`."""
        fmt, decoded = self.format, self._decoded
        is_alone = not transposed and self.data.ndim == 2  # else nested scales are decoded, too
        has_blocks = self.scale_axes == "cg" and not transposed
        is_stored = decoded == "stored" and not has_blocks
        is_read = has_floats(fmt) or is_stored or (decoded in ("nested", "multiples") and is_alone)
        text = self._made_of_scales(is_read, has_blocks)
        if fmt.scale == "e8m0" and decoded == "stored":
            text += ", for float16 scales decoded in front of it"
        if are_apart(self.data, fmt) and not is_alone:
            text += ", codes put in another order in front of it"
        is_due = fmt.offset is not None
        return text + (", offsets by a product of their own" if is_due else "")

    def _made_of_scales(self, is_read: bool, has_blocks: bool) -> str:
        fmt, (*_, K, N) = self.format, self.canonical_shape
        G, C = fmt.groups(K, N)
        g = K + self.extra[0] if G == 1 else fmt.group_size
        is_wide = C != N and G * C > 1 and not has_blocks  # one for all costs nothing
        rows = (K + self.extra[0]) // (g or K)
        is_padded = rows != G or bool(self.extra[1] and not has_blocks)
        # TMA takes rows of whole 16 bytes.
        if has_blocks and G > 1:
            is_padded |= rows * (4 if short_scale(fmt) is None else 2) % 16 > 0
        elif self._decoded == "nested":
            is_padded |= self.scale.scale.shape[-1] // G * rows * 4 % 16 > 0
        made = {"decoded": not is_read, "repeated": is_wide, "padded": is_padded}
        if not any(made.values()):
            return ""
        what = "scales and zero points" if fmt.zero_point and (is_wide or is_padded) else "scales"
        return f", {what} {' and '.join(how for how in made if made[how])} in front of it"

    def columns(self, take: Callable[[Array, int], Array]) -> QTensor:
        N, (extra_k, _) = self.canonical_shape[-1], self.extra
        whole = dataclasses.replace(self, data=self.data[..., :N, :], extra=(extra_k, 0))
        data = (cut := super(Prepared, whole).columns(take)).data
        more = -data.shape[-2] % TILE_N
        data = jnp.pad(data, [(0, 0)] * (data.ndim - 2) + [(0, more), (0, 0)])
        return dataclasses.replace(cut, data=data, extra=(extra_k, more))

    def codes_of_rows(self, rows: Int[Array, " i"]) -> Array:
        bits = self.element.bits
        data = self.data[: self.canonical_shape[-1]]
        if bits < 4:
            return planes.codes_at(data, bits, rows).T
        if bits == 8:
            at = rows if data.dtype != jnp.uint8 else interleave.place_in_pairs(rows)
            return _flipped(_retyped(data[:, at].T, self.element), self.format.element)
        stored = _as_uint8(data)
        bits_at = lambda at, bit: (
            _flipped(stored[:, at].T, self.format.element) >> bit.astype(jnp.uint8)[:, None]
        )
        if are_apart(data, self.format):
            code, sign = interleave.places_apart(rows)
            magnitude = interleave.magnitude_at(bits_at(*code) & jnp.uint8(7))
            return magnitude | (bits_at(*sign) & jnp.uint8(1)) << 3
        place = interleave.place(rows, looked_up=self.element.kind == "table")
        return bits_at(*place) & jnp.uint8(15)


@jax.tree_util.register_pytree_with_keys_class
class PreparedScale(QTensor):
    """Nested scales of a prepared weight, of which `pallas_kernels.nested` says what kernels read.

    Attributes:
      data: their codes, uint8 [*lead, G, N], as they were.
      scale: float32, `Nested.outer`: factors of blocks of N, [*lead, C, G], or with the offsets
        that they had [*lead, C, 2 * G].
      zero: None.
    """

    @property
    def scale_axes(self) -> str:
        return "cg"

    def stored_scales(self) -> tuple[Any, Any]:
        types: list[Any] = [self.format.scale]
        types += [] if self.format.offset is None else [self.format.offset]
        own = nested.factors(self.scale, has_offset=len(types) == 2)
        factor, *offset = (a.astype(dtype) for a, dtype in zip(own, types, strict=True))
        return factor, offset[0] if offset else None

    def canonical(self) -> QTensor:
        scale, zero = self.stored_scales()
        return QTensor(**fields_of(self, scale=scale, zero=zero))


def _prepared_scale(qt: QTensor) -> Any:
    """Returns what takes the place of `qt.scale` in a weight that is prepared."""
    if not is_qtensor(qt.scale):
        return _swapped(qt.scale, qt.format)
    if _decoded_by_kernels(qt.format, qt.canonical_shape[-2]) != "nested":
        return qt.scale
    outer = nested.outer_of(*read_scales(qt.scale))
    return PreparedScale(**fields_of(qt.scale, scale=outer, zero=None))


def reason_against(qt: QTensor) -> str | None:
    """Returns why the Hopper kernels cannot read a weight, or None if they can.

    Example:
      >>> import qjax
      >>> qt = qjax.quantize({"w": jnp.ones((256, 8))}, qjax.Format("int4", group_size=8))["w"]
      >>> reason_against(qt)
      'groups of 8: kernels read 16, 32, 64 and multiples of 128'
    """
    fmt = qt.format
    *_, K, N = qt.canonical_shape
    G, C = fmt.groups(K, N)
    g = fmt.group_size
    if fmt.element not in _FLIPPED:
        return f"{fmt.element} codes: kernels read {', '.join(_FLIPPED)}"
    if C not in (1, N) and fmt.group_columns != TILE_N:
        return f"{fmt.group_columns} columns share a scale: kernels take 1, {TILE_N} or all"
    if g is not None and G > 1 and g not in (16, 32, 64) and g % TILE_K:
        return f"groups of {g}: kernels read 16, 32, 64 and multiples of {TILE_K}"
    return None


def prepare(qparams: Any, device: Any = None) -> Any:
    """Returns the tree with weights in the layout of the device's kernels.

    On an NVIDIA GPU of compute capability 9.0 (H100, H200) these are

      weights of 2, 3, 4 and 8 bits (int2 to int4, uint2 to uint4, ternary, int8, uint8, e4m3, and
      tables of 16 levels: nf4, fp4, e2m1, iq4_nl), with or without zero points or offsets, in
      groups of 16, 32, 64 or multiples of 128, per channel or in blocks of 128 x 128. Products of
      them with bfloat16 or float16 activations run on `pallas_kernels.weight_only`, which rounds
      the levels of a table to that type.

      the same with rounded activations. Products of bytes run on `pallas_kernels.eight_bit`: int8
      and int4 weights with int8 activations, and e4m3 and int4 with e4m3, per channel, or in groups
      of 128 for up to 64 tokens, e4m3 for all. Also int4 with int8 if scales are int8_max15, and
      e2m1 with e4m3 if they are e4m3_for_e2m1, in groups. In all others codes are multiplied as
      bfloat16, which has them exactly; what is rounded in groups is rounded to it once more. Why
      more tokens are no bytes, `pallas_kernels.tuning.most_in_bytes` says.

    On one of capability 8.x (A100, RTX 3090, RTX 4090) they are int4, uint4, int8 and uint8
    weights, nf4 and other tables of 16 levels, in groups of 32, 64 or multiples of 128 or per
    channel, and int8 weights with int8 activations. Their products run on `pallas_kernels.triton`,
    which needs Triton and jax-triton.

    `qjax.explain` tells which products do. On any other device the tree is returned as it is.

    A pure function that moves codes and loses nothing: `restore` is its inverse. Stacked weights
    stay stacked. What is prepared computes the same on every platform, but slower where there is
    no kernel for it. Checkpoints hold what was before: `qjax.save` restores.

    Args:
      qparams: a pytree with QTensors; arrays, tracers or ShapeDtypeStructs under `eval_shape`.
      device: a `jax.Device`; or "h100", "a100", "rtx3090" or "rtx4090", for programs that are
        compiled elsewhere. Default: the first device of the default platform.

    Raises:
      ValueError: for a name that is not known.
      RuntimeError: on a GPU of capability 8.x, if Triton or jax-triton are missing or too old.

    Example:
      >>> import qjax
      >>> w = qjax.quantize({"w": jnp.ones((256, 128))}, qjax.Format("int8"))
      >>> prepare(w, "h100")["w"].data.shape
      (128, 256)
    """
    from qjax import ampere  # whose weights are a subclass of those here

    capability = _capability(device, ampere.DEVICES)
    if capability is None:
        return qparams

    def one(leaf):
        if not is_qtensor(leaf) or isinstance(leaf, Prepared):
            return leaf
        if capability == 90:
            return leaf if reason_against(leaf) else _prepared(leaf)
        return leaf if ampere.reason_against(leaf) else ampere.prepared(leaf, capability)

    prepared = jax.tree.map(one, qparams, is_leaf=is_qtensor)
    _warn_of_placement(prepared)
    return prepared


def _warn_of_placement(prepared: Any) -> None:
    """Warns of weights that are sharded so that the kernels cannot read what each device has."""
    from qjax.sharding import beside_kernel

    flat, _ = jax.tree_util.tree_flatten_with_path(prepared, is_leaf=is_qtensor)
    paths: dict[str, list[str]] = {}
    for path, leaf in flat:
        if isinstance(leaf, Prepared) and (why := beside_kernel(leaf)) is not None:
            paths.setdefault(why, []).append(path_str(path))
    for why, of in paths.items():
        some = ", ".join(of[:3]) + (f" and {len(of) - 3} more" if len(of) > 3 else "")
        warnings.warn(f"{some}: {why}.", stacklevel=3)


def _capability(device: Any, names: dict[str, int]) -> int | None:
    """Returns the compute capability of a GPU that there are kernels for, such as 90, or None."""
    if isinstance(device, str):
        known = {"h100": 90} | names
        if device not in known:
            raise ValueError(
                f"`device` must be a jax.Device or one of {', '.join(known)}, got {device!r}."
            )
        return known[device]
    device = jax.devices()[0] if device is None else device
    if device.platform != "gpu":
        return None
    capability = _compat.capability_of(device)
    if not 80 <= capability <= 90:
        return None
    if capability < 90 and (why := versions.missing()):
        raise RuntimeError(
            f"the kernels for a GPU of capability {capability / 10} are in Triton: {why}. Without"
            " `prepare`, plain JAX runs."
        )
    return capability


def against_gpu(qt: QTensor) -> str | None:
    """Returns why no kernel reads a weight as it is on the GPU at hand, or None without a GPU."""
    from qjax import ampere

    if jax.default_backend() != "gpu" or isinstance(qt, Prepared):
        return None
    try:
        capability = _capability(None, ampere.DEVICES)
    except RuntimeError as e:
        return str(e)
    if capability is None:
        return "there are kernels for GPUs of capability 8.0 to 9.0"
    against = reason_against if capability == 90 else ampere.reason_against
    return against(qt) or "it is not prepared, see `qjax.prepare`"


def restore(qparams: Any) -> Any:
    """Returns the tree as it was before `prepare`, bit for bit."""
    one = lambda leaf: leaf.canonical() if is_qtensor(leaf) else leaf
    return jax.tree.map(one, qparams, is_leaf=is_qtensor)


def _prepared(qt: QTensor) -> Prepared:
    *lead, K, N = qt.canonical_shape
    g = qt.format.group_size
    unit, bits = TILE_K if g is None or g >= K else math.lcm(TILE_K, g), qt.element.bits
    extra = (-K % unit, -N % TILE_N)
    data, columns = qt.data, (K + extra[0]) * bits // 8
    if bits < 4:
        data, columns = packing.unpack(data, bits, qt.pad), K + extra[0]
    data = _flipped(data.swapaxes(-1, -2), qt.format.element)
    padding = [(0, 0)] * len(lead) + [(0, extra[1]), (0, columns - data.shape[-1])]
    data = jnp.pad(data, padding)
    if bits < 4:
        data = planes.packed(data, bits)
    elif bits == 4 and qt.element.kind == "int":
        data = interleave.interleaved_nibbles(data)
    elif bits == 4 and most_in_bytes(qt.format, K):
        data = lax.bitcast_convert_type(interleave.signs_apart(data), jnp.int8)
    elif bits == 4:
        data = interleave.interleaved(data)
    elif not most_in_bytes(qt.format, K):
        data = interleave.interleaved_pairs(_as_uint8(data))
    changed = fields_of(qt, data=data, scale=_prepared_scale(qt), zero=zeros_in_bytes(qt))
    return Prepared(**changed, extra=extra)


def zeros_in_bytes(qt: QTensor) -> Any:
    """Returns what takes the place of `qt.zero` in a weight that is prepared."""
    if not qt.format.zero_point:
        return qt.zero
    codes = qt.zero_codes()
    if qt.element.is_packed:
        return codes
    return lax.bitcast_convert_type(codes, jnp.uint8) ^ jnp.uint8(-qt.element.qmin)


def stored_zeros(qt: Prepared) -> Any:
    """Returns the `zero` of the QTensor that a prepared weight was."""
    if not qt.format.zero_point:
        return qt.zero
    element = qt.element
    if element.is_packed:
        return packing.pack(qt.zero, element.bits)
    return lax.bitcast_convert_type(qt.zero ^ jnp.uint8(-element.qmin), element.dtype)


def read_zeros(zero: Array, fmt: Format) -> Float[Array, "*b G C"]:
    """Returns the zero points of a prepared weight in float32."""
    return zero.astype(jnp.float32) + jnp.float32(numerics.get_element(fmt.element).qmin)


def fields_of(qt: QTensor, **changed: Any) -> dict[str, Any]:
    """Returns what a QTensor is made of, with changes."""
    values: dict[str, Any] = {f.name: getattr(qt, f.name) for f in dataclasses.fields(QTensor)}
    return values | changed


def _flipped(data: Array, element: str) -> Array:
    mask = _FLIPPED[element]
    return data ^ jnp.uint8(mask) if mask else data


def _as_uint8(data: Array) -> Array:
    return lax.bitcast_convert_type(data, jnp.uint8)


def _retyped(data: Array, element: numerics.Element) -> Array:
    """Returns codes of 8 bits in the type that a QTensor has them in."""
    return lax.bitcast_convert_type(data, element.dtype)


def canonical_codes(data: Array, fmt: Format, extra: tuple[int, int]) -> Array:
    """Returns the codes [*lead, N', K' in bytes] of a prepared weight as a QTensor stores them."""
    known = numerics.get_element(fmt.element)
    bits = known.bits
    *_, N, columns = data.shape
    if bits < 4:
        codes = planes.codes(data, bits)[..., : N - extra[1], :]
        codes = codes[..., : codes.shape[-1] - extra[0]].swapaxes(-1, -2)
        return packing.pack(codes, bits)
    if bits == 4 and known.kind == "int":
        data = interleave.natural_nibbles(data)
    elif bits == 4 and are_apart(data, fmt):
        data = interleave.signs_together(_as_uint8(data))
    elif bits == 4:
        data = interleave.interleaved(data)
    elif data.dtype == jnp.uint8:
        data = _retyped(interleave.interleaved_pairs(data), known)
    K = columns * 8 // bits - extra[0]
    data = data[..., : N - extra[1], : packing.packed_rows(K, bits)]
    return _flipped(data.swapaxes(-1, -2), fmt.element)


def are_apart(data: Any, fmt: Format) -> bool:
    """Returns whether signs of codes of 4 bits are apart, for a kernel that makes bytes of them."""
    return numerics.get_element(fmt.element).bits == 4 and data.dtype == jnp.int8


def are_natural(data: Any, fmt: Format) -> bool:
    """Returns whether codes of 8 bits lie as they are, for a kernel that multiplies bytes."""
    return numerics.get_element(fmt.element).bits == 8 and data.dtype != jnp.uint8


def looked_up(data: Array, fmt: Format) -> Array:
    """Returns codes of a prepared weight in the order that the weight-only kernels take."""
    if not are_apart(data, fmt):
        return data
    return interleave.interleaved(interleave.signs_together(_as_uint8(data)))


def kernel_codes(data: Array, element: str) -> Array:
    """Returns the codes of a prepared weight in the kernel's type, int4, int8 or e4m3 [.., N', K'].

    Those of 2 and 3 bits are uint8 [.., N', K' * b / 8]. They are the same bytes. Sub-byte types
    are only made here, as XLA copies slices of arrays of them in front of a kernel, and reads
    slices of bytes where they lie.
    """
    known = numerics.get_element(element)
    if known.bits < 4:
        return data
    if known.bits == 8:
        return lax.bitcast_convert_type(data, jnp.int8 if known.kind == "int" else known.dtype)
    return lax.bitcast_convert_type(data, jnp.int4).reshape(*data.shape[:-1], -1)


def zero_of(element: str) -> int | None:
    """Returns what kernels subtract from unsigned codes if there are no zero points; or None.

    None is for tables and floats, which are no such codes.
    """
    known = numerics.get_element(element)
    return int(-known.qmin) if known.kind == "int" else None


def short_scale(fmt: Format) -> str | None:
    """Returns the 16-bit type that scales are stored in and kernels read, or None for others.

    They reach a product in float32: XLA takes a cast back and the one that made them so for none.
    """
    is_short = isinstance(fmt.scale, str) and fmt.scale in ("bfloat16", "float16")
    return str(fmt.scale) if is_short else None


def has_floats(fmt: Format) -> bool:
    """Returns whether scales are stored as floats that every kernel reads."""
    return fmt.scale == "float32" or short_scale(fmt) is not None


def most_in_bytes(fmt: Format, K: int) -> float:
    """Returns for how many tokens products with rounded activations are of bytes: 0 for none."""
    if fmt.activation is None:
        return 0
    return tuning.most_in_bytes(
        fmt.element,
        fmt.activation,
        None if fmt.group_size is None or fmt.group_size >= K else fmt.group_size,
        multiples=_are_of_multiples(fmt),
        of_both=fmt.activation_scale == "group" and fmt.group_columns != TILE_N,
    )


def _are_of_multiples(fmt: Format) -> bool:
    """Returns whether scales times codes are what activations are, and these have steps of rows."""
    if fmt.activation is None or fmt.activation_scale == "group" or fmt.outliers is not None:
        return False
    known = _MULTIPLES.get((fmt.element, fmt.activation))
    return known is not None and _element_of_scales(fmt) == known


def _decoded_by_kernels(fmt: Format, K: int) -> str | None:
    """Returns which scales the Hopper kernels decode; None: no others than floats.

    "stored", "nested" and "multiples" ones: see the methods of `Prepared` with these names.
    """
    if most_in_bytes(fmt, K):
        return "multiples" if _are_of_multiples(fmt) else None
    if fmt.offset is not None:
        return None
    if fmt.scale in ("e8m0", "e4m3", Format("e4m3", group_columns=None)):
        return "stored"
    inner = fmt.scale
    if not isinstance(inner, Format) or fmt.group_columns != 1 or inner.group_columns is None:
        return None
    if fmt.zero_point:  # whose place the factors take
        return None
    is_plain = inner.group_size == 1 and not inner.zero_point and not inner.flatten
    # Factors and offsets become float32, and what they were again.
    is_plain = is_plain and {inner.scale, inner.offset} <= {"float32", "bfloat16", "float16", None}
    is_known = inner.element == "uint8" and inner.group_columns % TILE_N == 0
    return "nested" if is_plain and is_known else None


def scale_axes(fmt: Format) -> str:
    """Returns the order in which scales of a weight that is prepared for Hopper have G and C.

    "cg" is that of blocks of 128 x 128. TMA loads at least 16 bytes of a row: scales of what is
    multiplied one after another.
    """
    return "cg" if fmt.group_columns == TILE_N else "gc"


def _swapped(scale: Array, fmt: Format) -> Array:
    """Returns scales [*b, G, C] in the order of `scale_axes`, or such ones as [*b, G, C]."""
    return scale.swapaxes(-1, -2) if scale_axes(fmt) == "cg" else scale


def by_group(scale: Any, fmt: Format) -> Any:
    """Returns the scales of a prepared weight, or of its products, as [*b, G, C].

    Those that are nested are as they were.
    """
    return scale if is_qtensor(scale) else _swapped(scale, fmt)


def are_multiples(scale: Any, fmt: Format) -> bool:
    """Returns whether scales that a product is given are those of `Prepared.multiples`."""
    is_of_columns = isinstance(fmt.scale, Format) and fmt.scale.group_columns == 1
    return is_of_columns and scale.dtype in (jnp.int8, jnp.uint8)


def _element_of_scales(fmt: Format) -> str | None:
    """Returns the element that scales are of, times a scale of each column; None for others."""
    inner = fmt.scale
    if fmt.group_columns != 1 or not isinstance(inner, Format):
        return None
    is_plain = not (inner.zero_point or inner.offset is not None or inner.flatten)
    is_of_columns = inner.group_size is None and inner.group_columns == 1
    return inner.element if is_plain and is_of_columns else None
