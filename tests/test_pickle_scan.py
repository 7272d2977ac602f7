"""What a pickle would allocate, copy or hash, refused before torch reads it."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kan_model import CheckpointError, load_checkpoint
from kan_model.archives import read_archive
from kan_model.checkpoint import read_checkpoint
from kan_model.pickle_calls import Calls
from kan_model.pickle_values import Group, Name, Refused, TorchRefuses
from tests import zoo
from tests.hostile.writing import (
    archive,
    call,
    get,
    layer,
    legacy,
    legacy_storage,
    named,
    pickled,
    push,
    put,
    storage,
    tensor,
)
from tests.states import assert_same

_TYPED = "torch._tensor._rebuild"
_LONG = storage(1, key="1", kind="LongStorage")


def read(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    return read_checkpoint(path)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("torch has read the file")

    monkeypatch.setattr(torch, "load", load)


REFUSED = {
    "bytearray of a number": (call("builtins.bytearray", 6 * 10**9), "array of bytes"),
    "its name in Python 2": (call("__builtin__.bytearray", 6 * 10**9), "array of bytes"),
    "bytearray of a tensor": (call("builtins.bytearray", tensor((), of=_LONG)), "array of bytes"),
    "bytearray by another call": (
        call(f"{_TYPED}_from_type_v2", named("builtins.bytearray"), None, (10**9,), {}),
        "array of bytes",
    ),
    "a tensor by its size": (call("torch.FloatTensor", 10**9), "is damaged"),
    "a storage by its size": (call("torch.storage.UntypedStorage", 10**9), "UntypedStorage"),
    "a storage larger than its entry": (tensor((10**6,), of=storage(10**6)), "of which the file"),
    "a tensor larger than its storage": (tensor((65,), of=storage(64)), "reaches beyond"),
    "a tensor behind its storage": (tensor((2,), of=storage(64), offset=63), "reaches beyond"),
    "a stride beyond its storage": (tensor((2, 2), (64, 1), of=storage(64)), "reaches beyond"),
    "an empty tensor behind its storage": (tensor((0,), of=_LONG, offset=99), "begins beyond"),
    "a storage of two sizes": (push([storage(64), storage(2)]), "a storage of 2 numbers"),
    "a storage that is not there": (storage(1, key="7"), "the file holds 0 bytes"),
    "more dimensions than torch has": (tensor((1,) * 65, of=storage(64)), "64 dimensions"),
    "a set of a tensor": (call("builtins.set", tensor((9,), (0,), of=storage(64))), "copies what"),
    "text inflated": (call("_codecs.encode", "x", "zip"), "encodes text"),
    "a key that is a large number": (push({2**1000: 1}), "long to compare"),
    "a key of keys of keys": (
        b"}" + push(1) + b"".join(put(i) + get(i) + b"\x86" for i in range(40)) + b"Ns",
        "long to compare",
    ),
    "a list copied again and again": (
        b"](" + push([0] * 9000) + put(0) + call("builtins.set", get(0)) * 130 + b"e",
        "copies its parts",
    ),
    "values without end": (b"](" + b"N" * 4_000_001 + b"e", "at most 4,000,000, where"),
    "lists without end": (b"](" + b"]" * 1_000_001 + b"e", "holds too many values"),
}  # fmt: skip


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("case", REFUSED)
def test_what_takes_more_than_the_file_has_never_reaches_torch(tmp_path: Path, case: str) -> None:
    value, message = REFUSED[case]
    content = archive(pickled({**layer(), "x": value}), {"data/1": struct.pack("<q", 10**9)})
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, content)


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(
    "pickle",
    [
        b"\x80\x02",
        b"\x80\x02h\x07.",
        b"\x80\x02e.",
        b"\x80\x02\x85.",
        b"\x80\x02X\xff\xff\xff\xffa.",
        b"\x80\x04\x8c\x01a.",
        b"\x80\x02N" + push(1) + b"a.",
        b"\x80\x02N)R.",
    ],
)
def test_a_pickle_that_torch_would_not_read_to_its_end_never_reaches_it(
    tmp_path: Path, pickle: bytes
) -> None:
    with pytest.raises(CheckpointError, match="re-save it"):
        read(tmp_path, archive(pickle))


@pytest.mark.usefixtures("no_torch")
def test_a_legacy_storage_is_no_larger_than_its_file(tmp_path: Path) -> None:
    content = legacy({"x": tensor((2,), of=legacy_storage(10**10))}, ["0"])
    with pytest.raises(CheckpointError, match=r"10,000,000,000 numbers of 4 bytes, the file has"):
        read(tmp_path, content)


@pytest.mark.usefixtures("no_torch")
def test_a_pickle_alone_never_reaches_torch(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a pickle that torch\.save did not write"):
        read(tmp_path, pickled(call("builtins.bytearray", 6 * 10**9)))


@pytest.mark.parametrize(
    "options",
    [{}, {"pickle_protocol": 3}, {"_use_new_zipfile_serialization": False},
     {"_use_new_zipfile_serialization": False, "pickle_protocol": 3}],
)  # fmt: skip
def test_what_torch_saves_in_forms_that_it_reads_is_read(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    network = zoo.KAN([3, 4, 2]).eval()
    torch.save(network.state_dict(), tmp_path / "model.pt", **options)
    assert_same(tmp_path / "model.pt", network)


@pytest.mark.filterwarnings("ignore")
def test_tensors_of_every_kind_beside_a_kan_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = zoo.KAN([3, 4, 2]).eval()
    beside = {
        "quantized": torch.quantize_per_tensor(torch.randn(3, 3), 0.1, 0, torch.qint8),
        "by channel": torch.quantize_per_channel(
            torch.randn(3, 3), torch.ones(3), torch.zeros(3), 0, torch.qint8
        ),
        "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(),
        "meta": torch.empty(9, device="meta"),
        "small": torch.ones(3).to(torch.float8_e4m3fn),
        "unsigned": torch.ones(3, dtype=torch.uint16),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.ones(3)),
        "strided": torch.arange(12.0).view(3, 4).t()[1:, ::2],
        "bytes": (b"\0\xff", bytearray(b"\xfe"), torch.Size([1, 2]), 1j, {1, 2}),
        "device": torch.device("cpu"),
        "random": torch.get_rng_state(),
    }
    torch.save({"model": network.state_dict(), "beside": beside}, tmp_path / "model.pt")
    assert_same(tmp_path / "model.pt", network)


def test_whatever_torch_lets_a_file_call_with_a_number_is_refused_or_bounded() -> None:
    """Of a torch that lets files call more, each new function is refused until it has a rule."""
    from torch import _weights_only_unpickler

    calls = Calls((), 1000)
    for name in _weights_only_unpickler._get_allowed_globals():
        number = Group("tuple", [6 * 10**9], 1)
        if name in ("torch.device", "builtins.complex", "torch.serialization._get_layout"):
            continue  # which allocate nothing
        with pytest.raises((Refused, TorchRefuses)):
            calls.call(Name(name), number)


def test_long_histories_and_long_keys_beside_a_kan_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = zoo.KAN([3, 4, 2]).eval()
    beside = {
        "losses": [0.1 * i for i in range(1_500_000)],
        "k" * 1100: 1,
        "cache": {"q" * 5000: [1, 2], "x": {"r" * 5000: {"y": [3]}}},
        "names": {"s" * 3000},
    }
    torch.save({"model": network.state_dict(), **beside}, tmp_path / "model.pt")
    assert_same(tmp_path / "model.pt", network)


def test_a_tensor_behind_a_long_key_is_refused(tmp_path: Path) -> None:
    torch.save({"k" * 2000: {"x": torch.ones(2)}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="is a name of more than 1,024 characters"):
        read_checkpoint(tmp_path / "model.pt")


def test_a_module_with_a_long_name_inside_is_refused(tmp_path: Path) -> None:
    module = zoo.KAN([3, 4, 2])
    module.register_buffer("k" * 2000, torch.ones(2))
    torch.save(module, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="or names of more than 1024 characters"):
        read_checkpoint(tmp_path / "model.pt")


ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "a comment": lambda content: content[:-2] + struct.pack("<H", 3) + b"abc",
    "bytes before": lambda content: b"PK\3\4" + content,
    "bytes behind": lambda content: content + b"x",
    "a second directory": lambda content: content + content[content.index(b"PK\1\2") :],
    "a version that zipfile does not know": lambda content: replaced(content, 6, b"\x64\0"),
    "an encrypted entry": lambda content: replaced(content, 8, b"\1\0"),
    "no torch": lambda content: content.replace(b"data.pkl", b"data.pkx"),
}


def replaced(content: bytes, offset: int, value: bytes) -> bytes:
    """Change a field of the last entry in an archive's directory."""
    at = content.rindex(b"PK\1\2") + offset
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_can_be_read_in_two_ways_never_reaches_torch(
    tmp_path: Path, case: str
) -> None:
    with pytest.raises(CheckpointError, match="is damaged, truncated, or an archive"):
        read(tmp_path, ARCHIVES[case](archive(pickled(layer()))))


@pytest.mark.usefixtures("no_torch")
def test_entries_that_are_compressed_overlap_or_share_a_name_never_reach_torch(
    tmp_path: Path,
) -> None:
    honest = archive(pickled(layer()))
    for content, message in (
        (archive(pickled(layer()), compression=zipfile.ZIP_DEFLATED), "is compressed"),
        (archive(pickled(layer()), {"DATA/0": b"x"}), "two entries of one name"),
        (
            replaced(replaced(honest, 42, b"\0" * 4), 20, b"\xff\xff\0\0" * 2),
            "reach into|as an arch",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path, content)


def test_an_archive_with_directories_of_zip64_is_read(tmp_path: Path) -> None:
    """As torch.save writes it, and as Python's zipfile does, which is without them."""
    torch.save({"x": torch.ones(3)}, tmp_path / "torch.pt")
    assert b"PK\6\6" in (tmp_path / "torch.pt").read_bytes()
    size = (tmp_path / "torch.pt").stat().st_size
    assert read_archive(tmp_path / "torch.pt", size).sizes["data/0"] == 12
    content = archive(pickled({"x": tensor((2,), of=storage(64))}))
    assert b"PK\6\6" not in content
    assert [*read(tmp_path, content).states[0].tensors] == ["x"]


def test_names_are_bounded_before_they_are_joined(tmp_path: Path) -> None:
    inner = push({"layers": 1, "x": tensor((1,), of=storage(64))})
    for _ in range(3):
        inner = push({"k" * 500: inner})
    with pytest.raises(CheckpointError, match=r"k\.\.\.: is a name of more than 1,024 characters"):
        read(tmp_path, archive(b"\x80\x02" + inner + b"."))


def test_tensors_claim_no_more_together_than_the_file_may_hold(tmp_path: Path) -> None:
    flat = tensor((1500, 1500), (0, 0), of=storage(64))
    content = {f"layers.{i}.{part}": flat for i in range(3) for part in ("base_weight", "grid")}
    content |= {f"layers.{i}.spline_weight": flat for i in range(3)}
    path = tmp_path / "model.pt"
    path.write_bytes(archive(pickled(content)))
    with pytest.raises(CheckpointError, match=r"tensors up to this one claim \d+ bytes"):
        load_checkpoint(path)


def test_safetensors_with_headers_without_end_are_refused(tmp_path: Path) -> None:
    for header, message in (
        (b"{" + b" " * 2**23 + b"}", "expected at most 8,388,608"),
        (b'{"a":' * 100_000, "its header is no JSON"),
        (b'{"' + b"n" * 2000 + b'": {}}', "names of up to 2,000 characters"),
        (b'{"n": {"shape": [' + b"1," * 99 + b"1]}}", "has 100 dimensions"),
    ):
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)


def test_a_file_of_torchs_is_scanned_as_it_was_written(tmp_path: Path) -> None:
    """The scan ends where the pickle does: whatever torch.save writes is known to it."""
    from kan_model.pickle_scan import scan_archive

    content = io.BytesIO()
    torch.save(nn.Sequential(nn.Linear(2, 3), nn.SiLU()), content)
    path = tmp_path / "model.pt"
    path.write_bytes(content.getvalue())
    size = path.stat().st_size
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    found = scan_archive(read_archive(path, size), names, size)
    assert not found.mappings
    assert not found.lists
