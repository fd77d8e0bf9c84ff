"""Second moments of the inputs of a decoder's layers, collected block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import numpy as np
from flax import nnx

from vptq_jax.extras import progress_bar
from vptq_jax.lm.activations import Activations, Tokens, check_batches, hessian_key
from vptq_jax.lm.decoder import Block, Decoder
from vptq_jax.lm.fingerprint import (
    bytes_digest,
    decoder_fingerprint,
    end_digests,
    joined_digest,
    model_fingerprint,
    module_digests,
    text_digest,
)
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.streamed import StreamedModel
from vptq_jax.nn.collect import collect
from vptq_jax.nn.hessians import Hessians


def collect_hessians(
    model: LanguageModel | StreamedModel | nnx.Module,
    batches: Iterable[Any],
    call: Callable[[Any, Any], Any] | None = None,
    *,
    progress: bool = True,
    chunk_tokens: int = 1 << 19,
) -> Hessians:
    """Collects H of every linear layer of a decoder, and of its output projection, in one pass of the model.

    Batches are read in chunks. A chunk passes block by block, so that the device holds the moments of a single
    block, and the hidden states of one chunk lie there or, where they take too much of it, on the host, however long
    the stream is.

    Args:
        model: a language model, in memory (plain or quantized) or in storage, from where blocks are read as they are
            needed, once for each chunk; or any NNX module.
        batches: token ids, integer [B, T]; every token counts. Equal shapes share one compiled program.
        call: how another module is run on a batch, see `nn.collect.collect`, which does the work there.
        progress: show a progress bar.
        chunk_tokens: tokens whose hidden states device or host keep at once.

    Returns:
        Hessians by module path; `lm_head` (`model.embed_tokens` when tied) for the output projection.

    Raises:
        ValueError: there are no batches, an id is outside the vocabulary, or an activation is not finite.

    Example:
        >>> import numpy as np
        >>> x = np.array([[1.0, 0.0], [1.0, 2.0]], np.float32)
        >>> hessians = collect_hessians(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), [x], progress=False)
        >>> hessians.for_module("layers.0").tolist()  # X^T X over the two rows
        [[1.0, 1.0], [1.0, 2.0]]
    """
    if isinstance(model, LanguageModel):
        model = model.module
    if not isinstance(model, Decoder | StreamedModel):
        return collect(model, batches, call, progress=progress)
    if call is not None:
        raise ValueError("call is for modules of other kinds; a language model reads token ids by itself")
    shell = model.shell() if isinstance(model, StreamedModel) else model
    head = "model.embed_tokens" if shell.lm_head is None else "lm_head"
    means: dict[str, np.ndarray] = {}
    blocks: dict[str, str] = {}  # digests
    seen: list[str] = []  # digests of the batches
    tokens = 0
    count = len(batches) if isinstance(batches, Sized) else None
    total = None if count is None else count * len(shell.layers)
    with progress_bar(progress, total=total, desc="Hessians", unit="block") as bar:
        for chunk in _chunks(check_batches(batches, shell.config.vocab_size), chunk_tokens):
            activations = Activations(shell, chunk)
            share = activations.tokens / (tokens + activations.tokens)
            for layer in range(len(shell.layers)):
                name = f"model.layers.{layer}"
                block = _block(model, layer)
                _merge(means, activations.observe(block, name), share)
                if not tokens:
                    blocks |= module_digests(block, name)
                bar.update(len(chunk))
            _merge(means, {head: activations.observe_head()}, share)
            tokens += activations.tokens
            seen += map(bytes_digest, chunk)
    digests = blocks | end_digests(shell)
    modules: dict[str, dict[str, str]] = {}
    for path in (*shell.linears(), head):
        modules.setdefault(hessian_key(path), {})[path] = digests[f"{path}.weight"]
    fingerprint = model_fingerprint(shell.config.to_hf(), digests)
    return Hessians(means, modules, tokens, fingerprint, joined_digest(seen))


def check_origin(
    hessians: Hessians, model: LanguageModel | Decoder | StreamedModel, batches: Iterable[Tokens], name: str
) -> None:
    """Makes sure that Hessians are those that `collect_hessians` would return; reads all weights once.

    Args:
        hessians: from `load_hessians`.
        model: see `collect_hessians`.
        batches: see `collect_hessians`.
        name: where they come from, for the message.

    Raises:
        ValueError: they belong to another model, or to other text.
    """
    if isinstance(model, LanguageModel):
        model = model.module
    shell = model.shell() if isinstance(model, StreamedModel) else model
    fingerprint = decoder_fingerprint(shell, (_block(model, layer) for layer in range(len(shell.layers))))
    for what, found, expected in (
        ("the model", hessians.fingerprint, fingerprint),
        ("the calibration text", hessians.text, text_digest(check_batches(batches, shell.config.vocab_size))),
    ):
        if found != expected:
            raise ValueError(
                f"{name} holds Hessians already, but {what} was another one then; choose another directory for "
                "these, or use those as they are (--hessians, load_hessians)"
            )


def _block(model: Decoder | StreamedModel, layer: int) -> Block:
    return model.block(layer) if isinstance(model, StreamedModel) else model.layers[layer]


def _merge(means: dict[str, np.ndarray], found: dict[str, np.ndarray], share: float) -> None:
    """Takes means over further tokens in; `share` of all tokens are theirs."""
    for key, new in found.items():
        old = means.get(key)
        means[key] = new if old is None else (old * np.float64(1 - share) + new * np.float64(share)).astype(np.float32)


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
