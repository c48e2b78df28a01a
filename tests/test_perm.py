"""A weight whose stored rows have an order of their own is the same weight in plain order."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import checkpoint
from qjax.checkpoint.manifest import FILE
from qjax.qtensor import dequantize_array, quantize_array
from qjax.sharding import shard_specs, shardings_of

K, N = 64, 24
FORMATS = {
    "int4": qjax.Format("int4", group_size=16, zero_point=True),
    "int3": qjax.Format("int3", group_size=32, scale="float16"),
    "llm-int8": qjax.Format("int8", activation="int8", outliers=2.0, outlier_capacity=2),
}


def ordered(fmt, lead=(), seed=0):
    """Returns a QTensor with a random `perm`, and its float weight."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(*lead, K, N)).astype(np.float32)
    perm = rng.permuted(np.tile(np.arange(K, dtype=np.int32), (*lead, 1)), axis=-1)
    stored = np.take_along_axis(w, perm[..., None], axis=-2)
    inner = quantize_array(jnp.asarray(stored), fmt)
    qt = dataclasses.replace(inner, perm=jnp.asarray(perm))
    back = np.take_along_axis(
        np.asarray(dequantize_array(inner)), np.argsort(perm, axis=-1)[..., None], axis=-2
    )
    return qt, back


@pytest.mark.parametrize("name", ["int3"])
def test_it_stands_for_the_rows_in_their_own_order(name):
    qt, w = ordered(FORMATS[name], (3,))
    np.testing.assert_array_equal(dequantize_array(qt), w)


@pytest.mark.parametrize("name", ["int4", "llm-int8"])
def test_products_see_the_channels_in_its_order(name):
    qt, w = ordered(FORMATS[name])
    inner = dataclasses.replace(qt, perm=None)
    x = np.random.default_rng(1).normal(size=(5, K)).astype(np.float32)
    apply = jax.jit(qjax.apply(lambda w, x: x @ w))
    same = apply(inner, x[:, np.asarray(qt.perm)])
    np.testing.assert_allclose(apply(qt, x), same, rtol=1e-5, atol=1e-4)
    if FORMATS[name].activation is None:
        np.testing.assert_allclose(apply(qt, x), x @ w, rtol=1e-4, atol=1e-4)
    y = np.random.default_rng(2).normal(size=(5, N)).astype(np.float32)
    back = jax.jit(qjax.apply(lambda w, y: y @ w.T))(qt, y)
    np.testing.assert_allclose(back, y @ w.T, rtol=1e-4, atol=1e-4)
    grad = jax.grad(lambda x: qjax.apply(lambda w, x: (x @ w).sum())(qt, x))(jnp.asarray(x))
    np.testing.assert_allclose(grad, np.ones((5, N)) @ w.T, rtol=1e-4, atol=1e-4)


def test_rows_and_columns_are_looked_up_by_their_own_index():
    qt, w = ordered(FORMATS["int4"])
    at = jnp.asarray([3, 63, 3, 0])
    np.testing.assert_array_equal(qjax.apply(lambda w, i: w[i])(qt, at), w[np.asarray(at)])
    columns = qjax.apply(lambda w, i: w[:, i])(qt, at % N)
    np.testing.assert_array_equal(columns, w[:, np.asarray(at) % N])


def test_every_layer_of_a_scan_has_an_order_of_its_own():
    qt, w = ordered(FORMATS["int4"], (3,))
    x = np.random.default_rng(3).normal(size=(3, 5, K)).astype(np.float32)
    run = qjax.apply(lambda w, x: jax.lax.scan(lambda c, wx: (c, wx[1] @ wx[0]), 0, (w, x))[1])
    np.testing.assert_allclose(jax.jit(run)(qt, x), x @ w, rtol=1e-4, atol=1e-4)


def test_experts_keep_their_order_in_a_ragged_dot():
    qt, w = ordered(FORMATS["int4"], (3,))
    x = np.random.default_rng(4).normal(size=(6, K)).astype(np.float32)
    sizes = jnp.asarray([2, 3, 1])
    got = qjax.apply(lambda w, x: jax.lax.ragged_dot(x, w, sizes))(qt, x)
    want = np.concatenate([x[:2] @ w[0], x[2:5] @ w[1], x[5:] @ w[2]])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_mesh_never_splits_the_reordered_channels():
    qt, w = ordered(FORMATS["int4"])
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    places = shardings_of(qt, NamedSharding(mesh, P("x", "y")))
    assert places.data.spec == P(None, "y")
    assert places.perm.spec == P(None)
    placed = jax.tree.map(jax.device_put, qt, places)
    np.testing.assert_array_equal(dequantize_array(placed), w)
    assert shard_specs(qt, [], ("x",), (), mesh) is None
    assert shard_specs(qt, [], (), ("y",), mesh) is not None


def test_it_is_saved_and_only_readers_that_know_it_read_it(tmp_path):
    qt, w = ordered(FORMATS["int4"], (2,))
    checkpoint.save(tmp_path / "c", {"w": qt})
    back = checkpoint.load(tmp_path / "c")["w"]
    np.testing.assert_array_equal(back.perm, qt.perm)
    np.testing.assert_array_equal(dequantize_array(back), w)
    assert json.loads((tmp_path / "c" / FILE).read_text())["version"] == 3
    assert "act-order" in str(qjax.summary({"w": qt}))
