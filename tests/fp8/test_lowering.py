"""What is compiled: products of FP8 codes, not of codes made wide again."""

import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qjax import Format, fp8
from qjax.models import Decoder, ModelConfig

E4M3, E5M2 = "f8E4M3FN", "f8E5M2"


def stablehlo(fn, *args):
    """The program that a CUDA device would be given, which needs no such device."""
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def dots(text):
    """Returns the types of the operands and of the result of every dot."""
    found = re.findall(r"stablehlo\.dot_general .*: \((.*), (.*)\) -> (.*)", text)
    return [tuple(re.search(r"[x<]([a-z]\w*)>", t)[1] for t in types) for types in found]


@pytest.mark.parametrize(
    ("recipe", "wide"),
    [
        ("current", "bf16"),
        ("delayed", "bf16"),
        (fp8.Fp8Recipe(power_of_two=False), "f32"),
        (Format("e4m3", group_size=16, group_columns=16), "f32"),
    ],
    ids=["current", "delayed", "float scales", "block"],
)
def test_the_three_products_take_fp8_operands(recipe, wide):
    def loss_of(params, x):
        x = x * params["scale"].astype(x.dtype)  # so that the input needs a gradient too
        return jnp.sum(jnp.tanh(x @ params["w"].astype(x.dtype)).astype(jnp.float32))

    params = {"scale": jnp.ones(32), "w": jnp.ones((32, 48))}
    x = jnp.ones((64, 32), jnp.bfloat16)
    state = jax.eval_shape(fp8.init(loss_of, recipe), params, x)
    step = fp8.value_and_grad(loss_of, recipe)
    found = dots(stablehlo(step, state, params, x))
    # float32 where the weight's gradient, or each block, is accumulated outside.
    assert sorted(found) == sorted([(E4M3, E4M3, wide), (E5M2, E4M3, wide), (E4M3, E5M2, "f32")])


def test_gradients_of_a_decoder_have_no_product_of_a_weight_in_float():
    config = ModelConfig(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
        num_kv_heads=2, head_dim=16,
    )  # fmt: skip
    model = Decoder(config, dtype=jnp.bfloat16, scan_layers=True, remat=True)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    loss_of = lambda params, tokens: jnp.mean(model.apply({"params": params}, tokens) ** 2)
    step = fp8.value_and_grad(loss_of, "delayed")
    state = jax.eval_shape(fp8.init(loss_of, "delayed"), params, tokens)
    found = dots(stablehlo(step, state, params, tokens))
    float_dots = [d for d in found if not d[0].startswith("f8")]
    # Attention has two products without a weight, each computed again for its own two derivatives.
    assert len(float_dots) == 2 + 2 + 4
    # Seven weights and the head: forward, and both derivatives. Layers compute again all but their
    # last product, whose result no derivative needs.
    assert sum(d[:2] == (E4M3, E4M3) for d in found) == 7 + 1 + 6
    assert sum(d[:2] == (E5M2, E4M3) for d in found) == 7 + 1
    assert sum(d[:2] == (E4M3, E5M2) for d in found) == 7 + 1


@pytest.mark.h100
@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
def test_an_h100_multiplies_in_fp8(recipe):
    """Compiles a decoder's training step for an H100, without one."""
    mesh = importlib.import_module("pallas_kernels.h100").mesh()
    config = ModelConfig(
        "llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4,
        num_kv_heads=4, head_dim=64,
    )  # fmt: skip
    model = Decoder(config, dtype=jnp.bfloat16, scan_layers=True)
    tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    loss_of = lambda params, tokens: jnp.mean(model.apply({"params": params}, tokens) ** 2)
    step = fp8.value_and_grad(loss_of, recipe)
    state = jax.eval_shape(fp8.init(loss_of, recipe), params, tokens)
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P()))
    args = jax.tree.map(place, (state, params, tokens))
    with jax.set_mesh(mesh):
        lowered = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",))
        # Without a device nothing can be timed: take cuBLAS, the one that XLA can always choose.
        hlo = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False}).as_text()
    calls = re.findall(r'custom_call_target="(\S*?)"', hlo)
    kernels, calls = calls.count("mosaic_gpu_v2"), [c for c in calls if c.startswith("__cublas")]
    in_float = [c for c in calls if c != "__cublas$lt$matmul$f8"]
    # The two products of attention and their derivatives, and nothing else.
    assert len(in_float) == 2 + 4
    if recipe == "block":  # in a kernel that adds the blocks' sums
        assert kernels == 3 * (7 + 1)
        assert len(calls) == len(in_float)
        return
    # Seven weights and the head, thrice. XLA makes one product of those that share both an input
    # and its scale: q, k and v, gate and up.
    merged = 2 + 1 if recipe == "current" else 0
    assert 3 * (7 + 1 - merged) <= len(calls) - len(in_float) <= 3 * (7 + 1)
