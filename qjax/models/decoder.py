"""The decoder: one Flax module for Llama-like configs, which knows nothing of quantization."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qjax.models import rope
from qjax.models.cache import KVCache
from qjax.models.config import ModelConfig


class Context(NamedTuple):
    """What every layer of one call shares.

    Attributes:
      rotation: the angles of the tokens.
      mask: which keys a token sees.
      slot: the first cache slot to write; None without a cache.
    """

    rotation: rope.Rotation
    mask: Bool[Array, "B 1 1 T S"]
    slot: Int[Array, ""] | None


class Carry(NamedTuple):
    """What flows from layer to layer: the residual stream, and the caches of all layers if any.

    The caches are carried, not scanned over, so that a step writes its slot in place: a scanned
    output would be a new buffer for the whole cache.
    """

    x: Float[Array, "B T D"]
    k: Float[Array, "L B Hkv S Dh"] | None
    v: Float[Array, "L B Hkv S Dh"] | None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: ModelConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, carry: Carry, layer: Int[Array, ""] | int, context: Context) -> Carry:
        c = self.config
        B, T, _ = carry.x.shape

        def dense(features: int, bias: bool, name: str) -> nn.Dense:
            return nn.Dense(
                features, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name
            )

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(c.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        q = dense(c.num_heads * c.head_dim, c.qkv_bias, "q_proj")(carry.x)
        k = dense(c.num_kv_heads * c.head_dim, c.qkv_bias, "k_proj")(carry.x)
        v = dense(c.num_kv_heads * c.head_dim, c.qkv_bias, "v_proj")(carry.x)
        q = q.reshape(B, T, c.num_heads, c.head_dim)
        k = k.reshape(B, T, c.num_kv_heads, c.head_dim)
        v = v.reshape(B, T, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = norm("q_norm")(q), norm("k_norm")(k)
        q, k = rope.rotate(q, context.rotation), rope.rotate(k, context.rotation)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, Hkv, T, Dh]

        if carry.k is not None and carry.v is not None and context.slot is not None:
            at = (layer, 0, 0, context.slot, 0)
            cache_k = lax.dynamic_update_slice(carry.k, k[None].astype(carry.k.dtype), at)
            cache_v = lax.dynamic_update_slice(carry.v, v[None].astype(carry.v.dtype), at)
            carry = carry._replace(k=cache_k, v=cache_v)
            k = lax.dynamic_index_in_dim(cache_k, layer, keepdims=False).astype(self.dtype)
            v = lax.dynamic_index_in_dim(cache_v, layer, keepdims=False).astype(self.dtype)

        # h: kv heads, g: query heads that share one.
        q = q.reshape(B, T, c.num_kv_heads, -1, c.head_dim)
        scores = jnp.einsum("bthgd,bhsd->bhgts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(context.mask, scores * c.head_dim**-0.5, jnp.finfo(jnp.float32).min)
        # Padding sees no key at all; a finite minimum gives it the mean of all values, not NaN.
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        out = jnp.einsum("bhgts,bhsd->bthgd", weights, v).reshape(B, T, c.num_heads * c.head_dim)
        return carry._replace(x=dense(c.hidden_size, c.o_bias, "o_proj")(out))


class MLP(nn.Module):
    """The gated SiLU unit: down(silu(gate(x)) * up(x))."""

    config: ModelConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name=name
            )

        gate = dense(c.intermediate_size, "gate_proj")(x)
        up = dense(c.intermediate_size, "up_proj")(x)
        return dense(c.hidden_size, "down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention and MLP, each on the normed stream and added to it."""

    config: ModelConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self, carry: Carry, layer: Int[Array, ""] | int, context: Context
    ) -> tuple[Carry, None]:
        c = self.config

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(c.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        x = carry.x
        normed = carry._replace(x=norm("attn_norm")(x))
        carry = Attention(c, self.dtype, self.param_dtype, name="attn")(normed, layer, context)
        x = x + carry.x
        x = x + MLP(c, self.dtype, self.param_dtype, name="mlp")(norm("mlp_norm")(x))
        return carry._replace(x=x), None


class Decoder(nn.Module):
    """A Llama-like language model.

    Parameters: `embed/embedding [V, D]`, `layers_0/attn/q_proj/kernel [K, N]`, ...,
    `norm/scale [D]`, and `lm_head/kernel [D, V]` unless tied. With `scan_layers` the layers are one
    stack, `layers/attn/q_proj/kernel [L, K, N]`: quicker to compile, but on CPU each step of a
    decode copies its layer's weights out of the stack.

    Attributes:
      config: the hyperparameters.
      dtype: of the computation. Norms, rotations and softmax are float32 inside, logits always.
      param_dtype: of the parameters that `init` makes.
      scan_layers: whether to scan over the layers.
      remat: whether gradients recompute each layer.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        logits_at: Int[Array, " B"] | int | None = None,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], KVCache]:
        """Returns logits; with a cache, logits and the cache grown by `T` tokens.

        Args:
          tokens: ids. An id outside the vocabulary gives NaN.
          positions: of the tokens; -1 marks padding, which no token sees (`positions_of` turns a
            mask into positions). Counted on from the cache, or from 0, by default.
          cache: tokens seen before, from `init_cache` or an earlier call. Past its end all logits
            are NaN: lengths are only known at run time, and silence would be wrong.
          logits_at: where to compute logits: one index for all rows (-1 the last), or one for each;
            `[B, 1, V]` are returned. The head is the largest matmul, prompts need it once.

        Raises:
          ValueError: if `tokens` has not two axes or exceeds the cache.
        """
        c = self.config
        if tokens.ndim != 2:
            raise ValueError(
                f"`tokens` must be [B, T], got shape {tokens.shape}. One row is `tokens[None]`."
            )
        B, T = tokens.shape
        if positions is None:
            start = 0 if cache is None else jnp.max(cache.positions, axis=1, keepdims=True) + 1
            positions = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (B, T))
        keys = positions if cache is None else _write(cache.positions, positions, cache.length)
        context = Context(
            rotation=rope.rotation(c, positions),
            mask=_mask(positions, keys, c.sliding_window),
            slot=None if cache is None else cache.length,
        )

        embed = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="embed",
        )
        carry = Carry(embed(tokens), k=cache.k if cache else None, v=cache.v if cache else None)
        block = nn.remat(Block, prevent_cse=not self.scan_layers) if self.remat else Block
        if self.scan_layers:
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]: it takes a tree
                length=c.num_layers,
            )
            carry, _ = block(c, self.dtype, self.param_dtype, name="layers")(
                carry, jnp.arange(c.num_layers, dtype=jnp.int32), context
            )
        else:
            for i in range(c.num_layers):
                carry, _ = block(c, self.dtype, self.param_dtype, name=f"layers_{i}")(
                    carry, i, context
                )

        x = carry.x
        if isinstance(logits_at, int):
            x = lax.index_in_dim(x, logits_at, axis=1)
        elif logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
        x = nn.RMSNorm(c.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(x)
        if cache is not None:
            x = jnp.where(cache.length + T <= cache.k.shape[3], x, jnp.nan)
        if c.tie_embeddings:
            # Not `embed.attend`: its transposed table is copied on CPU, thrice the time at T = 1.
            table = embed.embedding.astype(self.dtype)
            logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
        else:
            head = nn.Dense(
                c.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="lm_head",
            )
            logits = head(x)
        logits = logits.astype(jnp.float32)
        if cache is None:
            return logits
        assert carry.k is not None
        assert carry.v is not None
        return logits, KVCache(carry.k, carry.v, keys, cache.length + T)


def _write(
    slots: Int[Array, "B S"], positions: Int[Array, "B T"], at: Int[Array, ""]
) -> Int[Array, "B S"]:
    if positions.shape[1] > slots.shape[1]:
        raise ValueError(
            f"{positions.shape[1]} tokens do not fit a cache of {slots.shape[1]} slots. Make it"
            f" longer: `init_cache(config, batch, max_len={positions.shape[1]})`."
        )
    return lax.dynamic_update_slice(slots, positions.astype(slots.dtype), (0, at))


def _mask(
    queries: Int[Array, "B T"], keys: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B 1 1 T S"]:
    """Returns which keys a query sees: tokens that exist, not later than it, in its window."""
    queries, keys = queries[:, None, None, :, None], keys[:, None, None, None, :]
    mask = (keys >= 0) & (keys <= queries)
    return mask if window is None else mask & (keys > queries - window)
