"""Flax NNX decoders (LLaMA, Mistral and their kin) with dense or quantized linear layers."""
