"""`y = x @ dequantize(w).T` straight from packed indices."""

from vptq_jax.pallas.vq_matmul.api import vq_matmul, vq_matmuls
from vptq_jax.pallas.vq_matmul.layout import KernelArray, choose_order, relayout, restore
from vptq_jax.pallas.vq_matmul.norm import RMS

__all__ = ["RMS", "KernelArray", "choose_order", "relayout", "restore", "vq_matmul", "vq_matmuls"]
