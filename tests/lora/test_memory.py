"""A training step has memory for the packed base and the adapters, none for the base's floats."""

import jax
import jax.numpy as jnp
import optax
import pytest

import qjax
from qjax import lora
from qjax.models import Decoder, ModelConfig

TOKENS = (2, 8)


def config(layers):
    return ModelConfig(
        "llama", vocab_size=32, hidden_size=256, intermediate_size=1024, num_layers=layers,
        num_heads=4, num_kv_heads=4, head_dim=64, tie_embeddings=True,
    )  # fmt: skip


def training(layers, policy="nf4-dq"):
    """Returns a train step on a base of so many layers, and the shapes of its arguments."""
    model = Decoder(config(layers), scan_layers=True, remat=True)
    tokens = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    base = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    base = qjax.quantize(base, policy) if policy else base
    fn = lambda params, tokens: model.apply({"params": params}, tokens)
    init = lambda: lora.init(jax.random.key(0), base, "*_proj/kernel", rank=2)
    adapters = jax.eval_shape(init)
    optimizer = lora.master_weights(optax.adamw(1e-3))

    def step(base, adapters, opt, tokens):
        def loss(adapters):
            logits = lora.apply(fn, dropout=0.1, key=jax.random.key(1))(base, adapters, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, opt = optimizer.update(grads, opt, adapters)
        return optax.apply_updates(adapters, updates), opt, value

    return step, (base, adapters, jax.eval_shape(optimizer.init, adapters), tokens)


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measured(layers, policy="nf4-dq"):
    """Returns (arguments, temporaries) of the compiled step, in bytes, and those of its parts."""
    step, shapes = training(layers, policy)
    memory = jax.jit(step, donate_argnums=(1, 2)).lower(*shapes).compile().memory_analysis()
    assert memory is not None
    # What a step makes lies where its arguments were; more are the loss and a table of pointers.
    outputs = len(jax.tree.leaves(jax.eval_shape(step, *shapes)))
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 4 + 8 * (outputs + 1)
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes, [nbytes(x) for x in shapes]


@pytest.mark.slow
def test_a_layer_adds_its_codes_its_adapters_and_its_saved_input():
    few, many, more = 2, 10, 8
    (args_few, temp_few, parts_few), (args, temp, parts) = measured(few), measured(many)
    base, adapters, opt, _ = ((b - a) // more for a, b in zip(parts_few, parts, strict=True))
    assert abs((args - args_few) / more - (base + adapters + opt)) < 1024  # alignment
    # With remat a layer keeps its input. The optimizer makes the gradients of A and B, their moves
    # and new float32 copies: 4 arrays of their size in float32, twice the bytes of bfloat16.
    saved = 4 * TOKENS[0] * TOKENS[1] * 256
    layer = (temp - temp_few) / more
    assert layer <= saved + 4 * 2 * adapters
    assert layer < base / 4
    weights = 4 * (4 * 256 * 256 + 3 * 256 * 1024)  # in float32
    assert base < weights / 7.5
    # The rest does not depend on the number of layers: it is one layer at work. XLA may have
    # several of its products under way, so that is the floats of all its matrices once, and what
    # its derivatives need of its tokens, of which the MLP's are the largest.
    hidden = 4 * TOKENS[0] * TOKENS[1] * 1024
    assert temp_few - few * layer < weights + 20 * hidden


def _avals(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _avals(inner)


def test_nothing_of_a_weights_size_is_computed():
    smallest = 256 * 256  # of the targeted weights; activations and adapters have fewer numbers

    def large(step, shapes):
        return {
            aval.shape
            for aval in _avals(jax.make_jaxpr(step)(*shapes).jaxpr)
            if hasattr(aval, "shape")
            and jnp.issubdtype(aval.dtype, jnp.floating)
            and aval.size >= smallest
        }

    step, shapes = training(2)
    assert large(step, shapes) == set()
    # The search does find the gradient of a float base, where one is asked for.
    fn = lambda base, x: jnp.sum(x @ base)
    shapes = (
        jax.ShapeDtypeStruct((256, 256), jnp.float32),
        jax.ShapeDtypeStruct((256,), jnp.float32),
    )
    assert large(jax.jit(jax.grad(fn)), shapes) == {(256, 256)}


def test_the_backward_pass_uses_the_packed_transposed_product():
    base = qjax.quantize({"w": jax.random.normal(jax.random.key(0), (64, 32))}, qjax.Format("nf4"))
    adapters = lora.init(jax.random.key(0), base, "w", rank=2)
    fn = lambda p, x: x @ p["w"]
    loss = lambda ad: jnp.sum(
        lora.apply(fn)(base, ad, lora.apply(fn)(base, ad, jnp.ones(64)) @ jnp.ones((32, 64))) ** 2
    )
    text = str(jax.make_jaxpr(jax.grad(loss))(adapters))
    assert text.count("packed_dot[") == 3
    assert text.count("transposed=True") == 1


def test_the_base_of_nf4_with_double_quantization_has_4_127_bits():
    w = jax.random.normal(jax.random.key(0), (1024, 1024))
    (qt,) = qjax.quantize({"w": w}, "nf4-dq").values()
    assert 8 * sum(x.nbytes for x in jax.tree.leaves(qt)) / w.size == 4 + 8 / 64 + 32 / (64 * 256)
