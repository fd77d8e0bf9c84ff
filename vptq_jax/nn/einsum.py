"""`VQEinsum`: an `nnx.Einsum` whose kernel is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vptq_jax.array import VQArray
from vptq_jax.nn.contraction import Contraction
from vptq_jax.nn.linear import VQLinear
from vptq_jax.pallas.vq_matmul import Packed, vq_matmul


class VQEinsum(VQLinear):
    """An einsum with a quantized kernel; a stack of matrices (experts) holds one quantized weight for each.

    Args:
        weight: the kernel as `Contraction.matrix` reads it; arrays of a stack have one more axis in front.
        contraction: what is computed.
        kernel_shape: shape of the kernel as the einsum names its axes.
        bias: as `nnx.Einsum` holds it, or None.
        stored: see `VQLinear`.
    """

    def __init__(
        self,
        weight: VQArray | Packed,
        contraction: Contraction,
        kernel_shape: tuple[int, ...],
        bias: Any = None,
        *,
        stored: Mapping[str, str] | None = None,
    ):
        super().__init__(weight, bias, stored=stored)
        self.contraction, self.kernel_shape = contraction, tuple(kernel_shape)

    def with_weight(self, weight: VQArray | Packed, stored: Mapping[str, str] | None = None) -> VQEinsum:
        """See `VQLinear.with_weight`."""
        bias = None if self.bias is None else self.bias.get_value()
        stored = dict(self.stored) if stored is None else stored
        return VQEinsum(weight, self.contraction, self.kernel_shape, bias, stored=stored)

    @property
    def stacked(self) -> bool:
        """Whether the weight is a stack of matrices."""
        return bool(self.contraction.stack)

    def __call__(self, x: Float[Array | np.ndarray, "..."], *, dtype: Any = None) -> Float[Array, "..."]:
        """The result is in `dtype`, by default that of x."""
        x = jnp.asarray(x)
        dtype = dtype or x.dtype
        rows, weight = self.contraction.rows(x), self.weight

        def product(rows: Array, weight: Any) -> Array:
            return vq_matmul(rows, weight, implementation="xla" if self.order is None else None, out_dtype=dtype)

        y = (jax.vmap(product) if self.stacked else product)(rows, weight)
        y = self.contraction.arranged(y, x.ndim, self.contraction.sizes(self.kernel_shape))
        if self.bias is None:
            return y
        sizes = dict(zip(self.contraction.kernel, self.kernel_shape, strict=True))
        return y + self.contraction.bias(self.bias[...], x.ndim, sizes).astype(y.dtype)
