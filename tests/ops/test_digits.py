import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import numerics, packing
from qjax.ops import blocked, cpu, digits
from qjax.ops.packed_dot import packed_dot


def value(d, step):
    """Returns what digits stand for, in float64."""
    return sum(256.0**i * np.asarray(v, np.float64) for i, v in enumerate(d)) * np.asarray(step)


@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_digits_are_off_by_half_a_unit(spread):
    normal = jax.random.normal(jax.random.key(0), (2, 16, 128))
    x = normal * jnp.exp(spread * jax.random.normal(jax.random.key(1), (2, 16, 1)))
    d, step = digits.split(x)
    absmax = np.abs(np.asarray(x)).max(-1, keepdims=True)
    assert (np.asarray(step) <= 2.0**-29 * absmax).all()
    assert (np.abs(value(d, step) - np.asarray(x, np.float64)) <= np.asarray(step) / 2).all()


def test_values_near_the_largest_are_exact():
    magnitude = 2.0 ** jax.random.uniform(jax.random.key(0), (8, 512), minval=-6, maxval=0)
    x = magnitude * jax.random.rademacher(jax.random.key(1), (8, 512), jnp.float32)
    x = x.at[:, 0].set(1.0)
    np.testing.assert_array_equal(value(*digits.split(x)), np.asarray(x, np.float64))


@pytest.mark.parametrize("edge", [0.0, 3.4e38, -3.4e38, 1.2e-38, 2.0**-100])
def test_the_whole_range_of_floats(edge):
    d, step = digits.split(jnp.full((1, 4), edge))
    # The smallest unit is the smallest normal number: half of it is what XLA takes for 0.
    np.testing.assert_allclose(value(d, step), edge, rtol=1e-7, atol=2.0**-127)


def test_nan_and_inf_poison_their_row_alone():
    x = jnp.ones((3, 4)).at[0, 1].set(jnp.nan).at[2, 3].set(-jnp.inf)
    assert np.isnan(np.asarray(digits.split(x)[1])).ravel().tolist() == [True, False, True]


ELEMENTS = ["int2", "int3", "int4", "int5", "int7", "int8", "uint1", "uint8", "ternary"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", ELEMENTS)
def test_product_of_digits_is_the_product(name, groups, dtype):
    element, (M, K, N) = numerics.get_element(name), (5, 192, 24)
    rng = np.random.default_rng(0)
    if element.is_packed:
        u = rng.integers(0, 2**element.bits, (K, N), dtype=np.uint8)
        data = packing.pack(jnp.asarray(u), element.bits)
    else:
        u = rng.integers(element.qmin, element.qmax + 1, (K, N))
        data = jnp.asarray(u, element.dtype)
    scale = rng.uniform(0.5, 1.5, (groups, N)).astype(np.float32)
    w = u * np.repeat(scale, K // groups, 0).astype(np.float64)
    x = jax.random.normal(jax.random.key(0), (M, K)).at[:, 7].mul(1e4).astype(dtype)
    y = digits.matmul(x, data, jnp.asarray(scale), element=element, g=K // groups)
    x = np.asarray(x, np.float64)
    # Few roundings are left: of the digits, of the sums' conversion to float, of adding the groups.
    half_unit = 2.0**-30 * np.abs(x).max(1, keepdims=True)
    bound = 4e-7 * (np.abs(x) @ np.abs(w)) + half_unit * np.abs(w).sum(0)
    assert (np.abs(np.asarray(y, np.float64) - x @ w) <= bound).all()


def test_blocked_products_agree_with_and_without_bytes():
    element = numerics.get_element("int4")
    u = np.random.default_rng(0).integers(0, 16, (256, 40), dtype=np.uint8)
    data = packing.pack(jnp.asarray(u), 4)
    scale = jnp.ones((2, 40))
    x = jax.random.normal(jax.random.key(0), (8, 256))
    static = {"element": element, "group_size": 128}
    a, b = (blocked.matmul(x, data, scale, in_bytes=flag, **static) for flag in (False, True))
    bound = 8e-7 * (np.abs(np.asarray(x)) @ (u + 8.0))
    assert (np.abs(np.asarray(a - b)) <= bound).all()


def test_only_what_gains_runs_in_bytes(monkeypatch):
    int4, int8 = numerics.get_element("int4"), numerics.get_element("int8")
    monkeypatch.setattr(cpu, "has_int8_dot", lambda: True)
    assert digits.is_faster(16, 4096, 128, int4)
    assert digits.is_faster(128, 4096, 4096, int8)
    assert not digits.is_faster(32, 4096, 128, int4)
    assert not digits.is_faster(8, 4096, 32, int4)
    assert not digits.is_faster(8, 1 << 17, 1 << 17, int8)
    assert not digits.is_faster(8, 4096, 128, numerics.get_element("nf4"))
    monkeypatch.setattr(cpu, "has_int8_dot", lambda: False)
    assert not digits.is_faster(16, 4096, 128, int4)


@pytest.mark.parametrize("prepare", [False, True])
def test_programs_for_a_gpu_do_not_depend_on_this_cpu(monkeypatch, prepare):
    monkeypatch.setattr(cpu, "has_int8_dot", lambda: True)
    K = 512 if prepare else 384  # of its own, as what was traced before is not traced again
    qt = qjax.quantize({"w": jnp.ones((K, 128))}, qjax.Format("int8"))["w"]
    qt = qjax.prepare(qt, "h100") if prepare else qt
    asked = []
    is_faster = digits.is_faster
    monkeypatch.setattr(digits, "is_faster", lambda *a: asked.append(a) or is_faster(*a))
    x = jnp.ones((11, K))  # in float32, for which there is no kernel
    lower = lambda platform: jax.jit(lambda x, qt: packed_dot(x, qt, implementation="xla")).trace(
        x, qt
    ).lower(lowering_platforms=(platform,))  # fmt: skip
    lower("cuda")
    assert not asked
    lower("cpu")
    assert bool(asked) != prepare  # what is prepared computes the same in every program
