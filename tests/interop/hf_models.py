"""A small decoder in every format that a Hugging Face directory holds, for the tests of them."""

import dataclasses
import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax import Format, export
from qjax.interop.hf import Weight, write_hf
from qjax.interop.hf.bitsandbytes import DOUBLE
from qjax.interop.hf.compressed_tensors import MXFP4, MXFP8, NVFP4
from qjax.models import Decoder, ModelConfig
from qjax.models.assemble import shapes
from qjax.qtensor import quantize_array

# Every kernel is a multiple of 128 both ways, for the blocks of FP8.
CONFIG = ModelConfig(
    "llama", vocab_size=96, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4,
    num_kv_heads=4, head_dim=32, max_position=128,
)  # fmt: skip
MODEL = Decoder(CONFIG)

W8A8 = Format("int8", activation="int8")
# name -> method, format of the kernels
CASES = {
    "gptq-int4": ("gptq", Format("int4", 32, scale="float16")),
    "gptq-int4-zp": ("gptq", Format("int4", 64, scale="float16", zero_point=True)),
    "gptq-int3-zp": ("gptq", Format("int3", 32, scale="bfloat16", zero_point=True)),
    "gptq-int2": ("gptq", Format("int2", 32, scale="float16", rule="absmax_full")),
    "gptq-int8": ("gptq", Format("int8", scale="float16")),
    "gptq-int8-zp": ("gptq", Format("int8", 128, scale="float16", zero_point=True)),
    "gptq-int4-act-order": ("gptq", Format("int4", 32, scale="float16", zero_point=True)),
    "gptq-int4-v2": ("gptq", Format("int4", 64, scale="float16", zero_point=True)),
    "awq": ("awq", Format("int4", 32, scale="float16")),
    "awq-zp": ("awq", Format("int4", 128, scale="float16", zero_point=True)),
    "ct-int4": ("compressed-tensors", Format("int4", 128, scale="bfloat16")),
    "ct-int4-zp": ("compressed-tensors", Format("int4", 32, zero_point=True)),
    "ct-int3-zp": ("compressed-tensors", Format("int3", 64, zero_point=True)),
    "ct-int5-channel": ("compressed-tensors", Format("int5")),
    "ct-int8": ("compressed-tensors", Format("int8", scale="float16")),
    "ct-w8a8": ("compressed-tensors", W8A8),
    "ct-w8a8-tensor": (
        "compressed-tensors",
        dataclasses.replace(W8A8, group_columns=None, activation_scale="tensor"),
    ),
    "ct-w8a8-static": (
        "compressed-tensors",
        dataclasses.replace(W8A8, activation_scale="static"),
    ),
    "ct-fp8-dynamic": ("compressed-tensors", Format("e4m3", activation="e4m3")),
    "ct-fp8-static": (
        "compressed-tensors",
        Format("e4m3", group_columns=None, activation="e4m3", activation_scale="static"),
    ),
    "ct-fp8-block": ("compressed-tensors", Format("e4m3", 128, 128)),
    "ct-nvfp4": ("compressed-tensors", NVFP4),
    "ct-mxfp4": ("compressed-tensors", MXFP4),
    "ct-mxfp8": ("compressed-tensors", MXFP8),
    "bnb-nf4": ("bitsandbytes", Format("nf4", 64)),
    "bnb-nf4-dq": ("bitsandbytes", Format("nf4", 64, scale=DOUBLE)),
    "bnb-fp4": ("bitsandbytes", Format("fp4", 128)),
    "bnb-int8": ("bitsandbytes", Format("int8", activation="int8", outliers=6.0)),
    "fp8": ("fp8", Format("e4m3", 128, 128)),
}


@functools.cache
def float_params():
    """The float parameters, flat: norms off one and weights large enough that all of them show."""
    rng = np.random.default_rng(0)
    out = {}
    for path, leaf in shapes(MODEL).items():
        noise = rng.normal(size=leaf.shape, scale=0.15).astype(np.float32)
        out[path] = jnp.asarray(1 + noise if path.endswith("scale") else noise)
    return out


@functools.cache
def quantized(fmt, at="*/attn/*/kernel|*/mlp/*/kernel"):
    """The parameters, flat, with kernels in a format."""
    rules = tuple(qjax.Rule(p, fmt) for p in at.split("|"))
    static = fmt.activation_scale == "static"
    if static:
        plain = dataclasses.replace(fmt, activation_scale="token")
        rules = tuple(qjax.Rule(r.match, plain) for r in rules)
    out = qjax.quantize(float_params(), qjax.Policy(rules))
    if static:
        step = jnp.float32(0.02)
        out = {
            path: dataclasses.replace(leaf, format=fmt, act_scale=step)
            if qjax.is_qtensor(leaf)
            else leaf
            for path, leaf in out.items()
        }
    return out


@functools.cache
def case(name):
    """The parameters, flat, of a case."""
    out = quantized(CASES[name][1])
    if name == "gptq-int4-act-order":  # groups of inputs that do not lie side by side
        rng = np.random.default_rng(2)
        groups = lambda K: rng.permutation(np.arange(K) // 32)
        change = lambda qt: {"perm": np.argsort(groups(qt.shape[0]), kind="stable").astype("i4")}
    elif name == "gptq-int4-v2":  # zero points of 0, which version 1 cannot say
        change = lambda qt: {"zero": qt.zero & 0xF0}
    else:
        return out
    return {
        path: dataclasses.replace(leaf, **jax.tree.map(jnp.asarray, change(leaf)))
        if qjax.is_qtensor(leaf)
        else leaf
        for path, leaf in out.items()
    }


def tree(flat):
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def stacked(flat):
    """The same parameters with their layers as one stack."""
    layers = sorted({p.partition("/")[0] for p in flat if p.startswith("layers_")})
    out = {p: leaf for p, leaf in flat.items() if not p.startswith("layers_")}
    for path in flat:
        head, _, rest = path.partition("/")
        if head == layers[0]:
            parts = [flat[f"{layer}/{rest}"] for layer in layers]
            out[f"layers/{rest}"] = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    return tree(out)


TOKENS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 24)).astype(np.int32)
POSITIONS = slice(None, None, 6)  # of which golden logits are kept


def logits(params):
    """What the model computes on packed weights."""
    run = jax.jit(qjax.apply(MODEL.apply))
    return np.asarray(run({"params": params}, jnp.asarray(TOKENS)))


_run_floats = jax.jit(MODEL.apply)


def float_logits(params):
    """What the model computes on the values of packed weights; compiled once for all formats."""
    return np.asarray(_run_floats({"params": qjax.dequantize(params)}, jnp.asarray(TOKENS)))


def write_all(root):
    """Writes the float model, and each case, into a directory of its own below `root`."""
    np.save(root / "tokens.npy", TOKENS)
    export.hf(root / "float", tree(float_params()), CONFIG, format=None)
    for name, (method, _) in CASES.items():
        export.hf(root / name, tree(case(name)), CONFIG, format=method)
    write_gpt_oss(root / "gpt-oss")


# ---- gpt-oss -------------------------------------------------------------------------------------

GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 96,
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "num_local_experts": 3, "num_experts_per_tok": 2,
    "sliding_window": 16, "layer_types": ["full_attention"], "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"gate_up_proj": (3, 64, 128), "down_proj": (3, 64, 64)}  # [E, K, N]


@functools.cache
def experts():
    """The experts of a gpt-oss layer, by their names in the file."""
    rng = np.random.default_rng(3)
    run = jax.jit(quantize_array, static_argnums=(1, 2))
    out = {}
    for name, shape in EXPERTS.items():
        w = jnp.asarray(rng.normal(size=shape), jnp.float32)
        out[f"model.layers.0.mlp.experts.{name}"] = run(w, MXFP4, "kn")
    return out


def write_gpt_oss(directory):
    """Writes a gpt-oss model whose experts are in MXFP4, all else in float."""
    H, heads, kv, D = 64, 2, 1, 32
    attn = "model.layers.0.self_attn"
    floats = {
        "model.embed_tokens.weight": (96, H), "lm_head.weight": (96, H), "model.norm.weight": (H,),
        "model.layers.0.input_layernorm.weight": (H,),
        "model.layers.0.post_attention_layernorm.weight": (H,),
        f"{attn}.q_proj.weight": (heads * D, H), f"{attn}.q_proj.bias": (heads * D,),
        f"{attn}.k_proj.weight": (kv * D, H), f"{attn}.k_proj.bias": (kv * D,),
        f"{attn}.v_proj.weight": (kv * D, H), f"{attn}.v_proj.bias": (kv * D,),
        f"{attn}.o_proj.weight": (H, heads * D), f"{attn}.o_proj.bias": (H,),
        f"{attn}.sinks": (heads,), "model.layers.0.mlp.router.weight": (3, H),
        "model.layers.0.mlp.router.bias": (3,),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (3, 128),
        "model.layers.0.mlp.experts.down_proj_bias": (3, H),
    }  # fmt: skip
    rng = np.random.default_rng(4)
    leaves = {n: rng.normal(size=s).astype(np.float32) for n, s in floats.items()} | experts()
    weights = []
    for name, leaf in leaves.items():
        get, is_expert = functools.partial(leaves.get, name), qjax.is_qtensor(leaf)
        weights.append(Weight(name, name, get, is_expert, is_expert))
    write_hf(directory, weights, GPT_OSS, format="mxfp4")


def judge(root, python):
    """Runs `hf_judge.py` on what `write_all` wrote; returns what it found, by "directory/what"."""
    script = Path(__file__).with_name("hf_judge.py")
    done = subprocess.run([python, script, root], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{python} {script}: {done.stderr[-2000:]}")
    return dict(np.load(root / "judged.npz"))


def torch_python():
    """Returns a Python that has the judges: $QJAX_TORCH_PYTHON, or this one; None: neither has."""
    if python := os.environ.get("QJAX_TORCH_PYTHON"):
        return python
    modules = ("torch", "transformers", "compressed_tensors", "bitsandbytes", "accelerate")
    return sys.executable if all(find_spec(m) for m in modules) else None
