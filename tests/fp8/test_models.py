"""A decoder in FP8: one history a layer under scan, and the same numbers as without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import fp8
from qjax.models import Decoder, ModelConfig

CONFIG = ModelConfig(
    "llama", vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, tie_embeddings=True,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 32)


def loss_with(**options):
    model = Decoder(CONFIG, **options)

    def loss_of(params, tokens):
        logits = jax.nn.log_softmax(model.apply({"params": params}, tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], -1))

    return loss_of


@pytest.fixture(scope="module")
def params():
    return jax.jit(Decoder(CONFIG).init)(jax.random.key(1), TOKENS)["params"]


def stacked(tree, name="layers_{}"):
    """The tree of the scanned model for that of the unrolled one."""
    layers = [tree[name.format(i)] for i in range(CONFIG.num_layers)]
    rest = {k: v for k, v in tree.items() if not k.startswith("layers_")}
    return rest | {"layers": jax.tree.map(lambda *a: jnp.stack(a), *layers)}


def unstacked(history):
    """The histories of the unrolled model for those of the scanned one."""
    out = {}
    for path, amax in history.items():
        for i in range(CONFIG.num_layers if path.startswith("layers/") else 1):
            name = path.replace("layers/", f"layers_{i}/")
            out[name] = fp8.Amax(*(a[i] for a in amax)) if name != path else amax
    return out


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "recipe", ["delayed", pytest.param("current", marks=SLOW), pytest.param("block", marks=SLOW)]
)
def test_layers_under_scan_and_remat_train_like_layers_in_a_row(params, recipe):
    plain, scanned = loss_with(), loss_with(scan_layers=True, remat=True)
    scan_before = jax.jit(fp8.init(scanned, recipe))(stacked(params), TOKENS)
    before = fp8.State({})
    if recipe == "delayed":
        before = fp8.State(unstacked(scan_before.history))
    (loss, after), grads = jax.jit(fp8.value_and_grad(plain, recipe))(before, params, TOKENS)
    run = jax.jit(fp8.value_and_grad(scanned, recipe))
    (scan_loss, scan_after), scan_grads = run(scan_before, stacked(params), TOKENS)
    assert abs(loss - scan_loss) <= 1e-5
    for a, b in zip(*map(jax.tree.leaves, (stacked(grads), scan_grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(a).max())
    want = after.history if recipe == "delayed" else {}
    got = unstacked(scan_after.history)
    assert got.keys() == want.keys()
    for path in want:
        for a, b in zip(got[path], want[path], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)


def test_every_product_with_a_weight_is_in_fp8(params):
    loss_of = loss_with(scan_layers=True)
    uses = fp8.explain(loss_of, "delayed")(stacked(params), TOKENS)
    assert {u.path for u in uses if u.is_packed} == {
        "embed/embedding",  # tied: the head
        *(f"layers/attn/{n}_proj/kernel" for n in "qkvo"),
        *(f"layers/mlp/{n}_proj/kernel" for n in ("gate", "up", "down")),
    }
    assert [(u.path, u.op) for u in uses if not u.is_packed] == [("embed/embedding", "gather")]


def test_the_trained_tree_stays_float(params):
    state = jax.eval_shape(fp8.init(loss_with(), "delayed"), params, TOKENS)
    _, grads = jax.eval_shape(fp8.value_and_grad(loss_with(), "delayed"), state, params, TOKENS)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), grads) == jax.tree.map(
        lambda a: (a.shape, a.dtype), params
    )
