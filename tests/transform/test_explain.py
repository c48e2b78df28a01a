"""explain lists every use of every quantized parameter."""

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax import Format
from qjax.ops import native


def model(params, tokens):
    x = params["embed"][tokens]
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["up"]) @ layer["down"]
    x = x + jnp.sort(params["mixer"], axis=0)[0, :16]
    return x @ params["embed"].T


@pytest.fixture
def params(quantize, normal):
    layer = {"up": normal(16, 32), "down": normal(32, 16)}
    tree = {"embed": normal(50, 16), "layers": [layer, layer], "mixer": normal(16, 16)}
    return quantize(tree, {"embed": "nk"})


def test_every_use_has_a_row(params):
    uses = qjax.explain(model)(params, jnp.arange(3))
    rows = {(u.path, u.op, u.how.split(":")[0]) for u in uses}
    assert rows == {
        ("0/embed", "gather", "rows looked up"),
        ("0/embed", "dot_general", "x @ W"),
        ("0/layers/0/up", "dot_general", "x @ W"),
        ("0/layers/0/down", "dot_general", "x @ W"),
        ("0/layers/1/up", "dot_general", "x @ W"),
        ("0/layers/1/down", "dot_general", "x @ W"),
        ("0/mixer", "sort", "dequantized"),
    }
    assert [u.path for u in uses.dequantized] == ["0/mixer"]
    assert all(u.count == 1 for u in uses)


def test_the_table_is_readable(params):
    lines = str(qjax.explain(model)(params, jnp.arange(3))).splitlines()
    assert lines[0].split() == ["parameter", "op", "how", "implementation"]
    assert len(lines) == 8
    how = lines[0].index("how")
    assert {line[how - 2 : how] for line in lines} == {"  "}  # columns line up
    assert "dequantized: `sort` has no rule for packed weights" in str(lines)


def test_shapes_are_enough(params):
    shapes = jax.eval_shape(lambda *a: a, params, jnp.arange(3))
    assert qjax.explain(model)(*shapes) == qjax.explain(model)(params, jnp.arange(3))


def test_repeated_uses_are_counted_and_keywords_named(quantize, normal):
    w = quantize({"w": normal(16, 16)})["w"]
    (use,) = qjax.explain(lambda *, w, x: x @ w @ w @ w)(w=w, x=normal(2, 16))
    assert (use.path, use.count) == ("w", 3)
    assert "dot_general x3" in str(
        qjax.explain(lambda *, w, x: x @ w @ w @ w)(w=w, x=normal(2, 16))
    )


def test_derivatives_are_uses_too(quantize, normal):
    w = quantize({"w": normal(16, 16)})["w"]
    fn = lambda w, x: jax.grad(lambda x: jnp.sin(x @ w).sum())(x)
    assert {u.how for u in qjax.explain(fn)(w, normal(2, 16))} == {"x @ W", "x @ Wᵀ"}


def test_the_implementation_can_be_chosen(quantize, assert_close, normal):
    w, x = quantize({"w": normal(64, 16)})["w"], normal(2, 64)
    fn = lambda w, x: x @ w
    for implementation, says in [
        (None, "native, " if native.why_not() is None else "blocks of K: no native kernel"),
        ("reference", "asked for"),
        ("xla", "blocks of K (asked for)"),
    ]:
        (use,) = qjax.explain(fn, implementation=implementation)(w, x)
        assert says in use.implementation
        got = qjax.apply(fn, implementation=implementation)(w, x)
        assert_close(got, x @ qjax.dequantize(w))
    with pytest.raises(ValueError, match="`implementation` must be None or one of reference, xla"):
        qjax.apply(fn, implementation="cuda")(w, x)


def test_nothing_quantized_gives_an_empty_table(normal):
    assert not qjax.explain(lambda x: x @ x)(normal(4, 4))


def test_int8_activations_are_named(quantize, normal):
    w = quantize({"w": normal(64, 16)}, fmt=Format("int8", activation="int8"))["w"]
    (use,) = qjax.explain(lambda w, x: x @ w)(w, normal(2, 64))
    assert use.implementation == "xla, int8 activations per token, int32 accumulator"
