"""Text that a model writes itself: of no licence, in its own distribution, as much of it as wanted."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from vptq_jax.extras import progress_bar
from vptq_jax.lm.decoder import Decoder
from vptq_jax.lm.generation import GenerationResult, generate
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.lm.sampling import Sampling


def self_text(
    model: LanguageModel | Decoder,
    tokens: int,
    starts: Int[np.ndarray, "T"],
    *,
    length: int = 512,
    start_length: int = 12,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Int[np.ndarray, "n length"]:
    """Continuations of short starts at temperature 1, to calibrate and tune on.

    Args:
        model: the one that writes, usually the one that is to be quantized.
        tokens: at least so many in all, the starts included.
        starts: token ids of some text, of which every row begins with a random snippet.
        length: tokens of a row.
        start_length: tokens of a snippet; models with a `first_token` have it before.
        batch_size: rows that are written at once.
        seed: the same seed, model and starts give the same text.
        progress: show a bar.

    Returns:
        int32 [n, length].

    Raises:
        ValueError: the starts hold no whole snippet, a number is out of range, or as `generate` raises it.
    """
    lm = LanguageModel.of(model)
    first = [] if lm.config.first_token is None else [lm.config.first_token]
    if not 1 <= start_length < length - len(first) or length > lm.config.context_length:
        raise ValueError(
            f"start_length is {start_length} and length {length}; expected 1 <= start_length, less than the length "
            f"of a row, and that at most the model's context of {lm.config.context_length}"
        )
    starts = np.asarray(starts)
    if starts.ndim != 1 or len(starts) < start_length:
        raise ValueError(f"starts have shape {list(starts.shape)}; expected at least {start_length} tokens in one axis")
    if tokens < 1 or batch_size < 1:
        raise ValueError(f"tokens is {tokens} and batch_size {batch_size}; expected at least 1 of each")
    rng = np.random.default_rng(seed)
    wanted = -(-tokens // length)
    rows: list[list[int]] = []
    with progress_bar(progress, total=wanted, desc="Writing", unit="row") as bar:
        while len(rows) < wanted:
            at = rng.integers(0, len(starts) - start_length + 1, batch_size)
            prompts = [first + starts[i : i + start_length].tolist() for i in at]
            found = generate(
                lm, prompts, max_new_tokens=length - len(prompts[0]), stop_tokens=(), return_result=True,
                sampling=Sampling(temperature=1.0, seed=int(rng.integers(1 << 31))),
            )  # fmt: skip
            assert isinstance(found, GenerationResult)
            rows += [prompt + new for prompt, new in zip(prompts, found.tokens, strict=True)]
            bar.update(batch_size)
    return np.array(rows[:wanted], np.int32)
