"""Adapters are saved alone and come back bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import lora
from qjax.checkpoint import CheckpointError, read_metadata


def make():
    base = {"x/y": {"k": jnp.zeros((8, 2, 4))}, "w": jnp.zeros((3, 8, 16))}
    used = qjax.usage(lambda p, x: (jnp.einsum("md,dhk->mhk", x, p["x/y"]["k"]), x @ p["w"]))(
        base, jnp.ones((5, 8))
    )
    made = lora.init(jax.random.key(0), base, "x*", rank=2, alpha=3.5, usage=used)
    return made | lora.init(
        jax.random.key(0), base, "w", rank=4, rank_stabilized=True, dtype=jnp.float32, usage=used
    )


def test_what_was_saved_is_loaded(tmp_path):
    adapters = make()
    lora.save(tmp_path / "ad", adapters, metadata={"base": "tiny"})
    loaded = lora.load(tmp_path / "ad")
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)  # static fields, too
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapters), strict=True):
        assert got.dtype == want.dtype
        assert np.array_equal(got, want)
    assert read_metadata(tmp_path / "ad")["metadata"] == {"base": "tiny"}


def test_adapters_are_loaded_onto_a_mesh(tmp_path):
    lora.save(tmp_path / "ad", make())
    mesh = jax.make_mesh((8,), ("x",))
    place = lambda path: NamedSharding(mesh, P("x") if path == "w/a" else P())
    loaded = lora.load(tmp_path / "ad", shardings=place)
    assert loaded["w"].a.sharding.spec == P("x")
    assert loaded["w"].b.sharding.is_fully_replicated


def test_other_checkpoints_are_refused(tmp_path):
    qjax.save(tmp_path / "params", {"w": jnp.ones(3)})
    with pytest.raises(CheckpointError, match=r"holds no adapters.*a tree of parameters"):
        lora.load(tmp_path / "params")
    lora.save(tmp_path / "ad", make())
    with pytest.raises(ValueError, match="exists"):
        lora.save(tmp_path / "ad", make())
    lora.save(tmp_path / "ad", make(), overwrite=True)
