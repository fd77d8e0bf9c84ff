"""The options of a tuning run."""

from __future__ import annotations

import dataclasses

from vptq_jax.schema import is_finite, is_integer, short


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """How a distillation runs; the defaults are those of the measured recipe (benchmarks/RESULTS.md).

    Attributes:
        tokens: trained on in all; batches come again in the same order when there are fewer.
        learning_rate: of Adam, in units of each leaf: a codebook's root mean square over the vectors in use, a
            column's scale, a norm's entries.
        warmup_steps: the rate rises linearly over so many steps, then falls as a cosine to zero at the last.
        evaluations: how often held-out text is scored, spread over the run; the best leaves are the result.
        accumulate: batches whose mean gradient makes one step, for steps of more tokens than memory holds at once.
        dtype: of the decoded weights and activations; what learns is float32.

    Raises:
        ValueError: a number is out of range.
    """

    tokens: int = 5_000_000
    learning_rate: float = 5e-3
    warmup_steps: int = 10
    evaluations: int = 10
    accumulate: int = 1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("tokens", "warmup_steps", "evaluations", "accumulate"):
            if not is_integer(value := getattr(self, name)) or value < 1:
                raise ValueError(f"{name} is {short(value)}; expected a whole number of at least 1")
        if not is_finite(self.learning_rate) or self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {short(self.learning_rate)}; expected a number above 0")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype is {short(self.dtype)}; expected bfloat16, float16 or float32")


DEFAULTS = TuneConfig()
"""Those of every run that is not told otherwise."""
