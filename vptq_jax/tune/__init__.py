"""Tuning of quantized models: codebooks, scales, offsets and norms learn, indices stay."""
