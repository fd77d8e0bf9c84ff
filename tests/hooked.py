"""Whose annotations the tests check at every call: shapes and dtypes by jaxtyping, types by beartype.

`conftest.py` installs jaxtyping's import hook for `PACKAGES`, with `check` as its type checker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

PACKAGES = (
    "vptq_jax.array",
    "vptq_jax.convert.hessian_files",
    "vptq_jax.lm.activations",
    "vptq_jax.lm.attention",
    "vptq_jax.lm.cache",
    "vptq_jax.lm.calibration",
    "vptq_jax.lm.data",
    "vptq_jax.lm.decoder",
    "vptq_jax.lm.diagnose",
    "vptq_jax.lm.divergence",
    "vptq_jax.lm.evaluation",
    "vptq_jax.lm.fingerprint",
    "vptq_jax.lm.generation",
    "vptq_jax.lm.language_model",
    "vptq_jax.lm.next_token",
    "vptq_jax.lm.norm",
    "vptq_jax.lm.quantizer",
    "vptq_jax.lm.rope",
    "vptq_jax.lm.self_text",
    "vptq_jax.nn",
    "vptq_jax.packing",
    "vptq_jax.pallas.decode_attention",
    "vptq_jax.pallas.nearest_centroid",
    "vptq_jax.pallas.vq_matmul.api",
    "vptq_jax.pallas.vq_matmul.dequantize",
    "vptq_jax.pallas.vq_matmul.kernel",
    "vptq_jax.pallas.vq_matmul.mosaic",
    "vptq_jax.pallas.vq_matmul.norm",
    "vptq_jax.pallas.vq_matmul.packed",
    "vptq_jax.pallas.vq_matmul.reference",
    "vptq_jax.pallas.vq_matmul.xla",
    "vptq_jax.quantization",
    "vptq_jax.tune",
)
"""All modules that declare shapes, or their packages. Others read files and commands, whose contents they check with
errors of their own, or work with numbers alone: `pallas.vq_matmul.plan` is called so often that its checks would take
longer than the tests."""

PYTREES = (
    "vptq_jax.array.VQArray",
    "vptq_jax.lm.cache.KVCache",
    "vptq_jax.lm.cache.LayerCache",
    "vptq_jax.lm.generation._Request",
    "vptq_jax.lm.generation._State",
    "vptq_jax.lm.next_token.SamplingArrays",
    "vptq_jax.lm.rope.Rotary",
    "vptq_jax.pallas.vq_matmul.norm.RMS",
    "vptq_jax.pallas.vq_matmul.packed.Packed",
    "vptq_jax.quantization.columns.Codes",
    "vptq_jax.quantization.metric.Metric",
    "vptq_jax.quantization.search.Problem",
)
"""Classes whose constructors take anything: JAX builds them anew around what stands in for arrays (batches of them,
partition specs, shapes, plain objects). Their methods are checked."""

OWN_CHECKS = (
    "vptq_jax.lm.activations.check_batches",
    "vptq_jax.lm.data.windows",
    "vptq_jax.lm.decoder.Decoder.__call__",
    "vptq_jax.lm.divergence.divergence",
    "vptq_jax.lm.decoder.Decoder.hidden",
    "vptq_jax.lm.evaluation.perplexity",
    "vptq_jax.lm.generation._Run.start",
    "vptq_jax.lm.generation.chat_prompt",
    "vptq_jax.lm.generation.generate",
    "vptq_jax.lm.generation.stream",
    "vptq_jax.lm.language_model.LanguageModel.__call__",
    "vptq_jax.lm.language_model.LanguageModel.of",
    "vptq_jax.lm.quantizer._quantize",
    "vptq_jax.lm.quantizer.quantize",
    "vptq_jax.lm.quantizer.run_fingerprint",
    "vptq_jax.pallas.decode_attention.api.decode_attention",
    "vptq_jax.pallas.nearest_centroid.api.cluster_sums",
    "vptq_jax.pallas.nearest_centroid.api.nearest_centroid",
    "vptq_jax.pallas.vq_matmul.api.vq_matmul",
    "vptq_jax.pallas.vq_matmul.api.vq_matmuls",
    "vptq_jax.quantization.search.quantize_weight",
    "vptq_jax.tune.distill.distill",
)
"""Functions that check their arguments themselves, with errors that tests expect. What they call is checked."""

_FREE = {f"{name}.__init__" for name in PYTREES} | set(OWN_CHECKS)
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a float may be an int, as for mypy


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, checked by beartype."""
    return function if f"{function.__module__}.{function.__qualname__}" in _FREE else _beartype(function)
