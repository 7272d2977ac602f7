"""Addresses as callers write them, and the targets that gRPC connects to.

A token without TLS goes to this machine alone. For it no name, no resolver and no control plane
decides where a connection leads: its targets are literal loopback addresses, and Unix sockets.
Nothing is sent here; one connection finds out which loopback address of `localhost` has a server.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from serving.client.errors import WrongSetting
from serving.client.handshake import Endpoint

_URI = re.compile(
    r"(?P<scheme>dns|ipv4|ipv6|unix|unix-abstract|xds):(//(?P<authority>[^/]*)/)?(?P<path>.*)"
)
# Of what is no URI gRPC makes the name of a host: "unix:8001 x" is port 8001 of a host called unix.
_URI_PATH = re.compile(r"(?:[\w.~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})+", re.ASCII)
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\[\]:/\s]+):(?P<port>[0-9]{1,5})")

_PROBE_S = 0.5  # for a connection to this machine to be accepted

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Target:
    """One server or several, as a channel connects to them.

    Attributes:
        uri: As gRPC names it.
        where: As the caller named it, for messages.
        hosts: Host by host, in brackets as written; empty for a Unix socket.
        endpoints: Hosts and ports, where there are some.
    """

    uri: str
    where: str
    hosts: tuple[str, ...]
    endpoints: tuple[Endpoint, ...]


def parse_target(addresses: str | Sequence[str], *, only_loopback: bool) -> Target:
    """Find what gRPC is to connect to.

    Args:
        addresses: `host:port`, several of them (in a list, or with commas between), or a target as
            gRPC writes it.
        only_loopback: Whether a token goes there in clear.

    Raises:
        WrongSetting: An address cannot be used, or leads, or could lead, to another machine and
            `only_loopback` is set.
    """
    where = addresses
    if isinstance(addresses, str):
        where = addresses = addresses.strip()
        uri = _as_target(addresses)
        if uri:
            if uri["scheme"].startswith("unix"):
                if only_loopback and not _URI_PATH.fullmatch(uri["path"]):
                    raise _not_in_clear(addresses)
                # Who may connect to a file, its permissions say; who may take an abstract name, as
                # who may take a port of a loopback address, nothing does. Both stay on the machine.
                return Target(addresses, addresses, (), ())
            if not only_loopback:
                return _uri_target(addresses, uri["path"].split(","))
            if uri["scheme"] == "xds" or uri["authority"]:
                # A control plane, or a name server that the target names, says where that is.
                raise _not_in_clear(addresses)
            addresses = uri["path"]
        addresses = addresses.split(",")
    given: Any = addresses  # not everybody's types are checked
    listed = [_host_port(each) for each in (given if isinstance(given, Iterable) else [given])]
    if not listed:
        raise WrongSetting("expected at least one address, found none; give host:port")
    if not isinstance(where, str) or not _as_target(where):
        where = ",".join(f"{host}:{port}" for host, port in listed)
    hosts = tuple(host for host, _ in listed)
    if only_loopback:
        found = _loopback_endpoints(listed, where)
        endpoints = tuple((str(ip), port) for ip, port in found)
        return Target(_literal(found, where), where, hosts, endpoints)
    endpoints = tuple((host.strip("[]"), port) for host, port in listed)
    if len(listed) == 1 and _numeric(hosts[0]) is None:
        return Target(f"dns:///{where}", where, hosts, endpoints)
    found = [(_looked_up(host)[0], port) for host, port in listed]
    return Target(_literal(found, where), where, hosts, endpoints)


def each_of(addresses: str) -> list[str]:
    """Part addresses with commas between into single ones; a target as gRPC writes it is one."""
    return [addresses] if _as_target(addresses) else addresses.split(",")


def common_name(target: Target) -> str | None:
    """Find what the certificates of several servers are for; None lets gRPC take the address's.

    Raises:
        WrongSetting: They have several names.
    """
    if len(target.hosts) < 2:
        return None
    if len(set(target.hosts)) > 1:
        raise WrongSetting(
            f"{target.where}: expected the name that the certificates of all these servers are "
            "for, found none; give it (server_name, --server-name)"
        )
    return target.hosts[0].strip("[]")


def _as_target(addresses: str) -> re.Match[str] | None:
    uri = _URI.fullmatch(addresses.strip())
    return uri if uri and not uri["path"].isdigit() else None  # a host may be called dns


def _uri_target(uri: str, listed: list[str]) -> Target:
    hosts = tuple(each.rpartition(":")[0] for each in listed)
    with_ports = [found for found in map(_HOST_PORT.fullmatch, listed) if found]
    endpoints = tuple((found["host"].strip("[]"), int(found["port"])) for found in with_ports)
    return Target(uri, uri, hosts, endpoints)


def _host_port(address: object) -> tuple[str, int]:
    text = address.strip() if isinstance(address, str) else ""
    found = _HOST_PORT.fullmatch(text)
    if found is None or not 0 < int(found["port"]) < 2**16:
        shown = text[:100] if isinstance(address, str) else address
        raise WrongSetting(
            f"address {shown!r}: expected host:port, such as 127.0.0.1:8001 or [::1]:8001"
        )
    return found["host"], int(found["port"])


def _literal(found: list[tuple[_Address, int]], where: str) -> str:
    """Write numeric addresses as a target."""
    versions = {address.version for address, _ in found}
    if len(versions) > 1:
        raise WrongSetting(
            f"{where}: expected addresses all of IPv4 or all of IPv6, found both; give a name that "
            "stands for all of them, as dns:///name:port"
        )
    if versions == {4}:
        return "ipv4:" + ",".join(f"{ip}:{port}" for ip, port in found)
    return "ipv6:" + ",".join(f"[{ip}]:{port}" for ip, port in found)


def _numeric(host: str) -> _Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _looked_up(host: str) -> list[_Address]:
    """List the addresses that a host stands for, IPv4 first."""
    numeric = _numeric(host)
    if numeric is not None:
        return [numeric]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise WrongSetting(f"{host}: no address of that name: {error.strerror}") from error
    addresses = sorted({str(info[4][0]) for info in found}, key=lambda text: (":" in text, text))
    return [ipaddress.ip_address(address) for address in addresses]


def _loopback_endpoints(listed: list[tuple[str, int]], where: str) -> list[tuple[_Address, int]]:
    """Choose the loopback addresses that a token may go to in clear.

    A target of gRPC is all of IPv4 or all of IPv6. Where both are possible, because all hosts are
    `localhost`, IPv4 is taken unless IPv6 alone has a server now.

    Args:
        listed: Hosts and ports.
        where: As the caller named them, for messages.

    Raises:
        WrongSetting: A host has no loopback address.
    """
    found = [(_loopbacks(host, where), port) for host, port in listed]
    alternatives = []
    for version in (4, 6):
        chosen = [
            (next((ip for ip in ips if ip.version == version), None), port) for ips, port in found
        ]
        complete = [(ip, port) for ip, port in chosen if ip is not None]
        if len(complete) == len(listed):
            alternatives.append(complete)
    if not alternatives:
        return [(ips[0], port) for ips, port in found]
    if len(alternatives) > 1:
        for endpoints in alternatives:
            if any(_accepts(ip, port) for ip, port in endpoints):
                return endpoints
    return alternatives[0]


def _loopbacks(host: str, where: str) -> list[_Address]:
    """List the loopback addresses of a host, IPv4 first.

    Raises:
        WrongSetting: There is none.
    """
    numeric = _numeric(host)
    if numeric is None and host.lower() != "localhost":
        raise _not_in_clear(where)
    addresses = [numeric] if numeric is not None else _looked_up("localhost")
    loopbacks = [ip for ip in addresses if ip.is_loopback and "%" not in str(ip)]
    if not loopbacks:
        raise _not_in_clear(where)
    return loopbacks


def _accepts(ip: _Address, port: int) -> bool:
    """Whether a connection to a loopback address is accepted now."""
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(_PROBE_S)
            probe.connect((str(ip), port))
    except OSError:
        return False
    return True


def _not_in_clear(where: str) -> WrongSetting:
    return WrongSetting(
        f"{where}: a token is sent over TLS, or to this machine alone (a loopback address such as "
        "127.0.0.1:8001, localhost:8001, or a Unix socket), because anybody on the way could read "
        "and use it; give a CA (ca, --ca), or such an address"
    )
