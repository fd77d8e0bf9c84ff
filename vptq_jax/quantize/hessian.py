"""Second moments of the inputs of linear layers, H = X^T X / T: the metric that quantization minimizes in.

Layers that read the same input (q/k/v, gate/up) share one H.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from vptq_jax.files import new_directory
from vptq_jax.models.decoder import Block, Decoder, RMSNorm, check_tokens
from vptq_jax.models.linear import Linear, VQLinear
from vptq_jax.models.rope import Rotary
from vptq_jax.quantize.fingerprint import array_digest, model_fingerprint

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


class Tap:
    """Stands in for a linear layer while a block is traced, and notes its input."""

    def __init__(self, layer: Linear | VQLinear, inputs: dict[str, Array], path: str):
        self.layer, self.inputs, self.path = layer, inputs, path

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        self.inputs[self.path] = x
        return self.layer(x)


def apply_tapped(
    block: Block, h: Float[Array, "B T hidden"], at: Rotary
) -> tuple[Float[Array, "B T hidden"], dict[str, Array]]:
    """The block's output and every distinct input of its linear layers, by path within the block.

    To be traced: inside `jax.jit` the block is a copy, which this changes.
    """
    inputs: dict[str, Array] = {}
    for path, owner, name in list(block.places()):
        if hessian_key(path) == path:
            setattr(owner, name, nnx.static(Tap(getattr(owner, name), inputs, path)))
    return block(h, at), inputs


@functools.partial(jax.jit, donate_argnames="moments")
def observe(
    block: Block, h: Float[Array, "B T hidden"], at: Rotary, moments: dict[str, Moment]
) -> tuple[Float[Array, "B T hidden"], dict[str, Moment]]:
    """Runs one batch through a block and adds the inputs of its linear layers to their moments."""
    h, inputs = apply_tapped(block, h, at)
    return h, {path: moment.add(inputs[path]) for path, moment in moments.items()}


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


class Activations:
    """Hidden states of every calibration batch in front of one block, kept on the host.

    Args:
        model: gives embedding, rotary positions and final norm; its blocks are passed in one by one.
        batches: int32 [B, T] each, checked.
    """

    def __init__(self, model: Decoder, batches: Sequence[Int[np.ndarray, "B T"]]):
        self.tokens = sum(batch.size for batch in batches)
        self._norm = model.norm
        lengths = {batch.shape[1] for batch in batches}
        self._at = {length: model.rotary(jnp.arange(length)[None]) for length in lengths}
        self._hidden = [np.asarray(model.embed(jnp.asarray(batch))) for batch in batches]

    def observe(self, block: Block, name: str, *, advance: bool) -> dict[str, Float[np.ndarray, "in in"]]:
        """H of the linear layers of a block whose module path is `name`, by module path.

        Args:
            block: the block that these hidden states enter.
            name: such as `model.layers.0`.
            advance: replace the hidden states by the block's outputs.

        Raises:
            ValueError: an input is not finite; names the layer.
        """
        moments = {
            path: Moment.zeros(getattr(owner, attribute).shape[1])
            for path, owner, attribute in block.places()
            if hessian_key(path) == path
        }

        def step(h: Array, at: Rotary) -> Array:
            nonlocal moments
            h, moments = observe(block, h, at, moments)
            return h

        outputs = self._map(step)
        if advance:
            self._hidden = outputs
        return {f"{name}.{path}": self._mean(moment, f"{name}.{path}") for path, moment in moments.items()}

    def advance(self, block: Block) -> None:
        """Replaces the hidden states by the outputs of a block."""
        self._hidden = self._map(lambda h, at: _run(block, h, at))

    def observe_head(self) -> Float[np.ndarray, "in in"]:
        """H of the output projection: of the hidden states behind the last block, normalized."""
        moment = Moment.zeros(self._hidden[0].shape[-1])
        for h in self._hidden:
            moment = _observe_norm(self._norm, jnp.asarray(h), moment)
        return self._mean(moment, "the output projection")

    def _map(self, function: Callable[[Array, Rotary], Array]) -> list[np.ndarray]:
        """The function's results on the host; each is fetched while the device works on the next batch."""
        results: list[Any] = []
        for index, h in enumerate(self._hidden):
            results.append(function(jnp.asarray(h), self._at[h.shape[1]]))
            if index:
                results[index - 1] = np.asarray(results[index - 1])
        return [np.asarray(result) for result in results]

    def _mean(self, moment: Moment, path: str) -> Float[np.ndarray, "in in"]:
        if not bool(moment.finite()):
            raise ValueError(
                f"the input of {path} holds NaN or infinite values (or their squares exceed float32) on the "
                "calibration data, expected finite ones; check the weights before it, or load the model in float32"
            )
        return moment.mean(self.tokens)


def check_batches(batches: Iterable[Int[Array, "B T"]], vocab_size: int) -> Iterator[Int[np.ndarray, "B T"]]:
    """Yields calibration batches as int32 on the host.

    Raises:
        ValueError: a batch is not an integer [B, T], holds ids outside the vocabulary, or there is none.
    """
    count = 0
    for count, batch in enumerate(batches, 1):
        check_tokens(batch, vocab_size, f"calibration batch {count - 1}")
        tokens = np.asarray(batch, np.int32)
        if not tokens.size:
            raise ValueError(f"calibration batch {count - 1} has shape {list(tokens.shape)}, expected at least a token")
        yield tokens
    if not count:
        raise ValueError("there are no calibration batches; is the text shorter than one window?")


def collect_hessians(
    model: Decoder, batches: Iterable[Int[Array, "B T"]], *, progress: bool = True, chunk_tokens: int = 1 << 18
) -> Hessians:
    """Collects H of every linear layer of a decoder, and of its output projection, in one pass of the model.

    Batches are read in chunks. A chunk passes block by block, so that the device holds the moments of a single
    block and the host the hidden states of one chunk, however long the stream is.

    Args:
        model: plain or quantized.
        batches: token ids, integer [B, T]; every token counts. Equal shapes share one compiled program.
        progress: show a progress bar.
        chunk_tokens: tokens whose hidden states the host keeps at once.

    Returns:
        Hessians by module path; `lm_head` (`model.embed_tokens` when tied) for the output projection.

    Raises:
        ValueError: there are no batches, an id is outside the vocabulary, or an activation is not finite.
    """
    head = "model.embed_tokens" if model.lm_head is None else "lm_head"
    means: dict[str, np.ndarray] = {}
    tokens = 0
    count = len(batches) if isinstance(batches, Sized) else None
    total = None if count is None else count * len(model.layers)
    with tqdm(total=total, desc="Hessians", unit="block", disable=not progress) as bar:
        for chunk in _chunks(check_batches(batches, model.config.vocab_size), chunk_tokens):
            activations = Activations(model, chunk)
            share = activations.tokens / (tokens + activations.tokens)

            def merge(found: dict[str, np.ndarray], share: float = share) -> None:
                for key, mean in found.items():
                    means[key] = mean if key not in means else _blend(means[key], mean, share)

            for layer, block in enumerate(model.layers):
                merge(activations.observe(block, f"model.layers.{layer}", advance=True))
                bar.update(len(chunk))
            merge({head: activations.observe_head()})
            tokens += activations.tokens
    digests = weight_digests(model)
    modules: dict[str, dict[str, str]] = {}
    for path in (*model.linears(), head):
        modules.setdefault(hessian_key(path), {})[path] = digests[f"{path}.weight"]
    return Hessians(means, modules, tokens, model_fingerprint(model.config.to_hf(), digests))


def weight_digests(model: Decoder) -> dict[str, str]:
    """`array_digest` of every tensor of a model; quantized weights count by the values that they stand for."""
    digests = {"model.norm.weight": array_digest(model.norm.weight[...])}
    for index, block in enumerate(model.layers):
        digests |= block_digests(block, f"model.layers.{index}")
    for path, layer in (("model.embed_tokens", model.embed_tokens), ("lm_head", model.lm_head)):
        if layer is not None:
            digests |= layer_digests(layer, path)
    return digests


def block_digests(block: Block, name: str) -> dict[str, str]:
    """`weight_digests` of one block."""
    digests = {
        f"{name}.{norm}.weight": array_digest(getattr(block, norm).weight[...])
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    for path, owner, attribute in block.places():
        digests |= layer_digests(getattr(owner, attribute), f"{name}.{path}")
    return digests


def layer_digests(layer: Linear | VQLinear, path: str) -> dict[str, str]:
    """`weight_digests` of one linear layer."""
    weight = layer.weight.dequantize() if isinstance(layer, VQLinear) else layer.weight[...]
    digests = {f"{path}.weight": array_digest(weight)}
    return digests if layer.bias is None else digests | {f"{path}.bias": array_digest(layer.bias[...])}


def _chunks(batches: Iterable[np.ndarray], tokens: int) -> Iterator[list[np.ndarray]]:
    """Runs of batches of at least `tokens` tokens in all (the last one fewer)."""
    chunk: list[np.ndarray] = []
    for batch in batches:
        chunk.append(batch)
        if sum(part.size for part in chunk) >= tokens:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _blend(old: np.ndarray, new: np.ndarray, share: float) -> np.ndarray:
    return (old.astype(np.float64) * (1 - share) + new.astype(np.float64) * share).astype(np.float32)


_run = jax.jit(lambda block, h, at: block(h, at))


@functools.partial(jax.jit, donate_argnames="moment")
def _observe_norm(norm: RMSNorm, h: Float[Array, "B T hidden"], moment: Moment) -> Moment:
    return moment.add(norm(h))


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
