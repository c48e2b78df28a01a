"""Tests of qjax/sharding.py: every part of a QTensor follows the float array's sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.format import Format
from qjax.qtensor import quantize_array
from qjax.sharding import shardings_of


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))


def quantized(shape, fmt, layout="kn"):
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda w: quantize_array(w, fmt, layout), w)


def specs(qt, mesh, spec):
    return jax.tree.map(
        lambda s: tuple(s.spec),
        shardings_of(qt, NamedSharding(mesh, spec)),
        is_leaf=lambda s: isinstance(s, NamedSharding),
    )


FORMATS = [
    Format("int4", 32),
    Format("int8"),
    Format("int3", 32, zero_point=True),
    Format("uint4", 32, offset="float16"),
    Format("nf4", 64, scale=Format("int8", 4)),
    Format("e4m3", 128, 128),
    Format("e4m3", group_columns=None),
    Format("int4", 96, remainder="ragged"),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout", "spec"),
    [
        ((512, 256), "kn", P("x", "y")),
        ((512, 256), "kn", P(None, ("y", "x"))),
        ((256, 512), "nk", P("y", "x")),
        ((4, 512, 256), "kn", P("y", None, "x")),
        ((512, 16, 16), "knn", P("x", "y")),
        ((32, 16, 256), "kkn", P("x", "y", None)),
        ((3, 512, 4, 256), "kbn", P(None, "x", "y")),
    ],
    ids=str,
)
def test_parts_can_be_placed_and_stay_the_same(mesh, fmt, shape, layout, spec):
    random = np.random.default_rng(0)
    qt = jax.tree.map(
        lambda a: random.integers(0, 100, a.shape).astype(a.dtype), quantized(shape, fmt, layout)
    )
    placed = jax.device_put(qt, shardings_of(qt, NamedSharding(mesh, spec)))
    assert jax.tree.structure(placed) == jax.tree.structure(qt)
    for a, b in zip(jax.tree.leaves(qt), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))


def test_groups_follow_k_and_columns_follow_n(mesh):
    s = specs(quantized((512, 256), Format("int4", 32, zero_point=True)), mesh, P("x", "y"))
    assert (s.data, s.scale, s.zero) == (("x", "y"), ("x", "y"), ("x", "y"))


def test_a_channel_scale_is_replicated_along_k(mesh):
    s = specs(quantized((512, 256), Format("int8")), mesh, P("x", "y"))
    assert (s.data, s.scale) == (("x", "y"), (None, "y"))


def test_a_tensor_scale_is_replicated(mesh):
    s = specs(quantized((512, 256), Format("e4m3", group_columns=None)), mesh, P("x", "y"))
    assert (s.data, s.scale) == (("x", "y"), (None, None))


def test_a_group_is_never_split(mesh):
    # 3 groups of 128 rows do not divide over 2 devices; a ragged last group never does.
    s = specs(quantized((384, 256), Format("int4", 128)), mesh, P("x", "y"))
    assert (s.data, s.scale) == (("x", "y"), (None, "y"))
    s = specs(quantized((192, 256), Format("int4", 128, remainder="ragged")), mesh, P("x", "y"))
    assert (s.data, s.scale) == (("x", "y"), (None, "y"))


def test_a_packing_unit_is_never_split(mesh):
    # 24 codes of 3 bits are 3 units of 8 codes: 9 bytes over 2 devices would split one.
    s = specs(quantized((24, 256), Format("int3", 12)), mesh, P("x", "y"))
    assert (s.data, s.scale) == ((None, "y"), ("x", "y"))


def test_an_axis_is_split_over_as_many_mesh_axes_as_can_be(mesh):
    s = specs(quantized((512, 256), Format("int4", 256)), mesh, P(("x", "y"), None))
    assert (s.data, s.scale) == ((("x", "y"), None), ("x", None))


def test_nested_scales_are_sharded_like_the_scales_they_stand_for(mesh):
    fmt = Format("nf4", 32, scale=Format("int8", 8, scale="float32"))
    s = specs(quantized((512, 256), fmt), mesh, P("x", "y"))
    assert s.scale.data == ("x", "y")  # 16 groups
    assert s.scale.scale == ("x", "y")  # 2 groups of 8 groups


def test_merged_axes_take_the_mesh_axes_of_all(mesh):
    s = specs(quantized((512, 16, 16), Format("int4", 32), "knn"), mesh, P(None, "y", "x"))
    assert s.data == (None, ("y", "x"))
    s = specs(quantized((16, 32, 256), Format("int4", 32), "kkn"), mesh, P("x", None, "y"))
    assert (s.data, s.scale) == (("x", "y"), ("x", "y"))


def test_stacked_and_batch_axes_keep_their_sharding(mesh):
    s = specs(quantized((4, 512, 256), Format("int4", 32)), mesh, P("y", None, "x"))
    assert (s.data, s.scale) == (("y", None, "x"), ("y", None, "x"))
    s = specs(quantized((512, 4, 256), Format("int4", 32), "kbn"), mesh, P("x", "y"))
    assert s.data == ("y", "x", None)


def test_refuses_a_sharding_that_does_not_fit(mesh):
    qt = quantized((512, 250), Format("int4", 32))
    with pytest.raises(ValueError, match=r"axis of size 250 .* over 4 devices"):
        shardings_of(qt, NamedSharding(mesh, P(None, "y")))
    with pytest.raises(ValueError, match="names 3 axes"):
        shardings_of(qt, NamedSharding(mesh, P(None, None, "x")))


def test_a_pre_scale_follows_k_and_an_act_scale_the_stack(mesh):
    fmt = Format("int8", activation="int8", activation_scale="static")
    qt = jax.eval_shape(
        lambda: quantize_array(
            jnp.zeros((4, 512, 256)), fmt, pre_scale=jnp.ones((4, 512)), act_scale=jnp.ones(4)
        )
    )
    s = shardings_of(qt, NamedSharding(mesh, P("x", "y")))
    assert s.pre_scale.spec == P("x", "y")
    assert s.act_scale.spec == P("x")
