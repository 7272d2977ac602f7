"""The way to the servers: addresses, and what gRPC does by itself on it.

Requests are spread over every address and sent to those that say they are ready; what one of them
leaves unanswered (UNAVAILABLE, CANCELLED) is asked of another; calls wait for a server that is not
up yet, as long as they may. gRPC does all of it, as `service_config` says. Nothing here connects,
but for finding out why no server has answered.

gRPC does not survive a fork. Channels that are open in a process stay untouched in its children,
because they share its connections; a child opens channels of its own, with connections of its own.
"""

import ipaddress
import json
import os
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import grpc
import grpc.aio

from protos import inference_pb2 as pb
from serving.client.credentials import Bearer, Tls, Token
from serving.client.errors import ClientError, Forked, TimedOut, WrongSetting, never_reached
from serving.client.errors import translated as translated_error
from serving.client.handshake import Endpoint, find_tls_fault

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
INFER = f"/{SERVICE}/ModelInfer"

_RETRIES = {
    "maxAttempts": 4,
    "initialBackoff": "0.02s",
    "maxBackoff": "0.5s",
    "backoffMultiplier": 2,
    # CANCELLED, too: gRPC's server ends a call with it that comes in the moment in which it stops,
    # which a balancer without health checks passes on. A call that is cancelled here is over.
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A connection that is dead without having said so is found out, also while nothing is asked:
    # the watch of a server's health is a call, too. Our server takes pings that are 20 seconds
    # apart; one that takes fewer ends the connection once, after which gRPC sends fewer.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # By default a server that was away is looked for again after up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
_URI = re.compile(r"(?P<scheme>dns|ipv4|ipv6|unix|unix-abstract|xds):(//[^/]*/)?(?P<path>.*)")
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\[\]:/\s]+):(?P<port>[0-9]{1,5})")


def service_config() -> dict[str, Any]:
    """Make gRPC's configuration of a client of several servers.

    It has no deadline: gRPC would take it for the most that a call may ask for.
    """
    return {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": ""},
        "methodConfig": [
            {"name": [{"service": SERVICE}], "waitForReady": True, "retryPolicy": _RETRIES}
        ],
        # While more than about a tenth of the calls fail, nothing is asked twice.
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
    }


@dataclass(frozen=True)
class Connection:
    """A way to one server or several, not taken yet.

    Args:
        target: As gRPC names it.
        where: As the caller named it, for messages.
        endpoints: Hosts and ports in it, where it has some.
        tls: How the servers are recognised; None without TLS.
        name: What their certificates must be for, if that is not the host.
        credentials: Of TLS, with the token; None without TLS.
        options: Of the channel.
        token: What goes with every call.
    """

    target: str
    where: str
    endpoints: tuple[Endpoint, ...]
    tls: Tls | None
    name: str | None
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, Any], ...]
    token: Token | None

    def open(self, *, alone: bool = False) -> grpc.Channel:
        """Make a channel, which connects at the first call.

        Args:
            alone: Whether it is to have connections of its own; others share theirs.
        """
        options = self.options + (_OWN_CONNECTION if alone or _is_forked() else ())
        if self.credentials is None:
            channel = grpc.insecure_channel(self.target, options)
        else:
            channel = grpc.secure_channel(self.target, self.credentials, options)
        _channels.add(channel)
        return channel

    def open_aio(self) -> grpc.aio.Channel:
        """Make a channel for the event loop that runs now. `close_aio` closes it.

        Raises:
            Forked: Another was open in the process that this one was forked from.
        """
        if _lost:
            raise Forked(
                f"{self.where}: an AsyncKanClient was open when this process was forked, which "
                "gRPC's event loops do not survive; close it before the fork, use KanClient here, "
                "or start the process with multiprocessing's 'spawn'"
            )
        options = self.options + (_OWN_CONNECTION if _is_forked() else ())
        if self.credentials is None:
            channel = grpc.aio.insecure_channel(self.target, options)
        else:
            channel = grpc.aio.secure_channel(self.target, self.credentials, options)
        _aio_channels.add(channel)
        return channel

    def translated(self, error: grpc.RpcError, model: str = "") -> ClientError:
        """Describe what a call has ended with; see errors.py."""
        return translated_error(error, self.where, model, has_token=self.token is not None)

    def never_reached(self, error: TimedOut, reason: grpc.RpcError, timeout_s: float) -> TimedOut:
        """Describe why no server has ever answered. This connects, and waits.

        Args:
            error: What is known without it.
            reason: What a call has ended with that did not wait.
            timeout_s: Time for one connection, in seconds.
        """
        return never_reached(error, self.translated(reason), self.tls_fault(timeout_s))

    def tls_fault(self, timeout_s: float) -> str | None:
        """Find the reason why TLS, or its absence, keeps the client from a server."""
        return find_tls_fault(self.endpoints, self.tls, self.name, timeout_s)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Give what goes with the next call beside what gRPC sends itself.

        Raises:
            WrongSetting: The token cannot be read, which gRPC would call an absent server.
        """
        found = self.token.metadata() if self.token is not None else ()
        return found if self.credentials is None else ()


_channels: WeakSet[grpc.Channel] = WeakSet()
_aio_channels: WeakSet[grpc.aio.Channel] = WeakSet()
_importer = os.getpid()
_inherited: list[object] = []
_lost = False


async def close_aio(channel: grpc.aio.Channel) -> None:
    """Close a channel of `Connection.open_aio`, in its event loop."""
    await channel.close()
    _aio_channels.discard(channel)


def _is_forked() -> bool:
    """Whether this process may share memory with another that has used gRPC."""
    return os.getpid() != _importer


def _keep_inherited() -> None:
    """Keep a parent's channels, because to let go of one may end the parent's connections."""
    global _lost
    _inherited.extend([*_channels, *_aio_channels])
    _lost = _lost or bool(_aio_channels)


os.register_at_fork(after_in_child=_keep_inherited)


def connection_to(
    addresses: str | Sequence[str],
    *,
    tls: Tls | None = None,
    token: str | None = None,
    token_file: str | Path | None = None,
    only_ready: bool = True,
) -> Connection:
    """Find out how servers are to be reached.

    Args:
        addresses: `host:port`, several of them (in a list, or with commas between), or a target as
            gRPC writes it, such as `dns:///name:port` with every address of a name. A single name
            is looked up again when connections end; the names of several are looked up once, now.
        tls: How to recognise them; None speaks without TLS.
        token: A bearer token.
        token_file: A file with one, read at every call.
        only_ready: Whether calls wait for servers that say they are ready, and go to these alone.

    Raises:
        WrongSetting: An address cannot be used, TLS cannot be had this way, or a token would go
            over the network in clear.
    """
    places = _places(addresses)
    if token is not None and token_file is not None:
        raise WrongSetting("expected a token or a file with one, found both; leave one out")
    shown: Token | None = None
    if token is not None or token_file is not None:
        shown = Token(token, Path(token_file) if token_file is not None else None)
        shown.metadata()  # what is wrong with it is told now
        if tls is None and not all(map(_is_this_machine, places.hosts)):
            raise WrongSetting(
                f"{places.where}: a token is sent over TLS, or to this machine alone, because "
                "anybody on the way could read and use it; give a CA (ca, --ca)"
            )
    options = _OPTIONS
    if only_ready:
        options += (("grpc.service_config", json.dumps(service_config())),)
    name = (tls.server_name or _common_name(places)) if tls is not None else None
    if name is not None:
        options += (("grpc.ssl_target_name_override", name),)
    credentials = tls.channel_credentials() if tls is not None else None
    if credentials is not None and shown is not None:
        bearer = grpc.metadata_call_credentials(Bearer(shown))
        credentials = grpc.composite_channel_credentials(credentials, bearer)
    return Connection(
        places.target, places.where, places.endpoints, tls, name, credentials, options, shown
    )


def each_of(addresses: str) -> list[str]:
    """Part addresses with commas between into single ones; a target as gRPC writes it is one."""
    return [addresses] if _as_target(addresses) else addresses.split(",")


def _as_target(addresses: str) -> re.Match[str] | None:
    uri = _URI.fullmatch(addresses.strip())
    return uri if uri and not uri["path"].isdigit() else None  # a host may be called dns


@dataclass(frozen=True)
class _Places:
    """Where servers are: for gRPC, for messages, and host by host; no host is a file."""

    target: str
    where: str
    hosts: tuple[str, ...]
    endpoints: tuple[Endpoint, ...]


def _places(addresses: str | Sequence[str]) -> _Places:
    if isinstance(addresses, str):
        uri = _as_target(addresses)
        if uri:
            if uri["scheme"].startswith("unix"):
                return _Places(addresses, addresses, (), ())
            hosts = tuple(place.rpartition(":")[0] for place in uri["path"].split(","))
            with_ports = map(_HOST_PORT.fullmatch, uri["path"].split(","))
            endpoints = tuple(_endpoint(each) for each in with_ports if each)
            return _Places(addresses, addresses, hosts, endpoints)
        addresses = addresses.split(",")
    given: Any = addresses  # not everybody's types are checked
    listed = [_host_port(each) for each in (given if isinstance(given, Iterable) else [given])]
    if not listed:
        raise WrongSetting("expected at least one address, found none; give host:port")
    where = ",".join(f"{host}:{port}" for host, port in listed)
    hosts = tuple(host for host, _ in listed)
    endpoints = tuple((host.strip("[]"), port) for host, port in listed)
    if len(listed) == 1 and _numeric(hosts[0]) is None:
        return _Places(f"dns:///{where}", where, hosts, endpoints)
    found = [(_looked_up(host), port) for host, port in listed]
    versions = {address.version for address, _ in found}
    if len(versions) > 1:
        raise WrongSetting(
            f"{where}: expected addresses all of IPv4 or all of IPv6, found both; give a name that "
            "stands for all of them, as dns:///name:port"
        )
    if versions == {4}:
        target = "ipv4:" + ",".join(f"{ip}:{port}" for ip, port in found)
    else:
        target = "ipv6:" + ",".join(f"[{ip}]:{port}" for ip, port in found)
    return _Places(target, where, hosts, endpoints)


def _endpoint(found: re.Match[str]) -> Endpoint:
    return found["host"].strip("[]"), int(found["port"])


def _host_port(address: object) -> tuple[str, int]:
    text = address.strip() if isinstance(address, str) else ""
    found = _HOST_PORT.fullmatch(text)
    if found is None or not 0 < int(found["port"]) < 2**16:
        shown = text[:100] if isinstance(address, str) else address
        raise WrongSetting(
            f"address {shown!r}: expected host:port, such as 127.0.0.1:8001 or [::1]:8001"
        )
    return found["host"], int(found["port"])


def _numeric(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _looked_up(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Find the one address that a host stands for: IPv4 if there are both."""
    numeric = _numeric(host)
    if numeric is not None:
        return numeric
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise WrongSetting(f"{host}: no address of that name: {error.strerror}") from error
    addresses = sorted(str(info[4][0]) for info in found)
    return ipaddress.ip_address(min(addresses, key=lambda address: ":" in address))


def _is_this_machine(host: str) -> bool:
    numeric = _numeric(host)
    return host == "localhost" if numeric is None else numeric.is_loopback


def _common_name(places: _Places) -> str | None:
    """Find what the certificates of several servers are for; None lets gRPC take the address's."""
    if len(places.hosts) < 2:
        return None
    if len(set(places.hosts)) > 1:
        raise WrongSetting(
            f"{places.where}: expected the name that the certificates of all these servers are "
            "for, found none; give it (server_name, --server-name)"
        )
    return places.hosts[0].strip("[]")
