"""Attention of one new token a row over a cache of keys and values."""

from vptq_jax.pallas.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
