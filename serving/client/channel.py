"""The way to the servers, and what gRPC does by itself on it. Addresses are read in targets.py.

Requests are spread over every address and sent to those that say they are ready; what one of them
leaves unanswered (UNAVAILABLE, CANCELLED) is asked of another; calls wait for a server that is not
up yet, as long as they may. gRPC does all of it, as `service_config` says. Nothing here connects,
but for finding out why no server has answered.

gRPC does not survive a fork. Channels that are open in a process stay untouched in its children,
because they share its connections; a child opens channels of its own, with connections of its own.
"""

import json
import os
from collections.abc import Sequence
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
from serving.client.targets import common_name, parse_target

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
    # Not from DNS, which others answer: what is below is the whole configuration.
    ("grpc.service_config_disable_resolution", 1),
)
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
# Through a proxy (http_proxy, grpc_proxy, https_proxy) a connection to a loopback address would
# leave this machine. GRPC_ADDRESS_HTTP_PROXY counts in spite of the first option.
_NO_PROXY = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.address_http_proxy_enabled_addresses", ""),
)


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
    if token is not None and token_file is not None:
        raise WrongSetting("expected a token or a file with one, found both; leave one out")
    shown: Token | None = None
    if token is not None or token_file is not None:
        shown = Token(token, Path(token_file) if token_file is not None else None)
    in_clear = shown is not None and tls is None
    target = parse_target(addresses, only_loopback=in_clear)
    if shown is not None:
        shown.metadata()  # raises what is wrong with it
    options = _OPTIONS + (_NO_PROXY if in_clear else ())
    if only_ready:
        options += (("grpc.service_config", json.dumps(service_config())),)
    name = (tls.server_name or common_name(target)) if tls is not None else None
    if name is not None:
        options += (("grpc.ssl_target_name_override", name),)
    credentials = tls.channel_credentials() if tls is not None else None
    if credentials is not None and shown is not None:
        bearer = grpc.metadata_call_credentials(Bearer(shown))
        credentials = grpc.composite_channel_credentials(credentials, bearer)
    return Connection(
        target.uri, target.where, target.endpoints, tls, name, credentials, options, shown
    )
