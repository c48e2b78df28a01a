"""Decode steps of Llama-3 on one to eight H100s, as the compiler counts memory and products."""

from __future__ import annotations

import functools

import pytest

from qjax.planning import Plan, plan

pytestmark = pytest.mark.h100

XLA_BYTES = 68e9  # of arguments, with which it schedules within an H100's memory
LAYERS = {"llama-3-8b": 32, "llama-3-70b": 80}
PRODUCTS = 7  # of a layer: q, k, v, o, gate, up, down


@functools.cache
def planned(model: str, policy: str, devices: int, batch: int) -> Plan:
    result = plan(model, policy, devices=devices, batch=batch, compiler=True)
    print(f"\n{result}")
    assert result.spilled == 0
    return result


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_70b_on_int4_fits_one_h100_with_few_temporaries(batch):
    got = planned("llama-3-70b", "int4-g128", 1, batch)
    assert got.arguments >= 35e9
    assert got.temporaries <= 0.02 * got.arguments
    assert got.fits
    assert got.products["mosaic_gpu_v2"] == PRODUCTS * LAYERS["llama-3-70b"]
    assert got.collectives == {}


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_tensor_parallel_steps_have_one_all_reduce_for_each_product_of_split_rows(devices):
    got = planned("llama-3-70b", "int4-g128", devices, 16)
    computed = plan("llama-3-70b", "int4-g128", devices=devices, batch=16, compiler=False)
    assert got.collectives == computed.collectives == {"all-reduce": 2 * LAYERS["llama-3-70b"]}
    assert got.products["mosaic_gpu_v2"] == PRODUCTS * LAYERS["llama-3-70b"]
    assert got.arguments == pytest.approx(computed.arguments, rel=1e-3)
    assert got.temporaries <= 0.02 * got.arguments


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("model", LAYERS)
def test_fp8_products_are_native_and_shards_tell_each_other_the_largest_activations(model, devices):
    got = planned(model, "fp8-dynamic", devices, 16)
    computed = plan(model, "fp8-dynamic", devices=devices, batch=16, compiler=False)
    if got.arguments <= XLA_BYTES:
        assert got.native_fp8 == PRODUCTS * LAYERS[model]
    else:  # it then computes keys and values again, twice, rather than keep their sums
        assert got.native_fp8 in (n * LAYERS[model] for n in (PRODUCTS, PRODUCTS + 4))
    # Before each product of split rows the steps of all tokens, after it the sums.
    expected = {"all-reduce": 2 * 2 * LAYERS[model]} if devices > 1 else {}
    assert got.collectives == computed.collectives == expected
    assert got.temporaries <= 0.02 * got.arguments


@pytest.mark.parametrize("devices", [1, 2])
def test_zero_points_add_a_byte_a_group_to_a_step_and_nothing_else(devices):
    got, without = (
        planned("llama-3-8b", policy, devices, 16) for policy in ("w4a16-asym", "int4-g128")
    )
    assert got.products == without.products
    assert got.collectives == without.collectives
    assert got.temporaries <= 1.01 * without.temporaries
    weights = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    assert got.arguments - without.arguments == pytest.approx(weights / 128 / devices, rel=0.01)
