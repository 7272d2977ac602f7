"""Every setting of the server, once: flags and environment variables derive from this class.

A flag `--grpc-port` is also `KANSERVE_GRPC_PORT`; a flag wins over the environment, which wins
over the default. Units are in the names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from serving.batching import Limits
from serving.errors import WrongSetting
from serving.policy import Control, parse_policy
from serving.runtime import Fused, Provider

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
    """Serve every bundle of a model repository over gRPC."""

    model_config = SettingsConfigDict(
        env_prefix="KANSERVE_",
        cli_prog_name="python -m serving",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        env_ignore_empty=True,  # compose files set variables that have no value
        frozen=True,
        protected_namespaces=(),
        extra="forbid",
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
    workers: Annotated[int, Field(ge=1, le=256)] = Field(
        1,
        description="processes that share the port, each with models, threads and limits of its "
        "own; more than one where a single one's Python is what is busy",
    )
    max_requests: Annotated[int, Field(ge=1, le=65_536)] = Field(
        1024,
        description="requests in a process at a time; more are refused before they are read",
    )
    max_streams: Annotated[int, Field(ge=1, le=4096)] = Field(
        64, description="streams open at a time, each in a thread of its own"
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
        16_384, description="most rows that wait, for each model; more are refused"
    )
    max_queue_bytes: _Room = Field(256 * 2**20, description="the same for bytes of inputs")
    model_limits: dict[str, ModelLimits] = Field(
        {},
        description="other limits for a model, as JSON: "
        '\'{"digits": {"max_batch_rows": 256, "max_wait_ms": 2}}\'',
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

    def limits_of(self, model: str) -> Limits:
        """Tell what the requests of a model may ask for."""
        own = self.model_limits.get(model, ModelLimits())
        names = ("max_batch_rows", "max_wait_ms", "max_queue_rows", "max_queue_bytes")
        rows, wait_ms, queue_rows, queue_bytes = (
            getattr(self, name) if (value := getattr(own, name)) is None else value
            for name in names
        )
        return Limits(rows, wait_ms / 1000, queue_rows, queue_bytes)


def read_settings(argv: Sequence[str]) -> Settings:
    """Take the settings from flags and environment.

    Args:
        argv: Arguments after the program's name.

    Raises:
        WrongSetting: A value is missing or wrong; the message names it.
        SystemExit: A flag is unknown, or help was asked for.
    """
    try:
        return Settings(_cli_parse_args=list(argv))
    except ValidationError as error:
        faults = [
            f"{_both_names(fault['loc'])}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_input=False)
        ]
        raise WrongSetting("; ".join(faults)) from error
    except SettingsError as error:
        raise WrongSetting(str(error)) from error


def _both_names(location: tuple[int | str, ...]) -> str:
    field = str(location[0]) if location else "settings"
    return f"--{field.replace('_', '-')} (KANSERVE_{field.upper()})"
