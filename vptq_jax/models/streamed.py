"""`StreamedModel`: a stored model that is never in memory as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vptq_jax.models.config import ModelConfig
from vptq_jax.models.params import ParamSource


@dataclasses.dataclass(frozen=True)
class StreamedModel:
    """A model whose weights stay in storage until they are asked for; `load.open_streamed` makes one.

    Attributes:
        config: the model's facts.
        source: reads one tensor at a time; may be asked for any of them, in any order, repeatedly.
        tokenizer: a transformers tokenizer or None.
        generation_config: the checkpoint's generation defaults or None.
    """

    config: ModelConfig
    source: ParamSource
    tokenizer: Any = None
    generation_config: Mapping[str, Any] | None = None
