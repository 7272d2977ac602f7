"""Where a server listens: the address that a name stands for, the port, and telling others of both.

This module knows sockets and files, not gRPC.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from serving.errors import StartupError
from serving.settings import Settings

_NOTHING_SERVED = (
    "no version could be served, with --workers not by each of them: model_refused says of each "
    "why, if it was not left out by --version-policy; mend that and start again, or start with "
    "--model-control poll, which looks again when files change"
)

_log = structlog.get_logger()


def resolve(host: str) -> str:
    """Find the one address that a host stands for: IPv4 if there are both, as for localhost.

    Raises:
        StartupError: There is none.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError(f"--host {host}: no address of that name: {error.strerror}") from error
    addresses = sorted(info[4][0] for info in found if isinstance(info[4][0], str))
    return min(addresses, key=lambda address: ":" in address)


def joined(address: str, port: int) -> str:
    """Write a numeric address and a port as one."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def port_of(joined_address: str) -> int:
    """Read the port that `joined` has written."""
    return int(joined_address.rpartition(":")[2])


def cannot_listen(host: str, port: int, use: str) -> StartupError:
    """Say that the port `--USE-port` cannot be had."""
    return StartupError(
        f"cannot listen on {host}:{port}: the port is taken or the address is not this machine's; "
        f"choose another --{use}-port (0 takes a free one) or --host"
    )


@contextmanager
def held_port(host: str, address: str, port: int, use: str) -> Iterator[int]:
    """Hold a port for processes that listen on it together, without listening.

    Args:
        host: As it was asked for, to name it in an error.
        address: Its numeric address.
        port: 0 takes a free one.
        use: What it is for: grpc or health.

    Yields:
        The port taken.

    Raises:
        StartupError: It cannot be had: somebody listens there.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as alone, socket.socket(family) as shared:
        try:
            # A port that others share already is not free, so it must first be had alone.
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((address, port))
            port = alone.getsockname()[1]
            alone.close()
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            shared.bind((address, port))
        except OSError as error:
            raise cannot_listen(host, port, use) from error
        yield port


def announce(settings: Settings, *, ready: bool, **found: Any) -> None:
    """Log where the server listens, and write it to the address file if there is to be one.

    A server that serves nothing and will not look again stays up, for whoever asks it why; so what
    to do is in the log.

    Args:
        settings: Of the server.
        ready: Whether it takes requests.
        found: The addresses `grpc`, `metrics` and `health`, and more for the log.

    Raises:
        StartupError: The file cannot be written.
    """
    file = settings.address_file
    if file is not None:
        try:
            taken = {name: found[name] for name in ("grpc", "metrics", "health") if found[name]}
            _write_whole(file, json.dumps(taken) + "\n")
        except OSError as error:
            raise StartupError(
                f"--address-file {file}: cannot be written: {error.strerror}"
            ) from error
    if settings.processes > 1:
        found["workers"] = settings.processes
    _log.info("listening", provider=settings.provider, ready=ready, **found)
    if not ready and settings.model_control == "none":
        _log.warning("nothing_served", remedy=_NOTHING_SERVED)


def withdraw(settings: Settings) -> None:
    """Take the address file away."""
    file = settings.address_file
    if file is not None and file.is_file():
        file.unlink()


def _write_whole(file: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing; a pipe or a device is written to."""
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    partial_file = file.with_name(f".{file.name}.partial")
    try:
        partial_file.write_text(text, encoding="utf-8")
        partial_file.replace(file)
    finally:
        partial_file.unlink(missing_ok=True)
