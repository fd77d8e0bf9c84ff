"""Vector post-training quantization (VPTQ) of language models in JAX.

Load, calibrate, quantize, save, measure, generate:

    import vptq_jax as vq

    model = vq.load("path/to/model")
    qmodel, report = vq.quantize(model, vq.QuantConfig("v8-k256-256"), batches)
    vq.save(qmodel, "out")
    print(vq.generate(qmodel, "The capital of France is", max_new_tokens=64))
"""

from vptq_jax.array import VQArray
from vptq_jax.checkpoint import save
from vptq_jax.evaluate import Perplexity, perplexity
from vptq_jax.generate import GenerationResult, chat_prompt, generate, stream
from vptq_jax.load import load, open_streamed
from vptq_jax.models.config import ModelConfig
from vptq_jax.models.decoder import Decoder
from vptq_jax.models.linear import Linear, VQLinear
from vptq_jax.models.registry import build
from vptq_jax.models.streamed import StreamedModel
from vptq_jax.pallas import nearest_centroid
from vptq_jax.pallas import vq_matmul as matmul
from vptq_jax.quantize.hessian import Hessians, collect_hessians, load_hessians
from vptq_jax.quantize.model import quantize
from vptq_jax.quantize.weight import quantize_weight
from vptq_jax.report import QuantReport
from vptq_jax.spec import QuantConfig, VQLayout, VQSpec

__all__ = [
    "Decoder",
    "GenerationResult",
    "Hessians",
    "Linear",
    "ModelConfig",
    "Perplexity",
    "QuantConfig",
    "QuantReport",
    "StreamedModel",
    "VQArray",
    "VQLayout",
    "VQLinear",
    "VQSpec",
    "build",
    "chat_prompt",
    "collect_hessians",
    "generate",
    "load",
    "load_hessians",
    "matmul",
    "nearest_centroid",
    "open_streamed",
    "perplexity",
    "quantize",
    "quantize_weight",
    "save",
    "stream",
]
