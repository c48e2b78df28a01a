"""Laws of the sample: the first rows that count, however they come in batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.observers import OBSERVERS, sample
from qjax.transform.calibrate import calibrate

K, R = 3, 7


def rows(m, *lead):
    return jax.random.normal(jax.random.key(m), (*lead, m, K))


def fold(parts, masks, lead=()):
    state = sample.init(lead, K, R)
    for x, mask in zip(parts, masks, strict=True):
        state = jax.jit(sample.update)(state, x, mask)
    return state


@pytest.mark.parametrize("cuts", [[11], [4], [2, 5], [0, 1, 3, 9]])
@pytest.mark.parametrize("m", [5, 7, 12])
def test_streaming_and_merging_equal_one_batch(m, cuts):
    x = rows(m)
    mask = jnp.arange(m) % 4 != 1
    want = np.zeros((R, K), np.float32)
    kept = np.asarray(x)[np.asarray(mask)][:R]
    want[: len(kept)] = kept

    parts, masks = (
        np.split(x, [c for c in cuts if c < m]),
        np.split(mask, [c for c in cuts if c < m]),
    )
    streamed = fold(parts, masks)
    merged = sample.init((), K, R)
    for p, k in zip(parts, masks, strict=True):
        merged = sample.merge(merged, fold([p], [k]))
    for state in (streamed, merged):
        np.testing.assert_array_equal(sample.finalize(state), want)
        assert state.seen == len(kept)


def test_every_leading_index_keeps_its_own_rows():
    x = rows(9, 2)
    mask = jnp.stack([jnp.arange(9) < 3, jnp.arange(9) > 4])
    state = fold([x], [mask], (2,))
    assert state.seen.tolist() == [3, 4]
    np.testing.assert_array_equal(state.rows[0, :3], x[0, :3])
    np.testing.assert_array_equal(state.rows[1, :4], x[1, 5:])
    assert not state.rows[0, 3:].any()


def test_merge_is_associative_and_init_its_identity():
    a, b, c = (fold([rows(m)], [jnp.ones(m, bool)]) for m in (2, 3, 4))
    left = sample.merge(sample.merge(a, b), c)
    right = sample.merge(a, sample.merge(b, c))
    empty = sample.init((), K, R)
    for x, y in [(left, right), (sample.merge(a, empty), a), (sample.merge(empty, a), a)]:
        jax.tree.map(np.testing.assert_array_equal, x, y)


def test_calibrate_keeps_the_rows_of_the_first_batches():
    assert OBSERVERS["sample"] is sample
    p = {"w": jnp.ones((K, 2)), "layers": jnp.ones((4, K, K))}

    def fn(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])
        return x @ p["w"]

    x = rows(300)
    whole = calibrate(fn, p, [x], ("sample",), report=None)
    parts = calibrate(fn, p, [x[:100], x[100:200], x[200:]], ("sample",), report=None)
    for path in ("w", "layers"):
        got, want = (c[path].stats["sample"] for c in (parts, whole))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(whole["layers"].stats["sample"][0], x[: sample.ROWS])
