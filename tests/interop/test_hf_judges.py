"""Our directories, judged by transformers, compressed-tensors and bitsandbytes.

What they said once lies in golden/hf_judged.npz, so that a machine without torch is judged too;
with `QJAX_TORCH_PYTHON`, or torch in this environment, they are asked again.
"""

from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
import pytest

import qjax
from qjax.interop.hf import open_hf
from qjax.qtensor import dequantize_canonical
from tests.interop.hf_models import (
    CASES,
    MODEL,
    POSITIONS,
    case,
    experts,
    float_logits,
    float_params,
    judge,
    logits,
    torch_python,
    tree,
    write_all,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_judged.npz"

JUDGED = ["float", *sorted(CASES)]
# transformers reads these with GPTQModel.
GPTQMODEL = [name for name, (method, _) in CASES.items() if method in ("gptq", "awq")]

# Errors relative to the largest logit.
TOLERANCE = {
    **dict.fromkeys(GPTQMODEL, 5e-3),  # it decodes to float16
    "ct-nvfp4": 3e-2,  # the library decodes it to bfloat16
    # Inputs between two codes go to either, as sums before them fall.
    "ct-w8a8-static": 5e-3,
    "ct-fp8-dynamic": 5e-2,
    "ct-fp8-static": 5e-2,
    # Its step is absmax / 127.5, ours absmax / 127: the same noise, but not the same numbers.
    "ct-w8a8": 0.2,
    "ct-w8a8-tensor": 0.2,
    # bitsandbytes multiplies in bfloat16 on a CPU, or casts to float16; what it decodes is exact.
    "bnb-nf4": 5e-2,
    "bnb-nf4-dq": 5e-2,
    "bnb-fp4": 5e-2,
    "bnb-int8": 0.1,
}


def ours(name):
    if name == "float":
        return float_logits(tree(float_params()))
    params = tree(case(name))
    packed = CASES[name][1].activation is not None or name == "ct-int4"
    return logits(params) if packed else float_logits(params)


def assert_close(name, got, want):
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= TOLERANCE.get(name, 1e-4), (name, error)


@pytest.mark.parametrize("name", JUDGED)
def test_logits_are_those_that_transformers_computed_for_our_directory(name):
    assert_close(name, ours(name)[:, POSITIONS], np.load(GOLDEN)[name])


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    python = torch_python()
    if python is None:
        pytest.skip("no judges: set QJAX_TORCH_PYTHON to a Python that has torch and the others")
    root = tmp_path_factory.mktemp("hf")
    write_all(root)
    return root, judge(root, python)


@pytest.mark.judge
@pytest.mark.slow
def test_transformers_computes_our_logits_now(judged):
    _, found = judged
    for name in JUDGED:
        if name in GPTQMODEL and "gptqmodel" not in str(found["versions"]):
            continue  # the test below is skipped, and says so
        assert f"{name}/error" not in found, str(found.get(f"{name}/error"))
        assert_close(name, ours(name), found[f"{name}/logits"])


@pytest.mark.judge
@pytest.mark.slow
@pytest.mark.parametrize("name", GPTQMODEL)
def test_gptqmodel_decodes_ours_exactly(judged, name):
    root, found = judged
    if "gptqmodel" not in str(found["versions"]):
        pytest.skip("GPTQModel is not installed beside torch")
    theirs, opened = modules_of(found, name), open_hf(root / name)
    assert len(theirs) == 7 * MODEL.config.num_layers
    for module, w in theirs.items():
        got = np.asarray(dequantize_canonical(opened.read(f"{module}.weight"))).T
        # It multiplies codes by scales in float16: half a unit in the last of 11 bits.
        np.testing.assert_allclose(w, got, rtol=2.0**-11, atol=0)


@pytest.mark.judge
@pytest.mark.slow
def test_transformers_decodes_our_experts_of_gpt_oss_exactly(judged):
    _, found = judged
    assert "gpt-oss/error" not in found, str(found.get("gpt-oss/error"))
    for name, qt in experts().items():
        np.testing.assert_array_equal(found[f"gpt-oss/{name}"], qjax.dequantize(qt))


def modules_of(found, name):
    return {k.partition("/")[2]: v for k, v in found.items() if k.startswith(f"{name}/model.")}


@pytest.mark.judge
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8"])
def test_bitsandbytes_decodes_ours_exactly(judged, name):
    root, found = judged
    theirs, opened = modules_of(found, name), open_hf(root / name)
    assert len(theirs) == 7 * MODEL.config.num_layers
    for module, w in theirs.items():
        assert_decoded(name, opened.read(f"{module}.weight"), w)


@pytest.mark.judge
@pytest.mark.slow
@pytest.mark.parametrize("name", ["theirs-nf4", "theirs-nf4-dq", "theirs-fp4", "theirs-int8"])
def test_we_decode_what_bitsandbytes_wrote_exactly(judged, name):
    root, found = judged
    theirs, opened = modules_of(found, name), open_hf(root / name)
    assert len(theirs) == 7 * MODEL.config.num_layers
    for module, w in theirs.items():
        assert_decoded(name, opened.read(f"{module}.weight"), w)
    params = qjax.models.load(root / name).params
    kinds = {
        path: qjax.is_qtensor(x) for path, x in flax.traverse_util.flatten_dict(params).items()
    }
    assert sum(kinds.values()) == len(theirs)


def assert_decoded(name, qt, w):
    got = np.asarray(dequantize_canonical(jax.tree.map(jax.numpy.asarray, qt))).T
    if name.endswith(("-dq", "-int8")):
        # One rounding more or less: of the scale of a scale, of SCB / 127.
        np.testing.assert_allclose(got, w, rtol=2.0**-22, atol=2.0**-24)
    else:
        np.testing.assert_array_equal(got, w)
