"""Causal attention with grouped queries, sliding windows and padding, all told by positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vptq_jax.lm.cache import LayerCache
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.norm import make_norm
from vptq_jax.lm.params import ParamSource
from vptq_jax.lm.rope import Rotary, rotate
from vptq_jax.nn.linear import Unnormalized, project
from vptq_jax.pallas import dispatch
from vptq_jax.pallas.decode_attention import decode_attention

QUERY_CHUNK = 256
_SHORTEST_FUSED = 128  # tokens of a row; for fewer it is not worth building a program


class Attention(nnx.Module):
    """Self-attention of one layer; the weights of its linear layers and norms under `name` of the source."""

    def __init__(self, config: ModelConfig, layer: int, source: ParamSource, name: str):
        hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        bias = config.attention_bias
        self.shared_inputs, self.qk_norm = config.architecture.attention, config.architecture.qk_norm
        self.head_dim, self.window = config.head_dim, config.window(layer)
        self.local_rope = self.window is not None and config.local_rope is not None
        # Attention divides by the square root of head_dim; what it should be divided by may be another number.
        self.query_factor = (self.head_dim / (config.query_pre_attn_scalar or self.head_dim)) ** 0.5
        self.q_proj = source.linear(f"{name}.q_proj", heads * self.head_dim, hidden, bias=bias)
        self.k_proj = source.linear(f"{name}.k_proj", kv_heads * self.head_dim, hidden, bias=bias)
        self.v_proj = source.linear(f"{name}.v_proj", kv_heads * self.head_dim, hidden, bias=bias)
        if self.qk_norm:
            self.q_norm = make_norm(config, source, f"{name}.q_norm", self.head_dim)
            self.k_norm = make_norm(config, source, f"{name}.k_norm", self.head_dim)
        self.o_proj = source.linear(f"{name}.o_proj", hidden, heads * self.head_dim, bias=config.attention_out_bias)

    def _heads(self, x: Float[Array, "B T hidden"] | Unnormalized, at: Rotary) -> tuple[Array, Array, Array]:
        q, k, v = (
            y.reshape(*y.shape[:-1], -1, self.head_dim) for y in project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        turn = at.local if self.local_rope else at
        assert turn is not None
        q, k = rotate(q, turn), rotate(k, turn)
        return q if self.query_factor == 1 else q * self.query_factor, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def __call__(self, x: Float[Array, "B T hidden"] | Unnormalized, at: Rotary) -> Float[Array, "B T hidden"]:
        """Every token sees the tokens of its row up to itself; `at` those of plain rows, positions 0 to T - 1."""
        q, k, v = self._heads(x, at)
        return self._out(attend_rows(q, k, v, self.window))

    def prefill(
        self, x: Float[Array, "B T hidden"] | Unnormalized, at: Rotary, start: Int[Array, "B"], size: int
    ) -> tuple[Float[Array, "B T hidden"], LayerCache]:
        """As the call, and the cache of `size` slots that holds this prompt."""
        q, k, v = self._heads(x, at)
        y = self._out(attend(q, k, v, at.positions, at.positions, self.window))
        return y, LayerCache.from_prompt(k, v, start, size)

    def step(
        self, x: Float[Array, "B 1 hidden"] | Unnormalized, at: Rotary, cache: LayerCache
    ) -> tuple[Float[Array, "B 1 hidden"], LayerCache]:
        """One more token a row, against the cache."""
        q, k, v = self._heads(x, at)
        cache, key_positions = cache.append(k, v)
        seen = visible(at.positions, key_positions, self.window)[:, 0]
        return self._out(decode_attention(q[:, 0], cache.keys, cache.values, seen)[:, None]), cache

    def extend(
        self, x: Float[Array, "B T hidden"] | Unnormalized, at: Rotary, cache: LayerCache, length: Int[Array, ""]
    ) -> tuple[Float[Array, "B T hidden"], LayerCache]:
        """`length` more tokens a row, against the cache and one another; those beyond are padding."""
        q, k, v = self._heads(x, at)
        # In a ring the new keys push out keys that the first of the new tokens still see: both are there side by side.
        keys, values = (
            jnp.concatenate([held, new.astype(held.dtype)], axis=2)
            for held, new in ((cache.keys, k), (cache.values, v))
        )
        key_positions = jnp.concatenate([cache.positions(), at.positions], axis=1)
        y = self._out(attend(q, keys, values, at.positions, key_positions, self.window))
        return y, cache.extend(k, v, length)

    def _out(self, heads: Float[Array, "B T N D"]) -> Float[Array, "B T hidden"]:
        return self.o_proj(heads.reshape(*heads.shape[:2], -1))


def attend_rows(
    q: Float[Array, "B T N D"], keys: Float[Array, "B K T D"], values: Float[Array, "B K T D"], window: int | None
) -> Float[Array, "B T N D"]:
    """As `attend`, for rows without padding: queries and keys lie at positions 0 to T - 1.

    Long rows in two bytes a number take cuDNN's fused attention on a GPU that has it, whose scores never reach memory.
    """

    def plain(q: Array, keys: Array, values: Array) -> Array:
        positions = jnp.arange(q.shape[1])[None]
        return attend(q, keys, values, positions, positions, window)

    def fused(q: Array, keys: Array, values: Array) -> Array:
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        seen = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, keys, values, is_causal=True, local_window_size=seen, implementation="cudnn"
        )

    if q.shape[1] < _SHORTEST_FUSED or not dispatch.has_fused_attention(q.dtype, q.shape[-1]):
        return plain(q, keys, values)
    # The default device is a GPU; the arrays may still lie on the host.
    return jax.lax.platform_dependent(q, keys, values, cuda=fused, default=plain)


def attend(
    q: Float[Array, "B T N D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
    window: int | None,
) -> Float[Array, "B T N D"]:
    """Softmax attention in float32; N query heads share K key heads, N a multiple of K.

    A query sees the keys at positions 0 up to its own, and with a window only the last `window`
    of them. Long inputs go in chunks of queries: memory grows with T, not with T squared, and on a
    CPU the scores of a chunk stay in its caches.
    """
    batch, length = q.shape[:2]
    if length <= QUERY_CHUNK:
        return _attend(q, keys, values, query_positions, key_positions, window)
    pad = -length % QUERY_CHUNK
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    query_positions = jnp.pad(query_positions, ((0, 0), (0, pad)), constant_values=-1)

    def chunks(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, QUERY_CHUNK, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(chunk: tuple[Array, Array]) -> Array:
        return _attend(chunk[0], keys, values, chunk[1], key_positions, window)

    y = jax.lax.map(one, (chunks(q), chunks(query_positions)))
    return y.swapaxes(0, 1).reshape(batch, length + pad, *y.shape[3:])[:, :length]


def visible(
    query_positions: Int[Array, "#B T"], key_positions: Int[Array, "#B S"], window: int | None
) -> Bool[Array, "#B T S"]:
    """Which key each query sees."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (distance >= 0) & (key_positions[:, None, :] >= 0)
    return seen if window is None else seen & (distance < window)


def _attend(
    q: Array, keys: Array, values: Array, query_positions: Array, key_positions: Array, window: int | None
) -> Float[Array, "B T N D"]:
    batch, length, heads, head_dim = q.shape
    kv_heads, size = keys.shape[1:3]
    group = heads // kv_heads
    # Plain batched matrix products, the queries of one key head together: [B*K, T*G, D] with [B*K, S, D].
    q = q.reshape(batch, length, kv_heads, group, head_dim).swapaxes(1, 2).reshape(-1, length * group, head_dim)
    keys, values = keys.reshape(-1, size, head_dim), values.reshape(-1, size, head_dim)
    scores = jnp.einsum("hqd,hsd->hqs", q, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    mask = visible(query_positions, key_positions, window)[:, None, :, None]
    scores = scores.reshape(batch, kv_heads, length, group, size)
    # A finite fill keeps padding queries, which see nothing, free of NaN.
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(values.dtype)
    weights = weights.reshape(-1, length * group, size)
    y = jnp.einsum("hqs,hsd->hqd", weights, values, preferred_element_type=jnp.float32).astype(q.dtype)
    return y.reshape(batch, kv_heads, length, group, head_dim).swapaxes(1, 2).reshape(batch, length, heads, head_dim)
