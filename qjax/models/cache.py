"""The key-value cache, a pytree that the decoder takes and returns."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qjax.models.config import ModelConfig

PADDING = -1  # The position of a token that is not there.


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, `S` slots for each row.

    A slot's position says all that a mask needs: whether a token is there (>= 0), its order and its
    distance. So prompts may be padded on either side, and rows may have different lengths.

    Attributes:
      k: keys, already rotated; heads before slots, so that a head's slots are contiguous.
      v: values.
      positions: the position of the token in each slot, `PADDING` where there is none.
      length: slots written so far, the same for all rows.
    """

    k: Float[Array, "L B Hkv S Dh"]
    v: Float[Array, "L B Hkv S Dh"]
    positions: Int[Array, "B S"]
    length: Int[Array, ""]


def init_cache(
    config: ModelConfig, batch: int, max_len: int, dtype: DTypeLike = jnp.float32
) -> KVCache:
    """Returns an empty cache for `batch` rows of at most `max_len` tokens, padding included."""
    shape = (config.num_layers, batch, config.num_kv_heads, max_len, config.head_dim)
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        positions=jnp.full((batch, max_len), PADDING, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def positions_of(mask: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns positions for an attention mask (1 token, 0 padding): 0, 1, ... over the tokens."""
    mask = mask.astype(jnp.int32)
    return jnp.where(mask > 0, jnp.cumsum(mask, axis=-1) - 1, PADDING)
