"""Operations of a JAX function on a packed weight seen through a View: dot, gather, conv, slice."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from qjax import _compat, qtensor
from qjax.ops import activation, packed_rows, ragged
from qjax.qtensor import QTensor
from qjax.view import Atom, Contraction, View, contraction, view_of


def as_view(qt: QTensor, name: str) -> View:
    """Returns the view of a QTensor in its logical shape."""
    qt.check_codes(name)
    *lead, K, N = qt.canonical_shape
    return view_of(qt, lead, qt.layout, K, N, jnp.dtype(qt.dtype), name)


def materialize(view: View) -> Array:
    """Returns the float array that a view stands for."""
    qt: QTensor = view.payload
    w = qtensor.dequantize_canonical(qt).astype(view.dtype)
    return rearrange_from_stored(w, view)


def partition(view: View) -> PartitionSpec:
    """Returns how the types of the stored arrays say that the view is sharded.

    Only meshes with explicit axes have that in their types. An axis of the view counts as sharded
    if its major atom is the major part of a sharded stored axis.
    """
    *lead, k, n = _compat.spec_of(view.payload.data)
    if getattr(view.payload, "data_axes", "kn") == "nk":  # other payloads have no say
        k, n = n, k
    major = {kind: atoms[0] for kind in "kn" if (atoms := view.atoms(kind))}
    entries: list[Any] = []
    for dim in view.dims:
        entry = None
        if dim and dim[0].kind == "b":
            axis = lead_axis(view, dim[0])
            entry = None if axis is None else lead[axis]
        elif dim and dim[0] == major[dim[0].kind]:
            entry = k if dim[0].kind == "k" else n
        entries.append(entry)
    return PartitionSpec(*entries)


def rearrange_from_stored(w: Array, view: View) -> Array:
    """Returns canonical `w` [*lead, K, N] as the logical array of `view`."""
    stored = [*view.atoms("b"), *view.atoms("k"), *view.atoms("n")]
    logical = [a for dim in view.dims for a in dim]
    w = w.reshape([a.size for a in stored])
    return w.transpose([stored.index(a) for a in logical]).reshape(view.shape)


def dot_general(
    x: Array,
    view: View,
    how: Contraction,
    *,
    x_contracting: Sequence[int],
    x_batch: Sequence[int],
    w_contracting: Sequence[int],
    w_batch: Sequence[int],
    weight_first: bool,
    out_dtype: Any,
    product: Any,
) -> Array:
    """Computes `lax.dot_general` of an activation and a stored weight.

    Args:
      x: the activation.
      view: the weight; `how` as `view.contraction(w_contracting, w_batch)` returned it.
      x_contracting, x_batch: axes of x, paired with `w_contracting`, `w_batch`.
      weight_first: whether the weight is the left operand, whose free axes come first.
      product: function (x [*lead, *m, K], transposed=, out_dtype=) -> [*lead, *m, N] that
        multiplies by the canonical weight.
    """
    lead = view.payload.data.shape[:-2]
    pairs = dict(zip(x_batch, w_batch, strict=True))
    pairs |= dict(zip(x_contracting, w_contracting, strict=True))

    # 1. Split every axis of x that meets the weight into the weight's atoms.
    labels: list[Any] = []
    sizes: list[int] = []
    for axis, size in enumerate(x.shape):
        if axis in pairs:
            atoms = view.dims[pairs[axis]]
            labels += atoms
            sizes += [a.size for a in atoms]
        else:
            labels.append(axis)  # a free axis of x: tokens
            sizes.append(size)
    x = x.reshape(sizes)

    # 2. Bring x to [*lead, *tokens, contracted]; leading axes it does not have are broadcast.
    b_atoms = view.atoms("b")
    inner = view.atoms("k" if how.form == "forward" else "n")
    outer = view.atoms("n" if how.form == "forward" else "k")
    tokens = [label for label in labels if not isinstance(label, Atom)]
    has = [a for a in b_atoms if a in labels]
    order = [labels.index(label) for label in (*has, *tokens, *inner)]
    x = x.transpose(order)
    token_sizes = x.shape[len(has) : len(has) + len(tokens)]
    n_inner = math.prod(a.size for a in inner)  # not -1: there may be no tokens
    x = x.reshape(*(a.size if a in has else 1 for a in b_atoms), *token_sizes, n_inner)
    if len(has) < len(b_atoms):
        x = jnp.broadcast_to(x, (*(a.size for a in b_atoms), *x.shape[len(b_atoms) :]))
    x = x.reshape(*lead, *token_sizes, x.shape[-1])

    y = product(
        x,
        transposed=how.form == "transposed",
        out_dtype=jnp.float32 if how.summed else out_dtype,
    )

    # 3. Name the axes of y, sum the contracted leading ones, and order them as dot_general does.
    y = y.reshape(*(a.size for a in b_atoms), *token_sizes, *(a.size for a in outer))
    names: list[Any] = [*b_atoms, *tokens, *outer]
    if how.summed:
        y = jnp.sum(y, [names.index(a) for a in how.summed]).astype(out_dtype)
        names = [n for n in names if n not in how.summed]
    used = {*w_batch, *w_contracting}
    free = [a for i, dim in enumerate(view.dims) if i not in used for a in dim]
    batch = [a for i in w_batch for a in view.dims[i]]
    final = [*batch, *free, *tokens] if weight_first else [*batch, *tokens, *free]
    y = y.transpose([names.index(n) for n in final])
    free_shape = [view.shape[i] for i in range(view.ndim) if i not in used]
    batch_shape = [view.shape[i] for i in w_batch]
    shape = (*free_shape, *token_sizes) if weight_first else (*token_sizes, *free_shape)
    return y.reshape(*batch_shape, *shape)


# ---- convolution --------------------------------------------------------------------------------


def is_pointwise(view: View, params: dict) -> bool:
    """Whether a convolution is a product at every position: a 1x1 kernel without groups."""
    _, into, *spatial = params["dimension_numbers"].rhs_spec
    return (
        all(view.shape[i] == 1 for i in spatial)
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and all(d == 1 for d in params["lhs_dilation"])
        and all(tuple(p) == (0, 0) for p in params["padding"])
        and contraction(view, (into,), ()) is not None
    )


def pointwise_conv(x: Array, view: View, params: dict, *, out_dtype: Any, product: Any) -> Array:
    """`lax.conv_general_dilated` with a kernel that `is_pointwise`: `dot_general`'s product."""
    numbers = params["dimension_numbers"]
    features, spatial = numbers.lhs_spec[1], numbers.lhs_spec[2:]
    for axis, stride in zip(spatial, params["window_strides"], strict=True):
        x = lax.slice_in_dim(x, 0, None, stride, axis=axis)
    out, into, *ones = numbers.rhs_spec
    kernel = view.squeeze(ones)
    w_contracting = (0,) if into < out else (1,)
    how = contraction(kernel, w_contracting, ())
    assert how is not None
    y = dot_general(
        x,
        kernel,
        how,
        x_contracting=(features,),
        x_batch=(),
        w_contracting=w_contracting,
        w_batch=(),
        weight_first=False,
        out_dtype=out_dtype,
        product=product,
    )
    # y has the axes of x without its features, then the output features.
    kept = [i for i in range(x.ndim) if i != features]
    source = {kept.index(numbers.lhs_spec[0]): numbers.out_spec[0], x.ndim - 1: numbers.out_spec[1]}
    source |= {kept.index(a): b for a, b in zip(spatial, numbers.out_spec[2:], strict=True)}
    return y.transpose(sorted(source, key=source.__getitem__))


def conv(x: Array, view: View, params: dict, *, dequantize: Any, rounded: Any) -> Array:
    """`lax.conv_general_dilated` with a kernel that is dequantized for it.

    Derivatives dequantize it again rather than keep the float kernel. Activations are rounded as
    the format says, the features of a position being a token, and multiplied in float.

    Args:
      dequantize: function of the view that returns the float kernel.
      rounded: function of (activation [.., features], view) that returns it rounded.
    """
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers",
             "feature_group_count", "batch_group_count", "precision",
             "preferred_element_type")  # fmt: skip

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(x, payload):
        whole = view.with_payload(payload)
        kernel = dequantize(whole)
        features = params["dimension_numbers"].lhs_spec[1]
        x = jnp.moveaxis(rounded(jnp.moveaxis(x, features, -1), whole), -1, features)
        return lax.conv_general_dilated(x, kernel, **{name: params[name] for name in names})

    return run(x, view.payload)


# ---- parts of a weight --------------------------------------------------------------------------


def take_axis(view: View, axis: int, take: Any, size: int) -> View | None:
    """Keeps part of one axis, still packed; None if the storage cannot be cut there.

    Stacked axes can always be cut, N where every column has scales of its own. A single entry of N
    is None too: `lookup` reads it.

    Args:
      take: function (array, array axis) -> array that cuts the axis, e.g. a slice.
      size: the axis' new length.
    """
    qt: QTensor = view.payload
    if len(view.dims[axis]) != 1:
        return None
    (atom,) = view.dims[axis]
    stored = lead_axis(view, atom)
    if stored is not None:
        payload = jax.tree.map(lambda a: take(a, stored), qt)
    elif atom.kind == "n" and size > 1 and len(view.atoms("n")) == 1 and _per_column(qt):
        payload = qt.columns(take)
    else:
        return None
    dim = (Atom(atom.kind, atom.position, size),) if size > 1 else ()
    return view.replace(axis, dim, payload)


def _per_column(qt: QTensor) -> bool:
    nested = isinstance(qt.scale, QTensor) or isinstance(qt.zero, QTensor)
    return qt.format.group_columns == 1 and not nested


def lead_axis(view: View, atom: Atom) -> int | None:
    """Returns the axis of the stored arrays that is `atom`; None if it is no whole leading one."""
    if atom.kind != "b":
        return None
    rank = view.atoms("b").index(atom)
    lead = view.payload.data.shape[:-2]
    axes = [i for i, size in enumerate(lead) if size > 1]  # axes of size 1 have no atom
    fits = len(axes) == len(view.atoms("b")) and lead[axes[rank]] == atom.size
    return axes[rank] if fits else None


def align_lead(view: View) -> View:
    """Returns the view with the leading axes of the stored arrays split as its atoms are."""
    sizes = [a.size for a in view.atoms("b")]
    lead = view.payload.data.shape[:-2]
    if [size for size in lead if size > 1] == sizes:
        return view
    split = lambda a: a.reshape(*sizes, *a.shape[len(lead) :])
    return view.with_payload(jax.tree.map(split, view.payload))


def can_unstack(view: View) -> bool:
    """Whether the first axis of the view is the first axis of every stored array."""
    lead = view.payload.data.shape[:-2]
    if not lead or not view.dims:
        return False
    if lead[0] == 1:
        return not view.dims[0]
    return len(view.dims[0]) == 1 and lead_axis(view, view.dims[0][0]) == 0


def lookup(
    view: View, axis: int, indices: Array, mode: Any, fill_value: Any, *, by_kernel: bool = False
) -> Any:
    """`lax.gather` along one whole axis: [*indices.shape, *other axes]; None if it would cut data.

    Along K or N the entries are dequantized; along a stacked axis (experts) the result is packed.

    Args:
      by_kernel: whether the Hopper kernel does that, which `against_kernel` has nothing against.
    """
    size = view.shape[axis]
    atoms = view.dims[axis]
    modes = lax.GatherScatterMode
    fill = modes.from_any(mode) == modes.FILL_OR_DROP
    valid = (indices >= 0) & (indices < size)
    safe = jnp.clip(indices, 0, size - 1)
    if len(atoms) == 1 and lead_axis(view, atoms[0]) is not None:
        return _lookup_stacked(view, axis, safe, valid if fill else None, fill_value)
    value = jnp.nan if fill_value is None else fill_value
    if by_kernel and fill and np.isnan(value):
        return gather_rows(view, axis, jnp.where(valid, indices, -1), by_kernel=True)
    out = gather_rows(view, axis, safe, by_kernel=by_kernel)
    if out is None or not fill:
        return out
    valid = valid.reshape(*valid.shape, *[1] * (out.ndim - valid.ndim))
    return jnp.where(valid, out, jnp.asarray(value, out.dtype))


def _lookup_stacked(view: View, axis: int, indices: Array, valid: Any, fill_value: Any) -> Any:
    (atom,) = view.dims[axis]
    stored = lead_axis(view, atom)
    assert stored is not None
    flat = indices.reshape(-1)
    qt: QTensor = jax.tree.map(lambda a: jnp.take(a, flat, axis=stored, mode="clip"), view.payload)
    if valid is not None:
        # What lies outside is NaN: so is its scale. Only a plain float scale can say that.
        plain = not isinstance(qt.scale, QTensor) and jnp.issubdtype(qt.scale.dtype, jnp.floating)
        if not plain or not (fill_value is None or np.isnan(fill_value)):
            return None
        shape = [1] * qt.scale.ndim
        shape[stored] = flat.size
        bad = jnp.where(valid.reshape(shape), 1.0, jnp.nan).astype(qt.scale.dtype)
        qt = dataclasses.replace(qt, scale=qt.scale * bad)
    dim = (Atom("b", atom.position, flat.size),) if flat.size > 1 else ()
    out = view.replace(axis, dim, qt)
    out = out.transpose([axis, *(i for i in range(out.ndim) if i != axis)])
    return out.reshape((*indices.shape, *out.shape[1:]))


def _looked_up_along(view: View, axis: int) -> str | None:
    """Returns whether an axis is all of K, "k", or all of N, "n", of one weight; None: neither."""
    atoms = view.dims[axis]
    if view.atoms("b") or view.payload.data.ndim != 2 or not atoms:
        return None
    kind = atoms[0].kind
    return kind if list(atoms) == view.atoms(kind) else None


def against_kernel(view: View, axis: int) -> str | None:
    """Returns why the Hopper kernel does not look up entries of an axis, or None if it does."""
    if _looked_up_along(view, axis) != "n":
        return "its rows are not contiguous"
    return packed_rows.reason_against(view.payload)


def gather_rows(view: View, axis: int, indices: Array, *, by_kernel: bool = False) -> Array | None:
    """Looks up entries of one axis: [*indices.shape, *other axes], reading only what is looked up.

    Args:
      view: a weight [.., V, ..] without leading axes.
      axis: the looked-up axis; all of N or all of K.
      indices: integers, in range; for the kernel, entries of others are NaN.

    Returns:
      Dequantized float entries, or None if the storage cannot be read there.
    """
    kind = _looked_up_along(view, axis)
    if kind is None:
        return None
    flat = indices.reshape(-1)
    if kind == "n":
        if by_kernel:
            rows = packed_rows.packed_rows(flat, view.payload)
        else:
            rows = qtensor.dequantize_columns(view.payload.canonical(), flat)
        others = view.atoms("k")
    else:
        rows = qtensor.dequantize_rows(view.payload.canonical(), flat)  # [i, N]
        others = view.atoms("n")
    rows = rows.astype(view.dtype).reshape(-1, *(a.size for a in others))
    logical = [a for i, dim in enumerate(view.dims) if i != axis for a in dim]
    rows = rows.transpose(0, *(1 + others.index(a) for a in logical))
    shape = [size for i, size in enumerate(view.shape) if i != axis]
    return rows.reshape(*indices.shape, *shape)


def ragged_dot(
    x: Array,
    view: View,
    group_sizes: Array,
    *,
    out_dtype: Any,
    precision: Any,
    implementation: str | None = None,
) -> Array | None:
    """`lax.ragged_dot` with packed experts [E, K, N], see `qjax.ops.ragged`.

    Activations are rounded as the format says and multiplied in float.

    Args:
      x: [M, K], rows sorted by expert.
      view: the experts; returns None unless its axes are E, K, N in that order and all experts
        take the channels in their own order.
      group_sizes: [E] rows of each expert.
      implementation: as for `packed_dot`.

    Raises:
      ValueError, NotImplementedError: as `ragged.check`.
    """
    qt: QTensor = view.payload
    # An axis of size 1, as that of a shard's only expert, has no atom.
    kinds = [[a.kind for a in dim] or [kind] for dim, kind in zip(view.dims, "bkn", strict=True)]
    if kinds != [["b"], ["k"], ["n"]] or qt.data.ndim != 3 or qt.perm is not None:
        return None
    ragged.check(qt, implementation)
    run = functools.partial(
        ragged.ragged_dot,
        qt=dataclasses.replace(qt, format=qt.format.weight_only, pre_scale=None, act_scale=None),
        group_sizes=group_sizes,
        precision=precision,
        implementation=implementation,
    )
    if ragged.takes_codes(qt, implementation) and math.prod(x.shape):
        # A kernel multiplies codes; the steps of rows are factors of its results.
        codes, step = activation.codes_of_experts(x, qt, group_sizes)
        return (step * run(codes, dtype="float32", out_dtype="float32")).astype(out_dtype)
    x = activation.of_experts(x, qt, group_sizes)
    return run(x, dtype=jnp.promote_types(view.dtype, x.dtype), out_dtype=out_dtype)
