"""`python -m tests.mutated`: mutated requests, read by our parser and by protobuf's, compared.

Requests of all kinds are mutated byte by byte, and as fields: dropped, repeated, moved, cut, with
lengths that are wrong. Whatever both take must mean the same.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError
from rich.progress import track

from protos import inference_pb2 as pb
from serving.wire_format import Parts, split_request


def requests(chance: random.Random) -> bytes:
    """Make a request as clients do."""
    request = pb.ModelInferRequest(model_name=chance.choice(["m", "digits", "ä" * 50, ""]))
    if chance.random() < 0.3:
        request.model_version = chance.choice(["1", "12345", "x"])
    if chance.random() < 0.5:
        request.id = chance.choice(["", "7", "request-" * 20, "\N{GRINNING FACE}"])
    for number in range(chance.choice([1, 1, 1, 2, 3])):
        rows = chance.choice([0, 1, 3, 40])
        tensor = request.inputs.add(name=f"x{number}", datatype="FP32", shape=[rows, 4])
        if chance.random() < 0.2:
            tensor.contents.fp32_contents.extend([0.5] * rows * 4)
        else:
            request.raw_input_contents.append(chance.randbytes(rows * 16))
    if chance.random() < 0.2:
        request.outputs.add(name="y")
    if chance.random() < 0.2:
        request.parameters["kanserve_details"].bool_param = True
    return request.SerializeToString()


def fields(content: bytes) -> list[bytes]:
    """Cut a message into its fields."""
    found, place = [], 0
    while place < len(content):
        length, end, shift = 0, place + 1, 0
        while True:
            length |= (content[end] & 0x7F) << shift
            end, shift = end + 1, shift + 7
            if content[end - 1] < 0x80:
                break
        found.append(content[place : end + length])
        place = end + length
    return found


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Change a message at some places."""
    for _ in range(chance.choice([0, 1, 1, 2, 5])):
        kind = chance.randrange(7)
        place = chance.randrange(len(content) or 1)
        if kind == 0:
            content = content[:place] + chance.randbytes(1) + content[place + 1 :]
        elif kind == 1:
            content = content[:place] + chance.randbytes(chance.randrange(4)) + content[place:]
        elif kind == 2:
            content = content[:place]
        elif kind == 3:
            content = content[:place] + content[place + chance.randrange(8) :]
        elif kind == 4:  # a length in more bytes than it needs
            content = content.replace(b"\x04", b"\x84\x00", 1)
        else:
            try:
                parts = fields(content)
            except IndexError:
                continue
            if kind == 5:
                chance.shuffle(parts)
            else:
                parts += chance.choices(parts, k=2) if parts else []
            content = b"".join(parts)
    return content


def compare(content: bytes) -> str:
    """Compare what both parsers find; return which case it was.

    Raises:
        AssertionError: They differ.
    """
    parts = split_request(content)
    try:
        expected = pb.ModelInferRequest.FromString(content)
    except DecodeError:
        # Ours leaves what is in a header to protobuf, which has parsed it once with tensors.
        if parts is not None:
            assert not _is_message(parts.header), content
        return "invalid"
    if parts is None:
        return "left to protobuf"
    header = pb.ModelInferRequest.FromString(parts.header)
    assert not header.raw_input_contents, content
    assert not header.id, content
    found = _together(header, parts, content)
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(
        deterministic=True
    ), content
    return "same"


def _is_message(content: bytes) -> bool:
    try:
        pb.ModelInferRequest.FromString(content)
    except DecodeError:
        return False
    return True


def _together(header: Any, parts: Parts, content: bytes) -> Any:
    header.id = parts.id
    header.raw_input_contents.extend(content[at : at + size] for at, size in parts.tensors)
    return header


def run(messages: int, seed: int) -> Counter[str]:
    """Compare so many messages; return how many there were of each case."""
    chance = random.Random(seed)
    return Counter(compare(mutated(requests(chance), chance)) for _ in range(messages))


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two parsers of requests."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutated", description=main.__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    found: Counter[str] = Counter()
    for part in track(range(100), "messages"):
        found += run(arguments.messages // 100, arguments.seed * 100 + part)
    print(dict(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
