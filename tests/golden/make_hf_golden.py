"""Makes tests/golden/hf: tiny random checkpoints and the logits transformers computes for them.

Run once, with transformers and torch installed: `python tests/golden/make_hf_golden.py`. The tests
read the files and need neither.
"""

from pathlib import Path

import numpy as np

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def build():
    """Returns name to (class, config)."""
    import transformers as t

    return {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
        "mistral": (t.MistralForCausalLM, t.MistralConfig(**SIZES, sliding_window=16, head_dim=16)),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**SIZES, tie_word_embeddings=True)),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**SIZES, head_dim=16)),
    }


def main():
    import torch

    for seed, (name, (cls, config)) in enumerate(build().items()):
        # Eager attention applies the sliding window on every version of torch.
        config._attn_implementation = "eager"
        model = cls(config).eval()
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in model.named_parameters():
            # Larger than an initialization, and norms off one: every parameter must show.
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data = 1 + noise if "norm" in path else noise
        directory = Path(__file__).parent / "hf" / name
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        tokens = torch.randint(0, SIZES["vocab_size"], (2, 48), generator=generator)
        logits = model(tokens).logits.detach().numpy()
        np.savez_compressed(directory / "expected.npz", tokens=tokens.numpy(), logits=logits)
        print(name, float(abs(logits).max()))


if __name__ == "__main__":
    main()
