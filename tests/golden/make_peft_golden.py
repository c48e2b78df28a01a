"""Makes tests/golden/peft: adapters that the peft package wrote, and what its models compute.

Run once, with peft, transformers and torch installed: `python tests/golden/make_peft_golden.py`.
The tests read the files and need none of the three. The base is tests/golden/hf/llama.

With a directory as its argument it reads adapters instead, and writes peft's logits beside them:
`python tests/golden/make_peft_golden.py DIRECTORY`.
"""

import json
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent
BASE = GOLDEN / "hf" / "llama"
CONFIGS = {
    "all": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {"mlp.down_proj": 7},
    },
}


def base():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        BASE, attn_implementation="eager", dtype=torch.float32
    ).eval()


def logits_of(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def main():
    import torch
    from peft import LoraConfig, get_peft_model

    tokens = np.load(BASE / "expected.npz")["tokens"]
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
        for path, parameter in model.named_parameters():
            if "lora_B" in path:  # as training leaves it: not 0
                parameter.data.normal_(std=0.2)
        directory = GOLDEN / "peft" / name
        model.save_pretrained(directory)
        (directory / "README.md").unlink(missing_ok=True)
        # Not the path on the machine that made it.
        text = json.loads((directory / "adapter_config.json").read_text())
        text["base_model_name_or_path"] = "llama"
        (directory / "adapter_config.json").write_text(json.dumps(text, indent=2))
        np.savez_compressed(directory / "expected.npz", logits=logits_of(model, tokens))


def judge(directory: Path):
    from peft import PeftModel

    tokens = np.load(BASE / "expected.npz")["tokens"]
    model = PeftModel.from_pretrained(base(), directory).eval()
    np.savez_compressed(directory / "judged.npz", logits=logits_of(model, tokens))


if __name__ == "__main__":
    judge(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
