"""Laws of cutting a function at its weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from qjax import Format
from qjax.layout import Layout
from qjax.qtensor import dequantize_array, quantize_array
from qjax.transform.segments import Key, SegmentError, Segments, stack_slices

D = 8


def _params(L=3):
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "up": jax.random.normal(keys[0], (L, D, 16)),
        "down": jax.random.normal(keys[1], (L, 16, D)),
        "norm": 1 + jax.random.normal(keys[2], (L, D)),
        "head": jax.random.normal(keys[3], (D, 5)),
    }


def _layer(x, w):
    h = jax.checkpoint(nn.silu)(x * w["norm"] @ w["up"])
    return x + jnp.tanh(h @ w["down"]), jnp.sum(x)


def _stacked(p, x):
    x, sums = lax.scan(_layer, x, {k: v for k, v in p.items() if k != "head"})
    return jax.jit(jnp.dot)(x, p["head"]) + sums[-1]


def _layouts(p, *names):
    return {n: Layout.parse("kn", p[n].shape) for n in names}


def _run(cut, weights, p, x):
    """Runs all levels; returns the values that are left, and what the weights read."""
    env, shared, read = cut.start((x,)), cut.constants(p), {}
    for level in cut.levels:
        env.update(cut.run(level.make, weights, shared | env))
        fold = lambda state, rows, others: rows
        rows = cut.reader(level, fold)(None, _floats(cut, p), shared | env, None, None)
        names = cut.read_keys(level)
        read |= {names[int(i)]: r[0].x for i, r in rows.items()}
        for v in level.freed:
            env.pop(v, None)
    return env, read


def _floats(cut, p):
    out = {}
    for key in cut.keys:
        w = p[key.path]
        for i in key.at:
            w = w[i]
        out[key] = w
    return out


def test_a_scan_over_layers_becomes_a_level_for_each_product():
    p = _params()
    cut = Segments(_stacked, p, (jnp.ones((2, D)),), _layouts(p, "up", "down", "head"))
    assert cut.keys == [
        *(Key(n, (i,)) for i in range(3) for n in ("up", "down")),
        Key("head"),
    ]
    assert [len(level.keys) for level in cut.levels] == [1] * 7


def test_weights_read_what_they_read_in_the_function():
    p, x = _params(), jax.random.normal(jax.random.key(9), (2, D))
    cut = Segments(_stacked, p, (x,), _layouts(p, "up", "down", "head"))
    env, read = _run(cut, _floats(cut, p), p, x)
    expected = x
    for i in range(3):
        w = {k: v[i] for k, v in p.items() if k != "head"}
        np.testing.assert_allclose(read[Key("up", (i,))], expected * w["norm"], rtol=1e-5)
        expected, _ = _layer(expected, w)
    np.testing.assert_allclose(read[Key("head")], expected, rtol=1e-4)
    assert not env, "everything is freed after its last reader"


def test_later_levels_run_on_the_packed_weights():
    p, x = _params(), jax.random.normal(jax.random.key(9), (2, D))
    cut = Segments(_stacked, p, (x,), _layouts(p, "up", "down", "head"))
    floats = _floats(cut, p)
    packed = {key: quantize_array(w, Format("int4")) for key, w in floats.items()}
    _, read = _run(cut, packed, p, x)
    rounded = p | {
        n: jnp.stack([dequantize_array(packed[Key(n, (i,))]) for i in range(3)])
        for n in ("up", "down")
    }
    _, expected = _run(cut, floats, rounded, x)
    # The floats of `cut` are its own: run again with rounded slices.
    rounded_floats = {k: dequantize_array(packed[k]) for k in floats}
    _, expected = _run(cut, rounded_floats, p, x)
    for key, rows in expected.items():
        np.testing.assert_allclose(read[key], rows, rtol=1e-4, atol=1e-5)


def test_alike_layers_share_their_compilation():
    p = _params(L=5)
    cut = Segments(_stacked, p, (jnp.ones((2, D)),), _layouts(p, "up", "down"))
    _run(cut, _floats(cut, p), p, jnp.ones((2, D)))
    makers = [k for k in cut._compiled if k[0] == "make"]
    # What all batches share, the start, the first step, and the two ways between products.
    assert len(makers) <= 5 < len(cut.levels)


def test_a_shared_activation_has_one_owner():
    def fn(p, x):
        return (x @ p["up"]) * (x @ p["gate"])

    p = {"up": jnp.ones((D, 4)), "gate": jnp.ones((D, 4))}
    x = jnp.ones((2, D))
    cut = Segments(fn, p, (x,), _layouts(p, "up", "gate"))
    (level,) = cut.levels
    owners = cut.owners(level, _floats(cut, p), cut.start((x,)), None)
    assert len(owners) == 2
    assert len(set(owners.values())) == 1


def test_batch_independent_values_are_computed_once():
    def fn(p, x):
        return x @ jnp.tanh(p["scale"])[:, None] * 1.0 + (x * jnp.tanh(p["scale"])) @ p["w"]

    p = {"scale": jnp.ones(D), "w": jnp.ones((D, 4))}
    cut = Segments(fn, p, (jnp.ones((2, D)),), _layouts(p, "w"))
    assert [e.primitive.name for e in cut.static.eqns].count("tanh") == 1
    assert "tanh" not in [e.primitive.name for level in cut.levels for e in level.make.eqns]


def test_a_reversed_scan_is_walked_from_its_end():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"], reverse=True)[0]

    p = {"w": jax.random.normal(jax.random.key(0), (3, D, D))}
    cut = Segments(fn, p, (jnp.ones((2, D)),), _layouts(p, "w"))
    assert cut.keys == [Key("w", (2,)), Key("w", (1,)), Key("w", (0,))]


@pytest.mark.parametrize(
    "moved",
    [lambda w: w, lax.stop_gradient, lambda w: checkpoint_name(w, "w")],
    ids=["cast", "constant", "named"],
)
def test_a_cast_before_the_scan_is_followed(moved):
    def fn(p, x):
        w = moved(p["w"].astype(jnp.bfloat16))
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    p = {"w": jax.random.normal(jax.random.key(0), (3, D, D))}
    x = jnp.ones((2, D), jnp.bfloat16)
    cut = Segments(fn, p, (x,), _layouts(p, "w"))
    _, read = _run(cut, _floats(cut, p), p, x)
    assert set(read) == {Key("w", (i,)) for i in range(3)}


@pytest.mark.parametrize("loop", ["while", "cond"])
def test_weights_inside_loops_and_branches_are_refused_by_name(loop):
    def fn(p, x):
        if loop == "cond":
            return lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: x, x)
        return lax.while_loop(lambda x: x[0, 0] < 3, lambda x: x @ p["w"] + 1, x)

    p = {"w": jnp.eye(D)}
    with pytest.raises(SegmentError, match=r"w: is used inside a `\w+`.*parallel"):
        Segments(fn, p, (jnp.ones((2, D)),), _layouts(p, "w"))


def test_slices_become_the_stack_again():
    parts = {Key("w", (i, j)): jnp.full(2, 10 * i + j) for i in range(2) for j in range(3)}
    assert stack_slices(parts, "w").shape == (2, 3, 2)
    assert stack_slices(parts, "w")[1, 2, 0] == 12
