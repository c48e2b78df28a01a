"""What is written comes back bit for bit, all of it or none, and what a format lacks is refused."""

import dataclasses
import json
import re
import struct
import tracemalloc

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax import Format, export
from qjax.interop.hf import METHODS, ExportError, Weight, open_hf, write_hf
from qjax.interop.hf import safetensors as st_files
from qjax.models import ModelConfig, load
from qjax.qtensor import PARTS, dequantize_array, quantize_array
from tests.interop.hf_models import CASES, CONFIG, case, float_params, quantized, stacked, tree

# They store the scale's reciprocal, or its multiple.
INEXACT = {"ct-nvfp4", "bnb-int8"}
VERIFIED = {"bnb-nf4-dq", "bnb-int8", "ct-nvfp4"}  # one of each kind: it takes time


def flat(params):
    return flax.traverse_util.flatten_dict(params, sep="/")


def stored(fmt):
    """A format without what says how its scales were chosen."""
    if not isinstance(fmt, Format):
        return fmt
    fields = {**fmt.to_dict(), "scale": stored(fmt.scale)}
    for name in ("rule", "remainder"):
        fields.pop(name, None)
    return tuple(sorted(fields.items(), key=str))


def assert_same(got, want, *, ulps=0):
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        if not qjax.is_qtensor(leaf):
            np.testing.assert_array_equal(got[path], leaf, err_msg=path)
            continue
        other = got[path]
        assert stored(other.format) == stored(leaf.format), path
        assert (other.layout, other.dtype, other.pad) == (leaf.layout, leaf.dtype, leaf.pad)
        np.testing.assert_array_equal(
            np.asarray(other.data).view(np.uint8), np.asarray(leaf.data).view(np.uint8)
        )
        for part in PARTS[1:]:
            a, b = jax.tree.leaves(getattr(other, part)), jax.tree.leaves(getattr(leaf, part))
            for x, y in zip(a, b, strict=True):
                x, y = np.asarray(x), np.asarray(y)
                assert (x.dtype, x.shape) == (y.dtype, y.shape), (path, part)
                if ulps and x.dtype == np.float32:
                    np.testing.assert_allclose(x, y, rtol=ulps * 2.0**-23)
                else:
                    x, y = x.reshape(-1).view(np.uint8), y.reshape(-1).view(np.uint8)
                    np.testing.assert_array_equal(x, y)


def files_of(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_comes_back_and_is_written_the_same_again(tmp_path, name):
    method, params = CASES[name][0], case(name)
    export.hf(tmp_path / "a", tree(params), CONFIG, format=method, verify=name in VERIFIED)
    once = load(tmp_path / "a")
    assert once.config == CONFIG
    assert_same(flat(once.params), params, ulps=1 if name in INEXACT else 0)
    export.hf(tmp_path / "b", once.params, once.config, format=method)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("name", ["gptq-int4-zp", "awq", "ct-w8a8", "bnb-nf4-dq"])
def test_layers_in_a_stack_are_written_and_read_like_others(tmp_path, name):
    method, fmt = CASES[name]
    params = quantized(fmt)
    export.hf(tmp_path / "a", tree(params), CONFIG, format=method)
    export.hf(tmp_path / "b", stacked(params), CONFIG, format=method)
    a, b = st_files.Directory(tmp_path / "a"), st_files.Directory(tmp_path / "b")
    assert a.tensors.keys() == b.tensors.keys()
    for tensor in a.tensors:
        np.testing.assert_array_equal(
            a.read(tensor).reshape(-1).view(np.uint8), b.read(tensor).reshape(-1).view(np.uint8)
        )
    got = load(tmp_path / "b", scan_layers=True).params
    assert_same(flat(got), flat(stacked(params)))


def test_scales_of_either_sign_stand_for_the_same_values(tmp_path):
    """(q - 8) s = ((15 - q) - 7) (-s): zero points say it where signs may not."""
    fmt = Format("int4", 32, scale="float16", rule="signed_absmax")
    params = quantized(fmt)
    assert any((leaf.scale < 0).any() for leaf in params.values() if qjax.is_qtensor(leaf))
    for method in ("gptq", "awq", "compressed-tensors"):
        export.hf(tmp_path / method, tree(params), CONFIG, format=method, verify=True)
        got = flat(load(tmp_path / method).params)
        for path, leaf in params.items():
            if qjax.is_qtensor(leaf):
                assert got[path].format.zero_point
                assert (got[path].scale >= 0).all()
                np.testing.assert_array_equal(dequantize_array(got[path]), dequantize_array(leaf))


def test_a_float_model_is_written_and_read(tmp_path):
    export.hf(tmp_path / "m", tree(float_params()), CONFIG, format=None)
    loaded = load(tmp_path / "m")
    assert loaded.config == CONFIG
    assert_same(flat(loaded.params), float_params())
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, architecture="mistral", sliding_window=16, eos_ids=(3, 4)),
        dataclasses.replace(CONFIG, architecture="qwen2", qkv_bias=True, tie_embeddings=True),
        dataclasses.replace(CONFIG, architecture="qwen3", qk_norm=True, sliding_window=8),
        dataclasses.replace(
            CONFIG,
            rope_scaling=qjax.models.RopeScaling(
                "llama3", factor=8.0, original_max_position=32, low_freq_factor=1.5
            ),
        ),
        dataclasses.replace(CONFIG, qkv_bias=True, o_bias=True, eos_ids=(2,), bos_id=1),
    ],
    ids=lambda c: c.architecture,
)
def test_a_config_comes_back(config):
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"qkv_bias": True},
        {"sliding_window": 8},
        {"rope_scaling": qjax.models.RopeScaling("divisors", divisors=(1.0,) * 16)},
    ],
)
def test_what_a_config_has_no_word_for_is_refused(changes):
    with pytest.raises(NotImplementedError, match=r"no word"):
        dataclasses.replace(CONFIG, **changes).to_hf()


def test_layers_may_differ_where_a_config_can_say_so(tmp_path):
    narrow, wide = Format("int4", 32, scale="float16"), Format("int8", 64, scale="float16")
    params = quantized(narrow, "*/attn/*/kernel|layers_0/mlp/*/kernel") | {
        path: leaf
        for path, leaf in quantized(wide, "layers_1/mlp/up_proj/kernel").items()
        if path == "layers_1/mlp/up_proj/kernel"
    }
    for method in ("gptq", "compressed-tensors"):
        export.hf(tmp_path / method, tree(params), CONFIG, format=method, verify=True)
        assert_same(flat(load(tmp_path / method).params), params)
    config = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    up = r"+:^model\.layers\.1\.mlp\.up_proj$"
    assert config["dynamic"][up] == {"bits": 8, "group_size": 64}
    assert config["dynamic"][r"-:^model\.layers\.1\.mlp\.down_proj$"] == {}
    config = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())
    quantization = config["quantization_config"]
    assert set(quantization["ignore"]) == {
        "lm_head", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj",
    }  # fmt: skip
    assert len(quantization["config_groups"]) == 2
    with pytest.raises(ExportError, match=r"awq cannot hold int8.*It can be held by"):
        export.hf(tmp_path / "awq", tree(params), CONFIG, format="awq")


def test_a_quantized_head_is_said_to_be_one(tmp_path):
    fmt = Format("int4", 32, scale="float16")
    params = quantized(fmt, "lm_head/kernel|*/mlp/*/kernel")
    for method in ("gptq", "compressed-tensors"):
        export.hf(tmp_path / method, tree(params), CONFIG, format=method, verify=True)
        assert_same(flat(load(tmp_path / method).params), params)
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["lm_head"] is True
    config = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())
    assert "lm_head" not in config["quantization_config"]["ignore"]
    with pytest.raises(ExportError, match=r"lm_head/kernel: awq .* head in float"):
        export.hf(tmp_path / "awq", tree(params), CONFIG, format="awq")


# ---- refusals ------------------------------------------------------------------------------------

PATH = "layers_0/attn/q_proj/kernel"
PLAIN = Format("int4", 32, scale="float16")


def with_leaf(**changes):
    params = quantized(PLAIN)
    return params | {PATH: dataclasses.replace(params[PATH], **changes)}


REFUSED = {
    "pre_scale": (lambda: with_leaf(pre_scale=jnp.ones(128)), "gptq", "`pre_scale`"),
    "act_scale": (lambda: with_leaf(act_scale=jnp.float32(1)), "awq", "`act_scale`"),
    "act-order": (lambda: with_leaf(perm=jnp.arange(128)[::-1]), "awq", "act-order.*by hf:gptq"),
    "ragged": (
        lambda: quantized(dataclasses.replace(PLAIN, group_size=96, remainder="ragged")),
        "gptq", "last group is ragged: 128 rows in groups of 96",
    ),
    "float32 scales": (
        lambda: quantized(Format("int4", 32)), "gptq", "scales are float32.*compressed-tensors",
    ),
    "bits": (
        lambda: quantized(Format("int5", 32, scale="float16")), "gptq", "5 bits.*compressed-tensors"
    ),
    "offsets": (
        lambda: quantized(Format("uint4", 32, scale="float16", offset="float16")),
        "compressed-tensors", "float offsets",
    ),
    "activations": (
        lambda: quantized(CASES["ct-w8a8"][1]), "gptq", "inputs are quantized to int8.*compressed"
    ),
    "groups of inputs": (
        lambda: quantized(
            Format("e4m3", 128, remainder="shrink", activation="e4m3", activation_scale="group")
        ),
        "compressed-tensors", "a step for each group",
    ),
    "outliers": (
        lambda: quantized(CASES["bnb-int8"][1]), "compressed-tensors", "outlier.*bitsandbytes"
    ),
    "nf4": (lambda: quantized(CASES["bnb-nf4"][1]), "awq", "no signed integer.*bitsandbytes"),
    "nested": (
        lambda: quantized(
            Format("nf4", 64, scale=Format("uint8", group_size=1, group_columns=256))
        ),
        "bnb", "nf4-bnb",
    ),
    "blocks": (lambda: quantized(Format("e4m3", 64, 64)), "fp8", "128 x 128.*compressed-tensors"),
    "signed int8": (
        lambda: quantized(Format("int8", rule="signed_absmax", activation="int8")),
        "compressed-tensors", "scales have signs",
    ),
    "e5m2": (lambda: quantized(Format("e5m2")), "compressed-tensors", "no signed integer"),
    "dense mxfp4": (lambda: quantized(CASES["ct-mxfp4"][1]), "mxfp4", r"\[E, K, N\].*compressed"),
    "embedding": (
        lambda: quantized(PLAIN, "embed/embedding"),
        "gptq", "embed/embedding: is quantized.*no linear",
    ),
    "nothing": (float_params, "gptq", "no parameter is quantized"),
    "a float format": (lambda: quantized(PLAIN), None, "held by hf:compressed-tensors, hf:gptq"),
    "several formats": (
        lambda: quantized(PLAIN) | {PATH: quantized(Format("int4", 64, scale="float16"))[PATH]},
        "awq", "group_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_format_lacks_is_refused_before_anything_is_written(tmp_path, what):
    make, method, message = REFUSED[what]
    with pytest.raises(ExportError, match=message):
        export.hf(tmp_path / "m", tree(make()), CONFIG, format=method)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["pre_scale", "nf4", "blocks", "ragged"])
def test_a_refusal_names_the_parameter_and_only_formats_that_hold_it(tmp_path, what):
    make, method, _ = REFUSED[what]
    params = make()
    with pytest.raises(ExportError) as error:
        export.hf(tmp_path / "m", tree(params), CONFIG, format=method)
    path, _, rest = str(error.value).partition(": ")
    assert qjax.is_qtensor(params[path])
    proposed = re.search(r"held by (.*)\.$", rest)
    assert proposed is not None
    assert "orbax" in proposed[1]
    for name in METHODS:
        if f"hf:{name}" in proposed[1].split(", "):
            METHODS[name].check("m.weight", params[path])


def test_unknown_formats_parameters_and_sources_are_named(tmp_path):
    params = tree(quantized(PLAIN))
    with pytest.raises(ValueError, match=r"'gguf'; there are compressed-tensors, gptq, awq"):
        export.hf(tmp_path / "m", params, CONFIG, format="gguf")
    with pytest.raises(ExportError, match=r"^adapter/a: is no parameter of a decoder"):
        export.hf(tmp_path / "m", params | {"adapter": {"a": jnp.ones(2)}}, CONFIG, format="gptq")
    export.hf(tmp_path / "other", params, dataclasses.replace(CONFIG, norm_eps=1e-3), format="gptq")
    with pytest.raises(ExportError, match=r"another model: norm_eps 0\.001, not 1e-06"):
        export.hf(tmp_path / "m", params, CONFIG, format="gptq", source=tmp_path / "other")


# ---- all or nothing ------------------------------------------------------------------------------


def test_a_directory_is_complete_or_not_there(tmp_path, monkeypatch):
    params = tree(quantized(PLAIN))
    add, count = st_files.Writer.add, iter(range(100))

    def failing(self, name, values):
        if next(count) == 7:
            raise OSError(28, "No space left on device")
        add(self, name, values)

    monkeypatch.setattr(st_files.Writer, "add", failing)
    with pytest.raises(OSError, match="No space left"):
        export.hf(tmp_path / "m", params, CONFIG, format="gptq")
    assert list(tmp_path.iterdir()) == []


def test_what_lies_there_is_kept_unless_it_may_be_replaced(tmp_path, monkeypatch):
    params = tree(quantized(PLAIN))
    export.hf(tmp_path / "m", params, CONFIG, format="gptq")
    before = files_of(tmp_path / "m")
    with pytest.raises(FileExistsError, match=r"m exists.*overwrite=True"):
        export.hf(tmp_path / "m", params, CONFIG, format="awq")
    with monkeypatch.context() as m:
        m.setattr(st_files.Writer, "add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export.hf(tmp_path / "m", params, CONFIG, format="awq", overwrite=True)
    assert files_of(tmp_path / "m") == before
    export.hf(tmp_path / "m", params, CONFIG, format="awq", overwrite=True)
    assert load(tmp_path / "m").params.keys() == params.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_verification_finds_a_wrong_byte(tmp_path, monkeypatch):
    add = st_files.Writer.add

    def wrong(self, name, values):
        if name.endswith("layers.1.mlp.up_proj.qweight"):
            values = values ^ np.eye(*values.shape, dtype=np.int32)
        add(self, name, values)

    monkeypatch.setattr(st_files.Writer, "add", wrong)
    with pytest.raises(ExportError, match=r"layers_1/mlp/up_proj/kernel: .* decodes to other"):
        export.hf(tmp_path / "m", tree(quantized(PLAIN)), CONFIG, format="gptq", verify=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [None, "gptq"])
def test_memory_does_not_grow_with_the_number_of_weights(tmp_path, method):
    fmt = Format("int4", 32, scale="float16")
    one = jax.tree.map(np.asarray, quantize_array(jnp.ones((512, 512)), fmt))

    def peak(n):
        make = (lambda: jax.tree.map(np.copy, one)) if method else lambda: np.ones((512, 512), "f4")
        weights = [
            Weight(f"m{i}", f"m{i}.weight", make, method is not None, True) for i in range(n)
        ]
        write_hf(tmp_path / f"{n}", weights, {}, format=method)
        tracemalloc.start()
        write_hf(tmp_path / f"{n}", weights, {}, format=method, overwrite=True)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(2), peak(16)
    assert many < few + 2**18  # 14 weights more are 1.8 MB, or 14


def test_shards_hold_what_one_file_does(tmp_path):
    params = tree(quantized(PLAIN))
    export.hf(tmp_path / "one", params, CONFIG, format="gptq")
    export.hf(tmp_path / "many", params, CONFIG, format="gptq", shard_bytes=60_000, verify=True)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert_same(flat(load(tmp_path / "many").params), flat(load(tmp_path / "one").params))
    index = json.loads((tmp_path / "many" / st_files.INDEX).read_text())
    tensors = st_files.read_header(tmp_path / "one" / st_files.SINGLE)
    assert index["weight_map"].keys() == tensors.keys()


def test_tokenizers_and_generation_files_are_copied_and_written(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    from qjax.models import Tokenizer

    params = tree(quantized(PLAIN))
    tokenizer = Tokenizer(Backend(WordLevel({"<s>": 0, "a": 1}, "<s>")), 0, (1,), "{{ x }}")
    export.hf(tmp_path / "a", params, CONFIG, format="gptq", tokenizer=tokenizer)
    assert load(tmp_path / "a").tokenizer.encode("a") == [1]
    assert json.loads((tmp_path / "a" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "a",
        "chat_template": "{{ x }}",
    }  # fmt: skip
    (tmp_path / "a" / "generation_config.json").write_text('{"top_k": 3}')
    config = json.loads((tmp_path / "a" / "config.json").read_text()) | {"extra": 1}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    export.hf(tmp_path / "b", params, CONFIG, format="awq", source=tmp_path / "a")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json"}  # fmt: skip
    assert files_of(tmp_path / "b").keys() == names
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["extra"], config["quantization_config"]["quant_method"]) == (1, "awq")


def test_safetensors_read_what_the_library_writes_and_the_other_way_round(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.array(3, np.float16),
        "c": np.zeros((0, 4), np.float32), "d": np.ones(3, ml_dtypes.bfloat16),
    }  # fmt: skip
    save_file(tensors, tmp_path / st_files.SINGLE, {"format": "pt"})
    directory = st_files.Directory(tmp_path)
    for name, values in tensors.items():
        got = directory.read(name)
        assert (got.dtype, got.shape) == (values.dtype, values.shape)
        np.testing.assert_array_equal(got, values)
    (tmp_path / "w").mkdir()
    with st_files.Writer(tmp_path / "w", 4096, 1 << 30) as writer:
        for name, values in tensors.items():
            writer.add(name, values)
    back = load_file(tmp_path / "w" / st_files.SINGLE)
    for name, values in tensors.items():
        np.testing.assert_array_equal(back[name], values)


def test_experts_are_written_under_their_own_names(tmp_path):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 64, 32)).astype(np.float32))
    qt = qjax.quantize(w, Format("e2m1", 32, scale="e8m0"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    bias = rng.normal(size=(3, 32)).astype(ml_dtypes.bfloat16)
    weights = [Weight("experts", name, lambda: qt, True, True),
               Weight("bias", name + "_bias", lambda: bias, False, False)]  # fmt: skip
    write_hf(tmp_path / "m", weights, {"model_type": "gpt_oss"}, format="mxfp4")
    opened = open_hf(tmp_path / "m")
    assert opened.names == {name, name + "_bias"}
    back = opened.read(name)
    np.testing.assert_array_equal(back.data, qt.data)
    np.testing.assert_array_equal(back.scale, qt.scale)
    np.testing.assert_array_equal(opened.read(name + "_bias"), bias)


# ---- damaged and foreign directories -------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    export.hf(tmp_path / "m", tree(quantized(PLAIN)), CONFIG, format="gptq")
    return tmp_path / "m"


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quant_method": "quip"}, NotImplementedError, "'quip' is not supported, only compressed"),
        ({"bits": 5}, NotImplementedError, "gptq.*5 bits"),
        ({"checkpoint_format": "marlin"}, NotImplementedError, "layout of one kernel"),
        ({"group_size": 0}, ValueError, "group_size 0"),
        ({"group_size": 64}, ValueError, r"scales' has shape \(4, 128\), but \(2, 128\)"),
        ({"bits": 8}, ValueError, "scales' has shape"),
        ({"quant_method": "awq", "version": "gemv"}, NotImplementedError, "only 'gemm'"),
        ({"quant_method": "bitsandbytes"}, ValueError, "exactly one of load_in_4bit"),
        ({"quant_method": "compressed-tensors"}, ValueError, "config_groups are missing"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {},
             "transform_config": {"config_groups": {"R1": {}}}},
            NotImplementedError, "rotations are not applied",
        ),
        (
            {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}},
            NotImplementedError, "kv_cache_scheme",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}},
            NotImplementedError, "sparsity",
        ),
        ({"quant_method": "fp8", "activation_scheme": "static"}, NotImplementedError, "static"),
    ],
)  # fmt: skip
def test_configs_that_are_not_understood_are_refused(written, changes, error, message):
    edit_config(written, **changes)
    with pytest.raises(error, match=message):
        load(written)


def test_groups_of_other_sizes_than_the_config_says_are_found(written):
    tensors = st_files.Directory(written)
    values = {name: tensors.read(name) for name in tensors.tensors}
    name = "model.layers.0.self_attn.q_proj.g_idx"
    values[name] = np.zeros(128, np.int32)
    (written / st_files.SINGLE).unlink()
    with st_files.Writer(written, 1 << 16, 1 << 30) as writer:
        for key, value in values.items():
            writer.add(key, value)
    with pytest.raises(ValueError, match=r"q_proj.weight: g_idx'.*have not 32 rows each"):
        load(written)


def test_act_order_in_one_layer_only_is_stacked(written):
    """The other layers then have the order in which their rows lie."""
    tensors = st_files.Directory(written)
    values = {name: tensors.read(name) for name in tensors.tensors}
    name = "model.layers.1.self_attn.q_proj.g_idx"
    values[name] = np.random.default_rng(0).permutation(values[name])
    (written / st_files.SINGLE).unlink()
    with st_files.Writer(written, 1 << 16, 1 << 30) as writer:
        for key, value in values.items():
            writer.add(key, value)
    unrolled, scanned = load(written), load(written, scan_layers=True)
    kernel = scanned.params["layers"]["attn"]["q_proj"]["kernel"]
    for i in range(2):
        one = unrolled.params[f"layers_{i}"]["attn"]["q_proj"]["kernel"]
        np.testing.assert_array_equal(dequantize_array(kernel)[i], dequantize_array(one))
    export.hf(written.parent / "again", scanned.params, CONFIG, format="gptq", verify=True)
    config = json.loads((written.parent / "again" / "config.json").read_text())
    assert config["quantization_config"]["desc_act"] is True
    again = st_files.Directory(written.parent / "again")
    for key, value in values.items():
        np.testing.assert_array_equal(again.read(key), value, err_msg=key)


def test_older_files_keep_their_config_beside(written):
    config = json.loads((written / "config.json").read_text())
    del config["quantization_config"]
    (written / "config.json").write_text(json.dumps(config))
    assert qjax.is_qtensor(load(written).params["layers_0"]["attn"]["q_proj"]["kernel"])


def small_file():
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(29)


@settings(max_examples=300)
@given(st.data())
def test_damaged_safetensors_are_refused_or_read_within_bounds(tmp_path_factory, data):
    whole = bytearray(small_file())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    whole = whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole
    directory = tmp_path_factory.mktemp("st", numbered=True)
    (directory / st_files.SINGLE).write_bytes(whole)
    try:
        opened = st_files.Directory(directory)
        read = {name: opened.read(name) for name in opened.tensors}
    except ValueError as error:
        message = str(error)
    else:
        message = "safetensors"
        assert sum(a.nbytes for a in read.values()) <= len(whole)
    assert "safetensors" in message  # an error names the file
