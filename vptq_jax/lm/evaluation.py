"""Perplexity as GPTQ-style papers measure it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from vptq_jax.extras import progress_bar
from vptq_jax.lm import data
from vptq_jax.lm.decoder import Decoder, check_tokens
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.meshes import as_automatic

HEAD_TOKENS = 256  # Tokens whose logits exist at one time.


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        value: exp(mean over windows of the mean negative log-likelihood in nats).
        windows: windows scored.
        tokens: targets scored, `windows * (context - 1)`.
        context: tokens of a window.
        seconds: wall-clock time, compilation included.
    """

    value: float
    windows: int
    tokens: int
    context: int
    seconds: float


def perplexity(
    model: LanguageModel | Decoder,
    tokens: Integer[Array | np.ndarray, "tokens"],
    *,
    context: int,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> Perplexity:
    """Perplexity over consecutive non-overlapping windows, each scored alone.

    The protocol of GPTQ (arXiv 2210.17323): the first token of a window is given, the other
    `context - 1` are targets; what does not fill a window is left out. Where a model has a `first_token`, it is the
    one that is given.

    Args:
        model: plain or quantized.
        tokens: token ids [T] of the whole text.
        context: tokens of a window.
        max_windows: score only this many windows, from the start.
        batch_size: windows in one forward pass.
        progress: show a bar.

    Raises:
        ValueError: the text is shorter than one window, a token id is outside the vocabulary, a
            number is out of range, or the model gives logits that are not finite.
    """
    module = LanguageModel.of(model).module
    limit = module.config.context_length
    if not 2 <= context <= limit:
        raise ValueError(f"context is {context}; expected 2 to {limit} tokens, as long as the model can read")
    windows = data.windows(tokens, context, max_windows, first=module.config.first_token)
    check_tokens(windows, module.config.vocab_size, "text")
    batches = list(_split(data.batches(windows, batch_size)))
    module = as_automatic(module)

    start = time.perf_counter()
    losses: list[float] = []
    with progress_bar(progress, total=len(windows), desc="Perplexity", unit="window") as bar:
        for batch in batches:
            losses += _window_losses(module, batch).tolist()
            if not np.isfinite(losses).all():
                raise ValueError(
                    f"the model gives logits that are not finite on window {np.isfinite(losses).argmin()}; "
                    "one of its tensors probably holds NaN or infinite values"
                )
            bar.update(len(batch))
    mean = float(np.mean(losses))
    if mean > _LARGEST_LOSS:
        raise ValueError(
            f"the model gives the text a mean loss of {mean:.4g} nats a token, and perplexity is exp of that, beyond "
            "any number; its weights are probably damaged, or belong to another tokenizer"
        )
    return Perplexity(
        value=float(np.exp(mean)),
        windows=len(windows),
        tokens=len(windows) * (context - 1),
        context=context,
        seconds=time.perf_counter() - start,
    )


_LARGEST_LOSS = 700.0  # exp of more is no float


def _split(batches: Iterable[Int[Array, "_B T"]]) -> Iterator[Int[Array, "_B T"]]:
    """The same rows in runs of powers of two, so that few programs serve every batch size."""
    for batch in batches:
        while len(batch):
            size = 1 << (len(batch).bit_length() - 1)
            yield batch[:size]
            batch = batch[size:]


def _window_losses(model: Decoder, tokens: Int[Array, "B T"]) -> Float[np.ndarray, "B"]:
    """Mean negative log-likelihood of all tokens of a window but the first, in nats, float64 [B]."""
    hidden = model.hidden(tokens)
    targets = jnp.roll(tokens, -1, axis=1)
    step = max(1, HEAD_TOKENS // len(tokens))
    # The host waits for all of them at once.
    losses = [
        _negative_log_likelihood(model.head(hidden[:, at : at + step]), targets[:, at : at + step])
        for at in range(0, tokens.shape[1], step)
    ]
    return np.concatenate(jax.device_get(losses), axis=1)[:, :-1].mean(axis=1, dtype=np.float64)


@jax.jit
def _negative_log_likelihood(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
