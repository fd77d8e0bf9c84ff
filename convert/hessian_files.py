"""The community's Hessian files: `{layer}_{qkv|o|up|down}.pt`, as published for many models by the makers of QuIP#.

Each holds `flatH`, the lower triangle of the centred second moment row by row, `mu`, the mean of the inputs,
`n`, their number of features, and `ct`, the number of tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vptq_jax.lm.arch import ARCHITECTURES
from vptq_jax.nn.hessians import Hessians, read_hessians
from vptq_jax.schema import INT32, short

_PARTS = ("qkv", "o", "up", "down")  # an H of each input of a block; the files are all of models like LLaMA
_MODULES = dict(zip(_PARTS, ARCHITECTURES["llama"].inputs(), strict=True))
_FILE = re.compile(r"(?P<layer>\d+)_(?P<part>qkv|o|up|down)\.pt")


def load_hessians(directory: str | os.PathLike[str]) -> Hessians:
    """Reads what `Hessians.save` wrote, or the community's `.pt` files; each H is read when it is asked for.

    Raises:
        FileNotFoundError: there is no such directory, or it holds no Hessians.
        ImportError: the files are `.pt` files and PyTorch is not installed.
        ValueError: a file is damaged, missing, or belongs to another collection.
    """
    directory = Path(directory)
    if not any(directory.glob("*.safetensors")) and any(directory.glob("*_qkv.pt")):
        return load_hessian_files(directory)
    return read_hessians(directory)


def load_hessian_files(
    directory: str | os.PathLike[str], *, num_layers: int | None = None, damping: float = 0.01
) -> Hessians:
    """Reads a directory of community Hessian files (needs `torch`); each file is read when its H is asked for.

    H is the lower triangle mirrored plus mu mu^T, divided by its mean diagonal, with `damping` added to the
    diagonal, as the format prescribes (the loaders of QuIP# and VPTQ).

    Args:
        directory: where the `.pt` files lie.
        num_layers: decoder layers of the model; None takes the highest number found.
        damping: share of the mean diagonal that is added to the diagonal.

    Raises:
        ImportError: torch is not installed.
        FileNotFoundError: there is no such file in the directory, or files of some layers are missing.
        ValueError: (at access) a file is damaged, of the wrong size or not finite.
    """
    _torch()
    directory = Path(directory)
    found = {match["layer"] + "_" + match["part"] for match in map(_FILE.fullmatch, _names(directory)) if match}
    if not found:
        raise FileNotFoundError(f"no Hessian files in {directory}; expected names such as 0_qkv.pt, 0_o.pt, 0_up.pt")
    if num_layers is None:
        num_layers = 1 + max(int(name.split("_")[0]) for name in found)
    files, modules = {}, {}
    for layer in range(num_layers):
        for part, names in _MODULES.items():
            paths = [f"model.layers.{layer}.{name}" for name in names]
            files[paths[0]] = directory / f"{layer}_{part}.pt"
            modules[paths[0]] = dict.fromkeys(paths, "")
    missing = [file.name for file in files.values() if file.stem not in found]
    if missing:
        raise FileNotFoundError(
            f"{directory} misses {len(missing)} of {len(files)} Hessian files for {num_layers} layers: "
            + ", ".join(missing[:8])
            + (", ..." if len(missing) > 8 else "")
        )
    first = next(iter(files.values()))
    return Hessians(_Regularized(files, damping), modules, _read(first)["ct"])


class _Regularized(Mapping):
    """Dense float32 Hessians, each made from its file at access."""

    def __init__(self, files: dict[str, Path], damping: float):
        self.files, self.damping = files, damping

    def __getitem__(self, key: str) -> Float[np.ndarray, "in in"]:
        return regularize(_dense(self.files[key]), self.damping)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def regularize(hessian: Float[np.ndarray, "in in"], damping: float) -> Float[np.ndarray, "in in"]:
    """H over its mean diagonal, plus `damping` on the diagonal."""
    scaled = hessian / np.diagonal(hessian).mean()
    return scaled + damping * np.eye(len(scaled), dtype=scaled.dtype)


def _dense(file: Path) -> Float[np.ndarray, "in in"]:
    content = _read(file)
    size = content["n"]
    lower, mean = (np.asarray(content[name].double().numpy()) for name in ("flatH", "mu"))
    for name, value, expected in (("flatH", lower, size * (size + 1) // 2), ("mu", mean, size)):
        if value.shape != (expected,):
            raise ValueError(f"{file}: {name} has shape {list(value.shape)}, expected [{expected}] for n = {size}")
        if not np.isfinite(value).all():
            raise ValueError(f"{file}: {name} holds NaN or infinite values, expected finite ones; get the file again")
    hessian = np.zeros((size, size))
    hessian[np.tril_indices(size)] = lower
    hessian += np.tril(hessian, -1).T + np.outer(mean, mean)
    if not np.diagonal(hessian).mean() > 0:
        raise ValueError(f"{file}: the mean diagonal of H is {np.diagonal(hessian).mean():g}, expected above 0")
    return hessian.astype(np.float32)


def _read(file: Path) -> dict[str, Any]:
    torch = _torch()
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes PyTorch's reader raise whatever its bytes lead to
        raise ValueError(f"{file} is not a Hessian file that can be read safely: {short(str(error))}") from None
    expected = ("flatH", "mu", "n", "ct")
    if not isinstance(content, dict) or any(name not in content for name in expected):
        names = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file} holds {short(names)}, expected a dictionary with {', '.join(expected)}")
    for name in ("n", "ct"):
        count = content[name]
        if isinstance(count, torch.Tensor) and count.numel() == 1 and not count.is_complex():
            count = count.item()
        if not isinstance(count, int | float) or isinstance(count, bool) or count != count or not 0 <= count <= INT32:
            raise ValueError(f"{file}: {name} is {short(content[name])}, expected a whole number from 0 to {INT32}")
        content[name] = int(count)
    for name in ("flatH", "mu"):
        tensor = content[name]
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            raise ValueError(f"{file}: {name} is {_kind(tensor)}, expected a dense tensor of floating-point numbers")
    return content


def _kind(value: Any) -> str:
    """What something from a file is, for a message."""
    dtype, layout = getattr(value, "dtype", None), getattr(value, "layout", None)
    return type(value).__name__ if dtype is None else f"a tensor of {dtype} ({layout})"


def _names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.is_dir() else []


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError(
            "reading .pt Hessian files needs PyTorch, which is not installed: "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu"
        ) from None
    return torch
