"""What the tools of each format make of our directories; run by a Python that has torch.

  python tests/interop/hf_judge.py ROOT

ROOT holds directories of models, `tokens.npy`, and gets `judged.npz`: for a directory D `D/logits`;
of the weights of bitsandbytes, GPTQModel (GPTQ and AWQ) and gpt-oss also what the tool decodes,
`D/<module>`; of the directories that bitsandbytes writes itself (`theirs-nf4`, ...) the same. What
fails leaves `D/error`.
"""

import importlib.metadata
import json
import sys
import traceback
from pathlib import Path


def load(directory, **options):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()


def run(directory, tokens, **options):
    import torch

    model = load(directory, **options)
    with torch.no_grad():
        # Before the first product, for which bitsandbytes may reorder codes.
        decoded = decoded_by_bitsandbytes(model) | decoded_by_gptqmodel(model) | experts(model)
        return model, decoded, model(tokens.long()).logits.float().numpy()


def decoded_by_bitsandbytes(model):
    import bitsandbytes as bnb

    out = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            w = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            out[name] = w.float().numpy()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            w, state = module.weight, module.state
            codes, absmax = (w.CB, w.SCB) if w.CB is not None else (state.CB, state.SCB)
            codes = codes if codes is not None else w.data
            out[name] = bnb.functional.int8_vectorwise_dequant(codes, absmax).float().numpy()
    return out


def decoded_by_gptqmodel(model):
    """Returns what its modules multiply by: their products with the unit vectors, [N, K]."""
    import torch

    return {
        name: module(torch.eye(module.in_features)).T.float().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "qzeros")
    }


def experts(model):
    """Returns the experts of gpt-oss, [E, K, N]."""
    return {
        name: w.float().numpy()
        for name, w in model.named_parameters()
        if name.endswith((".gate_up_proj", ".down_proj"))
    }


def main(root):
    import numpy as np
    import torch
    import transformers

    root = Path(root)
    tokens, out = torch.from_numpy(np.load(root / "tokens.npy")), {}

    def judge(directory):
        config = json.loads((directory / "config.json").read_text())
        quantization = config.get("quantization_config", {})
        options = {}
        match quantization.get("quant_method"):
            case "fp8":  # its products need a GPU, decoding does not
                options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
            case "mxfp4":
                options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
            # Of GPTQModel's modules those in plain torch: others are compiled on first use.
            case "gptq":
                made = transformers.GPTQConfig(quantization["bits"], backend="gptq_torch")
                options = {"quantization_config": made, "device_map": "cpu"}
            case "awq":
                made = transformers.AwqConfig(backend="torch_awq")
                options = {"quantization_config": made, "device_map": "cpu"}
        weights = [g["weights"] for g in quantization.get("config_groups", {}).values()]
        if any(w["scale_dtype"] or not w["symmetric"] for w in weights):
            # Decoded when loaded. Left packed, FP4 and MX decode to bfloat16 whatever the model's
            # type, and zero points do not load (compressed-tensors 0.20: none packed on "meta").
            options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
        _, decoded, logits = run(directory, tokens, **options)
        out[f"{directory.name}/logits"] = logits
        out.update({f"{directory.name}/{name}": w for name, w in decoded.items()})

    def theirs(name, **config):
        made = transformers.BitsAndBytesConfig(**config)
        model = load(root / "float", quantization_config=made)
        model.save_pretrained(root / name)

    settings = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    makers = {
        "theirs-nf4": {**settings, "bnb_4bit_quant_type": "nf4"},
        "theirs-nf4-dq": {
            **settings, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        },
        "theirs-fp4": {**settings, "bnb_4bit_quant_type": "fp4"},
        "theirs-int8": {"load_in_8bit": True},
    }  # fmt: skip
    for name, options in makers.items():
        try:
            theirs(name, **options)
        except Exception:
            out[f"{name}/error"] = np.array(traceback.format_exc())
    for directory in sorted(p for p in root.iterdir() if (p / "config.json").is_file()):
        try:
            judge(directory)
        except Exception:
            out[f"{directory.name}/error"] = np.array(traceback.format_exc())
    packages = ("torch", "transformers", "compressed-tensors", "bitsandbytes", "gptqmodel")
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    versions = json.dumps({name: installed[name] for name in packages if name in installed})
    np.savez_compressed(root / "judged.npz", versions=np.array(versions), **out)


if __name__ == "__main__":
    main(sys.argv[1])
