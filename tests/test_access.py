"""Who may call what, seen from the wire."""

import json
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.access import Access, certificate_names
from serving.errors import Forbidden, StartupError, Unauthenticated
from serving.watched import Watched
from tests.conftest import STATE_DICTS, run_module
from tests.security import Authority, bearer, write_access
from tests.servers import WAIT_S, await_true, served
from tests.wire import raw_request

UNIFORM = STATE_DICTS[0]
ROW = raw_request(UNIFORM.x[:1])
LOAD = pb.RepositoryModelLoadRequest(model_name=UNIFORM.name)
HEALTH = health_pb2.HealthCheckResponse
TOKENS = {"inference": ["reader"], "admin": ["operator"]}

Call = Callable[[GRPCInferenceServiceStub, Any], Any]


def infer(stub: GRPCInferenceServiceStub, metadata: Any) -> Any:
    return stub.ModelInfer(ROW, metadata=metadata, timeout=WAIT_S)


def stream(stub: GRPCInferenceServiceStub, metadata: Any) -> Any:
    return next(stub.ModelStreamInfer(iter([ROW]), metadata=metadata, timeout=WAIT_S))


def index(stub: GRPCInferenceServiceStub, metadata: Any) -> Any:
    request = pb.RepositoryIndexRequest()
    return stub.RepositoryIndex(request, metadata=metadata, timeout=WAIT_S)


def load(stub: GRPCInferenceServiceStub, metadata: Any) -> Any:
    return stub.RepositoryModelLoad(LOAD, metadata=metadata, timeout=WAIT_S)


def status(call: Call, stub: GRPCInferenceServiceStub, metadata: Any = None) -> grpc.StatusCode:
    try:
        call(stub, metadata)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


@pytest.mark.usefixtures("threads")
def test_tokens_open_their_group_alone(repository: Path, tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", tokens=TOKENS)
    with served(
        repository, access=access, model_control="explicit", load_models=(UNIFORM.name,)
    ) as (server, stub):
        for call in (infer, stream, index, load):
            assert status(call, stub) is grpc.StatusCode.UNAUTHENTICATED
            for wrong in (bearer("nobody"), bearer(""), (("authorization", "reader"),),
                          (*bearer("reader"), *bearer("operator"))):  # fmt: skip
                assert status(call, stub, wrong) is grpc.StatusCode.UNAUTHENTICATED
        for call in (infer, stream, index):
            assert status(call, stub, bearer("reader")) is grpc.StatusCode.OK
            assert status(call, stub, bearer("operator")) is grpc.StatusCode.PERMISSION_DENIED
        assert status(load, stub, bearer("reader")) is grpc.StatusCode.PERMISSION_DENIED
        assert status(load, stub, bearer("operator")) is grpc.StatusCode.OK
        # Whoever asks whether the server is well needs no token.
        assert stub.ServerReady(pb.ServerReadyRequest()).ready
        with grpc.insecure_channel(server.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert check.status == HEALTH.SERVING


def test_a_group_may_be_open_to_anyone(repository: Path, tmp_path: Path) -> None:
    access = write_access(
        tmp_path / "access.toml", tokens={"admin": ["operator"]}, anyone=["inference"]
    )
    with served(
        repository, access=access, model_control="explicit", load_models=(UNIFORM.name,)
    ) as (_, stub):
        assert status(infer, stub) is grpc.StatusCode.OK
        assert status(load, stub) is grpc.StatusCode.UNAUTHENTICATED


def test_a_group_without_a_table_is_closed(repository: Path, tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", tokens={"inference": ["reader"]})
    with served(
        repository, access=access, model_control="explicit", load_models=(UNIFORM.name,)
    ) as (_, stub):
        assert status(load, stub, bearer("reader")) is grpc.StatusCode.PERMISSION_DENIED


def test_tokens_change_while_the_server_runs(repository: Path, tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", tokens={"inference": ["old"]})
    with served(repository, access=access) as (_, stub):
        assert status(infer, stub, bearer("old")) is grpc.StatusCode.OK
        write_access(access, tokens={"inference": ["new"]})
        await_true(lambda: status(infer, stub, bearer("new")) is grpc.StatusCode.OK)
        assert status(infer, stub, bearer("old")) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.usefixtures("threads")
def test_certificates_open_their_group_alone(repository: Path, tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ca")
    access = write_access(
        tmp_path / "access.toml",
        tokens={"inference": ["reader"]},
        certificates={"inference": ["client.example"], "admin": ["operator.example"]},
    )
    with served(
        repository,
        access=access,
        model_control="explicit",
        load_models=(UNIFORM.name,),
        **authority.settings(mutual=True),
    ) as (server, _):
        for name, to_infer, to_load in (
            ("client.example", grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED),
            ("operator.example", grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.OK),
            ("other.example", grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.PERMISSION_DENIED),
        ):
            with authority.channel(server.address, name) as channel:
                stub = GRPCInferenceServiceStub(channel)
                assert status(infer, stub) is to_infer
                assert status(stream, stub) is to_infer
                assert status(load, stub) is to_load
        with authority.channel(server.address, "other.example") as channel:
            assert status(infer, GRPCInferenceServiceStub(channel), bearer("reader")) is (
                grpc.StatusCode.OK
            )


def test_every_verified_certificate_may_be_let_in(tmp_path: Path) -> None:
    access = Access(write_access(tmp_path / "a.toml", certificates={"inference": ["*"]}))
    for known in ({"peer_dns": [b"anybody"]}, {"x509_pem_cert": [b"of nobody by name"]}):
        assert access.refusal("inference", None, certificate_names(known)) is None
        assert isinstance(access.refusal("admin", None, certificate_names(known)), Forbidden)
    for unknown in ({}, {"transport_security_type": [b"ssl"]}):
        names = certificate_names(unknown)
        assert isinstance(access.refusal("inference", None, names), Unauthenticated)


# One text, as names of different types in different certificates.
NAMED: dict[str, tuple[list[x509.GeneralName], str | None]] = {
    "dns": ([x509.DNSName("client.example")], None),
    "uri": ([x509.UniformResourceIdentifier("client.example")], None),
    "email": ([x509.RFC822Name("client.example")], None),
    "cn": ([], "client.example"),
    "other": ([x509.RegisteredID(x509.ObjectIdentifier("1.2.3"))], None),
}


@pytest.mark.parametrize("rule", ["", *NAMED])
@pytest.mark.usefixtures("threads")
def test_a_name_counts_as_what_the_certificate_says_it_is(
    repository: Path, tmp_path: Path, rule: str
) -> None:
    authority = Authority.make(tmp_path / "ca")
    text = {"": "client.example", "other": "other types of SAN"}.get(rule, f"{rule}:client.example")
    access = write_access(tmp_path / "access.toml", certificates={"inference": [text]})
    with served(repository, access=access, **authority.settings(mutual=True)) as (server, _):
        for kind, (names, common_name) in NAMED.items():
            files = authority.write_named(*names, common_name=common_name)
            with authority.channel(server.address, files=files) as channel:
                found = status(infer, GRPCInferenceServiceStub(channel))
            fits = kind == rule or (rule == "" and kind in ("dns", "cn"))
            expected = grpc.StatusCode.OK if fits else grpc.StatusCode.PERMISSION_DENIED
            assert found is (grpc.StatusCode.PERMISSION_DENIED if kind == "other" else expected)


def test_every_type_of_name_is_known_from_a_real_connection(
    repository: Path, tmp_path: Path
) -> None:
    authority = Authority.make(tmp_path / "ca")
    files = authority.write_named(
        x509.DNSName("a.example"),
        x509.UniformResourceIdentifier("spiffe://kan.example/client"),
        x509.RFC822Name("b@kan.example"),
        x509.IPAddress(ip_address("2001:db8::1")),
        common_name="The Client",
    )
    for rule, code in (
        ("dns:A.Example", grpc.StatusCode.OK),  # the case of a host's name does not count
        ("uri:spiffe://kan.example/client", grpc.StatusCode.OK),
        ("uri:spiffe://kan.example/Client", grpc.StatusCode.PERMISSION_DENIED),
        ("email:b@kan.example", grpc.StatusCode.OK),
        ("ip:2001:db8:0:0::1", grpc.StatusCode.OK),
        ("cn:The Client", grpc.StatusCode.OK),
        ("cn:the client", grpc.StatusCode.PERMISSION_DENIED),
        ("dns:*", grpc.StatusCode.PERMISSION_DENIED),
    ):
        access = write_access(tmp_path / "access.toml", certificates={"inference": [rule]})
        with (
            served(repository, access=access, **authority.settings(mutual=True)) as (server, _),
            authority.channel(server.address, files=files) as channel,
        ):
            assert status(infer, GRPCInferenceServiceStub(channel)) is code, rule


def test_bytes_that_are_no_text_equal_no_name_in_a_file(tmp_path: Path) -> None:
    file = write_access(tmp_path / "a.toml", certificates={"inference": ["cn:a\ufffd"]})
    names = certificate_names({"x509_common_name": [b"a\xff"]})
    assert isinstance(Access(file).refusal("inference", None, names), Forbidden)


def test_refusals_are_counted(repository: Path, tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", tokens=TOKENS)
    with served(repository, access=access) as (server, stub):
        status(infer, stub)
        status(infer, stub, bearer("operator"))
        found = server.registry.get_sample_value(
            "kanserve_refusals_total", {"reason": "unauthorised"}
        )
        assert found == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[inference", "expected TOML"),
        ("a = " + "[" * 9999, "expected TOML"),
        ("a = " + "9" * 9999, "expected TOML"),
        ("[reader]", "reader: Extra inputs are not permitted"),
        ('[inference]\ntokens_sha256 = ["secret"]', "inference.tokens_sha256.0: String should"),
        ("[inference]\ntoken = 1", "inference.token: Extra inputs"),
        ("x = " + "[" * 100_000, "expected TOML: lists or tables too deep"),
        ("x = " + "1" * 5_000, "expected TOML: Exceeds the limit"),
        *(
            (f"[admin]\ncertificates = [{name!r}]", told)
            for name, told in (
                ("spiffe://kan.example/a", "expected one of dns:, uri:, cn:, email:, ip: before a"),
                ("spiffe://kan.example/a", "found 'spiffe://kan.example/a'; write uri:spiffe://k"),
                ("::1", "expected one of dns:, uri:, cn:, email:, ip: before a name, found '::1'"),
                ("::1", "write ip:::1, or cn:::1 if that is the common name"),
                ("2001:db8::1", "found '2001:db8::1'; write ip:2001:db8::1, or cn:2001:db8::1 if"),
                ("10.0.0.1", "found '10.0.0.1'; write ip:10.0.0.1, or cn:10.0.0.1 if that is the"),
                ("[fd00::1]", "; write ip:fd00::1, or cn:[fd00::1] if"),
                ("10.0.0.1:8001", "; write ip:10.0.0.1, because names in certificates have no po"),
                ("kan.example:8001", "; write kan.example, because names in certificates have no"),
                ("b@kan.example", "; write email:b@kan.example, or cn:b@kan.example if that is"),
                ("urn:x:y", "found 'urn:x:y'; write uri:urn:x:y, or cn:urn:x:y if that is the co"),
                ("mailto:b@kan.example", "; write uri:mailto:b@kan.example, or cn:mailto:b@kan"),
                ("The Client: One", "; write cn:The Client: One"),
                ("DNS:a", "expected one of dns:, uri:, cn:, email:, ip: before a name, found 'DN"),
                ("DNS:a", "; write dns:a, or cn:DNS:a if that is the common name"),
                ("uri:", "; write the name after the type, such as dns:client.example.com"),
                ("", "; write the name after the type, such as dns:client.example.com"),
                ("ip:client", "expected an IP address after ip:, found 'client'"),
            )
        ),
    ],
)
def test_what_is_no_rule_is_refused_at_the_start(
    repository: Path, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "access.toml"
    file.write_text(text)
    done = run_module("serving", "--model-repository", repository, "--access", file)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert message in json.loads(line)["reason"]
    assert "secret" not in line


def test_a_file_that_cannot_be_used_any_longer_is_told_once_and_not_used(tmp_path: Path) -> None:
    file, now, reads = tmp_path / "file", [0.0], 0

    def read() -> str:
        nonlocal reads
        reads += 1
        if file.read_text() == "bad":
            raise StartupError("bad")
        return file.read_text()

    file.write_text("one")
    watched = Watched([file], read, pause_s=1, clock=lambda: now[0])
    file.write_text("second")
    assert watched.get() == "one"  # it has been looked at just now
    now[0] = 1
    assert watched.get() == "second"
    file.write_text("bad")
    for now[0] in (2, 3, 4):
        assert watched.get() == "second"
    assert reads == 3
