"""A model file's bytes: seen as ONNX sees them, or refused. ONNX's own parser is the oracle."""

from pathlib import Path
from typing import Any

import google.protobuf.message
import numpy as np
import onnx
import pytest

from kan_bundle.errors import BundleError, GraphError
from serving.models.graph import check_graph
from serving.models.outline import read_outline
from tests.bundles import FOREIGN
from tests.conftest import STATE_DICTS
from tests.wire import part

EVIL = part(7, onnx.GraphProto(node=[FOREIGN]).SerializeToString())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"not a model", "found", id="text"),
        pytest.param(b"", "without a graph", id="nothing"),
        pytest.param(part(7, b"") + EVIL, "com.microsoft", id="a graph in two parts"),
        # A tag of 35 bits, of which a parser with 32 sees field 7, and one with 64 another.
        pytest.param(
            part(7, b"") + b"\xba\x80\x80\x80\x10" + EVIL[1:], "a field 536870919", id="a tag"
        ),
        pytest.param(part(7, b"") + b"\x0b\x0c", "wire type 3", id="a group"),
        pytest.param(part(7, b"") + b"\x00\x00", "a field 0", id="field 0"),
        pytest.param(part(7, b"", size=1), "a field 7 that ends at byte 7 of 6", id="truncated"),
        pytest.param(b"\x08" + b"\xff" * 11, "a number without an end", id="a number"),
        pytest.param(b"\x12\x02\x00\x00ORTM", "onnxruntime's own format", id="another format"),
    ],
)
def test_bytes_that_parsers_could_read_in_two_ways_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(GraphError, match=reason):
        check_graph(content, None)


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare every field of ours with the same field of ONNX's message."""
    for field in ours.DESCRIPTOR.fields:
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if field.message_type is None:
            assert mine == (other.encode() if isinstance(other, str) else other)
        elif field.is_repeated:
            assert len(mine) == len(other)
            for pair in zip(mine, other, strict=True):
                assert_same(*pair)
        else:
            assert ours.HasField(field.name) == theirs.HasField(field.name)
            if ours.HasField(field.name):
                assert_same(mine, other)


def test_the_declaration_is_onnxs() -> None:
    ours = read_outline(part(7, b"")).DESCRIPTOR.file
    theirs = onnx.ModelProto.DESCRIPTOR.file
    for name, message in ours.message_types_by_name.items():
        other = theirs.message_types_by_name[name]
        for field in message.fields:
            same = other.fields_by_name[field.name]
            assert (field.number, field.is_repeated) == (same.number, same.is_repeated)
            assert (field.message_type is None) == (same.message_type is None)
        for enum in message.enum_types:
            values = {value.name: value.number for value in enum.values}
            known = other.enum_types_by_name[enum.name].values
            assert values == {value.name: value.number for value in known}


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Change a file somewhere: a byte, a piece taken out, put in twice, or moved."""
    found = bytearray(content)
    for _ in range(rng.integers(1, 3)):
        start, end = sorted(int(i) for i in rng.integers(0, len(found), 2))
        piece = found[start : min(end, start + 40)]
        match rng.integers(6):
            case 0:
                del found[start : start + len(piece)]
            case 1:
                found[start:start] = piece
            case 2:
                found[end:end] = piece
            case _:
                found[start] = int(rng.integers(256))
    return bytes(found)


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_file_is_refused_or_seen_as_onnx_sees_it(repository: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = onnx.load(repository / STATE_DICTS[seed].name / "1" / "model.onnx")
    for weight in model.graph.initializer:
        weight.ClearField("raw_data")  # of which nothing is looked at
    content = model.SerializeToString()
    assert_same(read_outline(content), model)
    seen = 0
    for _ in range(200):
        changed = mutated(content, rng)
        try:
            ours = read_outline(changed)
        except GraphError:
            continue
        try:
            theirs = onnx.ModelProto.FromString(changed)
        except google.protobuf.message.DecodeError:
            continue
        try:
            assert_same(ours, theirs)
        except UnicodeDecodeError:  # ONNX's names are text
            continue
        seen += 1
        check(changed)
    assert seen > 10


def check(content: bytes) -> None:
    """Let a file pass or be refused in a line, but not fail in another way."""
    reason = ""
    try:
        check_graph(content, 100)
    except BundleError as error:
        reason = str(error)
    assert "\n" not in reason
    assert len(reason) < 1000


@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_pass_or_are_refused(repository: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = (repository / STATE_DICTS[seed].name / "1" / "model.onnx").read_bytes()
    for length in rng.integers(0, 300, 300):
        check(rng.bytes(length))
        check(part(7, part(1, rng.bytes(length))))
    for end in rng.integers(0, len(content), 30):
        check(content[:end])
    for _ in range(100):
        check(mutated(content, rng))
