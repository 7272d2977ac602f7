"""Every setting of the server, once: flags, environment and file derive from this class.

A flag `--grpc-port` is also `KANSERVE_GRPC_PORT` and `grpc_port` in a TOML file. Units are in the
names. configuration.py reads them.
"""

from ipaddress import ip_address
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from serving.batching import Limits
from serving.budget import too_small
from serving.configuration import PREFIX, ConfigFile
from serving.models.policy import Control, parse_policy
from serving.runtime import MOST_WORKERS, Fused, Provider

_DAY_S = 86_400


def _policy(text: str) -> str:
    parse_policy(text)
    return text


def _named(path: Path) -> Path:
    if not path.name:
        raise ValueError("expected a file, found a folder")
    return path


Switch = Literal["on", "off"]
_Rows = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Wait = Annotated[float, Field(ge=0, le=10_000)]
_Room = Annotated[int, Field(ge=1)]


class ModelLimits(BaseModel):
    """Limits of one model; None are the server's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_batch_rows: _Rows | None = None
    max_wait_ms: _Wait | None = None
    max_queue_rows: _Room | None = None
    max_queue_bytes: _Room | None = None


class Settings(BaseSettings):
    """Serve every bundle of a model repository over gRPC.

    Beside what follows, --kanserve-version prints the version, and --print-completion bash|zsh|fish
    a script that completes kan-serve in that shell.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        cli_prog_name="python -m serving",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,  # a wrong flag is told like a wrong value: one line, no usage
        env_ignore_empty=True,  # compose files set variables that have no value
        frozen=True,
        protected_namespaces=(),
        extra="forbid",
    )

    config: Path | None = Field(
        None,
        description="TOML file of settings, named as in the environment, in lower case and without "
        "the prefix; flags and environment win over it",
    )
    print_config: CliImplicitFlag[bool] = Field(
        False, description="print every setting as TOML, with where it comes from, and end"
    )
    model_repository: Path = Field(description="folder of MODEL/VERSION/ bundles")
    version_policy: Annotated[str, AfterValidator(_policy)] = Field(
        "latest:1",
        description="which versions of a model are served: latest:N, the N newest that pass their "
        "checks; all; specific:1,3",
    )
    model_control: Control = Field(
        "none",
        description="when versions are looked for: none at the start only, poll again and again, "
        "explicit when a client asks for a model to be loaded or unloaded",
    )
    poll_s: Annotated[float, Field(gt=0, le=_DAY_S)] = Field(
        5.0, description="with poll, seconds from one look to the next"
    )
    load_models: tuple[str, ...] = Field(
        (), description="with explicit, models to load at the start; none by default"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8001, description="port for gRPC; 0 takes a free one"
    )
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8002, description="port for Prometheus, at /metrics; 0 takes a free one"
    )
    metrics_hosts: tuple[str, ...] = Field(
        (),
        description="names under which the metrics port answers, beside IP addresses, localhost, "
        "host and this machine's name: others may be a web page's, which reads through a browser",
    )
    health_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None,
        description="another port for grpc.health.v1 alone, never with TLS, for probes that know "
        "none; 0 takes a free one",
    )
    tls_cert: Path | None = Field(
        None,
        description="certificate chain of the server, PEM; with it and tls_key, gRPC is TLS alone. "
        "All three files are read again when they change",
    )
    tls_key: Path | None = Field(None, description="its private key, PEM")
    tls_client_ca: Path | None = Field(
        None, description="certificates, PEM, one of which must have signed a client's"
    )
    access: Path | None = Field(
        None,
        description="TOML file of who may call what: tables [inference] and [admin] with "
        "tokens_sha256, certificates or anyone; read again when it changes",
    )
    provider: Provider = Field("cpu", description="where models run")
    fused: Fused = Field(
        "auto",
        description="run KANLinear layers by the fused operator of kan_ops: auto where its library "
        "is installed, on refuses to start without, off never",
    )
    cuda_graphs: Switch = Field(
        "off",
        description="with cuda, capture a model's runs as graphs, one for each power of two of "
        "rows up to max_batch_rows; batches are filled up to it",
    )
    cuda_tf32: Switch = Field(
        "off",
        description="with cuda, let products keep 10 bits of the mantissa; a model whose golden "
        "answers are then missed is refused",
    )
    address_file: Annotated[Path, AfterValidator(_named)] | None = Field(
        None, description="write the addresses taken to this file, as JSON"
    )
    max_message_bytes: Annotated[int, Field(ge=4096, le=2**31 - 1)] | None = Field(
        None,
        description="largest request accepted; by default 64 MiB, or 64 rows of the model with "
        "the largest rows if that is more",
    )
    max_inflight_bytes: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="bytes of messages and answers in a process at a time, with what they become; "
        "more requests are refused before they are read. By default half of the memory that is "
        "left when models are loaded, of the container's limit divided by workers",
    )
    max_model_bytes: Annotated[int, Field(ge=1)] = Field(
        4 * 2**30,
        description="largest file of a version; a version with a larger one is refused before "
        "any of it is loaded",
    )
    require_signature: Path | None = Field(
        None,
        description="serve only versions that are signed by the owner of this public key, a PEM "
        "file; see python -m export --sign-key",
    )
    workers: Annotated[int, Field(ge=1, le=MOST_WORKERS)] | None = Field(
        None,
        description="processes that share the port, each with models, threads and limits of its "
        "own. By default one for every CPU, as far as memory holds their models; one with cuda",
    )
    worker_timeout_s: Annotated[float, Field(ge=1.0, le=_DAY_S)] = Field(
        5.0,
        description="with several workers, longest that a process may show no sign of life, before "
        "it is killed and replaced",
    )
    max_requests: Annotated[int, Field(ge=1, le=65_536)] = Field(
        1024,
        description="requests in a process at a time; more are refused before they are read",
    )
    max_streams: Annotated[int, Field(ge=1, le=4096)] = Field(
        128, description="streams open at a time, each in a thread of its own"
    )
    max_peer_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="part of the streams, watches and connections that one address may have, "
        "unless --access knows the caller; 1 where every caller comes through one balancer",
    )
    receive_timeout_s: Annotated[float, Field(ge=0.1, le=_DAY_S)] = Field(
        60.0, description="longest that a call may take to send its message"
    )
    max_connections: Annotated[int, Field(ge=16, le=2**20)] | None = Field(
        None,
        description="connections to a process at a time; by default as many as it may open files, "
        "and at most 4096",
    )
    max_connection_calls: Annotated[int, Field(ge=1, le=2**31 - 1)] = Field(
        1024, description="calls under way on one connection; a client keeps more to itself"
    )
    max_metadata_bytes: Annotated[int, Field(ge=1024, le=2**24)] = Field(
        16_384, description="largest metadata of a call"
    )
    max_connection_age_s: Annotated[float, Field(gt=0, le=_DAY_S)] | None = Field(
        None,
        description="ask clients to connect anew after so long, give or take a tenth, so that they "
        "find servers that have come since; never by default",
    )
    max_connection_idle_s: Annotated[float, Field(gt=0, le=_DAY_S)] | None = Field(
        None, description="close a connection without calls after so long; never by default"
    )
    keepalive_s: Annotated[float, Field(ge=1, le=_DAY_S)] = Field(
        60.0, description="ask a silent connection for a sign of life after so long"
    )
    min_ping_interval_s: Annotated[float, Field(ge=0.01, le=_DAY_S)] = Field(
        20.0,
        description="clients may ask so often; who does more often is cut off",
    )
    engine_threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="threads that one run of a model may use"
    )
    engine_slots: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="runs at a time; by default one for every CPU that this process may use, "
        "divided by the threads of a run",
    )
    max_batch_rows: _Rows = Field(
        1024,
        description="most rows in one run; larger requests run in parts",
    )
    max_wait_ms: _Wait = Field(
        0.0,
        description="longest that a request waits for others to run with; with 0 only those that "
        "are there at the same time run together, and only if they are short",
    )
    max_queue_rows: _Room = Field(
        20_480,
        description="most rows that wait, with those of a run, for each model; more are refused",
    )
    max_queue_bytes: _Room = Field(256 * 2**20, description="the same for bytes of inputs")
    model_limits: dict[str, ModelLimits] = Field(
        {},
        description="other limits for a model, as JSON: "
        '\'{"digits": {"max_batch_rows": 256, "max_wait_ms": 2}}\'',
    )
    otlp_endpoint: str | None = Field(
        None,
        description="where traces are sent, by OTLP over gRPC: http://HOST:4317, https for TLS; "
        "none are by default",
    )
    trace_share: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="share of requests that are traced when their caller does not say whether",
    )
    drain_s: Annotated[float, Field(ge=0, le=_DAY_S)] = Field(
        0.5,
        description="after SIGTERM, seconds between turning readiness off and taking no more "
        "requests, for balancers to notice",
    )
    grace_s: Annotated[float, Field(ge=0, le=_DAY_S)] = Field(
        10.0, description="after that, seconds for running requests to end"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe event that is logged"
    )

    log_requests: Switch = Field(
        "off",
        description="log every request that is let in: id, model, rows, status, where its time "
        "went",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Name where values come from, the strongest first; flags come before all."""
        return init_settings, env_settings, ConfigFile(settings_cls)

    @property
    def processes(self) -> int:
        """How many processes serve; one where that was not chosen."""
        return self.workers or 1

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if twice := _same_port(self.grpc_port, self.metrics_port, self.health_port):
            raise ValueError(twice)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key: expected both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca: expected --tls-cert and --tls-key with it")
        if self.load_models and self.model_control != "explicit":
            raise ValueError(
                "--load-models needs --model-control explicit; with "
                f"{self.model_control} every model of the repository is loaded"
            )
        if self.model_control == "explicit" and self.access is None and not is_own(self.host):
            raise ValueError(
                "--model-control explicit lets clients load and unload models: where others reach "
                f"it ({self.host}), it needs --access with a table [admin]"
            )
        if (
            self.max_inflight_bytes is not None
            and self.max_message_bytes is not None
            and (wrong := too_small(self.max_inflight_bytes, self.max_message_bytes))
        ):
            raise ValueError(wrong)
        return self

    def limits_of(self, model: str) -> Limits:
        """Tell what the requests of a model may ask for."""
        own = self.model_limits.get(model, ModelLimits())
        names = ("max_batch_rows", "max_wait_ms", "max_queue_rows", "max_queue_bytes")
        rows, wait_ms, queue_rows, queue_bytes = (
            getattr(self, name) if (value := getattr(own, name)) is None else value
            for name in names
        )
        return Limits(rows, wait_ms / 1000, queue_rows, queue_bytes)


def _same_port(grpc: int, metrics: int, health: int | None) -> str | None:
    """Say which two settings ask for the same port, if two do; 0 takes another one each time."""
    ports = {"--grpc-port": grpc, "--metrics-port": metrics, "--health-port": health}
    for one, other in combinations(ports, 2):
        if ports[one] and ports[one] == ports[other]:
            return (
                f"{one} and {other}: expected two ports, found {ports[one]} for both; choose "
                "another for one of them (0 takes a free one)"
            )
    return None


def is_own(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
