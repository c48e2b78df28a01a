"""Rescaling a decoder's channels without changing its function, to move weights off a grid.

Weights that were stored in 4 bits once lie on that grid, and quantizing them to the same grid again
is lossless: a win that says nothing about float weights. Scales that cancel move them off it.
"""

from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.models.config import ModelConfig


def rescale(
    params: Any, config: ModelConfig, *, seed: int = 0, amount: float = 0.15
) -> dict[str, Any]:
    """Multiplies the rows of every kernel by exp(u) of their own, and divides what feeds them.

    With s = exp(u), u uniform in [-amount, amount] for each channel:

      norm / s,  then s q_proj, s k_proj, s v_proj;  and likewise for gate_proj and up_proj
      v_proj / s over its columns, then s o_proj     (a key-value head's s serves all its queries)
      up_proj / s over its columns, then s down_proj

    The function is the same up to rounding; groups along K no longer share the old scales.

    Args:
      params: float parameters of a `Decoder`, unrolled or stacked.
      config: the model's.
      seed: of the scales.
      amount: largest |u|.
    """
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep="/")
    D, F = config.hidden_size, config.intermediate_size
    heads, dim = config.num_kv_heads, config.head_dim
    out = dict(flat)
    layers = sorted({path.partition("/")[0] for path in flat if path.startswith("layers")})
    for i, layer in enumerate(layers):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), 4)
        lead = flat[f"{layer}/attn_norm/scale"].shape[:-1]

        def scales(key, *shape, lead=lead):
            return jnp.exp(jax.random.uniform(key, (*lead, *shape), minval=-amount, maxval=amount))

        def multiply(path, s, layer=layer):
            w = out[f"{layer}/{path}"]
            out[f"{layer}/{path}"] = (w.astype(jnp.float32) * s).astype(w.dtype)

        attn, mlp, down = scales(keys[0], D), scales(keys[1], D), scales(keys[2], F)
        value = scales(keys[3], heads, dim)
        multiply("attn_norm/scale", 1 / attn)
        for name in ("q_proj", "k_proj", "v_proj"):
            multiply(f"attn/{name}/kernel", attn[..., :, None])
        multiply("mlp_norm/scale", 1 / mlp)
        for name in ("gate_proj", "up_proj"):
            multiply(f"mlp/{name}/kernel", mlp[..., :, None])
        multiply("mlp/up_proj/kernel", 1 / down[..., None, :])
        multiply("mlp/down_proj/kernel", down[..., :, None])
        flat_value = _heads(value, 1)
        multiply("attn/v_proj/kernel", 1 / flat_value[..., None, :])
        if config.qkv_bias:
            multiply("attn/v_proj/bias", 1 / flat_value)
        queries = config.num_heads // heads
        multiply("attn/o_proj/kernel", _heads(value, queries)[..., :, None])
    return flax.traverse_util.unflatten_dict(out, sep="/")


def _heads(s: Float[Array, "*b Hkv Dh"], queries: int) -> Float[Array, "*b HkvxGxDh"]:
    s = jnp.repeat(s, queries, axis=-2)
    return s.reshape(*s.shape[:-2], -1)
