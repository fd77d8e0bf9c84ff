"""What every stored format shares: finding out what a model needs, and handing it over tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from vptq_jax.convert.safetensors_reader import find_nonfinite
from vptq_jax.models.config import ModelConfig
from vptq_jax.models.decoder import Decoder
from vptq_jax.models.linear import Linear, VQLinear
from vptq_jax.models.params import AbstractSource, DenseSource
from vptq_jax.models.registry import build

FLOATS = ("float32", "float16", "bfloat16")
"""dtypes of weights, as NumPy names them."""


class Plan(AbstractSource):
    """Everything a model asks for, and nothing allocated.

    Attributes:
        shapes: shape of every dense tensor, by Hugging Face name, as if no layer were quantized.
        linears: (out_features, in_features, bias) of every linear layer, by module path; the
            embedding table and `lm_head` are among them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.linears: dict[str, tuple[int, int, bool]] = {}
        build(config, self)

    def linear(self, name: str, out_features: int, in_features: int, *, bias: bool) -> Linear | VQLinear:
        """See `ParamSource.linear`."""
        self.linears[name] = (out_features, in_features, bias)
        return super().linear(name, out_features, in_features, bias=bias)


class HeaderSource(AbstractSource):
    """Shapes as the model asks for them, dtypes as the file stores them."""

    def __init__(self, dtype_of: Callable[[str], Any]):
        super().__init__()
        self._dtype_of = dtype_of

    def tensor(self, name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """See `ParamSource.tensor`."""
        return jax.ShapeDtypeStruct(shape, self._dtype_of(name))


class StoredSource(DenseSource):
    """Tensors read from a file when the model asks for them.

    Args:
        read: name to a float NumPy array in an aligned buffer of its own.
        progress: told the bytes of every tensor that arrived.
    """

    def __init__(self, read: Callable[[str], np.ndarray], progress: Callable[[int], Any] | None = None):
        self._read, self._progress = read, progress

    def tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        """See `ParamSource.tensor`.

        Raises:
            ValueError: the tensor holds NaN or infinite values.
        """
        array = self._read(name)
        if self._progress:
            self._progress(array.nbytes)
        return to_device(name, array.reshape(shape))


def all_linears(model: Decoder) -> dict[str, Linear | VQLinear]:
    """Every linear layer by Hugging Face module path, the embedding table and `lm_head` included."""
    layers = {"model.embed_tokens": model.embed_tokens, **model.linears()}
    return layers if model.lm_head is None else layers | {"lm_head": model.lm_head}


def quantized_layers(model: Decoder) -> dict[str, VQLinear]:
    """The quantized ones of `all_linears`."""
    return {path: layer for path, layer in all_linears(model).items() if isinstance(layer, VQLinear)}


def to_device(name: str, array: np.ndarray) -> Array:
    """The array on the default device, adopted without a copy where the device is the host.

    Raises:
        ValueError: it holds NaN or infinite values.
    """
    position = find_nonfinite(array)
    if position is not None:
        value = array.reshape(-1)[position]
        place = [int(i) for i in np.unravel_index(position, array.shape)]
        raise ValueError(
            f"tensor {name!r} holds {value} at {place} (dtype {array.dtype}); expected finite numbers. "
            "The file is damaged, or the dtype asked for is too narrow"
        )
    return jax.device_put(array)


def check_dtype(dtype: Any) -> np.dtype | None:
    """A parameter dtype from what a user may give; None stays None.

    Raises:
        ValueError: not float32, float16 or bfloat16.
    """
    if dtype is None:
        return None
    try:
        found = np.dtype(jax.numpy.dtype(dtype))
    except TypeError:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(FLOATS)}") from None
    if found.name not in FLOATS:
        raise ValueError(f"dtype is {found.name}; expected one of {', '.join(FLOATS)}")
    return found
