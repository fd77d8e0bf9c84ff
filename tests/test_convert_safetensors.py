"""Safetensors headers are checked in full before anything is read, and tensors arrive unchanged."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from vptq_jax.convert.safetensors_reader import DTYPES, SafetensorsFiles, find_nonfinite


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@settings(max_examples=20, derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=5
    )
)
def test_tensors_written_by_safetensors_arrive_unchanged(tmp_path_factory, kinds):
    rng = np.random.default_rng(0)
    tensors = {}
    for number, (kind, shape) in enumerate(kinds):
        raw = rng.integers(0, 2 if kind == "BOOL" else 256, (int(np.prod(shape)), np.dtype(DTYPES[kind]).itemsize))
        tensors[f"t{number}"] = raw.astype(np.uint8).reshape(-1).view(DTYPES[kind]).reshape(shape)
    file = tmp_path_factory.mktemp("st") / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    files = SafetensorsFiles(file)
    assert set(files) == set(tensors)
    for name, tensor in tensors.items():
        read = files.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert read.tobytes() == tensor.tobytes()
        assert read.size == 0 or read.ctypes.data % 64 == 0


def sharded(path, shards, weight_map=None):
    for name, tensors in shards.items():
        save_file(tensors, path / name)
    if weight_map is None:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
A, B = np.arange(4, dtype=np.float32), np.ones((2, 2), ml_dtypes.bfloat16)


def test_shards_are_one_checkpoint(tmp_path):
    files = SafetensorsFiles(sharded(tmp_path, {ONE: {"a": A}, TWO: {"b": B}}))
    np.testing.assert_array_equal(files.read("a"), A)
    np.testing.assert_array_equal(files.read("b"), B)
    assert files.nbytes == A.nbytes + B.nbytes


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": ONE, "b": "model-00003-of-00002.safetensors"}, "is missing"),
        ({"a": ONE, "b": "../secret.safetensors"}, "not a plain file name"),
        ({"a": ONE, "b": "/etc/passwd"}, "not a plain file name"),
        ({"a": ONE, "b": 3}, "not a plain file name"),
        ({"a": ONE, "b": ["x"]}, "not a plain file name"),
        ({"a": ONE, "b": ONE, "c": TWO}, "does not hold it"),
        ({"a": ONE, "c": TWO, "b": TWO}, "the index places 'c'"),
        ({}, "weight_map is"),
        ([1], "weight_map is"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, weight_map, message):
    sharded(tmp_path, {ONE: {"a": A}, TWO: {"b": B}}, weight_map)
    with pytest.raises(ValueError, match=message):
        SafetensorsFiles(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    sharded(tmp_path, {ONE: {"a": A}, TWO: {"b": B, "a": A}}, {"a": ONE, "b": TWO})
    with pytest.raises(ValueError, match="'a' is in both"):
        SafetensorsFiles(tmp_path)


def test_a_tensor_that_the_index_forgets_is_refused(tmp_path):
    sharded(tmp_path, {ONE: {"a": A}, TWO: {"b": B, "c": A}}, {"a": ONE, "b": TWO})
    with pytest.raises(ValueError, match="'c', which the index does not list"):
        SafetensorsFiles(tmp_path)


def test_shards_without_index_and_directories_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither"):
        SafetensorsFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        SafetensorsFiles(tmp_path)
    save_file({"a": A}, tmp_path / ONE)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors\.index\.json"):
        SafetensorsFiles(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, bytes(7), "do not lie in the file's 7 data bytes"),
        ({"a": entry()}, bytes(9), "1 bytes after tensor 'a'"),
        ({"a": entry(dtype="F13")}, bytes(8), "dtype 'F13' is not supported"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "is not supported"),
        ({"a": entry(shape=[3])}, bytes(8), "span 8 bytes; F32 of shape"),
        ({"a": entry(shape=[-1, -2])}, bytes(8), "whole numbers from 0 on"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "whole numbers from 0 on"),
        ({"a": entry(shape=[1 << 40, 1 << 40], offsets=[0, 8])}, bytes(8), "span 8 bytes"),
        ({"a": entry(shape=[2] * 100_000)}, bytes(8), "at most 8 whole numbers"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "do not lie"),
        ({"a": entry(offsets=[0, 8.0])}, bytes(8), "two whole numbers"),
        ({"a": entry(offsets=[0, 1 << 62], shape=[1 << 60])}, bytes(8), "do not lie"),
        ({"a": entry(), "b": entry()}, bytes(8), "overlaps"),
        ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "leaves a gap"),
        ({"a": {"dtype": "F32"}}, b"", "lacks dtype, shape or data_offsets"),
        ({"a": 3}, b"", "lacks dtype, shape or data_offsets"),
        (
            b'{"a": ' + json.dumps(entry()).encode() + b', "a": ' + json.dumps(entry()).encode() + b"}",
            bytes(8),
            "twice",
        ),
        (b"[]", b"", "expected an object"),
        (b"{", b"", "not usable JSON"),
        (b"\xff\xfe\xfd", b"", "not JSON"),
        (b'{"a":' * 100_000, b"", "nests too deeply"),
        (b'{"a":' + b"9" * 10_000 + b"}", b"", "not usable JSON"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, data, message):
    with pytest.raises(ValueError, match=message):
        SafetensorsFiles(write(tmp_path / "model.safetensors", header, data))


@pytest.mark.parametrize("raw", [b"", b"\0\0\0", struct.pack("<Q", 1 << 60), struct.pack("<Q", 50) + b"{}"])
def test_files_shorter_than_their_header_are_refused(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="header"):
        SafetensorsFiles(tmp_path)


def test_a_file_that_shrinks_between_header_and_read(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": A}, file)
    files = SafetensorsFiles(file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="tensor 'a': the file ended after 13 of 16 bytes"):
        files.read("a")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_find_nonfinite(dtype, value):
    array = np.full((7, 5), np.finfo(np.float16).max, np.float32).astype(dtype)
    assert find_nonfinite(array) is None
    array[3, 2] = value
    assert find_nonfinite(array) == 17
    assert find_nonfinite(array.view(np.int8)) is None
