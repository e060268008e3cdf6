"""safetensors directories: read by slices, written as a stream, and clear about what is wrong with them."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from meshway.framework.conversion.tensor_files import (
    INDEX,
    SINGLE,
    Spec,
    TensorFiles,
    shards,
    size_in_bytes,
    write_tensors,
)
from meshway.framework.errors import UserError

TENSORS = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b.weight": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "c": np.array([1.5, -2.0], np.float16),
    "d": np.array(3.0, np.float32),
}


def write(directory, max_bytes):
    directory.mkdir()
    specs = {name: Spec(value.shape, value.dtype) for name, value in TENSORS.items()}
    return write_tensors(directory, specs, TENSORS.__getitem__, max_bytes)


@pytest.fixture
def sharded(tmp_path):
    write(tmp_path / "model", 100)
    return tmp_path / "model"


@pytest.mark.parametrize("max_bytes, files", [(10**6, 1), (100, 2), (1, 4)])
def test_what_is_written_is_read_here_and_by_the_library(tmp_path, max_bytes, files):
    names = write(tmp_path / "model", max_bytes)
    assert len(names) == files
    tensors = TensorFiles(tmp_path / "model")
    assert sorted(tensors) == sorted(TENSORS)
    assert tensors.num_bytes == sum(value.nbytes for value in TENSORS.values())
    library = {}
    for name in names:
        library |= safetensors.numpy.load_file(tmp_path / "model" / name)
    for name, value in TENSORS.items():
        assert tensors.dtype(name) == library[name].dtype == value.dtype
        assert tensors.read(name).tobytes() == library[name].tobytes() == value.tobytes()
    assert (tmp_path / "model" / INDEX).exists() == (files > 1)


def test_a_slice_is_read(sharded):
    found = TensorFiles(sharded).read("a.weight", (slice(1, 3), slice(2, 5)))
    np.testing.assert_array_equal(found, TENSORS["a.weight"][1:3, 2:5])


def test_the_index_is_what_transformers_writes(sharded):
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"] == {"total_size": 96 + 12 + 4 + 4}
    assert index["weight_map"]["a.weight"] == "model-00001-of-00002.safetensors"
    assert index["weight_map"]["d"] == "model-00002-of-00002.safetensors"


def test_a_large_tensor_is_alone():
    specs = {name: Spec((size,), np.dtype(np.float32)) for name, size in (("a", 1), ("b", 9), ("c", 1), ("d", 1))}
    assert [list(part) for part in shards(specs, 8)] == [["a"], ["b"], ["c", "d"]]


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5kb", 1500), ("800MB", 8 * 10**8), ("77", 77)])
def test_sizes(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5TB", "-1", "0", "five"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="is not a size"):
        size_in_bytes(text)


def refuses(directory, *words):
    with pytest.raises(UserError) as error:
        TensorFiles(directory)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_shard_that_is_missing(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refuses(sharded, "lacks 1 of 2 shards", "model-00002-of-00002.safetensors", "b.weight", "fetch")


@pytest.mark.parametrize("size", [3, 40, 350])
def test_a_file_that_is_truncated(sharded, size):
    path = sharded / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:size] if size < 300 else path.read_bytes()[:-5])
    refuses(sharded, "model-00001-of-00002.safetensors is truncated, damaged or no safetensors file")


def test_an_index_that_names_a_tensor_its_shard_has_not(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["a.wait"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refuses(sharded, "says that model-00001-of-00002.safetensors holds tensor 'a.wait'", "did you mean 'a.weight'")


def test_an_index_that_is_no_index(sharded):
    (sharded / INDEX).write_text("[]")
    refuses(sharded, INDEX, "cannot be read")


def test_a_directory_without_weights(tmp_path):
    refuses(tmp_path, "neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").touch()
    refuses(tmp_path, "pytorch_model.bin is not read", "save_pretrained")


def test_a_dtype_that_is_not_converted(tmp_path):
    value = np.zeros(4, ml_dtypes.float8_e4m3fn)
    safetensors.numpy.save_file({"a": value}, tmp_path / SINGLE)
    tensors = TensorFiles(tmp_path)
    with pytest.raises(UserError, match=r"'a' in model.safetensors has dtype F8_E4M3.*BF16.*unquantised"):
        tensors.read("a")
