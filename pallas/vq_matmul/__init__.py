"""`y = x @ dequantize(w).T` straight from packed indices."""

from vptq_jax.pallas.vq_matmul.api import vq_matmul, vq_matmuls
from vptq_jax.pallas.vq_matmul.norm import RMS
from vptq_jax.pallas.vq_matmul.packed import Packed, choose_order, pack, unpack

__all__ = ["RMS", "Packed", "choose_order", "pack", "unpack", "vq_matmul", "vq_matmuls"]
