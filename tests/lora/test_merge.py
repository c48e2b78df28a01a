"""Merging is W + s A B; quantizing that again reports what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Format, Policy, Rule, lora

NF4 = Format("nf4", 16, scale=Format("uint8", group_size=1, group_columns=16))
# Its scales are eighths of small integers: sums of products with it are exact in any order.
EXACT = Format("int4", rule="signed_absmax")


def integers(*shape, seed=0):
    """Small integers, of which sums of products are exact in float32."""
    return jax.random.randint(jax.random.key(seed), shape, -4, 5).astype(jnp.float32)


def adapters_of(base, targets="*", usage=None):
    made = lora.init(jax.random.key(0), base, targets, rank=4, alpha=8, usage=usage)
    return {
        path: dataclasses.replace(
            ad,
            a=integers(*ad.a.shape, seed=1).astype(jnp.bfloat16),
            b=integers(*ad.b.shape, seed=2).astype(jnp.bfloat16),
        )
        for path, ad in made.items()
    }


@pytest.mark.parametrize(
    ("equation", "x", "w", "update"),
    [
        ("mk,kn->mn", (3, 32), (32, 16), "kr,rn->kn"),
        ("mk,nk->mn", (3, 32), (16, 32), "kr,rn->nk"),
        ("bthk,hkd->btd", (2, 3, 4, 8), (4, 8, 16), None),
        ("lmk,lkn->lmn", (3, 2, 32), (3, 32, 16), "lkr,lrn->lkn"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_merged_weights_are_exact(equation, x, w, update, packed):
    fn = lambda p, x: jnp.einsum(equation, x, p["w"])
    base, x = {"w": integers(*w), "norm": jnp.ones(3)}, integers(*x, seed=3)
    used = qjax.usage(fn)(base, x)
    if packed:
        base = qjax.quantize(base, Policy([Rule("w", EXACT)]), usage=used)
    adapters = adapters_of(base, "w", used)
    merged = lora.merge(base, adapters)
    float_base = qjax.dequantize(base)
    ad = adapters["w"]
    a, b = ad.a.astype(jnp.float32), ad.b.astype(jnp.float32)
    want = jnp.einsum(update, a, b) if update else (a @ b).reshape(w)
    assert jnp.array_equal(merged["w"], float_base["w"] + 2 * want)
    assert merged["norm"] is base["norm"]
    got = lora.apply(fn)(base, adapters, x)
    np.testing.assert_allclose(fn(merged, x), got, rtol=1e-5, atol=1e-3)


def test_only_adapted_weights_change():
    base = qjax.quantize({"a": integers(32, 16), "b": integers(32, 16, seed=5)}, NF4)
    adapters = adapters_of(base, "a")
    merged, (requantized, _) = lora.merge(base, adapters), lora.merge_quantized(base, adapters)
    assert merged["b"] is requantized["b"] is base["b"]
    assert merged["a"].dtype == jnp.float32


@pytest.mark.parametrize("fmt", [None, Format("int8")], ids=["own", "int8"])
def test_the_report_is_what_requantizing_did(fmt):
    base = qjax.quantize({"a": integers(32, 16), "stack": integers(3, 32, 16)}, NF4)
    adapters = adapters_of(base)
    merged = lora.merge(base, adapters)
    out, report = lora.merge_quantized(base, adapters, fmt)
    assert [row.path for row in report] == ["a", "stack"]
    for row in report:
        assert out[row.path].format == (fmt or base[row.path].format)
        w, sum_ = qjax.dequantize(base[row.path]), merged[row.path]
        error = np.linalg.norm(qjax.dequantize(out[row.path]) - sum_)
        update = np.linalg.norm(sum_ - w)
        np.testing.assert_allclose(row.update, update / np.linalg.norm(w), rtol=1e-4)
        np.testing.assert_allclose(row.error_to_update, error / update, rtol=1e-4)
        kept = np.vdot(qjax.dequantize(out[row.path]) - w, sum_ - w) / update**2
        np.testing.assert_allclose(row.kept, kept, rtol=1e-4)
        np.testing.assert_allclose(
            row.sqnr_db, 20 * np.log10(np.linalg.norm(sum_) / error), rtol=1e-4
        )
    assert "error/update" in str(report)
    want = qjax.quantize(merged, fmt or NF4)
    for got, leaf in zip(jax.tree.leaves(out), jax.tree.leaves(want), strict=True):
        assert jnp.array_equal(got, leaf)


def test_smoothed_weights_merge_with_their_factors():
    w, s = integers(32, 16), jnp.exp2(jnp.arange(32) % 3)
    base = {"w": qjax.qtensor.quantize_array(w, Format("int8"), pre_scale=s)}
    adapters = adapters_of(base)
    out, _ = lora.merge_quantized(base, adapters)
    assert jnp.array_equal(out["w"].pre_scale, s)
    merged = lora.merge(base, adapters)["w"]
    step = jnp.max(jnp.abs(merged / s[:, None]), axis=0) / 127 * s[:, None]
    assert (jnp.abs(qjax.dequantize(out)["w"] - merged) <= step / 2 * (1 + 1e-5)).all()


def test_what_does_not_fit_is_refused_by_path():
    base = {"a": integers(32, 16)}
    adapters = adapters_of(base)
    with pytest.raises(ValueError, match="a: is float, it has no format"):
        lora.merge_quantized(base, adapters)
    with pytest.raises(ValueError, match=r"a: has an adapter, but the base has no such weight"):
        lora.merge({"b": base["a"]}, adapters)
    with pytest.raises(ValueError, match=r"a: an adapter with A \[32, 4\]"):
        lora.merge({"a": base["a"].T}, adapters)
    with pytest.raises(ValueError, match=r"a: .*group_size"):
        lora.merge_quantized(base, adapters, Format("int4", group_size=24))
    large = {"a": base["a"] * 1e7}
    with pytest.raises(qjax.QuantizationError, match="a: its scales do not fit into float16"):
        lora.merge_quantized(large, adapters, Format("int4", scale="float16"))


# ---- several -------------------------------------------------------------------------------------


def test_a_weighted_sum_is_the_sum_of_updates():
    base = {"a": integers(32, 16), "b": integers(32, 16)}
    one, two = adapters_of(base), adapters_of(base, "a")
    two["a"] = dataclasses.replace(two["a"], alpha=2.0, rank_stabilized=True)
    both = lora.combine([one, two], [0.5, -2.0])
    assert both["a"].rank == 8
    assert jnp.array_equal(both["a"].update(), 0.5 * one["a"].update() - 2 * two["a"].update())
    assert jnp.array_equal(both["b"].update(), 0.5 * one["b"].update())
    traced = jax.jit(lambda w: lora.combine([one, two], w)["a"].update())(jnp.array([0.5, -2.0]))
    assert jnp.array_equal(traced, both["a"].update())


def test_a_switch_between_adapters_compiles_once():
    base, x = qjax.quantize({"w": integers(32, 16)}, EXACT), integers(2, 32)
    made = [adapters_of(base), jax.tree.map(jnp.negative, adapters_of(base))]
    run = lora.apply(lambda p, x: x @ p["w"])
    switched = jax.jit(lambda several, i: run(base, lora.select(several, i), x))
    for i, adapters in enumerate(made):
        assert jnp.array_equal(switched(lora.stack(made), i), jax.jit(run)(base, adapters, x))
    assert switched._cache_size() == 1


def test_unlike_adapters_are_not_stacked():
    base = {"a": integers(32, 16), "b": integers(32, 16)}
    with pytest.raises(ValueError, match="only one of number 0 and number 1 has 'b'"):
        lora.stack([adapters_of(base), adapters_of(base, "a")])
    other = lora.init(jax.random.key(0), base, "*", rank=2)
    with pytest.raises(ValueError, match="a: number 0 has rank 4"):
        lora.stack([adapters_of(base), other])
    with pytest.raises(ValueError, match="1 numbers for 2 adapters"):
        lora.combine([other, other], [1.0])
    with pytest.raises(ValueError, match="a: the adapters are of weights of different shapes"):
        lora.combine([other, adapters_of({"a": integers(16, 16)})], [1.0, 1.0])
