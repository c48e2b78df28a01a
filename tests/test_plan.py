"""A plan counts what a decode step needs, by the compiler or, plainly labelled, from shapes."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import qjax
from pallas_kernels import h100
from qjax.cli.app import app
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.planning import plan, read_config

TINY = ModelConfig("llama", 512, 256, 512, 3, 4, 4, 64)


def test_known_models_have_their_sizes():
    for name, billions in (("llama-3-8b", 8.03), ("llama-3-70b", 70.55)):
        got = plan(name, None, compiler=False)
        assert got.weights / 2 / 1e9 == pytest.approx(billions, abs=0.01)
        assert str(got).startswith(f"{name}, bfloat16, 1 x h100, batch 1, context 1024")


def test_bytes_are_those_of_the_weights():
    got = plan(TINY, "int4-g128", batch=2, context=64, compiler=False)
    decoder = Decoder(TINY, jnp.bfloat16, jnp.bfloat16, scan_layers=True)
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves = jax.tree.leaves(qjax.quantize(params, "int4-g128"))
    assert got.weights == sum(leaf.nbytes for leaf in leaves)
    assert got.cache == 2 * 2 * (3 * 2 * 4 * 64 * 64)  # k and v in two bytes
    assert got.source == "shapes"
    assert got.temporaries is None
    assert got.collectives == {}


@pytest.mark.parametrize("policy", [None, "int4-g128", "int8", "fp8-dynamic"])
def test_devices_share_all_but_the_embedding_norms_and_scales_of_rows(policy):
    one, four = (plan("llama-3-8b", policy, devices=n, compiler=False) for n in (1, 4))
    embedding = 2 * 128256 * 4096
    shared = one.weights - embedding
    assert shared / 4 + embedding <= four.weights <= shared / 4 * 1.02 + embedding
    assert four.cache == one.cache / 4
    sums = 2 * 32  # after o and down, in every layer
    largest = sums if policy == "fp8-dynamic" else 0  # activation of every token, before them
    assert four.collectives == {"all-reduce": sums + largest}


def test_smaller_policies_need_less():
    sizes = [
        plan("llama-3-8b", p, compiler=False).weights for p in (None, "int8", "nf4", "w3a16-gptq")
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_70b_in_bfloat16_needs_two_h100s_and_int4_one():
    assert not plan("llama-3-70b", None, compiler=False).fits
    assert plan("llama-3-70b", "int4-g128", compiler=False).fits
    assert not plan("llama-3-70b", "int4-g128", device="rtx4090", compiler=False).fits


def test_a_config_json_is_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    assert read_config(str(tmp_path)) == read_config(str(tmp_path / "config.json"))
    assert read_config(str(tmp_path)).num_layers == 3


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"no model 'gpt-9'.*llama-3-70b"):
        plan("gpt-9", None)
    with pytest.raises(ValueError, match="num_kv_heads=4"):
        plan(TINY, None, devices=8)
    with pytest.raises(ValueError, match="`device` must be one of h100"):
        plan(TINY, None, device="tpu")
    with pytest.raises(ValueError, match="devices=9"):
        plan(TINY, None, devices=9)
    with pytest.raises(RuntimeError, match="no compiler"):
        plan(TINY, None, device="a100", compiler=True)


def test_qjax_plan_is_the_function():
    assert qjax.plan is plan


def test_the_command_prints_a_table_and_json():
    args = ["plan", "llama-3-8b", "-p", "int4-g128", "--devices", "2", "--no-compile"]
    table = CliRunner().invoke(app, args)
    assert table.exit_code == 0, table.output
    for words in ("shapes, computed", "needs a compiler", "64 x all-reduce", "fits"):
        assert words in table.stdout
    data = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)
    assert data["source"] == "shapes"
    assert data == plan("llama-3-8b", "int4-g128", devices=2, compiler=False).to_dict()


@pytest.mark.h100
def test_the_compiler_agrees_with_the_shapes():
    config = dataclasses.replace(TINY, hidden_size=512, intermediate_size=1024)
    computed, compiled = (
        plan(config, "int4-g128", devices=2, batch=8, context=64, compiler=c) for c in (False, True)
    )
    assert h100.missing() is None
    assert compiled.source == "compiler"
    assert compiled.arguments == pytest.approx(computed.arguments, rel=0.001)
    assert compiled.collectives == computed.collectives
    assert compiled.products["mosaic_gpu_v2"] == 3 * 7
    assert compiled.spilled == 0
