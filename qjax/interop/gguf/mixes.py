"""Mixes: which tensor of a model gets which type in a file of a given kind.

A file called Q4_K_M is not all Q4_K: some tensors lose more by rounding than others, and llama.cpp
gives them more bits. The rules are those of its quantizer (`llama_tensor_get_type`), for models
whose tensors are named as Llama's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from qjax.interop.gguf.errors import GGUFError
from qjax.interop.gguf.types import BY_NAME


class Mix(NamedTuple):
    """A kind of file.

    Attributes:
      file_type: `general.file_type`.
      base: the type of most tensors.
    """

    file_type: int
    base: str


MIXES: Mapping[str, Mix] = {
    "F32": Mix(0, "F32"),
    "F16": Mix(1, "F16"),
    "BF16": Mix(32, "BF16"),
    "Q4_0": Mix(2, "Q4_0"),
    "Q4_1": Mix(3, "Q4_1"),
    "Q5_0": Mix(8, "Q5_0"),
    "Q5_1": Mix(9, "Q5_1"),
    "Q8_0": Mix(7, "Q8_0"),
    "Q2_K": Mix(10, "Q2_K"),
    "Q3_K_S": Mix(11, "Q3_K"),
    "Q3_K_M": Mix(12, "Q3_K"),
    "Q3_K_L": Mix(13, "Q3_K"),
    "Q4_K_S": Mix(14, "Q4_K"),
    "Q4_K_M": Mix(15, "Q4_K"),
    "Q5_K_S": Mix(16, "Q5_K"),
    "Q5_K_M": Mix(17, "Q5_K"),
    "Q6_K": Mix(18, "Q6_K"),
    "TQ1_0": Mix(36, "TQ1_0"),
    "TQ2_0": Mix(37, "TQ2_0"),
}

# What to use for rows that are no whole super-blocks.
_SMALLER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0",
            "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # fmt: skip

_FLOATS = ("F32", "F16", "BF16")
# Routers, and what has a position or a token type as its row, are kept as they are.
_KEPT = re.compile(r".*(_norm|ffn_gate_inp|position_embd|token_types|ssm_conv1d)\.weight")


def types_of(
    mix: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    num_experts: int = 0,
) -> dict[str, str]:
    """Returns the type of every tensor of a model.

    Args:
      mix: a name in `MIXES`.
      shapes: tensor names, as in the file, to their shapes `[N, K]` or `[E, N, K]`.
      num_layers, num_heads, num_kv_heads, num_experts: of the model; 0 experts: a dense one.

    Raises:
      GGUFError: if there is no such mix.
    """
    if mix not in MIXES:
        raise GGUFError(f"there is no mix {mix!r}. There are {', '.join(MIXES)}.")
    grouped = num_heads // num_kv_heads >= 4
    tied = "output.weight" not in shapes

    def one(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) < 2 or not name.endswith(".weight") or _KEPT.fullmatch(name):
            return "F32"
        base = MIXES[mix].base
        if base in _FLOATS:
            return base
        kind = _type(mix, base, name, num_layers, grouped, num_experts, tied)
        return fitting(kind, shape[-1])

    return {name: one(name, shape) for name, shape in shapes.items()}


def fitting(kind: str, K: int) -> str:
    """Returns the type for rows of K values that are to be of a given type, or as near as fits."""
    if K % BY_NAME[kind].block:
        kind = _SMALLER.get(kind, "F16")
    return kind if K % BY_NAME[kind].block == 0 else "F16"


def _type(mix: str, base: str, name: str, n: int, grouped: bool, experts: int, tied: bool) -> str:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q8_0" if mix == "Q8_0" else "Q6_K"
    if name == "token_embd.weight" and base.startswith("TQ"):
        return "Q4_K"
    layer = re.match(r"blk\.(\d+)\.(\w+)\.", name)
    if layer is None:
        return base
    i, part = int(layer[1]), layer[2].removesuffix("_exps")
    if part not in ("attn_v", "attn_k", "attn_qkv", "attn_output", "ffn_down"):
        return base
    if not mix.startswith(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")):
        return base
    more = i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    if experts == 8 and part in ("attn_v", "attn_k"):
        return "Q8_0"
    if experts == 8 and part == "attn_output":
        return "Q5_K" if mix in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M") else base
    is_value = part in ("attn_v", "attn_qkv")
    is_output, is_down = part == "attn_output", part == "ffn_down"
    match mix:
        case "Q2_K" if is_value:
            return "Q4_K" if grouped else "Q3_K"
        case "Q2_K" if is_output or is_down:
            return "Q3_K"
        case "Q3_K_M" if is_value:
            return "Q5_K" if i < 2 else "Q4_K"
        case "Q3_K_M" if is_output:
            return "Q4_K"
        case "Q3_K_M" if is_down:
            return "Q5_K" if i < n // 16 else "Q4_K"
        case "Q3_K_L" if is_value or is_output or is_down:
            return "Q5_K"
        case "Q4_K_S" if is_value:
            return "Q5_K" if i < 4 else base
        case "Q4_K_S" if is_down:
            return "Q5_K" if i < n // 8 else base
        case "Q4_K_M" | "Q5_K_M" if (is_value or is_down) and more:
            return "Q6_K"
    return base
