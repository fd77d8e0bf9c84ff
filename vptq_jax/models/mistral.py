"""Mistral 7B, Nemo and Large."""

from vptq_jax.models.decoder import Decoder


class Mistral(Decoder):
    """`Decoder` without biases, with an optional sliding window and a free head_dim."""
