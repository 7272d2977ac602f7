"""Every setting of the server, once: flags and environment variables derive from this class.

A flag `--grpc-port` is also `KANSERVE_GRPC_PORT`; a flag wins over the environment, which wins
over the default. Units are in the names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from serving.errors import WrongSetting
from serving.runtime import Fused, Provider

_DAY_S = 86_400


def _named(path: Path) -> Path:
    if not path.name:
        raise ValueError("expected a file, found a folder")
    return path


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
    address_file: Annotated[Path, AfterValidator(_named)] | None = Field(
        None, description="write the addresses taken to this file, as JSON"
    )
    max_message_bytes: Annotated[int, Field(ge=4096, le=2**31 - 1)] | None = Field(
        None,
        description="largest request accepted; by default 64 MiB, or 64 rows of the model with "
        "the largest rows if that is more",
    )
    rpc_threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        4, description="requests worked on at the same time"
    )
    engine_threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="threads that one run of a model may use"
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
