"""Every tensor of a file gets the type that llama.cpp's quantizer gives it."""

import json
from pathlib import Path

import pytest

from qjax.interop.gguf import MIXES, GGUFError
from qjax.interop.gguf.mixes import fitting, types_of

# The output of the reference quantizer, by model, mix and tensor; a list has a type for each layer.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gguf_mixes.json").read_text())["types"]

# Layers, heads, kv heads, experts, widths of the residual stream and of the MLP.
MODELS = {
    "untied_mha_16": (16, 4, 4, 0, 256, 512),
    "untied_gqa4_32": (32, 4, 1, 0, 256, 512),
    "tied_mha_12": (12, 4, 4, 0, 256, 512),
    "moe8_16": (16, 4, 2, 8, 256, 512),
    "gpt2_16": (16, 4, 4, 0, 256, 256),
    "gpt2_in288": (8, 4, 4, 0, 288, 272),
}
CASES = [(model, mix) for model in MODELS for mix in GOLDEN[model] if mix in MIXES]


@pytest.mark.parametrize(("model", "mix"), CASES)
def test_types_are_those_of_the_reference_quantizer(model, mix):
    n, heads, kv_heads, experts, hidden, mlp = MODELS[model]
    shapes, expected = {}, {}
    for tensor, types in GOLDEN[model][mix].items():
        is_layer = tensor.startswith(("attn", "ffn"))
        for i in range(n) if is_layer else [None]:
            name = tensor if i is None else f"blk.{i}.{tensor}"
            K = mlp if "ffn_down" in tensor else hidden
            is_vector = tensor.endswith("bias") or "norm" in tensor
            shapes[name] = (K,) if is_vector else (8, K)
            expected[name] = types if isinstance(types, str) else types[i or 0]
    got = types_of(
        mix, shapes, num_layers=n, num_heads=heads, num_kv_heads=kv_heads, num_experts=experts
    )
    assert got == expected


def test_mixes_of_floats_leave_vectors_in_full():
    shapes = {"token_embd.weight": (8, 64), "output_norm.weight": (64,)}
    got = types_of("BF16", shapes, num_layers=1, num_heads=1, num_kv_heads=1)
    assert got == {"token_embd.weight": "BF16", "output_norm.weight": "F32"}


def test_rows_that_no_block_divides_stay_floats():
    assert fitting("Q4_K", 256) == "Q4_K"
    assert fitting("Q4_K", 288) == "Q5_0"
    assert fitting("Q4_K", 40) == "F16"
    assert fitting("Q8_0", 40) == "F16"


def test_a_mix_that_does_not_exist_is_named():
    with pytest.raises(GGUFError, match=r"no mix 'Q4_K_XL'\. There are F32"):
        types_of("Q4_K_XL", {}, num_layers=1, num_heads=1, num_kv_heads=1)
