"""Laws of AWQ: no candidate is worse than rounding to nearest, and losses are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.ptq import awq
from qjax.qtensor import dequantize_array, dequantize_canonical, quantize_array
from qjax.transform import calibrate, fold

K, N = 32, 12
FORMATS = [
    qjax.Format("int4", group_size=16),
    qjax.Format("int3", group_size=16, scale="bfloat16", rule="mse"),
    qjax.Format("int2", group_size=16, zero_point=True),
    qjax.Format("uint4", group_size=16, offset="float16"),
    qjax.Format("nf4", group_size=16, scale=qjax.Format("uint8", group_size=1, group_columns=12)),
    qjax.Format("e4m3"),
    qjax.Format("e2m1", group_size=16, scale="e8m0"),
    qjax.Format("int4", group_size=12, group_columns=5, remainder="ragged"),
    qjax.Format("int8", group_columns=None),
]
# int3 takes the path of int4, and a zero point that of an offset.
EVERY = [
    pytest.param(fmt, id=str(fmt), marks=[pytest.mark.slow] if i in (0, 3) else [])
    for i, fmt in enumerate(FORMATS)
]


def problem(*lead, seed=0, widths=(N, N + 3)):
    """Weights of one group, and the statistics of correlated inputs with a few large channels."""
    rng = np.random.default_rng(seed)
    weights = [jnp.asarray(rng.standard_normal((*lead, K, n)), jnp.float32) for n in widths]
    x = rng.standard_normal((*lead, 200, K)) @ (np.eye(K) + 0.2 * rng.standard_normal((K, K)))
    x[..., rng.choice(K, 3, replace=False)] *= 20
    x = jnp.asarray(x, jnp.float32)
    H = jnp.einsum("...mk,...ml->...kl", x, x, precision="highest") / 200
    return weights, H, jnp.mean(jnp.abs(x), -2)


def exact(w, D, H):
    """tr(DᵀHD) / tr(WᵀHW) in float64."""
    w, D, H = (np.asarray(a, np.float64) for a in (w, D, H))
    form = lambda a: np.sum(a * (H @ a), (-2, -1))
    return form(D), form(w)


@pytest.mark.parametrize("fmt", EVERY)
def test_the_loss_is_that_of_the_scaled_weights_and_never_above_rounding(fmt):
    weights, H, a = problem(2)
    found = awq.search(weights, H, a, fmt)
    s = found.scale
    after = awq.moments_after(H, s)
    for scale, h, loss in ((jnp.ones_like(s), H, found.rtn), (s, after, found.final)):
        importance = jnp.diagonal(h, axis1=-2, axis2=-1)
        error = total = 0
        for w in weights:
            qt = quantize_array(w * scale[..., None], fmt, importance=importance)
            e, t = exact(w, w - dequantize_canonical(qt) / scale[..., None], H)
            error, total = error + e, total + t
        np.testing.assert_allclose(loss, error / total, rtol=1e-3)
    assert (found.final <= found.rtn).all()


def test_large_inputs_are_saved_at_the_cost_of_others():
    weights, H, a = problem()
    found = awq.search(weights, H, a, qjax.Format("int3", group_size=16))
    assert found.final < 0.6 * found.rtn
    assert found.alpha > 0
    assert jnp.argmax(found.scale) in jnp.argsort(-a)[:3]


def test_weights_that_are_exact_already_are_left_alone():
    w = jnp.where(jax.random.bernoulli(jax.random.key(0), shape=(K, N)), 7.0, -7.0)
    found = awq.search([w], jnp.eye(K), jnp.ones(K), qjax.Format("int4", group_size=16))
    assert (found.rtn, found.final) == (0.0, 0.0)
    assert (found.scale == 1).all()


def test_every_index_of_a_stack_chooses_for_itself():
    weights, H, a = problem(3)
    fmt = qjax.Format("int3", group_size=16)
    stacked = awq.search(weights, H, a, fmt)
    for i in range(3):
        alone = awq.search([w[i] for w in weights], H[i], a[i], fmt)
        np.testing.assert_allclose(stacked.scale[i], alone.scale, rtol=1e-5)
        np.testing.assert_allclose(stacked.final[i], alone.final, rtol=1e-3)


@pytest.mark.parametrize("tie", [fold.Piece(2, 8), fold.Piece(3, K)])
def test_tied_channels_stay_equal(tie):
    weights, H, a = problem(3)
    found = awq.search(weights, H, a, qjax.Format("int3", group_size=16), tied=(tie,))
    digits = found.scale.reshape(-1, tie.size, tie.stride)
    np.testing.assert_allclose(digits[:, :1], digits[:, 1:2], rtol=1e-6)
    assert (found.final <= found.rtn).all()
    assert found.final.min() < found.rtn.min()


def test_weights_may_have_formats_of_their_own():
    weights, H, a = problem()
    coarse, fine = qjax.Format("int3", group_size=16), qjax.Format("int8")
    both = awq.search(weights, H, a, (fine, coarse))
    swapped = awq.search(weights[::-1], H, a, (coarse, fine))
    np.testing.assert_array_equal(both.alpha, swapped.alpha)
    np.testing.assert_allclose(both.final, swapped.final, rtol=1e-5)
    assert both.rtn < 0.9 * awq.search(weights, H, a, coarse).rtn
    with pytest.raises(ValueError, match="got 1 for 2 weights"):
        awq.search(weights, H, a, (coarse,))


def test_dead_inputs_keep_their_weights():
    weights, H, a = problem()
    dead = jnp.arange(K) % 5 == 0
    alive = jnp.where(dead, 0.0, 1.0)
    fmt = qjax.Format("int3", group_size=16)
    found = awq.search(weights, H * alive[:, None] * alive, a * alive, fmt)
    assert (found.scale[dead] == 1).all()
    assert jnp.isfinite(found.scale).all()
    nothing = awq.search(weights, 0 * H, 0 * a, fmt)
    assert (nothing.scale == 1).all()
    assert nothing.final == 0


def sizes(jaxpr):
    """Sizes of all values of a jaxpr, and the number of its operations."""
    out, count = [], 0
    for eqn in jaxpr.eqns:
        out += [int(np.prod(v.aval.shape)) for v in eqn.outvars]
        count += 1
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                more, n = sizes(inner)
                out, count = out + more, count + n
    return out, count


def test_no_array_has_a_grid_axis_and_the_program_does_not_grow():
    def program(k, n, grid):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((k, n), (k, k), (k,))]
        fmt = qjax.Format("int4", group_size=16)
        run = lambda w, H, a: awq.search([w], H, a, fmt, grid=grid)
        clip = lambda w, H, a: awq.clip(w, H, fmt, steps=grid)
        return [sizes(jax.make_jaxpr(f)(*shapes).jaxpr) for f in (run, clip)]

    for small, large in zip(program(32, 48, 4), program(128, 160, 64), strict=True):
        assert small[1] == large[1]
        assert max(large[0]) <= 128 * 160


@pytest.mark.parametrize("fmt", EVERY)
def test_clipping_never_grows_a_groups_own_error(fmt):
    (w,), H, _ = problem(2, widths=(N,))
    out = awq.clip(w, H, fmt)
    assert (out.after <= out.before).all()
    assert ((out.fraction >= 0.5) & (out.fraction <= 1)).all()
    # What the clamped weight is quantized to has the error that is said.
    fitted = fmt.fit(K)
    importance = jnp.diagonal(H, axis1=-2, axis2=-1)
    g = fitted.group_size or K
    errors = []
    for v in (out.weight, w):
        D = np.asarray(w - dequantize_canonical(quantize_array(v, fmt, importance=importance)))
        error = total = 0
        parts = []
        for start in range(0, K, g):
            rows = slice(start, start + g)
            h = np.asarray(H, np.float64)[..., rows, rows]
            d, wg = D[..., rows, :].astype(np.float64), np.asarray(w, np.float64)[..., rows, :]
            parts.append(np.sum(d * (h @ d), -2))
            error, total = error + parts[-1].sum(-1), total + np.sum(wg * (h @ wg), (-2, -1))
        errors.append(parts)
        np.testing.assert_allclose(
            out.after if v is out.weight else out.before, error / total, rtol=1e-3
        )
    if fmt.group_columns == 1 and isinstance(fmt.scale, str):
        for clipped, plain in zip(*errors, strict=True):
            assert (clipped <= plain * (1 + 1e-4)).all()


def test_clipping_an_outlier_helps_the_rest():
    w = jax.random.normal(jax.random.key(0), (K, N)).at[3].mul(4.0)
    H = jnp.diag(jnp.ones(K).at[3].set(1e-3))  # an outlier that hardly matters
    out = awq.clip(w, H, qjax.Format("int3", group_size=16))
    assert out.after < 0.5 * out.before
    assert (out.fraction[0] < 1).all()


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [(FORMATS[0], jnp.bfloat16), (FORMATS[2], jnp.float32), (FORMATS[4], jnp.float32)],
)
def test_a_solved_weight_is_stored_as_rounding_would(fmt, dtype):
    (w,), H, _ = problem(2, widths=(N,))
    w = w.astype(dtype)
    qt, d = awq.solve(w, H, fmt)
    plain, _ = awq.solve(w, H, fmt, clipped=False)
    like = quantize_array(w, fmt, importance=jnp.diagonal(H, axis1=-2, axis2=-1))
    assert jax.tree.structure(qt) == jax.tree.structure(like)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(like), strict=True):
        np.testing.assert_array_equal(a, b)
    wide = w.astype(jnp.float32)
    error, total = exact(wide, wide - dequantize_canonical(qt), H)
    np.testing.assert_allclose(d.final, error / total, rtol=1e-3)
    assert (d.final <= d.rtn).all()


def test_folded_into_a_model_the_scales_lower_its_error():
    rng = np.random.default_rng(0)
    f = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    p = {"g": jnp.exp(1.5 * f(K)), "a": f(K, 64), "gate": f(K, 64), "b": f(64, N)}

    def fn(p, x):
        h = x * p["g"]
        return (jax.nn.silu(h @ p["gate"]) * (h @ p["a"])) @ p["b"]

    x, test = f(256, K), f(64, K)
    seen = calibrate.calibrate(fn, p, [x], ("hessian", "moments"), report=None)
    fmt = qjax.Format("int4", group_size=16)
    folded = p
    for group in fold.find(fn)(p, x):
        stats = seen[group.readers[0]].stats
        weights = [p[r] for r in group.readers]
        found = awq.search(weights, stats["hessian"], stats["moments"], fmt, tied=group.tied)
        folded = fold.fold(folded, group, found.scale)

    def error(params):
        rounded = {
            k: dequantize_array(quantize_array(v, fmt)) if v.ndim == 2 else v
            for k, v in params.items()
        }
        return float(jnp.mean((fn(rounded, test) - fn(p, test)) ** 2))

    assert error(folded) < 0.8 * error(p)
