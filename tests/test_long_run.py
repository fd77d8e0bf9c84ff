"""A process that serves for long: its memory and its programs stay what they were after warming up."""

import gc
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from vptq_jax.convert.loading import load
from vptq_jax.lm.evaluation import perplexity
from vptq_jax.lm.generation import _decode, _prefill, chat_prompt, generate, stream
from vptq_jax.lm.quantizer import quantize
from vptq_jax.lm.sampling import Sampling
from vptq_jax.spec import QuantConfig

CALLS, WARM = 2000, 700


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_thousand_mixed_calls(tiny_hf):
    jax.clear_caches()
    gc.collect()
    dense = load(tiny_hf)
    batches = [np.arange(32, dtype=np.int32).reshape(1, 32)]
    model, _ = quantize(dense, QuantConfig("v4-k16", rounds=0, kmeans_iters=4), batches, progress=False)
    rng = random.Random(0)
    text = np.arange(400) % 90

    def call() -> None:
        kind = rng.random()
        sampling = Sampling(temperature=rng.choice([0.0, 0.7]), top_k=rng.choice([None, 5]), seed=rng.randrange(99))
        if kind < 0.6:
            rows = [[rng.randrange(3, 90) for _ in range(rng.randrange(1, 60))] for _ in range(rng.randrange(1, 9))]
            generate(model, rows, max_new_tokens=rng.randrange(1, 20), sampling=sampling)
        elif kind < 0.8:
            for _ in stream(model, "the quick brown", max_new_tokens=rng.randrange(1, 20), sampling=sampling):
                pass
        elif kind < 0.82:  # a process of its own: slower than all else
            generate(model, chat_prompt(model, "a fox"), max_new_tokens=4, sampling=sampling)
        else:
            perplexity(model, text, context=32, max_windows=rng.randrange(1, 9), batch_size=rng.randrange(1, 9))

    sizes = []
    for index in range(CALLS):
        call()
        if index + 1 in (WARM, CALLS):
            gc.collect()
            sizes.append((resident(), _prefill._cache_size() + _decode._cache_size()))
    (warm, programs), (end, later) = sizes
    print(
        f"{warm / 1e6:.1f} MB and {programs} programs after {WARM} calls, {end / 1e6:.1f} MB and {later} after {CALLS}"
    )
    assert later <= programs + 2
    assert later <= 40
    assert end <= 1.02 * warm
