"""Vector post-training quantization (VPTQ) of language models in JAX.

Load, calibrate, quantize, save, measure, generate:

    import vptq_jax as vq

    lm = vq.load("path/to/model")
    small, report = vq.quantize(lm, vq.QuantConfig("v8-k256-256"), batches)
    vq.save(small, "out")
    print(vq.generate(small, "The capital of France is", max_new_tokens=64))

Names are imported when they are first used, so that `import vptq_jax` costs no more than what is used of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vptq_jax.array import VQArray as VQArray
    from vptq_jax.convert.checkpoint import save as save
    from vptq_jax.convert.hessian_files import load_hessians as load_hessians
    from vptq_jax.convert.loading import load as load
    from vptq_jax.convert.loading import open_streamed as open_streamed
    from vptq_jax.format import Format as Format
    from vptq_jax.lm.config import ModelConfig as ModelConfig
    from vptq_jax.lm.decoder import Decoder as Decoder
    from vptq_jax.lm.divergence import Divergence as Divergence
    from vptq_jax.lm.divergence import divergence as divergence
    from vptq_jax.lm.evaluation import Perplexity as Perplexity
    from vptq_jax.lm.evaluation import perplexity as perplexity
    from vptq_jax.lm.generation import GenerationResult as GenerationResult
    from vptq_jax.lm.generation import chat_prompt as chat_prompt
    from vptq_jax.lm.generation import generate as generate
    from vptq_jax.lm.generation import stream as stream
    from vptq_jax.lm.hessians import collect_hessians as collect_hessians
    from vptq_jax.lm.language_model import LanguageModel as LanguageModel
    from vptq_jax.lm.prompt_cache import PromptCache as PromptCache
    from vptq_jax.lm.quantizer import quantize as quantize
    from vptq_jax.lm.registry import build as build
    from vptq_jax.lm.report import QuantReport as QuantReport
    from vptq_jax.lm.sampling import Sampling as Sampling
    from vptq_jax.lm.self_text import self_text as self_text
    from vptq_jax.lm.streamed import StreamedModel as StreamedModel
    from vptq_jax.nn.forms import Rounding as Rounding
    from vptq_jax.nn.forms import pack as pack
    from vptq_jax.nn.forms import trainable as trainable
    from vptq_jax.nn.forms import unpack as unpack
    from vptq_jax.nn.hessians import Hessians as Hessians
    from vptq_jax.nn.linear import Linear as Linear
    from vptq_jax.nn.linear import VQLinear as VQLinear
    from vptq_jax.nn.linear import VQParam as VQParam
    from vptq_jax.pallas.dispatch import KernelFallbackWarning as KernelFallbackWarning
    from vptq_jax.pallas.nearest_centroid.api import nearest_centroid as nearest_centroid
    from vptq_jax.pallas.vq_matmul.api import vq_matmul as matmul  # noqa: F401
    from vptq_jax.pallas.vq_matmul.packed import Packed as Packed
    from vptq_jax.quantization.search import quantize_weight as quantize_weight
    from vptq_jax.quantization.search import search as search
    from vptq_jax.spec import QuantConfig as QuantConfig
    from vptq_jax.spec import SearchOptions as SearchOptions
    from vptq_jax.spec import VQSpec as VQSpec
    from vptq_jax.tune.config import TuneConfig as TuneConfig
    from vptq_jax.tune.distill import distill as distill
    from vptq_jax.tune.history import TuneHistory as TuneHistory

_HOME = {
    "Decoder": "lm.decoder",
    "Divergence": "lm.divergence",
    "Format": "format",
    "GenerationResult": "lm.generation",
    "Hessians": "nn.hessians",
    "KernelFallbackWarning": "pallas.dispatch",
    "LanguageModel": "lm.language_model",
    "Linear": "nn.linear",
    "ModelConfig": "lm.config",
    "Packed": "pallas.vq_matmul.packed",
    "Perplexity": "lm.evaluation",
    "PromptCache": "lm.prompt_cache",
    "QuantConfig": "spec",
    "QuantReport": "lm.report",
    "Rounding": "nn.forms",
    "Sampling": "lm.sampling",
    "SearchOptions": "spec",
    "StreamedModel": "lm.streamed",
    "TuneConfig": "tune.config",
    "TuneHistory": "tune.history",
    "VQArray": "array",
    "VQLinear": "nn.linear",
    "VQParam": "nn.linear",
    "VQSpec": "spec",
    "build": "lm.registry",
    "chat_prompt": "lm.generation",
    "collect_hessians": "lm.hessians",
    "distill": "tune.distill",
    "divergence": "lm.divergence",
    "generate": "lm.generation",
    "load": "convert.loading",
    "load_hessians": "convert.hessian_files",
    "matmul": "pallas.vq_matmul",
    "nearest_centroid": "pallas",
    "open_streamed": "convert.loading",
    "pack": "nn.forms",
    "perplexity": "lm.evaluation",
    "quantize": "lm.quantizer",
    "quantize_weight": "quantization.search",
    "save": "convert.checkpoint",
    "search": "quantization.search",
    "self_text": "lm.self_text",
    "stream": "lm.generation",
    "trainable": "nn.forms",
    "unpack": "nn.forms",
}
"""Where each public name lives."""

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vptq_jax")
    if name in ("convert", "pallas"):
        return import_module(f"vptq_jax.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'vptq_jax' has no attribute {name!r}")
    value = getattr(import_module(f"vptq_jax.{_HOME[name]}"), "vq_matmul" if name == "matmul" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
