"""`y = x @ dequantize(w).T` straight from packed indices."""

from vptq_jax.pallas.vq_matmul.api import vq_matmul

__all__ = ["vq_matmul"]
