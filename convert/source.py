"""What every stored format shares: finding out what a model needs, and handing it over tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from vptq_jax.convert.safetensors_reader import find_nonfinite
from vptq_jax.lm.params import AbstractSource, DenseSource

FLOATS = ("float32", "float16", "bfloat16")
"""dtypes of weights, as NumPy names them."""


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
