"""Killing and interrupting a quantization: whatever the moment, running it again gives the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, signal, sys
import jax, numpy as np
from vptq_jax.lm.config import ModelConfig
from vptq_jax.lm.params import RandomSource
from vptq_jax.lm.registry import build
from vptq_jax.lm.quantizer import quantize
from vptq_jax.spec import QuantConfig

config = ModelConfig.from_hf({
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
})
model = build(config, RandomSource(jax.random.key(0), std=0.2))
batches = [np.asarray(jax.random.randint(jax.random.key(i), (2, 16), 0, 64)) for i in range(3)]
quant = QuantConfig("v4-k16-16", kmeans_iters=5, rounds=1, mode="sequential")
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs inherit that it is ignored.
replace, pause_at, renamed = os.replace, int(sys.argv[2]), 0

def pausing_replace(source, target):
    global renamed
    renamed += str(target).endswith(".safetensors")
    if renamed and renamed == pause_at:
        print("paused", flush=True)
        sys.stdin.read()
    replace(source, target)

os.replace = pausing_replace
print("ready", flush=True)
quantize(model, quant, batches, workdir=sys.argv[1], progress=False)
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a quantization into a directory; programs are compiled once for all of them."""
    cache = tmp_path_factory.mktemp("compiled")
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
    }
    running = []

    def start(directory, pause_at=0):
        """Given `pause_at`, it waits with that operator written but not yet under its name."""
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(directory), str(pause_at)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        for line in ("ready", "paused")[: 1 + bool(pause_at)]:
            assert process.stdout.readline() == f"{line}\n", process.stderr.read()
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """Files of an uninterrupted run, and its seconds with every program compiled before."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    finish(start(first))
    process = start(second)
    began = time.monotonic()
    finish(process)
    assert contents(first) == contents(second), "two uninterrupted runs differ"
    return contents(second), time.monotonic() - began


def finish(process):
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert output == "done\n"


def contents(directory):
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.name != "seconds.jsonl"}


def operators(directory):
    return {name for name in contents(directory) if name.endswith(".safetensors")}


def test_killed_twice_while_writing_and_run_again(start, reference, tmp_path):
    files, _ = reference
    for before, count in ((0, 5), (4, 20)):
        process = start(tmp_path, count - before)
        process.kill()
        process.communicate()
        left = contents(tmp_path)
        finished = {name: left[name] for name in operators(tmp_path)}
        assert finished.items() <= files.items(), "an operator file differs or is partial"
        assert len(finished) == count - 1
        assert len(left) == len(finished) + 3, "run.json, lock and the file that was being written"
    finish(start(tmp_path))
    assert contents(tmp_path) == files


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_ten_random_moments(start, reference, tmp_path):
    files, seconds = reference
    moments = random.Random(0)
    killed = 0
    for attempt in range(40):
        directory = tmp_path / str(attempt)
        process = start(directory)
        time.sleep(moments.uniform(0, seconds))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        finish(start(directory))
        assert contents(directory) == files
        if killed == 10:
            return
    pytest.fail(f"only {killed} of 40 runs could be killed before they were over")


def test_interrupt_stops_at_once_and_leaves_whole_files(start, reference, tmp_path):
    files, _ = reference
    process = start(tmp_path, 3)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt" in errors
    assert "done" not in output
    left = contents(tmp_path)
    assert left.items() <= files.items()
    assert not [name for name in left if name.startswith(".")]
    finish(start(tmp_path))
    assert contents(tmp_path) == files
