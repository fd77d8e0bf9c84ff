"""Second moments of the inputs of linear layers, H = X^T X / T: the metric that quantization minimizes in.

Layers that read the same input (q/k/v, gate/up) share one H.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Array, Bool, Float
from safetensors.numpy import save_file

from vptq_jax.files import new_directory

# Layers that read the same tensor as another one, which carries the H of all of them.
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def hessian_key(path: str) -> str:
    """The module path under which the H of a module is kept: that of q_proj for k_proj, and so on."""
    parent, _, name = path.rpartition(".")
    name = _SAME_INPUT.get(name, name)
    return f"{parent}.{name}" if parent else name


class Moment(NamedTuple):
    """A running sum of X^T X in float32, with what rounding has taken from it."""

    total: Float[Array, "in in"]
    lost: Float[Array, "in in"]

    @classmethod
    def zeros(cls, features: int) -> Moment:
        """The sum over no tokens."""
        return cls(jnp.zeros((features, features), jnp.float32), jnp.zeros((features, features), jnp.float32))

    def add(self, x: Float[Array, "*batch in"]) -> Moment:
        """Adds the outer products of all rows of x, losing no more than a single rounding over any number of calls."""
        rows = x.reshape(-1, x.shape[-1])
        term = jnp.einsum(
            "ti,tj->ij", rows, rows, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        # Kahan's summation with Knuth's two-sum, which needs no order of magnitudes.
        term = term + self.lost
        total = self.total + term
        kept = total - self.total
        return Moment(total, (self.total - (total - kept)) + (term - kept))

    def mean(self, tokens: int) -> Float[np.ndarray, "in in"]:
        """The symmetric second moment over `tokens` rows, summed in float64, as float32 on the host."""
        exact = np.asarray(self.total, np.float64) + np.asarray(self.lost, np.float64)
        return ((exact + exact.T) / (2 * tokens)).astype(np.float32)

    def finite(self) -> Bool[Array, ""]:
        """Whether every row added so far was finite (squares of others show on the diagonal)."""
        return jnp.isfinite(jnp.trace(self.total))


class Hessians:
    """Second moments by module, and what they were collected from.

    Args:
        arrays: float32 [in_features, in_features] by the path of the first module that reads that input; read anew at
            every access when it is backed by files.
        modules: for each key of `arrays`, the modules that share it and the digest of the weight of each
            (`fingerprint.array_digest`; empty when unknown).
        tokens: calibration tokens behind every H.
        fingerprint: `fingerprint.model_fingerprint` of the model, empty when unknown.
    """

    def __init__(
        self,
        arrays: Mapping[str, Float[np.ndarray, "in in"]],
        modules: Mapping[str, Mapping[str, str]],
        tokens: int,
        fingerprint: str = "",
    ):
        self.arrays, self.modules = arrays, modules
        self.tokens, self.fingerprint = tokens, fingerprint
        self._key = {path: key for key, paths in modules.items() for path in paths}

    def __contains__(self, path: str) -> bool:
        return path in self._key

    def __iter__(self) -> Iterator[str]:
        return iter(self._key)

    def for_module(self, path: str) -> Float[np.ndarray, "in in"]:
        """H of the input of a module such as `model.layers.0.self_attn.q_proj`, float32 [in_features, in_features].

        Raises:
            ValueError: there is none for this module.
        """
        if path not in self._key:
            raise ValueError(f"no Hessian for {path}; there are {len(self._key)}, for {_some(self._key)}")
        return self.arrays[self._key[path]]

    def weight_digest(self, path: str) -> str:
        """Digest of the weight of a module at collection time, empty when unknown."""
        return self.modules[self._key[path]][path]

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes one safetensors file per H, each with modules, shape, tokens and fingerprint in its metadata.

        The directory appears under its name when it is complete.

        Raises:
            FileExistsError: the directory holds something and `overwrite` is False.
        """
        with new_directory(directory, overwrite=overwrite) as temporary:
            for key, modules in self.modules.items():
                array = np.asarray(self.arrays[key], np.float32)
                header = {
                    "format": _FORMAT,
                    "modules": dict(modules),
                    "shape": list(array.shape),
                    "tokens": self.tokens,
                    "fingerprint": self.fingerprint,
                    "files": len(self.modules),
                }
                save_file(
                    {"hessian": array}, temporary / f"{key}.safetensors", metadata={"vptq_jax": json.dumps(header)}
                )


_FORMAT = "hessian-1"


def load_hessians(directory: str | os.PathLike[str]) -> Hessians:
    """Reads what `Hessians.save` wrote; each H is read from its file when it is asked for.

    Raises:
        FileNotFoundError: there is no such directory, or it holds no Hessians.
        ValueError: a file is damaged, missing, or belongs to another collection.
    """
    directory = Path(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"no Hessians in {directory}: expected *.safetensors files as Hessians.save writes them"
        )
    headers = {file.name.removesuffix(".safetensors"): _read_header(file) for file in files}
    first = next(iter(headers.values()))
    for key, header in headers.items():
        for field in ("tokens", "fingerprint", "files"):
            if header[field] != first[field]:
                raise ValueError(
                    f"{directory / key}.safetensors has {field} {header[field]!r} but others have {first[field]!r}; "
                    "the directory mixes two collections"
                )
    if len(files) != first["files"]:
        raise ValueError(
            f"{directory} holds {len(files)} of {first['files']} Hessian files; collect or copy them again"
        )
    modules = {key: header["modules"] for key, header in headers.items()}
    return Hessians(_Files(directory, list(modules)), modules, first["tokens"], first["fingerprint"])


def check_hessian(hessian: Float[np.ndarray, "in in"], path: str, in_features: int) -> None:
    """Checks size, finiteness and symmetry on the host.

    Raises:
        ValueError: naming the module, what was found and what was expected.
    """
    if hessian.shape != (in_features, in_features):
        raise ValueError(
            f"Hessian of {path} has shape {list(hessian.shape)}, expected [{in_features}, {in_features}]; "
            "it belongs to another model"
        )
    if not np.isfinite(hessian).all():
        raise ValueError(f"Hessian of {path} holds NaN or infinite values, expected finite ones; collect it again")
    diagonal = np.diagonal(hessian)
    if diagonal.min() < 0:
        raise ValueError(
            f"Hessian of {path} has the negative diagonal entry {diagonal.min():g}, expected a second moment X^T X / T"
        )
    difference = float(np.abs(hessian - hessian.T).max())
    if difference > 1e-5 * diagonal.max():
        raise ValueError(
            f"Hessian of {path} is not symmetric: H and its transpose differ by {difference:g} "
            f"(largest diagonal entry {diagonal.max():g}); expected a second moment X^T X / T"
        )


class _Files(Mapping):
    """Arrays of a directory, read at each access so that the host holds one at a time."""

    def __init__(self, directory: Path, keys: list[str]):
        self.directory, self.keys_ = directory, keys

    def __getitem__(self, key: str) -> Float[np.ndarray, "in in"]:
        with safetensors.safe_open(self.directory / f"{key}.safetensors", framework="numpy") as file:
            return file.get_tensor("hessian")

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def _read_header(file: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            metadata = tensors.metadata() or {}
            names = list(tensors.keys())
            shape = tensors.get_slice("hessian").get_shape() if "hessian" in names else None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
    header = json.loads(metadata["vptq_jax"]) if "vptq_jax" in metadata else {}
    if header.get("format") != _FORMAT:
        raise ValueError(f"{file} has format {header.get('format')!r}, expected {_FORMAT!r} as Hessians.save writes it")
    if shape != header["shape"]:
        raise ValueError(f"{file} holds a tensor 'hessian' of shape {shape}, expected {header['shape']}")
    return header


def _some(names: Mapping[str, Any], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")
