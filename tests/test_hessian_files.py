"""Community Hessian files: `{layer}_{qkv|o|up|down}.pt`."""

import pickle
import sys

import numpy as np
import pytest

from vptq_jax.convert.hessian_files import load_hessian_files, load_hessians
from vptq_jax.nn.hessians import Hessians

torch = pytest.importorskip("torch")

SIZES = {"qkv": 6, "o": 4, "up": 6, "down": 10}


def write_file(path, size, seed=0, **changes):
    x = np.random.default_rng(seed).normal(size=(50, size)) + 1.0
    mean = x.mean(0)
    centred = (x - mean).T @ (x - mean) / len(x)
    content = {
        "flatH": torch.tensor(centred[np.tril_indices(size)], dtype=torch.float32),
        "mu": torch.tensor(mean, dtype=torch.float32),
        "n": size,
        "ct": len(x),
    }
    torch.save({key: value for key, value in (content | changes).items() if value is not None}, path)
    return x


@pytest.fixture
def directory(tmp_path):
    for layer in range(2):
        for part, size in SIZES.items():
            write_file(tmp_path / f"{layer}_{part}.pt", size, seed=layer)
    return tmp_path


def test_hessian_is_the_regularized_second_moment(tmp_path):
    for part, size in SIZES.items():
        x = write_file(tmp_path / f"0_{part}.pt", size)
        if part == "down":
            expected = x.T @ x / len(x)
    hessians = load_hessian_files(tmp_path)
    assert isinstance(hessians, Hessians)
    assert hessians.tokens == 50
    expected = expected / np.diagonal(expected).mean() + 0.01 * np.eye(10)
    np.testing.assert_allclose(hessians.for_module("model.layers.0.mlp.down_proj"), expected, rtol=1e-5)
    np.testing.assert_array_equal(
        hessians.for_module("model.layers.0.self_attn.k_proj"), hessians.for_module("model.layers.0.self_attn.q_proj")
    )
    assert hessians.for_module("model.layers.0.mlp.gate_proj").shape == (6, 6)


def test_saved_as_safetensors_and_read_again(directory, tmp_path):
    hessians = load_hessians(directory)
    hessians.save(tmp_path / "out")
    again = load_hessians(tmp_path / "out")
    for path in hessians:
        np.testing.assert_array_equal(hessians.for_module(path), again.for_module(path))


def test_missing_layer_is_named(directory):
    (directory / "1_up.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 8 .*1_up\.pt"):
        load_hessian_files(directory)
    with pytest.raises(FileNotFoundError, match=r"2_qkv\.pt"):
        load_hessian_files(directory, num_layers=3)


def test_empty_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"0_qkv\.pt"):
        load_hessian_files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 5}, r"flatH has shape \[10\], expected \[15\] for n = 5"),
        ({"mu": torch.zeros(3)}, r"mu has shape \[3\], expected \[4\]"),
        ({"flatH": torch.full((10,), torch.nan)}, "flatH holds NaN"),
        ({"flatH": torch.zeros(10), "mu": torch.zeros(4)}, "mean diagonal"),
        ({"ct": None}, "expected a dictionary with flatH, mu, n, ct"),
    ],
)
def test_wrong_content(directory, changes, message):
    write_file(directory / "0_o.pt", 4, **changes)
    hessians = load_hessian_files(directory)
    with pytest.raises(ValueError, match=message):
        hessians.for_module("model.layers.0.self_attn.o_proj")


class Intruder:
    def __reduce__(self):
        return sys.exit, (1,)


def test_pickles_are_never_executed(directory):
    (directory / "0_o.pt").write_bytes(pickle.dumps(Intruder()))
    hessians = load_hessian_files(directory)
    with pytest.raises(ValueError, match="read safely"):
        hessians.for_module("model.layers.0.self_attn.o_proj")
    torch.save(Intruder(), directory / "0_o.pt")
    with pytest.raises(ValueError, match="read safely"):
        hessians.for_module("model.layers.0.self_attn.o_proj")


def test_truncated_file(directory):
    file = directory / "0_o.pt"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"0_o\.pt is not a Hessian file"):
        load_hessian_files(directory).for_module("model.layers.0.self_attn.o_proj")


def test_without_torch_the_error_says_how_to_install_it(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        load_hessian_files(directory)
