"""The decoder of every architecture in `arch`: RMSNorm, rotary attention, gated MLP.

Parameters and activations keep the dtype of the weights; norms, softmax and logits are float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Integer

from vptq_jax.lm.arch import Norms
from vptq_jax.lm.attention import Attention
from vptq_jax.lm.cache import KVCache, LayerCache, cache_sizes
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.norm import RMSNorm, make_norm
from vptq_jax.lm.params import ParamSource
from vptq_jax.lm.rope import Rotary, rotary
from vptq_jax.meshes import automatic, spec_of
from vptq_jax.nn.linear import Linear, Unnormalized, VQLinear, project

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    # Its cube is computed in float32, as PyTorch does in any dtype.
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype),
}


class MLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, source: ParamSource, name: str):
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.shared_inputs, self.activation = config.architecture.mlp, config.architecture.activation
        self.gate_proj = source.linear(f"{name}.gate_proj", inner, hidden, bias=bias)
        self.up_proj = source.linear(f"{name}.up_proj", inner, hidden, bias=bias)
        self.down_proj = source.linear(f"{name}.down_proj", hidden, inner, bias=bias)

    def __call__(self, x: Float[Array, "*batch hidden"] | Unnormalized) -> Float[Array, "*batch hidden"]:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(_ACTIVATIONS[self.activation](gate) * up)


class Block(nnx.Module):
    """One layer. Blocks hold no layer number, so that all of one kind share one compiled program."""

    def __init__(self, config: ModelConfig, layer: int, source: ParamSource):
        name, architecture = f"model.layers.{layer}", config.architecture
        self.attention_norms, self.mlp_norms = architecture.attention_norms, architecture.mlp_norms

        def read(norm: str | None) -> None:
            if norm is not None:
                setattr(self, norm, make_norm(config, source, f"{name}.{norm}", config.hidden_size))

        read(self.attention_norms.before)
        self.self_attn = Attention(config, layer, source, f"{name}.self_attn")
        read(self.attention_norms.after)
        read(self.mlp_norms.before)
        self.mlp = MLP(config, source, f"{name}.mlp")
        read(self.mlp_norms.after)

    def __call__(self, h: Float[Array, "B T hidden"], at: Rotary) -> Float[Array, "B T hidden"]:
        """The whole rows at once; `at` from `Decoder.rotary`."""
        return self._finish(h, self.self_attn(self._before(self.attention_norms, h), at))

    def prefill(self, h: Array, at: Rotary, start: Array, size: int) -> tuple[Array, LayerCache]:
        """As the call, and the layer's cache of `size` slots."""
        y, cache = self.self_attn.prefill(self._before(self.attention_norms, h), at, start, size)
        return self._finish(h, y), cache

    def step(self, h: Array, at: Rotary, cache: LayerCache) -> tuple[Array, LayerCache]:
        """One token a row, against the cache."""
        y, cache = self.self_attn.step(self._before(self.attention_norms, h), at, cache)
        return self._finish(h, y), cache

    def extend(self, h: Array, at: Rotary, cache: LayerCache, length: Array) -> tuple[Array, LayerCache]:
        """`length` tokens a row, against the cache and one another."""
        y, cache = self.self_attn.extend(self._before(self.attention_norms, h), at, cache, length)
        return self._finish(h, y), cache

    def places(self) -> Iterator[tuple[str, nnx.Module, str]]:
        """Path within the block, owner and attribute of every linear layer, in forward order."""
        for half in ("self_attn", "mlp"):
            owner = getattr(self, half)
            for names in owner.shared_inputs:
                for name in names:
                    yield f"{half}.{name}", owner, name

    def norms(self) -> dict[str, RMSNorm]:
        """The norms, by path within the block."""
        names = (*self.attention_norms, *self.mlp_norms)
        found = {name: getattr(self, name) for name in names if name is not None}
        if self.self_attn.qk_norm:
            found |= {f"self_attn.{name}": getattr(self.self_attn, name) for name in ("q_norm", "k_norm")}
        return found

    def _finish(self, h: Array, y: Array) -> Array:
        """The block's output, from its input and what attention made of that."""
        h = h + self._after(self.attention_norms, y)
        return h + self._after(self.mlp_norms, self.mlp(self._before(self.mlp_norms, h)))

    def _before(self, norms: Norms, h: Array) -> Unnormalized:
        return getattr(self, norms.before).defer(h)

    def _after(self, norms: Norms, y: Array) -> Array:
        return y if norms.after is None else getattr(self, norms.after)(y)


class Decoder(nnx.Module):
    """A causal language model: `logits = model(tokens)`.

    `model(tokens)` runs layer by layer through one compiled block, so a first call compiles in
    the time of one layer; inside `jax.jit` it becomes part of the one program.

    Args:
        config: the model's facts.
        source: where the parameters come from.

    Attributes:
        embed_tokens, lm_head: `Linear` or `VQLinear` of [vocab_size, hidden_size]; `lm_head` is
            None when the embedding is tied to it.
        layers: the `Block`s.
    """

    tables = ("embed_tokens",)  # read by rows, see `nn.forms.quantized`

    def __init__(self, config: ModelConfig, source: ParamSource):
        vocab, hidden = config.vocab_size, config.hidden_size
        self.config = config
        self.embed_tokens = source.linear("model.embed_tokens", vocab, hidden, bias=False)
        self.layers = nnx.List([Block(config, layer, source) for layer in range(config.num_layers)])
        self.norm = make_norm(config, source, "model.norm", hidden)
        head = None if config.tie_word_embeddings else source.linear("lm_head", vocab, hidden, bias=False)
        self.lm_head: Linear | VQLinear | None = nnx.data(head)

    @property
    def dtype(self) -> Any:
        """dtype of the activations: that of the norm weights."""
        return self.norm.weight.dtype

    def __call__(self, tokens: Integer[Array | np.ndarray, "B T"]) -> Float[Array, "B T V"]:
        """Float32 logits of every position.

        Raises:
            ValueError: tokens is not an integer [B, T], or holds an id outside the vocabulary.
        """
        check_tokens(tokens, self.config.vocab_size)
        tokens = jnp.asarray(tokens)
        return automatic(Decoder._logits, PartitionSpec(*spec_of(tokens), None), self, tokens)

    def _logits(self, tokens: Integer[Array, "B T"]) -> Float[Array, "B T V"]:
        return self.head(self._hidden(tokens))

    def hidden(self, tokens: Integer[Array | np.ndarray, "B T"]) -> Float[Array, "B T hidden"]:
        """What `head` turns into logits: the output of the last block. Raises as the call does."""
        check_tokens(tokens, self.config.vocab_size)
        return self._hidden(jnp.asarray(tokens))

    def _hidden(self, tokens: Integer[Array, "B T"]) -> Float[Array, "B T hidden"]:
        at = self.rotary(jnp.arange(tokens.shape[1])[None])
        h = self.embed(tokens)
        for block in self.layers:
            h = _apply_block(block, h, at)
        return h

    def embed(self, tokens: Integer[Array, "B T"]) -> Float[Array, "B T hidden"]:
        """The rows of the embedding table, scaled where the architecture says so."""
        scale = self.config.hidden_size**0.5 if self.config.architecture.scaled_embedding else None
        return _lookup(self.embed_tokens, tokens, dtype=self.dtype, scale=scale)

    def rotary(self, positions: Int[Array, "#B T"]) -> Rotary:
        """What a block needs to know about positions; `jnp.arange(T)[None]` for plain rows."""
        return _rotary(self.config, positions)

    def head(self, h: Float[Array, "B T hidden"]) -> Float[Array, "B T V"]:
        """Final norm and logits (float32)."""
        layer = self.embed_tokens if self.lm_head is None else self.lm_head
        return _logits(self.norm, layer, h, soft_cap=self.config.final_logit_softcapping)

    def prefill(
        self, tokens: Int[Array, "B T"], start: Int[Array, "B"], *, capacity: int, spare: int = 0
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Reads prompts that are padded on the left.

        Args:
            tokens: int32 [B, T]; columns before `start` are padding and may hold any valid id.
            start: first column of each row's prompt.
            capacity: slots of the cache, at least T; static.
            spare: slots of a layer with a sliding window beyond that window: so many tokens can be taken back however
                long the text; static.

        Returns:
            logits of the token after each prompt, and the cache with `capacity` slots.
        """
        at = self.rotary(jnp.arange(tokens.shape[1])[None, :] - start[:, None])
        h = self.embed(tokens)
        caches = []
        for block, size in zip(self.layers, cache_sizes(self.config, capacity, spare), strict=True):
            h, cache = block.prefill(h, at, start, size)
            caches.append(cache)
        return self.head(h[:, -1:])[:, 0], KVCache.of(caches)

    def step(self, tokens: Int[Array, "B"], cache: KVCache) -> tuple[Float[Array, "B V"], KVCache]:
        """Appends one token a row; returns the logits of the next one and the cache."""
        at = self.rotary((cache.slot - cache.start)[:, None])
        h = self.embed(tokens[:, None])
        caches = []
        for index, block in enumerate(self.layers):
            h, layer = block.step(h, at, cache.layer(index))
            caches.append(layer)
        return self.head(h)[:, 0], KVCache.of(caches)

    def extend(
        self, tokens: Int[Array, "B T"], length: Int[Array, ""], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Appends several tokens a row at once.

        Args:
            tokens: int32 [B, T]; columns from `length` on are padding and may hold any valid id.
            length: how many are to be read, 1 to T; may be traced.
            cache: what was read before, with room: its layers without a window have at least `slot + length` slots.

        Returns:
            logits of the token after the last one read, and the cache, as of which nothing of the padding is seen.
        """
        new = jnp.arange(tokens.shape[1])
        positions = jnp.where(new < length, cache.slot + new - cache.start[:, None], -1)
        at = self.rotary(positions)
        h = self.embed(tokens)
        caches = []
        for index, block in enumerate(self.layers):
            h, layer = block.extend(h, at, cache.layer(index), length)
            caches.append(layer)
        last = jax.lax.dynamic_slice_in_dim(h, length - 1, 1, axis=1)
        return self.head(last)[:, 0], KVCache.of(caches)

    def linears(self) -> dict[str, Linear | VQLinear]:
        """The decoder's linear layers in forward order, by Hugging Face module path."""
        return {path: getattr(owner, name) for path, owner, name in self._places()}

    def all_linears(self) -> dict[str, Linear | VQLinear]:
        """`linears()`, before them the embedding table, after them the output projection where it is not tied."""
        layers = {"model.embed_tokens": self.embed_tokens, **self.linears()}
        return layers if self.lm_head is None else layers | {"lm_head": self.lm_head}

    def quantized_layers(self) -> dict[str, VQLinear]:
        """The quantized ones of `all_linears`."""
        return {path: layer for path, layer in self.all_linears().items() if isinstance(layer, VQLinear)}

    def set_linear(self, path: str, layer: Linear | VQLinear) -> None:
        """Replaces a linear layer: one of `linears()`, `lm_head` or `model.embed_tokens`.

        Setting `lm_head` on a model with tied embeddings unties them.

        Raises:
            ValueError: no such path, or a layer of another shape.
        """
        places = {place: (owner, name) for place, owner, name in self._places()}
        places |= {"lm_head": (self, "lm_head"), "model.embed_tokens": (self, "embed_tokens")}
        if path not in places:
            raise ValueError(
                f"the model has no linear layer {path!r}; expected lm_head, model.embed_tokens or one of linears(), "
                f"such as {next(iter(self.linears()))!r}"
            )
        owner, name = places[path]
        expected = (getattr(owner, name) or self.embed_tokens).shape
        if layer.shape != expected:
            raise ValueError(f"{path}: the new layer has shape {list(layer.shape)}; expected {list(expected)}")
        if path == "lm_head" and self.lm_head is None:
            self.config = dataclasses.replace(self.config, tie_word_embeddings=False)
        setattr(owner, name, layer)

    def _places(self) -> Iterator[tuple[str, nnx.Module, str]]:
        for index, block in enumerate(self.layers):
            for path, owner, name in block.places():
                yield f"model.layers.{index}.{path}", owner, name


def check_tokens(tokens: Any, vocab_size: int, what: str = "tokens") -> None:
    """Checks an integer [B, T] of token ids; traced values are taken on trust.

    Raises:
        ValueError: another dtype or shape, or an id outside 0 .. vocab_size - 1.
    """
    if isinstance(tokens, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{what}: found {ids.dtype} {list(ids.shape)}; expected integer token ids [batch, length]")
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"{what}: token id {ids[row, column]} at row {row}, column {column} is outside the vocabulary; "
            f"expected 0 to {vocab_size - 1}"
        )


@jax.jit
def _apply_block(block: Block, h: Array, at: Rotary) -> Array:
    return block(h, at)


@functools.partial(jax.jit, static_argnames="soft_cap")
def _logits(norm: RMSNorm, layer: Linear | VQLinear, h: Array, *, soft_cap: float | None) -> Array:
    logits = layer(norm(h), dtype=jnp.float32)
    return logits if soft_cap is None else jnp.tanh(logits / soft_cap) * soft_cap


_rotary = jax.jit(rotary, static_argnums=0)


def _lookup_rows(table: Linear | VQLinear, tokens: Array, *, dtype: Any, scale: float | None) -> Array:
    if isinstance(table, VQLinear):
        rows = table.array.take_rows(tokens, dtype)
    else:
        rows = table.weight[...][tokens].astype(dtype)
    # The factor is rounded too: models were trained with it so.
    return rows if scale is None else rows * jnp.asarray(scale, dtype)


_lookup = jax.jit(_lookup_rows, static_argnames=("dtype", "scale"))
