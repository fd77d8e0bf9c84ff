"""LLaMA 1 to 3.3 and what shares its `model_type`, such as SmolLM2."""

from vptq_jax.models.decoder import Decoder


class Llama(Decoder):
    """`Decoder` with optional biases and every rope type."""
