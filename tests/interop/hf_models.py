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
from qjax.interop.hf.bitsandbytes import DOUBLE
from qjax.interop.hf.compressed_tensors import MXFP4, MXFP8, NVFP4
from qjax.models import Decoder, ModelConfig
from qjax.models.assemble import shapes

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
    for name, (method, fmt) in CASES.items():
        export.hf(root / name, tree(quantized(fmt)), CONFIG, format=method)


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
