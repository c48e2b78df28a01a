import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import numerics, packing
from qjax.ops import blocked


def make(element_name, K, N, group_size, *, columns=1, zero=False, offset=False, seed=0):
    """Returns arguments of `matmul` and the float64 weight they stand for."""
    rng = np.random.default_rng(seed)
    element = numerics.get_element(element_name)
    G, C = -(-K // group_size), -(-N // columns)
    if element.is_packed:
        codes = rng.integers(0, 2**element.bits, (K, N), dtype=np.uint8)
        data = packing.pack(jnp.asarray(codes), element.bits)
        table = np.asarray(element.levels or np.arange(2**element.bits) + element.qmin)
        q = table[codes]
    elif element.kind == "float":
        data = jnp.asarray(rng.standard_normal((K, N)), jnp.float32).astype(element.dtype)
        q = np.asarray(data.astype(jnp.float32))
    else:
        q = rng.integers(element.qmin, element.qmax + 1, (K, N))
        data = jnp.asarray(q, element.dtype)
    scale = rng.uniform(0.5, 1.5, (G, C)).astype(np.float32)
    z = rng.integers(0, 4, (G, C)).astype(np.float32) if zero else np.zeros((G, C), np.float32)
    b = rng.standard_normal((G, C)).astype(np.float32) if offset else np.zeros((G, C), np.float32)
    spread = lambda v: np.repeat(np.repeat(v, group_size, 0)[:K], columns, 1)[:, :N].astype(float)
    w = (q.astype(np.float64) - spread(z)) * spread(scale) + spread(b)
    args = (data, jnp.asarray(scale), jnp.asarray(z) if zero else None,
            jnp.asarray(b) if offset else None)  # fmt: skip
    return args, {"element": element, "group_size": group_size, "columns": columns}, w


@functools.partial(jax.jit, static_argnames=("element", "group_size", "columns"))
def matmul(x, *args, **static):
    return blocked.matmul(x, *args, **static)


@functools.partial(jax.jit, static_argnames=("K", "element", "group_size", "columns"))
def matmul_t(x, *args, **static):
    return blocked.matmul_t(x, *args, **static)


@functools.partial(jax.jit, static_argnames=("K", "element", "group_size", "columns"))
def gather(index, *args, **static):
    return blocked.gather(index, *args, **static)


def assert_close(y, x, w):
    """Float32 accumulation: the error is a few ulps of what the absolute products add up to."""
    x = np.asarray(x, np.float64)
    bound = np.abs(x) @ np.abs(w) + np.abs(x).sum(1, keepdims=True) * np.abs(w).max()
    assert y.shape == bound.shape
    assert y.dtype == jnp.float32
    assert (np.abs(np.asarray(y, np.float64) - x @ w) <= 8e-7 * bound).all()


ELEMENTS = ["int2", "int3", "int4", "int5", "int6", "int7", "int8", "uint1", "uint4", "uint8",
            "ternary", "nf4", "fp4", "e2m1", "e4m3", "e5m2"]  # fmt: skip


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_element(element, M):
    args, static, w = make(element, 128, 24, 64)
    x = jax.random.normal(jax.random.key(0), (M, 128))
    assert_close(matmul(x, *args, **static), x, w)
    x = jax.random.normal(jax.random.key(1), (M, 24))
    assert_close(matmul_t(x, *args, K=128, **static), x, w.T)


# K and g: even, ragged, per channel, longer than K, finer groups too short, a group inside a unit,
# K inside a unit.
SHAPES = [
    (256, 32),
    (576, 128),
    (192, 192),
    (64, 128),
    (100, 64),
    (96, 12),
    (96, 4),
    (101, 32),
    (7, 7),
]


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize(
    ("element", "K", "g"),
    [("int4", *shape) for shape in SHAPES]
    + [("int3", *shape) for shape in SHAPES if shape[0] % 8 or shape[1] % 8]
    + [(e, K, g) for e in ("int8", "nf4") for K, g in [(576, 128), (101, 32)]],
)
def test_groups_need_not_divide(K, g, element, M):
    args, static, w = make(element, K, 16, g, zero=element != "nf4", offset=element == "int3")
    x = jax.random.normal(jax.random.key(0), (M, K))
    assert_close(matmul(x, *args, **static), x, w)
    x = jax.random.normal(jax.random.key(1), (M, 16))
    assert_close(matmul_t(x, *args, K=K, **static), x, w.T)


@pytest.mark.parametrize(("N", "columns"), [(256, 128), (200, 128), (64, 64)])
@pytest.mark.parametrize("M", [1, 5])
def test_square_blocks(N, columns, M):
    args, static, w = make("e4m3", 256, N, 128, columns=columns)
    x = jax.random.normal(jax.random.key(0), (M, 256))
    assert_close(matmul(x, *args, **static), x, w)
    index = jnp.array([[0, N - 1], [3, 130 % N]])
    rows = gather(index, *args, K=256, **static)
    np.testing.assert_array_equal(rows, w.T[np.asarray(index)].astype(np.float32))


@pytest.mark.parametrize("element", ["int3", "int4", "int8", "nf4", "e5m2"])
@pytest.mark.parametrize(("K", "g"), [(256, 64), (100, 64), (7, 7)])
def test_gather_is_dequantized_columns(element, K, g):
    args, static, w = make(element, K, 40, g)
    index = jnp.array([5, 39, 0, 5])
    rows = gather(index, *args, K=K, **static)
    # q * scale is one rounding of an exact product.
    np.testing.assert_array_equal(rows, w.T[np.asarray(index)].astype(np.float32))


@pytest.mark.parametrize("M", [1, 2, 8, 33])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("element", ["int4", "int8", "nf4"])
def test_tokens_and_dtypes(M, dtype, element):
    # Large enough for several blocks.
    args, static, w = make(element, 2048, 1024, 128)
    x = jax.random.normal(jax.random.key(0), (M, 2048)).astype(dtype)
    assert_close(matmul(x, *args, **static), x, w)


@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_scales_are_read_in_their_type(scale_dtype):
    (data, scale, _, _), static, _ = make("int4", 256, 16, 32)
    scale = scale.astype(scale_dtype)
    x = jax.random.normal(jax.random.key(0), (4, 256))
    a = matmul(x, data, scale, **static)
    b = matmul(x, data, scale.astype(jnp.float32), **static)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("M", [1, 8, 128])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("element", "g"), [("int4", 128), ("nf4", 64), ("int8", 4096), ("int3", 64), ("e4m3", 128)]
)
def test_the_weight_is_never_dequantized_as_a_whole(element, g, M, transposed):
    K, N = 4096, 2048
    e = numerics.get_element(element)
    rows = packing.packed_rows(K, e.bits) if e.is_packed else K
    data = jax.ShapeDtypeStruct((rows, N), e.dtype)
    scale = jax.ShapeDtypeStruct((K // g, N), jnp.float32)
    static = {"element": e, "group_size": g}
    if transposed:
        f = lambda x, d, s: blocked.matmul_t(x, d, s, K=K, **static)
    else:
        f = lambda x, d, s: blocked.matmul(x, d, s, **static)
    x = jax.ShapeDtypeStruct((M, N if transposed else K), jnp.float32)
    temp = jax.jit(f).lower(x, data, scale).compile().memory_analysis().temp_size_in_bytes
    # 8-bit floats are copied once, as bytes: see `_as_bytes`.
    assert temp < K * N * 4 / 4 + (K * N if e.kind == "float" else 0)


@pytest.mark.parametrize("M", [1, 4])
def test_under_vmap_scan_cond_and_grad(M):
    made = [make("int4", 128, 32, 32, seed=i) for i in range(3)]
    data, scale = (jnp.stack([args[j] for args, _, _ in made]) for j in range(2))
    static, ws = made[0][1], [w for _, _, w in made]
    x = jax.random.normal(jax.random.key(0), (3, M, 128))

    def f(x, data, scale):
        return blocked.matmul(x, data, scale, **static)

    mapped = jax.jit(jax.vmap(f))(x, data, scale)
    _, scanned = jax.jit(lambda *xs: jax.lax.scan(lambda c, a: (c, f(*a)), None, xs))(
        x, data, scale
    )
    for i in range(3):
        assert_close(mapped[i], x[i], ws[i])
        assert_close(scanned[i], x[i], ws[i])
    no = lambda *_: jnp.zeros((M, 32))
    assert_close(
        jax.jit(lambda p, *a: jax.lax.cond(p, f, no, *a))(True, x[0], data[0], scale[0]),
        x[0],
        ws[0],
    )
    gradient = jax.jit(jax.grad(lambda x: f(x, data[0], scale[0]).sum()))(x[0])
    assert_close(gradient, jnp.ones((M, 32)), ws[0].T)
