"""Makes tests/golden/hf_judged.npz: the logits that transformers computes for our directories.

Run from the root of the repository, once, with a Python that has torch, transformers, accelerate,
compressed-tensors, bitsandbytes, gptqmodel and optimum:

  QJAX_TORCH_PYTHON=/path/to/python python -m tests.golden.make_hf_judged

The tests read the file and need none of them.
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.interop.hf_models import POSITIONS, judge, torch_python, write_all


def main():
    python = torch_python()
    if python is None:
        raise SystemExit("no judges: set QJAX_TORCH_PYTHON to a Python that has torch.")
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        write_all(root)
        found = judge(root, python)
    for name, value in found.items():
        if name.endswith("/error"):
            print(name, str(value).strip().splitlines()[-1])
    kept = {
        name.removesuffix("/logits"): value[:, POSITIONS]
        for name, value in found.items()
        if name.endswith("/logits") and not name.startswith(("theirs", "gpt-oss"))
    }
    np.savez_compressed(
        Path(__file__).with_name("hf_judged.npz"), versions=found["versions"], **kept
    )
    print(sorted(kept))


if __name__ == "__main__":
    main()
