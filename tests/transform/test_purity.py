"""Nothing outside of a call of `qjax.apply` changes: no patches, no poisoned trace caches."""

import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

SNAPSHOT = """
import jax, jax.numpy, jax.lax, jax.nn, jax.export, flax.linen, flax.nnx, optax, sys, types

def snapshot():
    out = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "numpy"):
            for key, value in list(vars(module).items()):
                if callable(value) or isinstance(value, types.ModuleType):
                    out[name, key] = (value, getattr(value, "__code__", None))
    return out

before = snapshot()
import jax.numpy as jnp
import qjax

w = qjax.quantize(jnp.ones((8, 8)), qjax.Format("int8"))
y = jax.jit(qjax.apply(lambda w, x: jax.nn.relu(x @ w)))(w, jnp.ones((2, 8)))
assert (y == 8).all()
changed = [
    name for name, (value, code) in snapshot().items()
    if name in before and (before[name][0] is not value or before[name][1] is not code)
]
assert not changed, changed
"""


def test_no_attribute_of_jax_or_flax_is_replaced():
    subprocess.run([sys.executable, "-c", SNAPSHOT], check=True, timeout=300)


def primitives(fn, *args):
    return set(re.findall(r"\b(packed_dot|dot_general)\[", str(jax.make_jaxpr(fn)(*args))))


# The functions behind `@`, jnp.dot and einsum are jitted inside JAX, with caches of their own.
PRODUCTS = {
    "matmul": lambda w, x: x @ w,
    "dot": lambda w, x: jnp.dot(x, w),
    "einsum": lambda w, x: jnp.einsum("bk,kn->bn", x, w),
    "jit": jax.jit(lambda w, x: x @ w),
    "checkpoint": jax.checkpoint(lambda w, x: x @ w),
    "dense": lambda w, x: nn.Dense(32, use_bias=False).apply({"params": {"kernel": w}}, x),
}


@pytest.mark.parametrize("packed_first", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_equal_shapes_do_not_share_traces(quantize, assert_close, normal, name, packed_first):
    fn = PRODUCTS[name]
    M = 11 + 2 * list(PRODUCTS).index(name) + packed_first  # shapes that no other test has traced
    w, x = normal(64, 32), normal(M, 64)
    q = quantize({"kernel": w})["kernel"]

    def packed():
        assert primitives(qjax.apply(fn), q, x) == {"packed_dot"}
        assert_close(qjax.apply(fn)(q, x), x @ qjax.dequantize(q))

    def plain():
        assert primitives(fn, w, x) == {"dot_general"}
        assert np.array_equal(fn(w, x), fn(w, x))
        assert_close(fn(w, x), x @ w)

    for step in (packed, plain, packed, plain) if packed_first else (plain, packed, plain, packed):
        step()


def test_other_products_inside_fn_stay_float(quantize, normal):
    q, w, x = quantize({"w": normal(64, 64)})["w"], normal(64, 64, seed=1), normal(3, 64)
    text = str(jax.make_jaxpr(qjax.apply(lambda q, w, x: x @ q @ w))(q, w, x))
    assert (text.count("packed_dot["), text.count("dot_general[")) == (1, 1)


def test_two_formats_of_one_shape_do_not_share_traces(quantize, assert_close, normal):
    w, x = normal(64, 32), normal(3, 64)
    fn = jax.jit(qjax.apply(lambda w, x: x @ w))
    for element, group in [("int4", 16), ("int4", 32), ("nf4", 16), ("int8", None)]:
        q = quantize({"w": w}, fmt=qjax.Format(element, group))["w"]
        assert_close(fn(q, x), x @ qjax.dequantize(q))


def test_private_jax_is_imported_in_one_file():
    root = pathlib.Path(qjax.__file__).parent
    users = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"^\s*(from|import) jax\._src", path.read_text(encoding="utf-8"), re.M)
    }
    assert users <= {"_compat.py"}
