"""Addresses and tokens: what is taken, and what is refused before anything is sent."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from serving.client import Tls, WrongSetting
from serving.client.channel import connection_to, service_config


@pytest.mark.parametrize(
    ("addresses", "target"),
    [
        ("127.0.0.1:8001", "ipv4:127.0.0.1:8001"),
        ("kan.example:8001", "dns:///kan.example:8001"),
        ("[::1]:8001", "ipv6:[::1]:8001"),
        ("10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (["[fe80::1]:1", "[fe80::2]:2"], "ipv6:[fe80::1]:1,[fe80::2]:2"),
        ("dns:///kan:8001", "dns:///kan:8001"),
        ("dns:8001", "dns:///dns:8001"),  # a host of that name
        ("ipv4:10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
        ("unix:/run/kan.sock", "unix:/run/kan.sock"),
    ],
)
def test_addresses_become_targets(addresses: str | list[str], target: str) -> None:
    assert connection_to(addresses).target == target


def test_names_in_a_list_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"a": ["fd00::1", "10.0.0.1"], "b": ["10.0.0.2"]}

    def look_up(host: str, *_: object, **__: object) -> list[Any]:
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(None, None, None, "", (address, 0)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert connection_to("a:1,b:2").target == "ipv4:10.0.0.1:1,10.0.0.2:2"
    with pytest.raises(WrongSetting, match="c: no address of that name"):
        connection_to("a:1,c:2")


@pytest.mark.parametrize(
    "addresses",
    [
        *("", "host", "host:", "host:0", "host:65536", "::1:8001", "http://h:1", [], "a:1,"),
        *(8001, [8001], None, b"127.0.0.1:1"),  # as of callers whose types nobody checks
    ],
)
def test_what_is_no_address_is_refused(addresses: Any) -> None:
    with pytest.raises(WrongSetting, match="expected"):
        connection_to(addresses)


def test_addresses_of_two_kinds_are_refused() -> None:
    with pytest.raises(WrongSetting, match="all of IPv4 or all of IPv6, found both"):
        connection_to(["127.0.0.1:1", "[::1]:1"])


def test_every_channel_has_the_configuration_that_readme_shows() -> None:
    options = dict(connection_to("127.0.0.1:1").options)
    config = json.loads(options["grpc.service_config"])
    assert config == service_config()
    assert config["healthCheckConfig"] == {"serviceName": ""}
    (method,) = config["methodConfig"]
    assert method["name"] == [{"service": "inference.GRPCInferenceService"}]
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "CANCELLED"]
    assert "timeout" not in method  # it would cap what a call asks for


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/kan.sock"])
def test_a_token_goes_to_this_machine_without_tls(address: str) -> None:
    assert connection_to(address, token="t").metadata() == (("authorization", "Bearer t"),)


@pytest.mark.parametrize("address", ["192.0.2.1:1", "kan.example:1", "127.0.0.1:1,192.0.2.1:1"])
def test_a_token_goes_nowhere_else_in_clear(address: str) -> None:
    with pytest.raises(WrongSetting, match=r"a token is sent over TLS.*give a CA") as refused:
        connection_to(address, token="s3cret")
    assert "s3cret" not in str(refused.value)
    tls = Tls(server_name="kan.example")
    assert connection_to(address, token="s3cret", tls=tls).metadata() == ()  # gRPC sends it


@pytest.mark.parametrize("token", ["", "hush hush", "hush\nx-more: 1", "hüsh"])
def test_what_is_no_token_is_refused_and_not_shown(token: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(token, encoding="utf-8")
    for given in ({"token": token}, {"token_file": file}):
        with pytest.raises(WrongSetting, match="expected a token of visible ASCII") as refused:
            connection_to("127.0.0.1:1", **given)
        assert "hush" not in str(refused.value)
        assert "hüsh" not in str(refused.value)


def test_one_token_is_enough(tmp_path: Path) -> None:
    with pytest.raises(WrongSetting, match="found both"):
        connection_to("127.0.0.1:1", token="t", token_file=tmp_path / "token")
    with pytest.raises(WrongSetting, match="cannot be read: No such file"):
        connection_to("127.0.0.1:1", token_file=tmp_path / "token")
