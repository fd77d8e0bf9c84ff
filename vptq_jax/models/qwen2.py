"""Qwen2 and Qwen2.5."""

from vptq_jax.models.decoder import Decoder


class Qwen2(Decoder):
    """`Decoder` with biases on q, k and v, and a sliding window in the upper layers or none."""
