"""Where `quantize` takes the metric of each layer from: Hessians that exist, or batches run along with it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vptq_jax.models.decoder import Block, Decoder
from vptq_jax.models.linear import Linear, VQLinear
from vptq_jax.quantize.activations import Activations, hessian_key
from vptq_jax.quantize.fingerprint import block_digests, bytes_digest, layer_digests
from vptq_jax.quantize.hessian import Hessians
from vptq_jax.quantize.linalg import dot
from vptq_jax.spec import QuantConfig

T = TypeVar("T")


class Calibration(Protocol):
    """Accompanies `quantize` from block to block."""

    seconds: float

    def enter(self, block: Block, layer: int, *, needed: bool) -> None:
        """A full-precision block is about to be quantized; `needed` if any of its layers is not finished."""
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

    def target(self, path: str, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """The weight that quantization of that layer should approach."""
        ...


class GivenHessians:
    """Hessians from `collect_hessians`, `load_hessians` or the community's files."""

    seconds = 0.0

    def __init__(self, hessians: Hessians):
        self._hessians = hessians

    def enter(self, block: Block, layer: int, *, needed: bool) -> None:
        """See `Calibration`."""

    def leave(self, block: Block) -> None:
        """See `Calibration`."""

    def hessian(self, path: str) -> Float[np.ndarray, "in in"]:
        """See `Calibration`."""
        return self._hessians.for_module(path)

    def inputs(self, path: str) -> dict[str, str]:
        """See `Calibration`."""
        return {"hessian": bytes_digest(self._hessians.for_module(path))}

    def target(self, path: str, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """See `Calibration`."""
        return weight


class RunningCalibration:
    """Batches that pass the model block by block, in front of (or behind) its quantization.

    Args:
        model: embedding, rotary positions and final norm.
        batches: int32 [B, T] each.
        config: mode and compensation.
        last: the last block that batches must reach; behind it nothing is left to do.
    """

    def __init__(self, model: Decoder, batches: list[np.ndarray], config: QuantConfig, last: int):
        self.seconds = 0.0
        self._config, self._last = config, last
        self._tokens = hashlib.blake2b("".join(map(bytes_digest, batches)).encode(), digest_size=16).hexdigest()
        self._before = ""  # digest of all full-precision weights in front of the current block
        self._extend(layer_digests(model.embed_tokens, "model.embed_tokens"))
        self._digests: Mapping[str, str] = {}
        self._layer = -1
        self._hessians: dict[str, np.ndarray] = {}
        self._drifts: dict[str, np.ndarray] = {}
        self._activations = self._exact = None
        if last >= 0:
            self._activations = self._timed(lambda: Activations(model, batches))
        if last >= 0 and config.compensation:
            self._exact = self._timed(lambda: Activations(model, batches))

    def enter(self, block: Block, layer: int, *, needed: bool) -> None:
        """See `Calibration`."""
        name = f"model.layers.{layer}"
        self._layer, self._digests = layer, block_digests(block, name)
        self._hessians, self._drifts = {}, {}
        activations, exact = self._activations, self._exact
        if activations is None or layer > self._last:
            return
        independent = self._config.mode == "independent"
        if exact is not None and needed:
            self._hessians, self._drifts = self._timed(lambda: activations.observe_drift(exact, block, name))
        elif exact is not None:
            self._timed(lambda: exact.advance(block))
        elif needed:
            self._hessians = self._timed(lambda: activations.observe(block, name, advance=independent))
        elif independent:
            self._timed(lambda: activations.advance(block))

    def leave(self, block: Block) -> None:
        """See `Calibration`."""
        self._extend(self._digests)
        activations = self._activations
        if activations is not None and self._layer <= self._last and self._config.mode == "sequential":
            self._timed(lambda: activations.advance(_dense(block)))

    def hessian(self, path: str) -> Float[np.ndarray, "in in"]:
        """See `Calibration`."""
        if path.startswith("model.layers."):
            return self._hessians[hessian_key(path)]
        assert self._activations is not None
        return self._activations.observe_head()

    def inputs(self, path: str) -> dict[str, str]:
        """See `Calibration`."""
        return {"token ids": self._tokens, "weights before": self._before}

    def target(self, path: str, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """See `Calibration`."""
        drift = self._drifts.get(hessian_key(path))
        if drift is None:
            return weight
        config = self._config
        return compensated_target(weight, self.hessian(path), drift, config.compensation, config.damping)

    def _extend(self, digests: Mapping[str, str]) -> None:
        text = json.dumps([self._before, sorted(digests.items())])
        self._before = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _timed(self, function: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return function()
        finally:
            self.seconds += time.perf_counter() - started


@jax.jit
def compensated_target(
    W: Float[Array, "out in"],
    H: Float[Array, "in in"],
    D: Float[Array, "in in"],
    share: float,
    damping: float,
) -> Float[Array, "out in"]:
    """The weight whose outputs on drifted inputs come nearest to those of W on exact inputs.

    Minimizes |X W^T - X~ V^T|^2 over V, with a ridge that pulls towards W: V = W + share * W D (H + damping)^-1.

    Args:
        W: weight, any float dtype.
        H: second moment of the drifted inputs X~.
        D: drift moment (X - X~)^T X~ / T.
        share: 0 returns W.
        damping: ridge, as a share of the mean diagonal of H.
    """
    weight = W.astype(jnp.float32)
    ridge = damping * jnp.trace(H) / len(H)
    # The floor keeps a zero Hessian, whose drift moment is zero as well, solvable.
    factor = jax.scipy.linalg.cho_factor(H + jnp.maximum(ridge, jnp.finfo(jnp.float32).tiny) * jnp.eye(len(H)))
    step = jax.scipy.linalg.cho_solve(factor, dot(weight, D).T).T
    return jnp.where(jnp.isfinite(step).all(), weight + share * step, weight)


def _dense(block: Block) -> Block:
    """The block with dense copies of its quantized layers, so that all blocks run one compiled program."""
    block = nnx.merge(*nnx.split(block))
    dtype = block.input_layernorm.weight.dtype
    for _, owner, name in list(block.places()):
        layer = getattr(owner, name)
        if isinstance(layer, VQLinear):
            bias = None if layer.bias is None else layer.bias[...]
            setattr(owner, name, Linear(layer.weight.dequantize(dtype), bias))
    return block
