"""What runs is named, and why it is no kernel."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import qjax
from qjax.ops.packed_dot import packed_dot
from qjax.qtensor import quantize_array
from tests.prepare.weights import FORMATS, QUANTIZED, quantized_weight, weight


def test_explain_names_the_kernel_and_why_there_is_none():
    qt = weight("int4")
    f = lambda x, w: x @ w
    x = jnp.ones((3, 256), jnp.bfloat16)
    (use,) = qjax.explain(f)(x, qjax.prepare(qt, "h100"))
    assert use.implementation.startswith("mosaic on CUDA")
    (use,) = qjax.explain(f)(x, qjax.prepare(quantized_weight("w8a8"), "h100"))
    assert use.implementation.startswith("mosaic on CUDA, else xla, int8 activations per token")
    (use,) = qjax.explain(f)(x, qjax.prepare(quantized_weight("w4a8 fp8"), "h100"))
    in_bytes = "mosaic on CUDA, codes in bfloat16 for more than 64 tokens, else xla, e4m3"
    assert use.implementation.startswith(in_bytes)
    (use,) = qjax.explain(f, implementation="xla")(x, qjax.prepare(qt, "h100"))
    assert use.implementation.startswith("xla")
    back = lambda x, w: x @ w.T
    apart = qjax.prepare(quantized_weight("fp4 x fp8"), "h100")
    (use,) = qjax.explain(f)(x, apart)
    assert "in front of it" not in use.implementation
    (use,) = qjax.explain(back)(jnp.ones((3, 128)), apart)
    assert "scales decoded in front of it, codes put in another order" in use.implementation
    (use,) = qjax.explain(back)(jnp.ones((3, 128)), qjax.prepare(qt, "h100"))
    assert use.implementation.startswith("mosaic on CUDA")
    (use,) = qjax.explain(back)(jnp.ones((3, 128)), qjax.prepare(weight("nvfp4"), "h100"))
    assert "no kernel for x @ Wᵀ in groups of 16" in use.implementation
    for name in ("int2", "int3"):
        (use,) = qjax.explain(f)(x, qjax.prepare(weight(name), "h100"))
        assert use.implementation.startswith("mosaic on CUDA")
        (use,) = qjax.explain(back)(jnp.ones((3, 128)), qjax.prepare(weight(name), "h100"))
        assert use.implementation.startswith("mosaic on CUDA")


def test_explain_names_what_is_done_beside_the_kernel_on_every_call():
    def how(fmt, shape=(256, 128), device="h100", **options):
        qt = jax.eval_shape(lambda: qjax.prepare(quantize_array(jnp.ones(shape), fmt), device))
        x = jax.ShapeDtypeStruct((*shape[:-2], 3, shape[-2]), jnp.bfloat16)
        (use,) = qjax.explain(jnp.matmul, **options)(x, qt)
        return use.implementation

    read = "mosaic on CUDA, x in bfloat16 or float16; else xla"
    names = ("int4", "channels", "nf4-dq", "nvfp4", "ternary", "unsigned")
    for name in (*names, "zero point", "uint3", "uint8", "int8, zero point"):
        assert how(FORMATS[name]) == read
    apart = "codes put in another order in front of it"
    assert apart not in how(QUANTIZED["fp4 x fp8"])
    assert apart in how(QUANTIZED["fp4 x fp8"], (2, 256, 128))
    assert apart not in how(QUANTIZED["fp4 x fp8"].weight_only)
    assert how(QUANTIZED["w3a8"]).startswith("mosaic on CUDA, codes in bfloat16, else xla, int8")
    assert "steps times codes rounded to bfloat16 for more than 64" in how(QUANTIZED["w4a8 1x128"])
    flat = qjax.Format("uint8", group_size=256, flatten=True)
    assert "scales decoded in front of it" in how(qjax.Format("nf4", 64, scale=flat))
    assert "scales decoded in front of it" in how(FORMATS["nf4-dq"], (2, 256, 128))
    for blocks in (FORMATS["fp8 blocks"], QUANTIZED["fp8 1x128"]):
        assert "in front of it" not in how(blocks, (512, 128))
        assert "scales padded in front of it" in how(blocks, (256, 128))  # not to 16 bytes
    e8m0 = dataclasses.replace(FORMATS["fp8 blocks"], scale="e8m0")
    assert "scales decoded in front of it" in how(e8m0, (512, 128))
    back = lambda x, w: jnp.matmul(x, w.mT)
    (use,) = qjax.explain(back)(
        jnp.ones((3, 256), jnp.bfloat16), qjax.prepare(weight("fp8 blocks", (512, 256)), "h100")
    )
    assert "scales repeated in front of it" in use.implementation
    assert "scales padded in front of it" in how(FORMATS["int4"], (256, 130))
    assert "for float16 scales decoded" in how(FORMATS["mxfp4"])
    assert "scales and zero points padded in front" in how(FORMATS["zero point"], (256, 130))
    assert "offsets by a product" in how(FORMATS["offset"])
    nested = dataclasses.replace(FORMATS["nf4-dq"], element="uint4", zero_point=True)
    assert "scales decoded in front of it" in how(nested)
    assert "zero points decoded" in how(FORMATS["zero point"], device="a100")
    one_by_one = "one weight of the stack after another"
    assert "codes as bfloat16 times all of the stack" in how(QUANTIZED["w8a8"], (2, 256, 128))
    outliers = dataclasses.replace(QUANTIZED["w8a8"], outliers=6.0)
    assert f"{one_by_one} (a scan copies them for it): outliers" in how(outliers, (2, 256, 128))
    assert one_by_one in how(FORMATS["int4"], (2, 256, 128), "a100")
    assert how(FORMATS["int4"], (2, 256, 128)) == read
    forced = qjax.explain(lambda x, w: x @ w.T, implementation="mosaic")
    (use,) = forced(jnp.ones((3, 128), jnp.bfloat16), qjax.prepare(weight("nvfp4"), "h100"))
    assert use.implementation == "mosaic (asked for): no kernel for x @ Wᵀ in groups of 16"


def test_explain_says_why_a_gpu_has_no_kernel_for_what_is_not_prepared(monkeypatch):
    int5 = quantize_array(jnp.ones((2, 256, 128)), qjax.Format("int5", group_size=64))
    uint8 = quantize_array(jnp.ones((256, 128)), qjax.Format("int8", 8, activation="uint8"))
    x, sizes = jnp.ones((3, 256), jnp.bfloat16), jnp.array([2, 1])

    def how(w, **options):
        f = lambda x, w: x @ w if w.ndim == 2 else lax.ragged_dot(x, w, sizes)
        return qjax.explain(f, **options)(x, w)[0].implementation

    def on(capability):
        gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [gpu])

    assert "prepare" not in how(weight("int4"))
    on("9.0")
    assert how(weight("int4")) == "xla, blocks of K: it is not prepared, see `qjax.prepare`"
    assert how(weight("int4"), implementation="xla") == "xla, blocks of K (asked for)"
    assert how(qjax.prepare(weight("int4"))).startswith("mosaic on CUDA")
    assert how(int5).startswith("xla, blocks of K: int5 codes: kernels read")
    assert "groups of 8: kernels read 16, 32" in how(uint8)
    on("10.0")
    assert "capability 8.0 to 9.0" in how(weight("int4"))


def test_a_forced_kernel_that_cannot_run_says_why():
    qt = weight("int4")
    x = jnp.ones((3, 256))
    with pytest.raises(ValueError, match=r"qjax\.prepare"):
        packed_dot(x, qt, implementation="mosaic")
    prepared = qjax.prepare(qt, "h100")
    with pytest.raises(ValueError, match="float32"):
        packed_dot(x, prepared, implementation="mosaic")
    groups_of_16 = qjax.prepare(weight("nvfp4"), "h100")
    with pytest.raises(NotImplementedError, match="x @ Wᵀ, as in derivatives, in groups of 16"):
        packed_dot(x[:, :128], groups_of_16, transposed=True, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="GPUs only"):
        packed_dot(x.astype(jnp.bfloat16), prepared, implementation="mosaic")
