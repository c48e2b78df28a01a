"""Flax Linen modules run unmodified on packed weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax import Format


@pytest.fixture
def check(quantize, assert_agrees):
    def run(module, x, layouts=None, **how):
        variables = module.init(jax.random.key(0), x)
        qparams = {**variables, "params": quantize(variables["params"], layouts)}
        return assert_agrees(module.apply, qparams, x, **how)

    return run


@pytest.mark.parametrize(
    ("module", "shape", "layouts"),
    [
        (nn.Dense(32), (4, 64), {}),
        (nn.DenseGeneral((4, 16)), (4, 64), {"kernel": "knn"}),
        (nn.DenseGeneral(32, axis=(-2, -1)), (5, 4, 16), {"kernel": "kkn"}),
        (nn.DenseGeneral((2, 16), axis=(-2, -1)), (5, 4, 16), {"kernel": "kknn"}),
        (nn.DenseGeneral((2, 16), axis=2, batch_dims=(0,)), (3, 5, 64), {"kernel": "knn"}),
        (nn.MultiHeadDotProductAttention(4), (2, 8, 64), {"out/kernel": "kkn", "*kernel": "knn"}),
        (nn.Einsum((64, 4, 16), "...d,dhk->...hk"), (5, 64), {"kernel": "knn"}),
        (nn.Einsum((4, 16, 64), "...d,hkd->...hk"), (5, 64), {"kernel": "nnk"}),
    ],
    ids=["dense", "out2", "in2", "in2out2", "batched", "attention", "einsum", "einsum-nnk"],
)
def test_projections_are_packed(check, normal, module, shape, layouts):
    explanation = check(module, normal(*shape), layouts, depth=3)
    assert {use.op for use in explanation} == {"dot_general"}
    assert {use.how for use in explanation} == {"x @ W"}


class TiedEmbedding(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 32)
        return embed.attend(nn.Dense(32)(embed(tokens)))


def test_tied_embedding_is_looked_up_and_multiplied(check):
    explanation = check(TiedEmbedding(), jnp.arange(6).reshape(2, 3), {"*embedding": "nk"}, depth=2)
    uses = {(use.path.split("/")[-1], use.how) for use in explanation}
    assert uses == {("embedding", "rows looked up"), ("embedding", "x @ W"), ("kernel", "x @ W")}


@pytest.mark.parametrize(
    ("module", "shape", "layout", "how"),
    [
        (nn.Conv(16, (3, 3)), (2, 6, 6, 16), "kkkn", "x * W"),
        (
            nn.Conv(16, (3,), kernel_dilation=2, feature_group_count=2),
            (2, 8, 32),
            "kkn",
            "x * W",
        ),
        (nn.ConvTranspose(16, (3, 3), strides=(2, 2)), (2, 4, 4, 16), "kkkn", "x * W"),
        (nn.Conv(32, (1, 1)), (2, 6, 6, 64), "kkkn", "x @ W at every position"),
        (nn.Conv(32, (1,), strides=2), (2, 7, 64), "kkn", "x @ W at every position"),
    ],
    ids=["3x3", "grouped-dilated", "transposed", "1x1", "1x1-strided"],
)
def test_convolutions_say_what_they_do(check, normal, module, shape, layout, how):
    (use,) = check(module, normal(*shape), {"kernel": layout}, k=144)
    assert (use.op, use.how) == ("conv_general_dilated", how)
    assert (use.implementation == "kernel dequantized in the op") == (how == "x * W")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.gelu(nn.Dense(64)(nn.RMSNorm()(x)))
        return x + nn.Dense(32)(h), None


class Stack(nn.Module):
    remat: bool

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan()(x, None)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_are_packed_in_the_loop(
    quantize, assert_agrees, assert_close, normal, remat
):
    module, x = Stack(remat), normal(4, 32)
    variables = module.init(jax.random.key(0), x)
    qparams = {"params": quantize(variables["params"])}
    explanation = assert_agrees(module.apply, qparams, x, depth=6)
    assert [use.count for use in explanation] == [1, 1]  # the body is traced once

    loss = lambda f: lambda x: jnp.sum(jnp.sin(f(x)))
    got = jax.grad(loss(lambda x: qjax.apply(module.apply)(qparams, x)))(x)
    want = jax.grad(loss(lambda x: module.apply(qjax.dequantize(qparams), x)))(x)
    assert_close(got, want, depth=12)


class Regularized(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic, scale=1.0):
        x = nn.BatchNorm(use_running_average=deterministic)(nn.Dense(32)(x)) * scale
        return nn.Dropout(0.5, deterministic=deterministic)(x)

    def first(self, x):
        return x[0]


def test_flags_rngs_mutable_and_method_reach_the_module(quantize, assert_close, normal):
    module, x = Regularized(), normal(8, 64)
    variables = module.init(jax.random.key(0), x, deterministic=True)
    qparams = {**variables, "params": quantize(variables["params"], {"*kernel": "kn"})}
    kwargs = {
        "deterministic": False,
        "scale": 2.0,
        "mutable": ["batch_stats"],
        "rngs": {"dropout": jax.random.key(1)},
    }
    want = module.apply(qjax.dequantize(qparams), x, **kwargs)
    assert_close(qjax.apply(module.apply)(qparams, x, **kwargs), want)
    got = qjax.apply(module.apply)(qparams, x, method="first")
    assert (got == x[0]).all()


def test_a_format_with_a_zero_point_on_every_kernel_of_attention(
    check, quantize, assert_agrees, normal
):
    module, x = nn.MultiHeadDotProductAttention(4), normal(2, 8, 64)
    params = module.init(jax.random.key(0), x)["params"]
    fmt = Format("int4", 16, zero_point=True)
    qparams = {"params": quantize(params, {"out/kernel": "kkn", "*kernel": "knn"}, fmt)}
    assert_agrees(module.apply, qparams, x, depth=3)
