"""Laws of products in tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.ptq import tiles


@pytest.mark.parametrize(("K", "N", "parts"), [(128, 64, 8), (320, 256, 8), (512, 300, 3)])
def test_columns_do_not_depend_on_how_many_there_are(K, N, parts):
    a = jax.random.normal(jax.random.key(0), (16, K))
    b = jax.random.normal(jax.random.key(1), (K, N))
    for of in (jax.jit(tiles.dot), jax.jit(lambda _, b: tiles.total(b)[None])):
        apart = [of(a, part) for part in jnp.split(b, parts, axis=1)]
        np.testing.assert_array_equal(of(a, b), jnp.concatenate(apart, 1))


def test_it_is_the_product():
    a, b = jnp.arange(6.0).reshape(2, 3), jnp.arange(900.0).reshape(3, 300)
    np.testing.assert_array_equal(tiles.dot(a, b), np.asarray(a) @ np.asarray(b))
    np.testing.assert_array_equal(tiles.dot(a[0], b), np.asarray(a[0]) @ np.asarray(b))
    np.testing.assert_array_equal(tiles.total(b), np.sum(np.asarray(b), 0))
