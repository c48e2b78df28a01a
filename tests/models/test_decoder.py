"""The decoder computes what transformers computes, with and without a cache, scanned or not."""

import functools
import json
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models import Decoder, ModelConfig, RopeScaling, init_cache, load_hf, positions_of
from qjax.models.assemble import shapes
from qjax.models.rope import interleave_rows, split_rows

HF = Path(__file__).parents[1] / "golden" / "hf"
NAMES = sorted(path.name for path in HF.iterdir())
MAX_DELTA = 2e-3  # Promised for float32 logits.

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "llama": ModelConfig("llama", **SIZES, rope_scaling=RopeScaling("llama3", factor=4.0)),
    "mistral": ModelConfig("mistral", **SIZES, sliding_window=4),
    "qwen2": ModelConfig("qwen2", **SIZES, qkv_bias=True, tie_embeddings=True),
    "qwen3": ModelConfig("qwen3", **SIZES, qk_norm=True),
}
# Two orders of float32 sums over at most 24 terms of size about 1.
ORDER = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def make(config, **options):
    """Returns a model, its parameters, and tokens."""
    model = Decoder(config, **options)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = 0.3 * rng.normal(size=leaf.shape)
        return jnp.asarray(1 + noise if path.endswith("scale") else noise, leaf.dtype)

    leaves = {path: draw(path, leaf) for path, leaf in shapes(model).items()}
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 11)), jnp.int32)
    return model, flax.traverse_util.unflatten_dict(leaves, sep="/"), tokens


@functools.cache
def jitted(model):
    return jax.jit(model.apply, static_argnames="logits_at")


def stack(params, num_layers):
    layers = [params[f"layers_{i}"] for i in range(num_layers)]
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_with_transformers(name, scan_layers):
    loaded = load_hf(HF / name, scan_layers=scan_layers)
    expected = np.load(HF / name / "expected.npz")
    logits = jitted(loaded.model)({"params": loaded.params}, expected["tokens"])
    assert np.abs(logits - expected["logits"]).max() < MAX_DELTA


@pytest.mark.judge
@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_with_transformers_live(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        HF / name, dtype=torch.float32, attn_implementation="eager"
    )
    loaded = load_hf(HF / name)
    tokens = np.random.default_rng(7).integers(0, loaded.config.vocab_size, (3, 33))
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    logits = loaded.model.apply({"params": loaded.params}, jnp.asarray(tokens))
    assert np.abs(logits - expected).max() < MAX_DELTA


def test_parameters_are_named_and_laid_out_as_flax_does():
    unrolled = shapes(Decoder(CONFIGS["qwen3"]))
    assert unrolled["layers_1/attn/q_proj/kernel"].shape == (16, 32)
    assert unrolled["layers_0/mlp/down_proj/kernel"].shape == (24, 16)
    assert unrolled["layers_0/attn/q_norm/scale"].shape == (8,)
    assert unrolled["embed/embedding"].shape == (61, 16)
    assert unrolled["norm/scale"].shape == (16,)
    assert unrolled["lm_head/kernel"].shape == (16, 61)
    scanned = shapes(Decoder(CONFIGS["qwen3"], scan_layers=True))
    assert scanned["layers/attn/q_proj/kernel"].shape == (2, 16, 32)


@pytest.mark.parametrize("name", CONFIGS)
def test_scanned_equals_unrolled(name):
    config = CONFIGS[name]
    model, params, tokens = make(config)
    scanned = Decoder(config, scan_layers=True, remat=True)
    expected = jitted(model)({"params": params}, tokens)
    got = jitted(scanned)({"params": stack(params, config.num_layers)}, tokens)
    np.testing.assert_allclose(got, expected, **ORDER)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_equals_the_full_forward(name, scan_layers):
    model, params, tokens = make(CONFIGS[name], scan_layers=scan_layers)
    apply = jitted(model)
    full = apply({"params": params}, tokens)
    cache = init_cache(model.config, 2, 16)
    start, cache = apply({"params": params}, tokens[:, :6], cache=cache)
    steps = [start]
    for t in range(6, tokens.shape[1]):
        logits, cache = apply({"params": params}, tokens[:, t : t + 1], cache=cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), full, **ORDER)
    assert int(cache.length) == tokens.shape[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padding_changes_no_real_token(name, side):
    model, params, tokens = make(CONFIGS[name])
    apply = jitted(model)
    full = apply({"params": params}, tokens)
    width = (3, 0) if side == "left" else (0, 3)
    padded = jnp.pad(tokens[:, :7], ((0, 0), width), constant_values=5)
    mask = jnp.pad(jnp.ones((2, 7), jnp.int32), ((0, 0), width))
    positions = positions_of(mask)
    real = slice(3, 10) if side == "left" else slice(0, 7)
    logits = apply({"params": params}, padded, positions=positions)
    np.testing.assert_allclose(logits[:, real], full[:, :7], **ORDER)
    assert np.isfinite(logits).all()
    cache = init_cache(model.config, 2, 14)
    _, cache = apply({"params": params}, padded, positions=positions, cache=cache)
    logits, _ = apply({"params": params}, tokens[:, 7:], cache=cache)
    np.testing.assert_allclose(logits, full[:, 7:], **ORDER)


def test_logits_only_where_asked_are_those_of_the_full_forward():
    model, params, tokens = make(CONFIGS["qwen2"])
    full = jitted(model)({"params": params}, tokens)
    last = jitted(model)({"params": params}, tokens, logits_at=-1)
    np.testing.assert_allclose(last, full[:, -1:], **ORDER)
    each = jax.jit(model.apply)({"params": params}, tokens, logits_at=jnp.array([2, 9]))
    np.testing.assert_allclose(each[:, 0], full[jnp.arange(2), jnp.array([2, 9])], **ORDER)


def test_a_full_cache_is_loud():
    model, params, tokens = make(CONFIGS["llama"])
    with pytest.raises(ValueError, match="11 tokens do not fit a cache of 8 slots"):
        model.apply({"params": params}, tokens, cache=init_cache(model.config, 2, 8))
    cache = init_cache(model.config, 2, 8)
    _, cache = jitted(model)({"params": params}, tokens[:, :8], cache=cache)
    logits, _ = jitted(model)({"params": params}, tokens[:, 8:9], cache=cache)
    assert np.isnan(logits).all()


def test_tokens_need_a_batch_axis():
    model, params, tokens = make(CONFIGS["llama"])
    with pytest.raises(ValueError, match=r"tokens\[None\]"):
        model.apply({"params": params}, tokens[0])


@pytest.mark.parametrize("scan_layers", [False, True])
def test_gradients_reach_every_parameter(scan_layers):
    model, params, tokens = make(CONFIGS["qwen3"], scan_layers=scan_layers, remat=True)
    loss = lambda p: jnp.square(model.apply({"params": p}, tokens)).sum()
    grads = jax.jit(jax.grad(loss))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
    model, params, tokens = make(CONFIGS["llama"], dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits = jitted(model)({"params": params}, tokens)
    assert logits.dtype == jnp.float32
    exact = jitted(Decoder(CONFIGS["llama"]))({"params": params}, tokens)
    assert jnp.linalg.norm(logits - exact) < 0.05 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(("heads", "dim"), [(2, 4), (9, 64)])
def test_row_orders_are_inverse(heads, dim):
    rows = np.arange(heads * dim * 3).reshape(heads * dim, 3)
    np.testing.assert_array_equal(split_rows(interleave_rows(rows, heads), heads), rows)


def test_row_order_is_that_of_gguf():
    assert interleave_rows(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_json(name):
    config = CONFIGS[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(ModelConfig.from_dict(config.to_dict()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "mixtral"}, NotImplementedError, "model_type 'mixtral'.*llama"),
        ({"hidden_act": "gelu"}, NotImplementedError, "`hidden_act` = 'gelu'.*silu"),
        ({"num_hidden_layers": None}, ValueError, "lacks `num_hidden_layers`"),
        ({"rope_parameters": {"rope_type": "yarn"}}, NotImplementedError, "'yarn'.*llama3"),
        ({"num_key_value_heads": 3}, ValueError, "`num_kv_heads` must divide.*3 and 4"),
        ({"sliding_window": 8, "max_window_layers": 1}, NotImplementedError, "some layers only"),
    ],
)
def test_a_config_beyond_the_decoder_is_refused(change, error, message):
    raw = json.loads((HF / "llama" / "config.json").read_text())
    with pytest.raises(error, match=message):
        ModelConfig.from_hf(raw | change)


def test_an_unknown_config_field_is_refused():
    with pytest.raises(ValueError, match=r"unknown model config fields \['n_layer'\]"):
        ModelConfig.from_dict(CONFIGS["llama"].to_dict() | {"n_layer": 3})


def test_old_and_new_rope_keys_mean_the_same():
    raw = json.loads((HF / "llama" / "config.json").read_text())
    rope = dict(raw["rope_parameters"])
    old = {k: v for k, v in raw.items() if k != "rope_parameters"}
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(raw)
