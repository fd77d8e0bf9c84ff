"""How far a model's predictions are from another's: what quantization does, whatever the text says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vptq_jax.extras import progress_bar
from vptq_jax.lm import data
from vptq_jax.lm.decoder import Decoder, check_tokens
from vptq_jax.lm.evaluation import HEAD_TOKENS
from vptq_jax.lm.language_model import LanguageModel
from vptq_jax.meshes import as_automatic


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Means over tokens.

    Attributes:
        kl: KL(teacher || model) of the next token's distribution over the full vocabulary, in nats.
        top1: share of tokens after which both hold the same token for the most likely one.
        tokens: tokens compared, each a position of a row.
    """

    kl: float
    top1: float
    tokens: int


def divergence(
    model: LanguageModel | Decoder,
    teacher: LanguageModel | Decoder,
    rows: Int[np.ndarray, "n T"],
    *,
    batch_size: int = 1,
    progress: bool = False,
) -> Divergence:
    """Compares the predictions of two models at every position of some rows of text.

    Args:
        model: the one that is judged, such as a quantized model.
        teacher: the one that it should be like.
        rows: token ids [n, T], such as `data.windows` cuts.
        batch_size: rows in one forward pass.
        progress: show a bar.

    Raises:
        ValueError: the vocabularies differ, tokens are no [n, T] of ids in it, or logits are not finite.
    """
    student, reference = (as_automatic(LanguageModel.of(each).module) for each in (model, teacher))
    check_same_vocabulary(student, reference)
    check_tokens(rows, student.config.vocab_size, "rows")
    kls: list[float] = []
    agreed: list[bool] = []
    with progress_bar(progress, total=len(rows), desc="Divergence", unit="row") as bar:
        for tokens in data.batches(np.asarray(rows), batch_size):
            parts = jax.device_get(list(_compared(student, reference, tokens)))
            kls += [value for kl, _ in parts for value in kl.ravel().tolist()]
            agreed += [value for _, same in parts for value in same.ravel().tolist()]
            if not np.isfinite(kls).all():
                raise ValueError("a model gives logits that are not finite; one of its tensors probably holds NaN")
            bar.update(len(tokens))
    return Divergence(float(np.mean(kls)), float(np.mean(agreed)), len(kls))


def check_same_vocabulary(student: Decoder, teacher: Decoder) -> None:
    """Raises ValueError unless two models predict tokens of one vocabulary."""
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"the model has a vocabulary of {student.config.vocab_size} tokens and its teacher one of "
            f"{teacher.config.vocab_size}; expected the model that it was made from, or one of its tokenizer"
        )


def _compared(
    student: Decoder, teacher: Decoder, tokens: Int[Array, "B T"]
) -> Iterator[tuple[Float[Array, "B t"], Bool[Array, "B t"]]]:
    hidden, target = student.hidden(tokens), teacher.hidden(tokens)
    step = max(1, HEAD_TOKENS // len(tokens))
    for at in range(0, tokens.shape[1], step):
        part = slice(at, at + step)
        yield compare(student.head(hidden[:, part]), teacher.head(target[:, part]))


@jax.jit
def compare(
    logits: Float[Array, "*batch V"], target: Float[Array, "*batch V"]
) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"]]:
    """KL(softmax(target) || softmax(logits)) in nats, and whether the largest entry of both is the same one."""
    student, teacher = (jax.nn.log_softmax(each.astype(jnp.float32)) for each in (logits, target))
    kl = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return kl, student.argmax(-1) == teacher.argmax(-1)
