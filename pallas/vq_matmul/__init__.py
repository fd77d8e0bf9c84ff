"""`y = x @ dequantize(w).T` straight from packed indices."""

from vptq_jax.pallas.vq_matmul.api import vq_matmul, vq_matmuls
from vptq_jax.pallas.vq_matmul.layout import KernelArray, choose_order, relayout, restore

__all__ = ["KernelArray", "choose_order", "relayout", "restore", "vq_matmul", "vq_matmuls"]
