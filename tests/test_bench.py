"""qjax.bench: all ways compute the same product, and the report says what was timed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import bench


@pytest.mark.parametrize("name", bench.FORMATS)
def test_all_ways_compute_the_same_product(name):
    w = 0.02 * jax.random.normal(jax.random.key(0), (256, 64))
    x = jax.random.normal(jax.random.key(1), (8, 256))
    weights = bench._weights(w, name)
    y = {way: np.asarray(bench._WAYS[way](x, weights[way])) for way in weights}
    np.testing.assert_allclose(y["packed"], y["dequantize"], atol=1e-5)
    size = np.linalg.norm(y["float32"])
    # Any 4-bit format is within 20 % (14 dB) of the float product; another product is not.
    for way in weights:
        assert np.linalg.norm(y[way] - y["float32"]) < 0.2 * size, way


def test_products_report_every_case_and_ratios_of_medians():
    seen = []
    found = bench.products(
        ["int8", "nf4-g64"], [(128, 96)], [1, 4], repeats=3, on_product=seen.append
    )
    assert seen == found
    assert [(p.format, p.M, p.K, p.N) for p in found] == [
        ("int8", 1, 128, 96),
        ("int8", 4, 128, 96),
        ("nf4-g64", 1, 128, 96),
        ("nf4-g64", 4, 128, 96),
    ]
    for p in found:
        packed = p.timings["packed"]
        assert 0 < packed.min_ms <= packed.median_ms
        assert p.ratios["float32"] == p.timings["float32"].median_ms / packed.median_ms
        assert ("qwix" in p.timings) == bench.has_qwix()
        assert json.loads(json.dumps(p.to_dict()))["M"] == p.M


def test_no_dequantized_weight_is_allocated():
    # At M = 1 the partial sums are 1/16 of the float32 weight; beside them only scales.
    for p in bench.products(list(bench.FORMATS), [(1024, 1024)], [1], repeats=1):
        assert p.timings["packed"].temp_bytes < 4 * 1024 * 1024 / 4, p.format
        assert p.timings["dequantize"].temp_bytes >= 4 * 1024 * 1024 / 4, p.format


def test_rounds_are_interleaved_after_one_to_warm_up():
    order = []
    times = bench.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert [len(times["a"]), len(times["b"])] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": ["int5"]}, "int5.*int8, int4-g128, nf4-g64"),
        ({"repeats": 0}, "at least 1"),
        ({"tokens": [0]}, "positive"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench.products(**({"shapes": [(8, 8)], "tokens": [1]} | arguments))


def test_environment_says_what_a_reader_needs():
    assert {"platform", "cpus", "jax", "load_average", "inputs"} <= bench.environment().keys()


def test_decoding_times_every_tree():
    import qjax
    from qjax.models import Decoder, ModelConfig

    config = ModelConfig("llama", 64, 32, 48, 1, 2, 1, 16)
    model = Decoder(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    trees = {"float": params, "int8": qjax.quantize(params, "int8")}
    found = bench.decoding(
        qjax.apply(model.apply), config, trees, prompt=[1, 2, 3], new_tokens=4, repeats=2
    )
    assert [d.params for d in found] == ["float", "int8"]
    assert found[1].nbytes < found[0].nbytes
    assert all(0 < d.median_tokens_per_s <= d.max_tokens_per_s for d in found)
