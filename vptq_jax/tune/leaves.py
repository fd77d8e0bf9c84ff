"""What learns in a block of a quantized decoder, by name, and the size of a step in it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vptq_jax.array import VQArray
from vptq_jax.format import FLOATS
from vptq_jax.lm.decoder import Block
from vptq_jax.nn.forms import cast
from vptq_jax.nn.linear import Linear, VQLinear
from vptq_jax.nn.surgery import replace

Leaves = dict[str, Float[Array, "..."]]
"""Float32 arrays by dotted path within a block, such as `mlp.up_proj.codebook`."""


def learned(block: Block) -> Leaves:
    """Codebooks, scales, offsets and biases of quantized layers, and the weights of norms, in float32."""
    names = {f"{path}.{field}" for path in _quantized(block) for field in (*FLOATS, "bias")}
    names |= {f"{norm}.weight" for norm in block.norms()}
    return {name: leaf.astype(jnp.float32) for name, leaf in _arrays(block)[0].items() if name in names}


def with_leaves(block: Block, leaves: Leaves) -> Block:
    """A block with other arrays under these names, each in its new dtype; the rest is shared."""
    arrays, structure = _arrays(block)
    return nnx.merge(nnx.graphdef(block), jax.tree.unflatten(structure, list((arrays | leaves).values())), copy=True)


def as_before(block: Block, leaves: Leaves) -> Block:
    """A block with these leaves; norms and biases in the dtype that they have in it."""
    old = _arrays(block)[0]
    quantized = tuple(f".{field}" for field in FLOATS)
    found = {name: x if name.endswith(quantized) else x.astype(old[name].dtype) for name, x in leaves.items()}
    return with_leaves(block, found)


def decoded(block: Block, leaves: Leaves, dtype: Any) -> Block:
    """A dense block that computes in `dtype`: every quantized layer written out, differentiable in the leaves."""
    block = with_leaves(block, leaves)
    return cast(replace(block, {path: dense(layer, dtype) for path, layer in _quantized(block).items()}), dtype)


def dense(layer: VQLinear, dtype: Any) -> Linear:
    """A quantized layer written out."""
    bias: Any = None if layer.bias is None else layer.bias.get_value()
    return Linear(layer.array.dequantize(dtype), bias)


def units(block: Block, leaves: Leaves) -> Leaves:
    """The size of one step in each leaf, of a shape that broadcasts against it.

    Unused centroids may lie far out; they count nothing in a codebook's size, and never get a gradient.
    """
    found: Leaves = {name: jnp.abs(leaf) for name, leaf in leaves.items()}  # norms, biases
    for path, layer in _quantized(block).items():
        array = layer.array
        for field, used in _used(array).items():
            book = leaves[f"{path}.{field}"]
            mean = (jnp.square(book).mean(-1) * used).sum(-1) / jnp.maximum(used.sum(-1), 1)
            found[f"{path}.{field}"] = jnp.sqrt(mean)[..., None, None]
        if array.scale is not None:
            found |= {f"{path}.{field}": jnp.abs(leaves[f"{path}.scale"]) for field in ("scale", "offset")}
        if f"{path}.bias" in found:
            found[f"{path}.bias"] = jnp.sqrt(jnp.mean(jnp.square(leaves[f"{path}.bias"]), keepdims=True))
    return found


def _used(array: VQArray) -> dict[str, Float[Array, "*G k"]]:
    """By codebook: 1 for centroids that some vector carries, 0 for others."""
    main, residual = array.unpack()

    def marks(count: int, index: Array) -> Array:
        groups = index.reshape(index.shape[0], -1)
        return jax.vmap(lambda group: jnp.zeros(count).at[group].set(1.0))(groups)

    found = {"codebook": marks(array.format.num_centroids, main)}
    if residual is not None:
        found["res_codebook"] = marks(array.format.num_res_centroids, residual)
    if array.outlier_indices is not None:
        found["outlier_codebook"] = marks(array.format.num_outlier_centroids, array.outlier_indices[None])[0]
    return found


def _quantized(block: Block) -> dict[str, VQLinear]:
    return {path: layer for path, owner, name in block.places() if isinstance(layer := getattr(owner, name), VQLinear)}


def _arrays(block: Block) -> tuple[dict[str, Any], Any]:
    """Every array by dotted path, and the structure that takes them back in this order."""
    leaves, structure = jax.tree.flatten_with_path(nnx.state(block))
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True)), structure
