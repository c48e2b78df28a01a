"""Laws of calibration: statistics are those of the activations, wherever they occur."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.transform.calibrate import CalibrationError, calibrate

K = 8
QUIET = {"report": None}


def weights(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[-2])


def layers(params, x):
    """Three stacked layers under scan and remat."""

    def body(c, w):
        return jnp.tanh(c @ w), None

    return lax.scan(jax.checkpoint(body), x, params["w"])[0]


def unrolled(params, x):
    for w in params["w"]:
        x = jnp.tanh(x @ w)
    return x


def moments(rows):
    rows = np.asarray(rows, np.float64).reshape(-1, rows.shape[-1])
    return rows.T @ rows / len(rows)


def test_a_scan_gives_what_its_unrolled_layers_give():
    x, w = weights(5, K), weights(3, K, K, seed=1)
    scanned = calibrate(layers, {"w": w}, [x], **QUIET)["w"]
    loose = calibrate(unrolled, {"w": list(w)}, [x], **QUIET)
    for i in range(3):
        np.testing.assert_allclose(
            scanned.stats["hessian"][i], loose[f"w/{i}"].stats["hessian"], rtol=1e-5, atol=1e-7
        )
    assert scanned.rows.tolist() == [5.0] * 3


@pytest.mark.parametrize("observer", ["absmax", "minmax", "percentile", "hessian", "moments"])
def test_streaming_equals_one_batch(observer):
    # One product: deeper activations depend on the batch in the last bit.
    x, params = weights(6, K), {"w": weights(K, 4, seed=1)}

    def fn(p, x):
        return x @ p["w"]

    whole = calibrate(fn, params, [x], (observer,), **QUIET)["w"]
    parts = calibrate(fn, params, [x[:2], x[2:4], x[4:]], (observer,), **QUIET)["w"]
    exact = observer in ("absmax", "minmax", "percentile")
    for a, b in zip(jax.tree.leaves(whole.stats), jax.tree.leaves(parts.stats), strict=True):
        # Sums of 6 rows differ by their order: a few units in the last place of the largest.
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if exact else 4e-7 * float(jnp.max(a)))
    assert float(whole.rows) == float(parts.rows) == 6


def test_a_condition_gives_what_it_is_asked_with():
    """Once before the loop and once after each step, beside what the body gives."""
    x, p = weights(5, K) + 1, {"c": weights(K, K), "w": weights(K, K, seed=1)}
    busy = lambda p, h: jnp.sum(jnp.abs(h @ p["c"])) < 300
    step = lambda p, h: jnp.sin(h) @ p["w"] + h

    def loop(p, x):
        return lax.while_loop(lambda h: busy(p, h), lambda h: step(p, h), x)

    def rolled_out(p, x):
        for _ in range(steps):
            busy(p, x)
            x = step(p, x)
        return busy(p, x)

    h, steps = x, 0
    while busy(p, h):
        h, steps = step(p, h), steps + 1
    assert steps > 1
    got, want = (calibrate(fn, p, [x], **QUIET) for fn in (loop, rolled_out))
    for name, asked in (("c", steps + 1), ("w", steps)):
        assert float(got[name].rows) == float(want[name].rows) == 5 * asked
        a, b = got[name].stats["hessian"], want[name].stats["hessian"]
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.max()))


def test_second_moments_are_those_of_the_input():
    x, w = weights(2, 3, K), weights(K, 4)
    site = calibrate(lambda p, x: x @ p["w"], {"w": w}, [x], **QUIET)["w"]
    np.testing.assert_allclose(site.stats["hessian"], moments(x), rtol=1e-5)


def test_weights_that_read_one_activation_share_their_statistics():
    params = {name: weights(K, K, seed=i) for i, name in enumerate("qkvo")}

    def attention(p, x):
        return (x @ p["q"] + x @ p["k"] * (x @ p["v"])) @ p["o"]

    c = calibrate(attention, params, [weights(5, K)], **QUIET)
    assert {c[name].shared for name in "qkv"} == {c["q"].shared}
    assert c["o"].shared == "o"
    assert len(c.states) == 2


def test_padding_does_not_count():
    x, w = weights(2, 4, K), weights(K, 4)
    valid = jnp.array([[True, True, False, False], [True, True, True, False]])
    noisy = jnp.where(valid[..., None], x, 1e6)
    c = calibrate(lambda p, x: x @ p["w"], {"w": w}, [noisy], mask=lambda _: valid, **QUIET)["w"]
    assert float(c.rows) == 5
    np.testing.assert_allclose(c.stats["hessian"], moments(x[valid]), rtol=1e-5)


def test_a_branch_not_taken_and_a_loop_count_what_ran():
    params = {name: jnp.eye(K) for name in "abc"}

    def fn(p, x):
        x = lax.cond(jnp.sum(x * x) > 0, lambda x: x @ p["a"], lambda x: x @ p["b"], x)
        return lax.while_loop(lambda s: s[1] < 3, lambda s: (s[0] @ p["c"], s[1] + 1), (x, 0))[0]

    x = weights(5, K)
    c = calibrate(fn, params, [x, x], **QUIET)
    assert [float(c[name].rows) for name in "abc"] == [10, 0, 30]
    assert c.without_data() == ["b"]
    np.testing.assert_allclose(c["c"].stats["hessian"], moments(x), rtol=1e-5)


def test_experts_see_their_own_rows():
    x, w = weights(5, K), weights(3, K, 4)
    sizes = jnp.array([2, 0, 3])
    c = calibrate(lambda p, x: lax.ragged_dot(x, p["w"], sizes), {"w": w}, [x], **QUIET)
    assert c["w"].rows.tolist() == [2, 0, 3]
    assert c.without_data() == ["w[1]"]
    np.testing.assert_allclose(c["w"].stats["hessian"][2], moments(x[2:]), rtol=1e-5)


def test_a_convolution_sees_patches():
    x, w = weights(2, 6, 6, 3), weights(3, 3, 3, 4)

    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, p["w"], (1, 1), "VALID", dimension_numbers=numbers)

    site = calibrate(fn, {"w": w}, [x], **QUIET)["w"]
    rows = jnp.stack(
        [x[:, i : i + 3, j : j + 3].reshape(2, -1) for i in range(4) for j in range(4)], 1
    )
    np.testing.assert_allclose(site.stats["hessian"], moments(rows), rtol=1e-4, atol=1e-6)


def test_sharded_batches_give_global_statistics():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
    x, w = weights(8, K), weights(3, K, K, seed=1)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    a = calibrate(layers, {"w": w}, [x], **QUIET)["w"]
    b = calibrate(layers, {"w": w}, [sharded], **QUIET)["w"]
    np.testing.assert_allclose(a.stats["hessian"], b.stats["hessian"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, p, x: calibrate(f, p, [], **QUIET), "no calibration batches"),
        (lambda f, p, x: calibrate(f, p, [x, x * jnp.nan], **QUIET), "w/0: .* batch 2"),
        (lambda f, p, x: calibrate(f, p, [x], paths=["b"], **QUIET), "b: no weight of a product"),
        (lambda f, p, x: calibrate(f, p, [x], paths=["z"], **QUIET), "z: .*no such parameter"),
    ],
)
def test_bad_input_is_named(call, message):
    params = {"w": [weights(K, K)], "b": jnp.zeros(K)}
    with pytest.raises(ValueError, match=message):
        call(lambda p, x: x @ p["w"][0] + p["b"], params, weights(5, K))


def test_a_lookup_has_nothing_to_calibrate():
    with pytest.raises(CalibrationError, match="only looked up"):
        calibrate(
            lambda p, i: p["e"][i], {"e": weights(5, K)}, [jnp.array([1, 2])], paths=["e"], **QUIET
        )
