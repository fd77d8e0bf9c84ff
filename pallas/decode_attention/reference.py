"""The XLA implementation: the truth that the kernel is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def decode_attention(
    q: Float[Array, "B N D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B N D"]:
    """Softmax in float32; a finite fill keeps rows that see nothing free of NaN."""
    batch, heads, head_dim = q.shape
    grouped = q.reshape(batch, keys.shape[1], -1, head_dim)
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    y = jnp.einsum("bkgs,bksd->bkgd", weights, values, preferred_element_type=jnp.float32)
    return y.astype(q.dtype).reshape(batch, heads, head_dim)
