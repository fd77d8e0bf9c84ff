"""Vector post-training quantization (VPTQ) of language models in JAX."""
