from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.errors import InputError
from export.inputs import parse_shape, read_inputs
from kan_bundle.manifest import TensorSpec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("3,224,224", TensorSpec("input", "FP32", (-1, 3, 224, 224))),
        ("3x8x8", TensorSpec("input", "FP32", (-1, 3, 8, 8))),
        ("5", TensorSpec("input", "FP32", (-1, 5))),
        ("batch,3,8", TensorSpec("input", "FP32", (-1, 3, 8))),
        ("-1, 3, 8", TensorSpec("input", "FP32", (-1, 3, 8))),
        ("image=3,8,8", TensorSpec("image", "FP32", (-1, 3, 8, 8))),
        ("mask:bool=7", TensorSpec("mask", "BOOL", (-1, 7))),
    ],
)
def test_a_shape_is_read(text: str, spec: TensorSpec) -> None:
    assert parse_shape(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the sizes of one row"),
        ("three", "expected the sizes of one row"),
        ("3,,4", "expected the sizes of one row"),
        ("3,0", "expected sizes of 1 to"),
        (",".join(["2"] * 40), "expected the sizes of one row"),
        ("9" * 5000, "expected the sizes of one row"),
        ("999999,999999", "expected sizes of 1 to"),
        ("a b=3", "tensor name 'a b'"),
        ("=3", "tensor name ''"),
        ("x:FP16=3", "expected a type of FP32, INT64"),
    ],
)
def test_what_is_no_shape_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_shape(text)


def test_shapes_come_from_python_as_from_the_command_line() -> None:
    both = (TensorSpec("image", "FP32", (-1, 3, 4)), TensorSpec("age", "FP32", (-1, 1)))
    for given in (["image=3,4", "age=1"], {"image": (3, 4), "age": [1]}):
        found = read_inputs(given, None)
        assert found is not None
        assert found.specs == both
    assert read_inputs((3, 4), None) == read_inputs("3,4", None)
    assert read_inputs(3, None) == read_inputs("3", None) == read_inputs({"input": 3}, None)
    assert read_inputs(None, None) is None


def test_samples_tell_shapes_and_types(tmp_path: Path) -> None:
    x, tokens = np.zeros((5, 3, 4)), np.arange(5)[:, None]
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "both.npz", x=x, tokens=tokens)
    found = read_inputs(None, str(tmp_path / "x.npy"))
    assert found is not None
    assert found.specs == (TensorSpec("input", "FP32", (-1, 3, 4)),)
    both = (TensorSpec("x", "FP32", (-1, 3, 4)), TensorSpec("tokens", "INT64", (-1, 1)))
    for given in (tmp_path / "both.npz", {"x": x, "tokens": tokens}):
        found = read_inputs(None, given)
        assert found is not None
        assert found.specs == both
        assert found.samples is not None
        assert found.samples[0].dtype == np.float32
        np.testing.assert_array_equal(found.samples[1], tokens)


def test_a_shape_gives_the_samples_their_order_and_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    np.save(tmp_path / "b.npy", np.zeros((2, 4)))
    found = read_inputs(["b=4", "a=3"], [f"a={tmp_path}/a.npy", f"b={tmp_path}/b.npy"])
    assert found is not None
    assert [spec.name for spec in found.specs] == ["b", "a"]
    found = read_inputs("x=3", tmp_path / "a.npy")
    assert found is not None
    assert found.specs[0].name == "x"


@pytest.mark.parametrize(
    ("shape", "samples", "message"),
    [
        (["3", "4"], None, "a name of its own for each"),
        ("4", np.zeros((2, 3)), r"expected FP32 of shape \[batch, 4\], found FP32 of \[batch, 3\]"),
        (["a=3", "b=4"], np.zeros((2, 3)), "expected arrays for the inputs a, b, found input"),
        ({"a": (3,)}, {"b": np.zeros((2, 3))}, "expected arrays for the inputs a, found b"),
        (None, {"a": np.zeros((2, 3)), "b": np.zeros((4, 3))}, "as many rows for every input"),
        (None, np.zeros((0, 3)), "at least one row"),
        (None, np.zeros(3, dtype=complex), "found complex128"),
        (None, np.array(["text"]), "found <U4"),
        (None, [np.zeros((2, 3))], "found a list with a ndarray"),
        (None, {1: np.zeros((2, 3))}, "tensor name '1'"),
    ],
)
def test_what_contradicts_itself_is_refused(shape: Any, samples: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_inputs(shape, samples)


@pytest.mark.parametrize("content", [b"", b"not an array", b"PK\x03\x04broken"])
def test_samples_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npy': is not an array saved by numpy\.save"):
        read_inputs(None, tmp_path / "x.npy")
    with pytest.raises(InputError, match=r"none\.npy': cannot be read: No such file"):
        read_inputs(None, tmp_path / "none.npy")


def test_samples_that_inflate_without_end_are_refused(tmp_path: Path) -> None:
    zeros = np.zeros((2**24, 8), np.uint8)
    np.savez_compressed(tmp_path / "x.npz", x=zeros)
    with pytest.raises(InputError, match=r"holds 1 arrays of 134,217,\d+ bytes in a file of 130,"):
        read_inputs(None, tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "x.npz", x=zeros[: 2**22])
    assert read_inputs(None, tmp_path / "x.npz") is not None
    np.savez(tmp_path / "x.npz", **{f"x{i}": zeros[:1] for i in range(1001)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds 1,001 arrays"):
        read_inputs(None, tmp_path / "x.npz")


def test_a_table_in_words_is_told_how_to_become_an_array(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2\n3,4\n")
    with pytest.raises(InputError, match=r"x\.csv': is not an array .*numpy\.loadtxt"):
        read_inputs(None, str(tmp_path / "x.csv"))


def test_samples_with_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object))
    with pytest.raises(InputError, match="is not an array saved by numpy"):
        read_inputs(None, tmp_path / "x.npy")


def test_an_input_is_given_once(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    with pytest.raises(InputError, match="an input without a name twice"):
        read_inputs(None, [tmp_path / "x.npy", tmp_path / "x.npy"])


def test_a_tensor_of_torchs_is_an_array() -> None:
    found = read_inputs(None, torch.zeros(2, 3))  # type: ignore[arg-type]
    assert found is not None
    assert found.specs == (TensorSpec("input", "FP32", (-1, 3)),)
