"""`python -m tests.fuzzing`: good and malformed requests, mixed, at a server of their own.

Each must end with a status that docs/wire.md names for it, and each good one with the right answer;
after all of them the server is the same process and has grown by less than 20 MB since it was warm.
`make fuzz-wire` sends a million, `make test` some thousands.
"""

import argparse
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from protos import inference_pb2 as pb
from tests.conftest import STATE_DICTS
from tests.security import bearer, write_access
from tests.wire import raw_output, raw_request, typed_output, typed_request

GOLDEN = STATE_DICTS[0]
SERVICE = "/inference.GRPCInferenceService"
MAX_MESSAGE_BYTES = 2**20
MOST_GROWTH_MB = 20
TOKEN = "good"
_DEADLINE_S = 60.0
_WARM = 0.2  # of the requests

_C = grpc.StatusCode
_TOO_LATE = {_C.OK, _C.DEADLINE_EXCEEDED, _C.RESOURCE_EXHAUSTED}  # the last: no room in time


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        content: Its message.
        codes: How it may end.
        check: Looks at the answer, if it is to have one.
        method: Which is called.
        metadata: Sent with it.
        timeout_s: How long the answer is wanted.
        compression: Of the message.
        cancel: Whether it is cancelled at once.
    """

    content: bytes
    codes: frozenset[grpc.StatusCode]
    check: Callable[[bytes], bool] = lambda answer: True
    method: str = "ModelInfer"
    metadata: tuple[tuple[str, str | bytes], ...] = bearer(TOKEN)
    timeout_s: float = _DEADLINE_S
    compression: grpc.Compression = grpc.Compression.NoCompression
    cancel: bool = False


def cases(seed: int) -> Iterator[tuple[str, Case]]:
    """Draw cases for ever, each with the name of its kind."""
    draw = random.Random(seed)
    x, y64 = GOLDEN.x, GOLDEN.y64

    def rows() -> tuple[Any, Any]:
        chosen = [draw.randrange(len(x)) for _ in range(draw.choice((0, 1, 1, 1, 7, 40)))]
        return x[chosen], y64[chosen]

    def is_right(found: Any, wanted: Any) -> bool:
        return found.shape == wanted.shape and bool(
            (np.abs(found - wanted) <= 1e-5 * np.maximum(1, np.abs(wanted))).all()
        )

    def good(request: pb.ModelInferRequest, wanted: Any, **how: Any) -> Case:
        typed = not request.raw_input_contents and len(wanted) > 0

        def check(answer: bytes) -> bool:
            response = pb.ModelInferResponse.FromString(answer)
            return is_right((typed_output if typed else raw_output)(response), wanted)

        return Case(request.SerializeToString(), frozenset({_C.OK}), check, **how)

    def raw(**how: Any) -> Case:
        some, wanted = rows()
        return good(raw_request(some, id=str(draw.random())), wanted, **how)

    def typed() -> Case:
        chosen = draw.randrange(len(x))
        return good(typed_request(x[chosen : chosen + 1]), y64[chosen : chosen + 1])

    def compressed() -> Case:
        return raw(compression=draw.choice((grpc.Compression.Gzip, grpc.Compression.Deflate)))

    def in_a_stream() -> Case:
        some, wanted = rows()

        def check(answer: bytes) -> bool:
            found = pb.ModelStreamInferResponse.FromString(answer)
            return not found.error_message and is_right(raw_output(found.infer_response), wanted)

        content = raw_request(some).SerializeToString()
        return Case(content, frozenset({_C.OK}), check, "ModelStreamInfer")

    def refused(change: Callable[[pb.ModelInferRequest], Any], code: grpc.StatusCode) -> Case:
        request = raw_request(x[: draw.randrange(1, 5)])
        change(request)
        return Case(request.SerializeToString(), frozenset({code}))

    def wrong_tensor() -> Case:
        def change(request: pb.ModelInferRequest) -> None:
            tensor = request.inputs[0]
            huge = draw.choice((2**31, 2**40, 2**62, -1, -(2**63), 2**63 - 1))
            draw.choice(
                (
                    lambda: tensor.shape.append(1),
                    lambda: tensor.shape.pop(),
                    lambda: tensor.shape.__setitem__(0, huge),
                    lambda: tensor.shape.__setitem__(1, huge),
                    lambda: setattr(tensor, "name", draw.choice(("", "x", "input\0", "é" * 999))),
                    lambda: setattr(tensor, "datatype", draw.choice(("", "FP64", "BYTES", "fp32"))),
                    lambda: request.inputs.add(name="input", datatype="FP32", shape=[1, 4]),
                    lambda: request.ClearField("inputs"),
                    lambda: request.raw_input_contents.append(b""),
                    lambda: request.raw_input_contents.__setitem__(0, b"123"),
                    lambda: tensor.contents.fp32_contents.append(1.0),
                    lambda: request.outputs.add(name="none"),
                    lambda: [request.outputs.add(name="output") for _ in range(2)],
                    lambda: setattr(request.parameters["kanserve_details"], "string_param", "yes"),
                )
            )()

        return refused(change, _C.INVALID_ARGUMENT)

    def unknown_model() -> Case:
        names = (
            "",
            "none",
            "../" + GOLDEN.name,
            GOLDEN.name + "\0",
            "x" * 9999,
            GOLDEN.name + "/1",
        )
        name = draw.choice(names)
        return refused(lambda request: setattr(request, "model_name", name), _C.NOT_FOUND)

    def unknown_version() -> Case:
        version = draw.choice(("2", "-1", "01", "1.0", "one", "9" * 99, " 1"))
        return refused(lambda request: setattr(request, "model_version", version), _C.NOT_FOUND)

    def no_message() -> Case:
        content = draw.randbytes(draw.randrange(1, 300))
        try:
            pb.ModelInferRequest.FromString(content)
        except DecodeError:
            return Case(content, frozenset({_C.INVALID_ARGUMENT}))
        return Case(content, frozenset({_C.INVALID_ARGUMENT, _C.NOT_FOUND}))

    def mutated() -> Case:
        content = bytearray(raw_request(x[:3], id="i").SerializeToString())
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(content))
            draw.choice(
                (
                    lambda place=place: content.__setitem__(place, draw.randrange(256)),
                    lambda place=place: content.__delitem__(slice(place, place + 1)),
                    lambda place=place: content.insert(place, draw.randrange(256)),
                )
            )()
        return Case(bytes(content), frozenset({_C.OK, _C.INVALID_ARGUMENT, _C.NOT_FOUND}))

    def truncated() -> Case:
        content = raw_request(x[:3]).SerializeToString()
        some = content[: draw.randrange(1, len(content))]
        return Case(some, frozenset({_C.INVALID_ARGUMENT, _C.NOT_FOUND}))

    def too_large() -> Case:
        return Case(bytes(MAX_MESSAGE_BYTES + 1), frozenset({_C.RESOURCE_EXHAUSTED}))

    def bomb() -> Case:
        return Case(
            bytes(16 * MAX_MESSAGE_BYTES),
            frozenset({_C.RESOURCE_EXHAUSTED}),
            compression=grpc.Compression.Gzip,
        )

    def much_metadata() -> Case:
        metadata = (*bearer(TOKEN), ("x-much", "x" * 20_000))
        codes = frozenset({_C.RESOURCE_EXHAUSTED})
        return Case(raw_request(x[:1]).SerializeToString(), codes, metadata=metadata)

    def odd_metadata() -> Case:
        odd = (
            ("x-odd-bin", draw.randbytes(50)),
            ("traceparent", "00-zz"),
            ("x-request-id", "é"[:0]),
        )
        return raw(metadata=(*bearer(TOKEN), *odd))

    def no_token() -> Case:
        metadata = draw.choice(((), bearer(""), bearer("bad"), (("authorization", TOKEN),)))
        codes = frozenset({_C.UNAUTHENTICATED})
        return Case(raw_request(x[:1]).SerializeToString(), codes, metadata=metadata)

    def not_allowed() -> Case:
        request = pb.RepositoryModelLoadRequest(model_name=GOLDEN.name).SerializeToString()
        return Case(request, frozenset({_C.PERMISSION_DENIED}), method="RepositoryModelLoad")

    def unknown_method() -> Case:
        method = draw.choice(("Nothing", "SystemSharedMemoryStatus", "ModelInfer2"))
        return Case(b"", frozenset({_C.UNIMPLEMENTED}), method=method)

    def hurried() -> Case:
        return raw_with(_TOO_LATE, timeout_s=draw.choice((1e-6, 1e-4, 1e-3)))

    def cancelled() -> Case:
        return raw_with({_C.OK, _C.CANCELLED}, cancel=True)

    def raw_with(codes: set[grpc.StatusCode], **how: Any) -> Case:
        case = raw(**how)
        return Case(**(vars(case) | {"codes": frozenset(codes)}))

    kinds: dict[Callable[[], Case], float] = {
        raw: 30, typed: 5, compressed: 5, in_a_stream: 5, wrong_tensor: 12, unknown_model: 4,
        unknown_version: 4, no_message: 6, mutated: 8, truncated: 4, too_large: 0.2, bomb: 0.05,
        much_metadata: 1, odd_metadata: 2, no_token: 4, not_allowed: 1, unknown_method: 2,
        hurried: 3, cancelled: 4,
    }  # fmt: skip
    while True:
        (kind,) = draw.choices(list(kinds), list(kinds.values()))
        yield kind.__name__, kind()


@dataclass
class Found:
    """What came of it."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, case: Case, answer: bytes | None, code: grpc.StatusCode) -> None:
        with self.lock:
            self.counts[kind, code.name] += 1
            wrong = code not in case.codes
            if wrong or (answer is not None and not case.check(answer)):
                told = f"{kind}: {code.name}, expected {sorted(c.name for c in case.codes)}"
                self.faults.append(f"{told}: {case.content[:200].hex()}")


def send(address: str, number: int, seed: int, threads: int, found: Found) -> None:
    """Send so many cases and take down how they end."""

    def work(share: int, own_seed: int) -> None:
        drawn = cases(own_seed)
        with grpc.insecure_channel(
            address, [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            for _ in range(share):
                kind, case = next(drawn)
                answer, code = _call(channel, case)
                found.add(kind, case, answer, code)

    shares = [number // threads + (i < number % threads) for i in range(threads)]
    workers = [
        threading.Thread(target=work, args=(share, 1000 * seed + i))
        for i, share in enumerate(shares)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _call(channel: grpc.Channel, case: Case) -> tuple[bytes | None, grpc.StatusCode]:
    how: dict[str, Any] = {
        "metadata": case.metadata,
        "timeout": case.timeout_s,
        "compression": case.compression,
    }
    method = f"{SERVICE}/{case.method}"
    try:
        if case.method == "ModelStreamInfer":
            stream: Any = channel.stream_stream(method)
            (answer,) = stream(iter([case.content]), **how)
            return answer, _C.OK
        unary: Any = channel.unary_unary(method)
        call = unary.future(case.content, **how)
        if case.cancel:
            call.cancel()
        return call.result(), _C.OK
    except grpc.FutureCancelledError:
        return None, _C.CANCELLED
    except grpc.RpcError as error:
        return None, error.code()


def settings(folder: Path) -> list[str]:
    """Give the flags of a server that all this is sent to."""
    access = write_access(folder / "access.toml", tokens={"inference": [TOKEN], "admin": ["other"]})
    return ["--access", str(access), "--max-message-bytes", str(MAX_MESSAGE_BYTES)]


def memory_mb(pid: int) -> float:
    """Tell what a process holds."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Send a million requests, and tell what came of them."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from export import export_checkpoint
    from export.report import Report
    from tests.processes import serving

    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=main.__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--threads", type=int, default=8)
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    console.print(f"seed {arguments.seed}")
    found, held = Found(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quiet = Report(Console(file=(folder / "log").open("w")))
        export_checkpoint(GOLDEN.checkpoint, output=folder / "models", report=quiet)
        flags = ("--model-repository", folder / "models")
        with serving(*flags, *settings(folder)) as process, Progress(console=console) as progress:
            task = progress.add_task("requests", total=arguments.requests)
            step = max(1, arguments.requests // 100)
            for start in range(0, arguments.requests, step):
                number = min(step, arguments.requests - start)
                seed = arguments.seed + start
                send(process.address, number, seed, arguments.threads, found)
                held.append(memory_mb(process.popen.pid))
                progress.advance(task, number)
            alive = process.popen.poll() is None
    table = Table("kind", "status", "times")
    for (kind, code), count in sorted(found.counts.items()):
        table.add_row(kind, code, f"{count:,}")
    Console().print(table)
    warm = held[int(_WARM * len(held))]
    growth = held[-1] - warm
    print(f"{sum(found.counts.values()):,} requests, {len(found.faults)} ended otherwise than told")
    print(f"memory: {warm:.0f} MB when warm, {held[-1]:.0f} MB at the end, {max(held):.0f} MB most")
    for fault in found.faults[:20]:
        print(fault)
    return int(bool(found.faults) or not alive or growth > MOST_GROWTH_MB)


if __name__ == "__main__":
    sys.exit(main())
