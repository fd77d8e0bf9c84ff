"""Layers: dense and quantized, for any `nnx.Module`."""
