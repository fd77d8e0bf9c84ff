"""Quantizes a LLaMA-like model, saves it, and compares its perplexity with the original's.

    python examples/quantize_llama.py path/to/model out --spec v8-k65536-256 --text c4

The model is anything that `vptq_jax.load` reads: a Hugging Face directory or hub id, or a .gguf file.
"""

from __future__ import annotations

import argparse

import vptq_jax as vq
from vptq_jax.lm import data


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Returns the perplexities before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--spec", default="v8-k4096-4096")
    parser.add_argument("--text", default="builtin", help="builtin, wikitext2, c4 or a text file")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="windows of held-out text to score")
    options = parser.parse_args(arguments)

    model = vq.load(options.model)
    calibration = data.tokenize(model.tokenizer, data.load_text(options.text, "calibration"))
    evaluation = data.tokenize(model.tokenizer, data.load_text(options.text, "evaluation"))

    # Keep the Hessians (`hessians.save(directory)`) and many specs can be tried on one calibration.
    windows = data.windows(calibration, options.length, options.samples, first=model.config.first_token)
    hessians = vq.collect_hessians(model, data.batches(windows))

    # Rules give layers another spec by their path, or none at all; the first match wins.
    config = vq.QuantConfig(options.spec, rules=[(r"layers\.0\.mlp\.down_proj", None)])
    quantized, report = vq.quantize(model, config, hessians)
    vq.save(quantized, options.output)

    before, after = (
        vq.perplexity(m, evaluation, context=options.length, max_windows=options.windows).value
        for m in (model, vq.load(options.output))
    )
    print(f"{report.bits_total:.2f} bits per weight; perplexity {before:.2f} before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
