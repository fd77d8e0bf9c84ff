"""Perplexity of one exported model under this library and under the original software, on CPU in float32.

    pip install --no-deps vptq==0.0.5.post1      # Python 3.11; its PyTorch fallback runs without a GPU
    vptq-jax convert quantized-model exported --to hf-vptq
    python benchmarks/original_perplexity.py exported text.txt --context 512 --windows 16

The package's `VQuantLinear` holds the exported tensors inside a transformers model; its other
dependencies (accelerate, sentence-transformers) are not needed for that and are left out. Both sides
see the same windows, non-overlapping, first token of each unscored. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

_BATCH = 4

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def original_perplexity(path: Path, windows: np.ndarray) -> float:
    """exp of the mean negative log-likelihood that the original gives the windows [n, context]."""
    import torch
    from original import load_original
    from torch.nn import functional

    model = load_original(path)
    total = 0.0
    with torch.no_grad():
        # The original decodes every weight again for every batch: several windows at a time.
        for start in range(0, len(windows), _BATCH):
            batch = torch.tensor(windows[start : start + _BATCH].astype(np.int64))
            for logits, tokens in zip(model(batch).logits, batch, strict=True):
                total += functional.cross_entropy(logits[:-1].double(), tokens[1:], reduction="sum").item()
    return float(np.exp(total / (windows.shape[0] * (windows.shape[1] - 1))))


def our_perplexity(path: Path, windows: np.ndarray) -> float:
    """The same number from this library."""
    from vptq_jax.convert.loading import load
    from vptq_jax.lm.evaluation import perplexity

    model = load(path, dtype="float32")
    return perplexity(model, windows.reshape(-1), context=windows.shape[1]).value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory in VPTQ format, with tokenizer")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    options = parser.parse_args()
    from vptq_jax.convert.tokenizer import load_tokenizer

    ids = load_tokenizer(options.model)(options.text.read_text())["input_ids"]
    count = min(options.windows, len(ids) // options.context)
    windows = np.asarray(ids[: count * options.context], np.int32).reshape(count, options.context)
    rows = {}
    for name, measure in (("ours", our_perplexity), ("original", original_perplexity)):
        start = time.perf_counter()
        rows[name] = measure(options.model, windows)
        rows[f"{name}_seconds"] = round(time.perf_counter() - start, 1)
    rows["relative_difference"] = rows["ours"] / rows["original"] - 1
    print(json.dumps({"windows": count, "context": options.context} | rows, indent=1))


if __name__ == "__main__":
    main()
