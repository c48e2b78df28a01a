"""A loss that is no number names the leaf that made it so."""

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax import lora


def parts():
    base = {"layers/0": jnp.ones((64, 32)), "ids": jnp.arange(3)}
    adapters = lora.init(jax.random.key(0), {"layers/0": base["layers/0"]}, "*", rank=2)
    return qjax.quantize(base, qjax.Policy([qjax.Rule("layers*", qjax.Format("nf4"))])), adapters


def test_a_finite_loss_passes_without_a_look_at_the_trees():
    lora.check_loss(jnp.float32(1.0), adapters={"w": jnp.nan})


def test_the_first_leaf_that_is_not_finite_is_named():
    base, adapters = parts()
    broken = jax.tree.map(lambda x: x, adapters)
    b = broken["layers/0"].b.at[0, :3].set(jnp.inf)
    broken["layers/0"] = lora.Adapter(broken["layers/0"].a, b, broken["layers/0"].layout, 1.0)
    with pytest.raises(
        lora.NonFiniteError, match=r"loss is nan: in `adapters`, layers/0/b has 3 of"
    ):
        lora.check_loss(jnp.nan, adapters=broken, base=base)
    scale = base["layers/0"].scale.at[0, 7].set(jnp.nan)
    base["layers/0"] = qjax.qtensor.dataclasses.replace(base["layers/0"], scale=scale)
    with pytest.raises(
        lora.NonFiniteError, match=r"loss is inf: in `base`, layers/0/scale has 1 of"
    ):
        lora.check_loss(jnp.array([0.0, jnp.inf]), adapters=adapters, base=base)


def test_when_all_leaves_are_finite_it_says_so():
    base, adapters = parts()
    with pytest.raises(lora.NonFiniteError, match="all numbers of `adapters`, `base` are finite"):
        lora.check_loss(jnp.nan, adapters=adapters, base=base)
