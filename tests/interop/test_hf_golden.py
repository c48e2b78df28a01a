"""What other tools wrote decodes to their values, and encodes to their bytes again.

The vectors were made by running GPTQModel 7.7, AutoAWQ, compressed-tensors 0.19, bitsandbytes 0.50
and transformers 5.17 on seeded random numbers.
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax import Format
from qjax.interop.hf import awq, bitsandbytes, codec, compressed_tensors, fp8, gptq, mxfp4
from qjax.qtensor import dequantize_array, dequantize_canonical, quantize_array, read_codes

GOLDEN = Path(__file__).parents[1] / "golden"
NAME = "m.weight"


def golden(stem):
    return np.load(GOLDEN / f"{stem}.npz")


def decoded(qt):
    """The float weight [N, K], as the files of most methods have it."""
    return np.asarray(dequantize_canonical(jax.tree.map(jnp.asarray, qt))).swapaxes(-1, -2)


def assert_same_tensors(got, expected):
    assert set(got) == set(expected)
    for name, values in expected.items():
        assert got[name].dtype == values.dtype, name
        assert got[name].shape == values.shape, name
        np.testing.assert_array_equal(
            np.ascontiguousarray(got[name]).reshape(-1).view(np.uint8),
            np.ascontiguousarray(values).reshape(-1).view(np.uint8),
            err_msg=name,
        )


# ---- GPTQ ----------------------------------------------------------------------------------------

TAGS = [f"gptq{bits}{act}" for bits in (2, 3, 4, 8) for act in ("", "_act")]


def gptq_parts(tag, version):
    g = golden("gptq_awq")
    names = {"qweight": "qweight", "scales": "scales", "g_idx": "g_idx"}
    names["qzeros"] = f"qzeros_v{version}"
    return {part: g[f"{tag}_{name}"] for part, name in names.items()}, g


def gptq_config(bits, version, sym=False, **more):
    layout = {1: "gptq", 2: "gptq_v2"}[version]
    return {"bits": bits, "group_size": 32, "sym": sym, "checkpoint_format": layout} | more


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tag", TAGS)
def test_gptq_decodes_as_its_own_packer_meant(tag, version):
    parts, g = gptq_parts(tag, version)
    bits = int(tag[4])
    qt = gptq.GPTQ.of_config(gptq_config(bits, version)).decode(NAME, parts)
    assert (qt.perm is not None) == tag.endswith("_act")
    assert qt.format == Format(f"int{bits}", 32, scale="float16", zero_point=True)
    codes = np.asarray(read_codes(jax.tree.map(jnp.asarray, qt))) + 2 ** (bits - 1)
    np.testing.assert_array_equal(codec.from_order(codes, qt.perm), g[f"{tag}_q"])
    # With 8 bits the reference computes in float16.
    np.testing.assert_allclose(
        decoded(qt).T, g[f"{tag}_weight_kn"], rtol=0, atol=4e-3 if bits == 8 else 0
    )


@pytest.mark.parametrize("tag", TAGS)
def test_gptq_encodes_to_the_same_bytes(tag):
    parts, g = gptq_parts(tag, 2)
    bits = int(tag[4])
    qt = gptq.GPTQ.of_config(gptq_config(bits, 2)).decode(NAME, parts)
    gptq.GPTQ.check(NAME, qt)
    writer = gptq.GPTQ.of_weights({NAME: qt})
    # Version 1 is chosen where every zero point can be said in it.
    assert writer.version == (1 if g[f"{tag}_zero"].min() > 0 else 2)
    writer.version = 2
    assert_same_tensors(writer.encode(NAME, qt), {f"m.{p}": v for p, v in parts.items()})
    if g[f"{tag}_zero"].min() > 0:
        writer.version = 1
        first = {f"m.{p}": v for p, v in gptq_parts(tag, 1)[0].items()}
        assert_same_tensors(writer.encode(NAME, qt), first)
    assert writer.config([])["desc_act"] == tag.endswith("_act")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("true", [1, 2])
@pytest.mark.parametrize("label", [1, 2])
def test_gptq_tells_versions_apart_by_symmetric_zero_points(bits, true, label):
    parts, _ = gptq_parts(f"gptq{bits}", 2)
    middle = 2 ** (bits - 1) - (1 if true == 1 else 0)
    fields = np.full((32, 2), middle, np.uint8)
    parts["qzeros"] = codec.pack_words(fields, bits).T
    reader = gptq.GPTQ.of_config(gptq_config(bits, label, sym=True))
    tensors = {f"m.{p}": v for p, v in parts.items()}
    weights = reader.find(tensors)
    if true == label:
        reader.survey(weights, tensors.__getitem__)
    else:
        with pytest.warns(UserWarning, match=rf"says version {label}.*those of version {true}"):
            reader.survey(weights, tensors.__getitem__)
    qt = reader.decode(NAME, parts)
    assert qt.format == Format(f"int{bits}", 32, scale="float16")
    g = golden("gptq_awq")
    codes = g[f"gptq{bits}_q"].astype(np.float32) - 2.0 ** (bits - 1)
    want = codes * np.repeat(g[f"gptq{bits}_scales"].astype(np.float32), 32, axis=0)
    np.testing.assert_array_equal(decoded(qt).T, want)
    writer = gptq.GPTQ.of_weights({NAME: qt})
    assert (writer.sym, writer.version) == (True, 1)
    back = writer.encode(NAME, qt)
    np.testing.assert_array_equal(
        codec.unpack_words(back["m.qzeros"].T, bits, 32), 2 ** (bits - 1) - 1
    )
    np.testing.assert_array_equal(back["m.qweight"], parts["qweight"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_zero_points_of_0_are_read_as_their_writer_stored_them(bits):
    parts, _ = gptq_parts(f"gptq{bits}", 2)
    rng = np.random.default_rng(0)
    zero = rng.integers(0, 2**bits, (2, 32)).astype(np.uint8)
    zero[:, ::5] = 0
    words = codec.pack_words(zero.T, bits).T.view(np.uint32)
    ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
    reader = gptq.GPTQ.of_config(gptq_config(bits, 1))
    with pytest.warns(UserWarning, match="zero points of 0"):
        qt = reader.decode(NAME, parts | {"qzeros": (words - ones).view(np.int32)})
    np.testing.assert_array_equal(codec.positive_zeros(qt), zero)
    writer = gptq.GPTQ.of_weights({NAME: qt})
    assert (writer.version, writer.config([])["checkpoint_format"]) == (2, "gptq_v2")
    np.testing.assert_array_equal(writer.encode(NAME, qt)["m.qzeros"].view(np.uint32), words)


# ---- AWQ -----------------------------------------------------------------------------------------


def test_awq_decodes_and_encodes():
    g = golden("gptq_awq")
    parts = {part: g[f"awq_{part}"] for part in ("qweight", "qzeros", "scales")}
    qt = awq.AWQ.of_config({"bits": 4, "group_size": 32, "version": "gemm"}).decode(NAME, parts)
    np.testing.assert_array_equal(decoded(qt).T, g["awq_weight_kn"])
    awq.AWQ.check(NAME, qt)
    back = awq.AWQ.of_weights({NAME: qt}).encode(NAME, qt)
    assert_same_tensors(back, {f"m.{p}": v for p, v in parts.items()})


def test_awq_words_hold_columns_in_their_order():
    assert awq.pack(np.arange(8, dtype=np.uint8)[None])[0, 0] == 0x75316420


def test_awq_becomes_gptq_with_the_same_codes():
    g = golden("gptq_awq")
    parts = {part: g[f"awq_{part}"] for part in ("qweight", "qzeros", "scales")}
    qt = awq.AWQ.of_config({"w_bit": 4, "q_group_size": 32}).decode(NAME, parts)
    writer = gptq.GPTQ.of_weights({NAME: qt})
    tensors = writer.encode(NAME, qt)
    reader = gptq.GPTQ.of_config(writer.config([]))
    again = reader.decode(NAME, {n.removeprefix("m."): v for n, v in tensors.items()})
    np.testing.assert_array_equal(decoded(again).T, g["awq_weight_kn"])


# ---- compressed-tensors --------------------------------------------------------------------------

E4M3 = {"weight": ("fp8_tensor", "fp8_chan", "fp8_block", "mxfp8"), "weight_scale": ("nvfp4",)}
CT_FORMATS = {"int8_chan": "int-quantized", "naive4_group": "naive-quantized",
              "fp8_tensor": "float-quantized", "fp8_chan": "float-quantized",
              "fp8_block": "float-quantized", "nvfp4": "nvfp4-pack-quantized",
              "mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}  # fmt: skip
CT_TAGS = [*(f"pack{b}_sym" for b in range(2, 9)), "pack3_asym", "pack4_asym", "pack4_chan_k40",
           *CT_FORMATS]  # fmt: skip


def ct_parts(tag):
    g = golden("compressed_tensors")
    parts = {}
    for key in g.files:
        part = key.removeprefix(f"{tag}_")
        if key != part and part in compressed_tensors._PARTS:
            f8 = tag in E4M3.get(part, ())
            parts[part] = g[key].view(ml_dtypes.float8_e4m3fn) if f8 else g[key]
    scheme = json.loads(bytes(g[f"{tag}_args_json"]).decode())
    config = {
        "format": CT_FORMATS.get(tag, "pack-quantized"),
        "config_groups": {"group_0": scheme},
        "transform_config": {},
        "sparsity_config": {},
    }
    return parts, config, g[f"{tag}_decoded"]


@pytest.mark.filterwarnings("ignore:compressed-tensors. its readers quantize the inputs")
@pytest.mark.parametrize("tag", CT_TAGS)
def test_compressed_tensors_decode_as_the_library_does(tag):
    parts, config, expected = ct_parts(tag)
    qt = compressed_tensors.CompressedTensors.of_config(config).decode(NAME, parts)
    # For NVFP4 the library computes in bfloat16: two roundings of 2^-9.
    np.testing.assert_allclose(decoded(qt), expected, rtol=2.0**-8 if tag == "nvfp4" else 0, atol=0)


@pytest.mark.filterwarnings("ignore:compressed-tensors. its readers quantize the inputs")
@pytest.mark.parametrize("tag", sorted(set(CT_TAGS) - {"naive4_group"}))
def test_compressed_tensors_encode_to_the_same_bytes_and_scheme(tag):
    parts, config, _ = ct_parts(tag)
    cls = compressed_tensors.CompressedTensors
    qt = cls.of_config(config).decode(NAME, parts)
    cls.check(NAME, qt)
    writer = cls.of_weights({NAME: qt})
    back = writer.encode(NAME, qt)
    if tag == "nvfp4":  # a QTensor keeps the reciprocal
        ours, theirs = back.pop("m.weight_global_scale"), parts.pop("weight_global_scale")
        np.testing.assert_allclose(ours, theirs, rtol=2.0**-23)
    assert_same_tensors(back, {f"m.{p}": v for p, v in parts.items()})
    ours = writer.config([])
    scheme = config["config_groups"]["group_0"]
    assert ours["config_groups"]["group_0"]["weights"] == scheme["weights"]
    assert ours["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert ours["config_groups"]["group_0"]["input_activations"] == scheme["input_activations"]


def test_compressed_tensors_of_unpacked_codes_come_back_packed():
    parts, config, expected = ct_parts("naive4_group")
    cls = compressed_tensors.CompressedTensors
    qt = cls.of_config(config).decode(NAME, parts)
    writer = cls.of_weights({NAME: qt})
    tensors = {n.removeprefix("m."): v for n, v in writer.encode(NAME, qt).items()}
    again = cls.of_config(writer.config([])).decode(NAME, tensors)
    np.testing.assert_array_equal(decoded(again), expected)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_compressed_tensors_of_older_releases_leave_bits_unused(bits):
    parts, config, expected = ct_parts(f"pack{bits}_sym")
    N, K = expected.shape
    codes = codec.unpack_words(parts["weight_packed"].T, bits, K).T  # [N, K]
    n = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -K % n))).reshape(N, -1, n).astype(np.uint32)
    old = np.bitwise_or.reduce(padded << (bits * np.arange(n, dtype=np.uint32)), axis=-1)
    reader = compressed_tensors.CompressedTensors.of_config(config)
    qt = reader.decode(NAME, parts | {"weight_packed": old.view(np.int32)})
    np.testing.assert_array_equal(decoded(qt), expected)


def test_compressed_tensors_of_old_act_order():
    parts, config, expected = ct_parts("pack4_sym")
    K = expected.shape[1]
    g_idx = np.random.default_rng(0).permutation(np.arange(K) // 32).astype(np.int32)
    reader = compressed_tensors.CompressedTensors.of_config(config)
    qt = reader.decode(NAME, parts | {"weight_g_idx": g_idx})
    codes = codec.unpack_words(parts["weight_packed"].T, 4, K).T - np.float32(8)
    np.testing.assert_array_equal(decoded(qt), codes * parts["weight_scale"][:, g_idx])


# ---- bitsandbytes --------------------------------------------------------------------------------


def bnb_parts(element, *, double):
    g = golden("bitsandbytes")
    suffix = "_dq" if double else ""
    parts = {
        "weight": g[f"{element}_packed"],
        "weight.absmax": g[f"{element}_dq_absmax_u8"] if double else g[f"{element}_absmax"],
        "weight.quant_map": g[f"{element}_code"],
        f"weight.quant_state.bitsandbytes__{element}": g[f"{element}{suffix}_state_json"],
    }
    if double:
        parts["weight.nested_absmax"] = g[f"{element}_dq_nested_absmax"]
        parts["weight.nested_quant_map"] = g["dynamic_map"]
    return parts, g


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("element", ["nf4", "fp4"])
def test_bitsandbytes_decodes_exactly(element, double):
    parts, g = bnb_parts(element, double=double)
    reader = bitsandbytes.BitsAndBytes.of_config({"load_in_4bit": True})
    found = reader.find([f"m.{p}" for p in parts])
    assert found == {NAME: {p: f"m.{p}" for p in parts}}
    w = decoded(reader.decode(NAME, parts))
    # Compiled, a nested scale is one fused multiply and add; theirs is two roundings.
    tolerance = 2.0**-23 if double else 0
    first = g[f"{element}{'_dq' if double else ''}_deq_first4rows"]
    np.testing.assert_allclose(w[:4], first, rtol=0, atol=tolerance)
    if not double:
        sha = hashlib.sha256(np.ascontiguousarray(w).tobytes()).digest()
        np.testing.assert_array_equal(np.frombuffer(sha, np.uint8), g[f"{element}_deq_sha"])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("element", ["nf4", "fp4"])
def test_bitsandbytes_encodes_to_the_same_bytes(element, double):
    parts, _ = bnb_parts(element, double=double)
    cls = bitsandbytes.BitsAndBytes
    qt = cls.of_config({"load_in_4bit": True}).decode(NAME, parts)
    cls.check(NAME, qt)
    writer = cls.of_weights({NAME: qt})
    back = writer.encode(NAME, qt)
    state = f"m.weight.quant_state.bitsandbytes__{element}"
    ours = json.loads(back.pop(state).tobytes())
    theirs = json.loads(parts.pop(state.removeprefix("m.")).tobytes())
    assert ours == theirs
    assert_same_tensors(back, {f"m.{p}": v for p, v in parts.items()})
    assert writer.config([])["bnb_4bit_use_double_quant"] == double


def test_llm_int8_decodes_and_encodes():
    g = golden("bitsandbytes")
    cls = bitsandbytes.BitsAndBytes
    parts = {"weight": g["int8_CB"], "SCB": g["int8_SCB"], "weight_format": np.asarray(0, np.uint8)}
    qt = cls.of_config({"load_in_8bit": True, "llm_int8_threshold": 6.0}).decode(NAME, parts)
    assert qt.format == Format("int8", activation="int8", outliers=6.0)
    want = g["int8_CB"].astype(np.float32) * g["int8_SCB"][:, None] / 127
    np.testing.assert_allclose(decoded(qt), want, rtol=2.0**-22)
    back = cls.of_weights({NAME: qt}).encode(NAME, qt)
    assert_same_tensors(back, {f"m.{p}": v for p, v in parts.items()})


# ---- FP8 and MXFP4 of model families -------------------------------------------------------------


def test_deepseek_fp8_decodes():
    g = golden("fp8_fp4")
    w = np.zeros((256, 256), np.uint8)
    w[[0, 255]] = g["ds_weight_bytes_first2rows"]
    parts = {"weight": w.view(ml_dtypes.float8_e4m3fn), "weight_scale_inv": g["ds_scale_inv"]}
    reader = fp8.FP8.of_config({"weight_block_size": [128, 128]})
    qt = reader.decode(NAME, parts)
    np.testing.assert_array_equal(decoded(qt)[[0, 255]], g["ds_decoded_rows"])
    back = fp8.FP8.of_weights({NAME: qt}).encode(NAME, qt)
    assert_same_tensors(back, {f"m.{p}": v for p, v in parts.items()})


def test_fp8_scales_may_be_of_rows_of_the_tensor_or_powers_of_two():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(128, 256)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, 128).astype(np.float32)
    reader = fp8.FP8.of_config({"weight_block_size": None})
    rows = reader.decode(NAME, {"weight": w, "weight_scale_inv": scale})
    np.testing.assert_array_equal(decoded(rows), w.astype(np.float32) * scale[:, None])
    one = reader.decode(NAME, {"weight": w, "weight_scale_inv": scale[:1].reshape(())})
    np.testing.assert_array_equal(decoded(one), w.astype(np.float32) * scale[0])
    blocks = np.asarray([[0.5, 4.0]], ml_dtypes.float8_e8m0fnu)
    reader = fp8.FP8.of_config({"weight_block_size": [128, 128]})
    qt = reader.decode(NAME, {"weight": w, "weight_scale_inv": blocks})
    want = w.astype(np.float32) * np.repeat([0.5, 4.0], 128)
    np.testing.assert_array_equal(decoded(qt), want)
    writer = fp8.FP8.of_weights({NAME: qt})
    assert writer.config([])["scale_fmt"] == "ue8m0"
    back = writer.encode(NAME, qt)
    assert_same_tensors(back, {"m.weight": w, "m.weight_scale_inv": blocks})


def test_gpt_oss_experts_decode_and_encode():
    g = golden("fp8_fp4")
    parts = {"blocks": g["gptoss_blocks"], "scales": g["gptoss_scales"]}
    reader = mxfp4.MXFP4.of_config({})
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert reader.find([f"{name}_blocks", f"{name}_scales", f"{name}_bias"]) == {
        name: {"blocks": f"{name}_blocks", "scales": f"{name}_scales"}
    }
    qt = reader.decode(name, parts)
    np.testing.assert_array_equal(decoded(qt), g["gptoss_decoded_ERK"])
    mxfp4.MXFP4.check(name, qt)
    back = reader.encode(name, qt)
    assert_same_tensors(back, {f"{name}_{p}": v for p, v in parts.items()})


# ---- our own weights in their bytes --------------------------------------------------------------


def test_what_we_quantize_is_what_the_library_packs():
    g = golden("compressed_tensors")
    fmt = Format("int4", 32, rule="absmax_full")
    qt = quantize_array(jnp.asarray(g["pack4_sym_W"]), fmt, "nk")
    back = compressed_tensors.CompressedTensors.of_weights({NAME: qt}).encode(NAME, qt)
    # A group's largest value is half way between two codes; an ulp of the scale decides.
    ours = codec.unpack_words(back["m.weight_packed"].T, 4, 64).astype(int)
    theirs = codec.unpack_words(g["pack4_sym_weight_packed"].T, 4, 64).astype(int)
    assert (ours != theirs).mean() < 0.04
    assert abs(ours - theirs).max() <= 1
    np.testing.assert_array_equal(dequantize_array(qt), decoded(qt))
