"""Kernels: each op has one api with `implementation=`, an XLA reference, and its GPU kernels."""

from vptq_jax.pallas.decode_attention import decode_attention
from vptq_jax.pallas.dispatch import KernelFallbackWarning
from vptq_jax.pallas.nearest_centroid import cluster_sums, nearest_centroid
from vptq_jax.pallas.vq_matmul import vq_matmul

__all__ = ["KernelFallbackWarning", "cluster_sums", "decode_attention", "nearest_centroid", "vq_matmul"]
