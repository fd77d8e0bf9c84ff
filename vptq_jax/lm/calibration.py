"""Where `quantize` takes the metric of each layer from: Hessians that exist, or batches run along with it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from flax import nnx
from jaxtyping import Float

from vptq_jax.lm.activations import Activations, hessian_key
from vptq_jax.lm.decoder import Block, Decoder
from vptq_jax.lm.fingerprint import bytes_digest, end_digests, module_digests, text_digest
from vptq_jax.nn.hessians import Hessians
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.spec import QuantConfig

T = TypeVar("T")


@runtime_checkable
class Calibration(Protocol):
    """Accompanies `quantize` from block to block."""

    seconds: float

    def enter(self, block: Block, layer: int, *, needed: bool) -> None:
        """A full-precision block is about to be quantized in place; `needed` if any of its layers is not finished."""
        ...

    def leave(self, block: Block) -> None:
        """The block that was entered is now quantized."""
        ...

    def hessian(self, path: str) -> Float[np.ndarray, "in in"]:
        """H of a layer of the block that was entered, or of an output projection behind the last block."""
        ...

    def inputs(self, path: str) -> dict[str, str]:
        """What H of that layer depends on, as digests."""
        ...


class GivenHessians:
    """Hessians from `collect_hessians`, `load_hessians` or the community's files."""

    seconds = 0.0

    def __init__(self, hessians: Hessians):
        self._hessians = hessians
        self._digest: tuple[np.ndarray, str] | None = None  # of the H that was asked for last

    def enter(self, block: Block, layer: int, *, needed: bool) -> None:
        """See `Calibration`."""

    def leave(self, block: Block) -> None:
        """See `Calibration`."""

    def hessian(self, path: str) -> Float[np.ndarray, "in in"]:
        """See `Calibration`."""
        return self._hessians.for_module(path)

    def inputs(self, path: str) -> dict[str, str]:
        """See `Calibration`."""
        hessian = self._hessians.for_module(path)
        if self._digest is None or self._digest[0] is not hessian:
            self._digest = hessian, bytes_digest(hessian)
        return {"hessian": self._digest[1]}


class RunningCalibration:
    """Batches that pass the model block by block, in front of (or within) its quantization.

    In mode "independent" every H comes from the full-precision model. In mode "sequential" the H of a layer is
    observed when it is asked for, behind everything that is quantized by then: earlier blocks, and earlier layers
    of the same block.

    Args:
        model: embedding, rotary positions and final norm.
        batches: int32 [B, T] each.
        config: the mode.
        last: the last block that batches must reach; behind it nothing is left to do.
    """

    def __init__(self, model: Decoder, batches: list[np.ndarray], config: QuantConfig, last: int):
        self.seconds = 0.0
        self._sequential, self._last = config.mode == "sequential", last
        self._tokens = text_digest(batches)
        self._weights = ""  # digest of all full-precision weights outside the blocks, and of the blocks so far
        self._extend(end_digests(model))
        self._block: Block | None = None
        self._name = ""
        self._hessians: dict[str, np.ndarray] = {}
        self._activations = self._timed(lambda: Activations(model, batches)) if last >= 0 else None

    def enter(self, block: Block, layer: int, *, needed: bool) -> None:
        """See `Calibration`."""
        self._name = f"model.layers.{layer}"
        self._extend(module_digests(block, self._name))
        self._hessians = {}
        activations = self._activations
        self._block = block if activations is not None and layer <= self._last else None
        if activations is None or self._block is None or self._sequential:
            return
        if needed:
            self._hessians = self._timed(lambda: activations.observe(block, self._name))
        else:
            self._timed(lambda: activations.advance(block))

    def leave(self, block: Block) -> None:
        """See `Calibration`."""
        activations = self._activations
        if activations is not None and self._block is not None and self._sequential:
            self._timed(lambda: activations.advance(_dense(block)))
        self._block = None

    def hessian(self, path: str) -> Float[np.ndarray, "in in"]:
        """See `Calibration`."""
        activations = self._activations
        assert activations is not None, "asked for the H of a layer that is finished"
        if not path.startswith("model.layers."):
            return activations.observe_head()
        key, block = hessian_key(path), self._block
        if key not in self._hessians:
            assert block is not None
            self._hessians[key] = self._timed(lambda: activations.observe_layer(_dense(block), self._name, key))
        return self._hessians[key]

    def inputs(self, path: str) -> dict[str, str]:
        """See `Calibration`."""
        return {"token ids": self._tokens, "weights up to its block": self._weights}

    def _extend(self, digests: Mapping[str, str]) -> None:
        text = json.dumps([self._weights, sorted(digests.items())])
        self._weights = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _timed(self, function: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return function()
        finally:
            self.seconds += time.perf_counter() - started


def _dense(block: Block) -> Block:
    """The block with dense copies of its quantized layers, so that blocks in every state run one compiled program."""
    block = nnx.merge(*nnx.split(block), copy=True)
    dtype = next(iter(block.norms().values())).weight.dtype
    for _, owner, name in list(block.places()):
        layer = getattr(owner, name)
        if isinstance(layer, VQLinear):
            bias = None if layer.bias is None else layer.bias[...]
            setattr(owner, name, Linear(layer.array.dequantize(dtype), bias))
    return block
