"""Rescaling: every kernel changes, the function does not."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models import load
from qjax.models.rescale import rescale

HF = Path(__file__).parents[1] / "golden" / "hf"


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])  # plain, biases, q/k norms
def test_rescaling_moves_every_kernel_and_keeps_the_function(family, scan_layers):
    m = load(HF / family, scan_layers=scan_layers)
    moved = rescale(m.params, m.config, seed=3)
    tokens = jnp.arange(24)[None]
    y, z = (m.model.apply({"params": p}, tokens) for p in (m.params, moved))
    # Each of a few hundred products is rounded anew.
    np.testing.assert_allclose(z, y, atol=300 * np.finfo(np.float32).eps * float(jnp.abs(y).max()))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(m.params), jax.tree.leaves(moved), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if "kernel" in name and "layers" in name:
            ratio = np.asarray(b / a)
            assert np.unique(ratio[..., 0].round(5)).size > 8, name  # rows differ in scale
            assert (np.abs(np.log(ratio)) <= 0.3 + 1e-5).all()  # two scales of at most 0.15


def test_the_seed_decides():
    m = load(HF / "llama")
    a, b, c = (rescale(m.params, m.config, seed=s) for s in (1, 1, 2))
    kernel = lambda p: np.asarray(p["layers_0"]["mlp"]["down_proj"]["kernel"])
    np.testing.assert_array_equal(kernel(a), kernel(b))
    assert (kernel(a) != kernel(c)).any()
