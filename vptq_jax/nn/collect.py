"""Second moments of the inputs of any module's linear layers, observed while the module runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vptq_jax.extras import progress_bar
from vptq_jax.files import new_directory
from vptq_jax.nn.contraction import Contraction
from vptq_jax.nn.hessians import KIND, Hessians, read_hessians, write_file
from vptq_jax.nn.linear import VQLinear
from vptq_jax.nn.moments import Moment
from vptq_jax.nn.surgery import contraction_of, kernel_of, linears, modules, replace


class MomentState(nnx.Variable):
    """A part of a running sum of X^T X."""


class Tap(nnx.Module):
    """Stands in for a linear layer, and adds up the second moment of its inputs."""

    def __init__(self, layer: Any, contraction: Contraction, shape: tuple[int, ...]):
        self.layer, self.contraction = layer, contraction
        stack = tuple(shape[contraction.kernel.index(axis)] for axis in contraction.stack)
        features = shape[contraction.kernel.index(contraction.contracted)]
        self.total, self.lost = (MomentState(jnp.zeros((*stack, features, features), jnp.float32)) for _ in range(2))
        self.rows = MomentState(jnp.zeros((), jnp.float32))

    def __call__(self, x: Float[Array, "..."], *arguments: Any, **options: Any) -> Any:
        rows = self.contraction.rows(x)
        stack = len(self.contraction.stack)
        rows = rows.reshape(*rows.shape[:stack], -1, rows.shape[-1])
        add = jax.vmap(Moment.add) if stack else Moment.add
        self.total[...], self.lost[...] = add(Moment(self.total[...], self.lost[...]), rows)
        self.rows[...] = self.rows[...] + rows.shape[-2]
        return self.layer(x, *arguments, **options)

    def mean(self, path: str) -> Float[np.ndarray, "*stack in in"]:
        """H of what came in, float32 on the host.

        Raises:
            ValueError: nothing did, or something that is not finite.
        """
        if not float(self.rows[...]):
            raise ValueError(
                f"{path} was never called with the calibration batches; leave it out, or pass another call"
            )
        mean = Moment(self.total[...], self.lost[...]).mean(int(self.rows[...]))
        if not np.isfinite(mean).all():
            raise ValueError(
                f"the calibration data gives {path} inputs that are NaN, infinite or have squares beyond float32, "
                "expected finite ones"
            )
        return (mean + np.swapaxes(mean, -1, -2)) / 2


def collect(
    module: nnx.Module,
    batches: Iterable[Any],
    call: Callable[[Any, Any], Any] | None = None,
    *,
    directory: str | os.PathLike[str] | None = None,
    layers_at_once: int | None = None,
    progress: bool = False,
) -> Hessians:
    """Collects H = X^T X / rows of every dense linear layer of a module (`surgery.linears`), which stays as it is.

    Args:
        module: any NNX module. Layers inside of `jax.lax.scan` and the like cannot be observed; inside of NNX's own
            transformations they can.
        batches: what `call` takes, one after the other; read several times with `layers_at_once`.
        call: runs the module on a batch, `call(module, batch)`; None is `module(batch)`. It is compiled.
        directory: where each H goes as soon as it is known, as `Hessians.save` writes it, instead of the host's
            memory.
        layers_at_once: H of this many layers are on the device at once, and the batches run once for each such group;
            None observes all layers in one pass.
        progress: show a progress bar.

    Returns:
        Hessians by path; of stacked kernels (experts) one for each matrix, [stack, in_features, in_features].

    Raises:
        ValueError: the module has no dense linear layer, one was never called, an input is not finite, or there are
            no batches.
        FileExistsError: the directory holds something.
    """
    layers = {path: layer for path, layer in linears(module).items() if not isinstance(layer, VQLinear)}
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no dense linear layer; expected Linear, nnx.Linear, or nnx.Einsum with one "
            "contracted axis"
        )
    paths, step = list(layers), layers_at_once or len(layers)
    batches = list(batches) if step < len(paths) else batches
    groups = [paths[start : start + step] for start in range(0, len(paths), step)]
    found: dict[str, np.ndarray] = {}
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(new_directory(directory, kind=KIND)) if directory is not None else None
        bar = stack.enter_context(progress_bar(progress, desc="Hessians", unit="batch"))
        for group in groups:
            for path, mean in _observe(module, group, batches, call, bar):
                if temporary is None:
                    found[path] = mean
                else:
                    facts = {"tokens": 0, "fingerprint": "", "text": "", "files": len(paths)}
                    write_file(temporary, path, mean, {path: ""}, facts)
    if directory is not None:
        return read_hessians(Path(directory))
    return Hessians(found, {path: {path: ""} for path in found}, tokens=0)


def _observe(
    module: nnx.Module, paths: list[str], batches: Iterable[Any], call: Callable | None, bar: Any
) -> Iterator[tuple[str, np.ndarray]]:
    copy = replace(module, {})  # what is compiled writes its variables anew
    layers = linears(copy)
    taps = {}
    for path in paths:
        contraction = contraction_of(layers[path])
        assert contraction is not None
        taps[path] = Tap(layers[path], contraction, kernel_of(layers[path]).shape)
    tapped = replace(copy, taps)

    @nnx.jit
    def run(tapped: nnx.Module, batch: Any) -> None:
        (call or (lambda module, batch: module(batch)))(tapped, batch)

    seen = False
    for batch in batches:
        run(tapped, batch)
        bar.update()
        seen = True
    if not seen:
        raise ValueError("there are no calibration batches")
    parts: dict[str, Any] = modules(tapped)
    for path in paths:
        yield path, parts[path].mean(path)
