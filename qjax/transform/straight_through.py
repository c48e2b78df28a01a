"""Straight-through estimators: the derivatives of rounded weights and of products with them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from qjax import _compat, numerics, qtensor, scales
from qjax.format import Format
from qjax.ops import activation
from qjax.ops.packed_dot import packed_dot
from qjax.qtensor import QTensor
from qjax.transform import floats

# Weights of this many bits or more are float.
FLOAT_BITS = 32.0

# ---- weights ------------------------------------------------------------------------------------


def inside(u: Float[Array, "*b K N"], fmt: Format, *, is_learned: bool) -> Bool[Array, "*b K N"]:
    """Returns where a weight `u`, in units of its element, is not clipped: 1[|w| <= clip].

    A learned step clips at the outermost level (Esser et al., 2020, LSQ, eq. 3). A step that a rule
    chooses clips half a step beyond, where rounding to the outermost level ends: the rule puts the
    largest weight on that level, and rounding the scale to its stored type moves it a little out.
    The "absmean" rule chooses a scale that half of all weights exceed; there nothing counts as
    clipped, as in BitNet b1.58 (Ma et al., 2024), or those would never learn again.
    """
    element = numerics.get_element(fmt.element)
    if fmt.scale_rule == "absmean" and not is_learned:
        return jnp.ones(u.shape, bool)
    slack = 0.0 if is_learned else numerics.half_step(fmt.element)
    if element.kind == "float":
        slack *= element.qmax / 2.0 ** math.floor(math.log2(element.qmax)) if slack else 0.0
    return (u >= element.qmin - slack) & (u <= element.qmax + slack)


@jax.custom_vjp
def rounded_weight(
    w: Float[Array, "*b K N"], scale: Float[Array, "*b G C"] | None, qt: QTensor
) -> Float[Array, "*b K N"]:
    """Returns the dequantized `qt`, with the derivatives of the rounding that made it from `w`.

    With u = w / s + z, q its code and m = 1[u in range], straight through (Bengio et al., 2013):

      dL/dw = dL/dŵ m
      dL/ds = sum over the group of dL/dŵ (q - u where m, else q)       LSQ, eq. 3

    Args:
      w: canonical float weight.
      scale: learned scales, or None: chosen by the format's rule, which is a constant.
      qt: `w`, quantized; a constant.
    """
    del w, scale
    return qtensor.dequantize_canonical(qt)


def _rounded_fwd(w, scale, qt):
    return rounded_weight(w, scale, qt), (w, scale is not None, qt)


def _rounded_bwd(residuals, dw):
    w, is_learned, qt = residuals
    fmt, (s, zero) = qt.format, qtensor.read_scales(qt)
    u = qtensor.scaled(w, s, zero, fmt)
    m = inside(u, fmt, is_learned=is_learned)
    ds = None
    if is_learned:
        slope = dw * (qtensor.read_codes(qt) - jnp.where(m, u, 0.0))
        ds = jnp.sum(scales.split(slope, fmt, "constant"), (-3, -1))
    return jnp.where(m, dw, 0.0), ds, None


rounded_weight.defvjp(_rounded_fwd, _rounded_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def finer_weight(
    w: Float[Array, "*b K N"], bits: Float[Array, ""], fmt: Format, s: Float[Array, "*b G C"]
) -> Float[Array, "*b K N"]:
    """Returns `w` rounded to integers of `bits` bits over the range that the format's own has.

    s_b = s (-q_min) / 2^(b-1),  w_b = s_b clip(round(w / s_b), -2^(b-1), 2^(b-1) - 1)

    so that with one bit more each level stays and new ones lie halfway between them. `bits` may be
    traced: a width that changes during training compiles once. From 32 bits on w stays as it is.
    The derivative is straight-through, as for `rounded_weight`.
    """
    step, top = _finer(bits, fmt, s, w)
    u = scales.safe_divide(w, step)
    return jnp.where(bits >= FLOAT_BITS, w, jnp.clip(jnp.round(u), -top, top - 1) * step)


def _finer(bits, fmt, s, w):
    element = numerics.get_element(fmt.element)
    top = 2.0 ** (jnp.minimum(bits, 24.0) - 1)
    step = s * (-element.qmin / top)
    return scales.spread(step, fmt, *w.shape[-2:]), top


def _finer_fwd(w, bits, fmt, s):
    return finer_weight(w, bits, fmt, s), (w, bits, s)


def _finer_bwd(fmt, residuals, dw):
    w, bits, s = residuals
    step, top = _finer(bits, fmt, s, w)
    u = scales.safe_divide(w, step)
    m = (bits >= FLOAT_BITS) | ((u >= -top - 0.5) & (u <= top - 0.5))
    return jnp.where(m, dw, 0.0), None, None


finer_weight.defvjp(_finer_fwd, _finer_bwd)


# ---- products -----------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["qt", "dense", "act_scale", "seen"],
    meta_fields=["act_rule"],
)
@dataclasses.dataclass(frozen=True)
class FakeWeight:
    """A weight as fake quantization sees it: the payload of a View.

    Attributes:
      qt: what products read; a constant.
      dense: float32 [*lead, K, N], its dequantized value; derivatives with respect to the weight
        are those with respect to this array, which leads them on to the float parameter.
      act_scale: the learned step of the activation, likewise; None if it is not learned.
      seen: the running range of the activation, where one is kept: a `qjax.qat.ranges.Range`.
      act_rule: as in `qjax.latent.Latent`.
    """

    qt: QTensor
    dense: Array
    act_scale: Array | None = None
    seen: Any = None
    act_rule: str = "lsq"

    @property
    def data(self) -> Array:
        """The array that says which leading axes there are."""
        return self.dense


@dataclasses.dataclass(frozen=True)
class _Product:
    """What does not change a product's operands; static."""

    transposed: bool
    out_dtype: Any
    weight_dtype: Any
    act_rule: str
    implementation: str | None


def product(
    x: Float[Array, "*lead *m K"],
    w: FakeWeight,
    weight_dtype: Any,
    *,
    transposed: bool,
    out_dtype: Any,
    implementation: str | None = None,
) -> Float[Array, "*lead *m N"]:
    """Returns `packed_dot(x, w.qt)`, with straight-through derivatives.

    With x̂ the rounded activation, ŵ the dequantized weight and m_x = 1[x is not clipped],

      dL/dx = (dL/dy ŵᵀ) m_x        dL/dŵ = x̂ᵀ dL/dy

    and for a learned step s of the activation, with g = dL/dy ŵᵀ, u = x / s and q its code,

      lsq    dL/ds = sum g (q - u where m_x, else q)        Esser et al., 2020, eq. 3
      pact   dL/ds = sum g (0 where m_x, else q)            Choi et al., 2018, eq. 3; α = q_max s

    Args:
      weight_dtype: in which the float products of the backward pass multiply.
      transposed: whether to multiply by Wᵀ; activations stay float then.
    """
    how = _Product(
        transposed, jnp.dtype(out_dtype), jnp.dtype(weight_dtype), w.act_rule, implementation
    )
    leaves, tree = jax.tree.flatten((x, w.dense, w.act_scale, w.qt))
    return _product(how, *jax.tree.unflatten(tree, _compat.align_varying(*leaves)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _Product, x, dense, act_scale, qt):
    del dense, act_scale
    return packed_dot(
        x,
        qt,
        transposed=how.transposed,
        out_dtype=how.out_dtype,
        implementation=how.implementation,
    )


def _product_fwd(how, x, dense, act_scale, qt):
    return _product(how, x, dense, act_scale, qt), (x, dense, act_scale, qt)


def _product_bwd(how, residuals, dy):
    x, dense, act_scale, qt = residuals
    seen = activation.Rounded(x) if how.transposed else activation.rounded(x, qt)
    return *_pull(how, seen, x, dense, act_scale, dy), None


def _pull(how: _Product, seen: activation.Rounded, x, dense, act_scale, dy):
    """Returns the cotangents of x, of the dense weight and of the activation's step."""

    def dot(x, w):
        return floats.product(
            x.astype(how.weight_dtype), w.astype(how.weight_dtype), how.transposed, how.out_dtype
        )

    _, pull = jax.vjp(dot, seen.value, dense)
    dx, dw = pull(dy)
    dx, ds = activation.pulled_back(dx, seen, act_scale, how.act_rule)
    return dx.astype(x.dtype), dw, ds


_product.defvjp(_product_fwd, _product_bwd)


# ---- other operations ---------------------------------------------------------------------------


def with_value_of(value: Any, like: Any) -> Any:
    """Returns `value`, with the derivatives of `like`, which has its shape."""
    return _with_value_of(lax.stop_gradient(value), like)


@jax.custom_vjp
def _with_value_of(value, like):
    del like
    return value


_with_value_of.defvjp(lambda value, like: (value, None), lambda _, ct: (None, ct))
