"""What each parameter of the decoder is called in Hugging Face checkpoints and in GGUF files."""

from typing import NamedTuple


class Names(NamedTuple):
    """A tensor's names in files. Kernels are stored there as `[N, K]`, transposed."""

    hf: str
    gguf: str


_TOP = {
    "embed/embedding": Names("model.embed_tokens.weight", "token_embd.weight"),
    "norm/scale": Names("model.norm.weight", "output_norm.weight"),
    "lm_head/kernel": Names("lm_head.weight", "output.weight"),
}

# Within a layer; the files put a prefix with the layer's number before it.
_MODULES = {
    "attn_norm": Names("input_layernorm", "attn_norm"),
    "attn/q_proj": Names("self_attn.q_proj", "attn_q"),
    "attn/k_proj": Names("self_attn.k_proj", "attn_k"),
    "attn/v_proj": Names("self_attn.v_proj", "attn_v"),
    "attn/o_proj": Names("self_attn.o_proj", "attn_output"),
    "attn/q_norm": Names("self_attn.q_norm", "attn_q_norm"),
    "attn/k_norm": Names("self_attn.k_norm", "attn_k_norm"),
    "mlp_norm": Names("post_attention_layernorm", "ffn_norm"),
    "mlp/gate_proj": Names("mlp.gate_proj", "ffn_gate"),
    "mlp/up_proj": Names("mlp.up_proj", "ffn_up"),
    "mlp/down_proj": Names("mlp.down_proj", "ffn_down"),
}

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def names_of(path: str) -> Names:
    """Returns the file names of a parameter of the unrolled model.

    Example:
      >>> names_of("layers_3/attn/q_proj/kernel")
      Names(hf='model.layers.3.self_attn.q_proj.weight', gguf='blk.3.attn_q.weight')
    """
    if path in _TOP:
        return _TOP[path]
    layer, _, rest = path.partition("/")
    module, _, leaf = rest.rpartition("/")
    i = int(layer.removeprefix("layers_"))
    names = _MODULES[module]
    return Names(
        f"model.layers.{i}.{names.hf}.{_LEAVES[leaf]}", f"blk.{i}.{names.gguf}.{_LEAVES[leaf]}"
    )
