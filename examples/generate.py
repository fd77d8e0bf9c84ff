"""Continues prompts with any model that `vptq_jax.load` reads, plain or quantized.

python examples/generate.py out "The capital of France is" "Once upon a time"
"""

from __future__ import annotations

import argparse

import vptq_jax as vq


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the continuations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args(arguments)

    model = vq.load(options.model)
    settings = {
        "max_new_tokens": options.max_new_tokens,
        "sampling": vq.Sampling(temperature=options.temperature),
    }

    # One prompt, as it is written ...
    print(options.prompts[0], end="", flush=True)
    for piece in vq.stream(model, options.prompts[0], **settings):
        print(piece, end="", flush=True)
    print()

    # ... and all of them as one batch.
    result = vq.generate(model, options.prompts, return_result=True, **settings)
    for prompt, text in zip(options.prompts[1:], result.texts[1:], strict=True):
        print(prompt + text)
    print(f"{result.tokens_per_second:.1f} tokens/s")
    return result.texts


if __name__ == "__main__":
    main()
