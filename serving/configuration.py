"""Where settings come from: flags, environment, a TOML file, defaults; the former win.

This module knows no single setting: settings.py has them.
"""

import os
import tomllib
from argparse import ArgumentParser
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from serving.errors import WrongSetting

Source = Literal["flag", "environment", "file", "default"]

PREFIX = "KANSERVE_"
"""Of environment variables."""

SHELLS = ("bash", "zsh", "fish")
"""For which there is completion."""

_NOT_IN_A_FILE = ("config", "print_config")
_OF_FLAGS = "error parsing CLI: "  # how pydantic-settings begins what argparse says
_UNKNOWN = "unrecognized arguments: "  # and how argparse does
_ALIKE, _ALIKE_FLAG = 0.85, 0.8  # of two names, by difflib: a typing error, not another word
_MOST_SHOWN = 60


class ConfigFile(PydanticBaseSettingsSource):
    """The values of the file that `config` names, if flags or environment name one."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not asked: all values are given at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Read it.

        Raises:
            SettingsError: It cannot be read, or is no TOML.
        """
        path = self.current_state.get("config")
        if path is None:
            return {}
        try:
            with Path(path).open("rb") as file:
                values = tomllib.load(file)
        except OSError as error:
            raise SettingsError(f"--config {path}: cannot be read: {error.strerror}") from error
        except RecursionError as error:
            raise SettingsError(
                f"--config {path}: expected TOML: lists or tables too deep"
            ) from error
        except (
            ValueError
        ) as error:  # also of text that is not UTF-8, and of numbers too long to read
            raise SettingsError(f"--config {path}: expected TOML: {error}") from error
        for name in _NOT_IN_A_FILE:
            if name in values:
                raise SettingsError(f"--config {path}: {name} cannot be set in a file")
        return values


AnySettings = TypeVar("AnySettings", bound=BaseSettings)


def read_settings(kind: type[AnySettings], argv: Sequence[str]) -> AnySettings:
    """Take settings from where they are given.

    Args:
        kind: Their class.
        argv: Arguments after the program's name.

    Raises:
        WrongSetting: A flag is unknown, or a value missing or wrong; the message names it and
            where it was given.
        SystemExit: Help was asked for.
    """
    try:
        return kind(_cli_parse_args=list(argv))
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            text = fault["msg"].removeprefix("Value error, ")
            if not fault["loc"]:  # of several settings, which the message names
                faults.append(text)
                continue
            field, *inner = (str(part) for part in fault["loc"])
            place = "".join(f".{part}" for part in inner)
            if fault["type"] == "missing" and not inner:
                what = kind.model_fields[field].description
                faults.append(f"{_both_names(field)}: missing; give {_flag(field)}, {what}")
                continue
            if fault["type"] not in ("missing", "value_error", "extra_forbidden"):
                text += f", found {_shown(fault['input'])}"
            where = _given(_source(field, argv))
            faults.append(f"{_both_names(field)}{place}, {where}: {text}")
        raise WrongSetting("; ".join(faults)) from error
    except RecursionError as error:  # of a value that is read as JSON
        raise WrongSetting("a setting has values within values without end") from error
    except SettingsError as error:
        text = str(error)
        if text.startswith(_OF_FLAGS):
            text = text.removeprefix(_OF_FLAGS)
            text = f"{text}{_meant(kind, text)}; --help lists the flags"
        raise WrongSetting(text) from error


def unknown_variables(kind: type[BaseSettings]) -> dict[str, str]:
    """Find variables of the environment that are named like a setting's and are none.

    They are no error: Kubernetes sets `KANSERVE_SERVICE_HOST` and others for a Service of that
    name.

    Args:
        kind: The class of the settings.

    Returns:
        By their names, the variable of a setting that is named most like it; empty if none is.
    """
    known = [_variable(field) for field in kind.model_fields]
    return {
        name: next(iter(get_close_matches(name, known, n=1, cutoff=_ALIKE)), "")
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIX) and value and name.upper() not in known
    }


def _meant(kind: type[BaseSettings], text: str) -> str:
    """Name the flags that may be meant by those that argparse does not know."""
    known = [_flag(field) for field in kind.model_fields]
    words = text.removeprefix(_UNKNOWN).split() if text.startswith(_UNKNOWN) else ()
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    nearest = [get_close_matches(flag, known, n=1, cutoff=_ALIKE_FLAG) for flag in flags]
    meant = ", ".join(dict.fromkeys(one for found in nearest for one in found))
    return f"; did you mean {meant}?" if meant else ""


def completion(kind: type[BaseSettings], program: str, shell: str) -> str:
    """Write a static script that completes a command's flags, so that no Python runs at a tab.

    Args:
        kind: Of the settings.
        program: Name of the command.
        shell: bash, zsh or fish.

    Raises:
        WrongSetting: It is another shell, or the package that writes the script is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise WrongSetting("--print-completion: shtab writes it: pip install shtab") from error
    if shell not in SHELLS:
        raise WrongSetting(f"--print-completion: expected {', '.join(SHELLS)}, found {shell!r}")
    parser: ArgumentParser = CliSettingsSource(kind, cli_prog_name=program).root_parser
    for action in parser._actions:
        shown = str(action.metavar)
        if "Path" in shown:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif shown.startswith("{"):  # a Literal
            action.choices = shown.strip("{}").split(",")
    return shtab.complete(parser, shell)


def as_toml(settings: BaseSettings, argv: Sequence[str]) -> str:
    """Write settings as a file that `--config` takes, each with where it comes from.

    Args:
        settings: All of them.
        argv: The arguments that they were read from.
    """
    lines, tables = [], []
    for name in type(settings).model_fields:
        if name in _NOT_IN_A_FILE:
            continue
        value = settings.model_dump(mode="json", include={name}, exclude_none=True).get(name)
        source = _source(name, argv) if name in settings.model_fields_set else "default"
        if value is None:
            lines.append(f"# {name} is not set")
        elif isinstance(value, dict):
            tables.append(tomli_w.dumps({name: value}) if value else f"# {name} is empty\n")
        else:
            lines.append(f"{tomli_w.dumps({name: value}).rstrip()}  # {source}")
    return "\n".join([*lines, *tables])


def _source(field: str, argv: Sequence[str]) -> Source:
    """Tell where a setting was given that was given somewhere."""
    flag = _flag(field)
    if any(arg == flag or arg.startswith((f"{flag}=", f"{flag}.")) for arg in argv):
        return "flag"
    return "environment" if os.environ.get(_variable(field)) else "file"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _given(source: Source) -> str:
    return {
        "flag": "as a flag",
        "environment": "in the environment",
        "file": "in the file of --config",
    }[source]


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _variable(field: str) -> str:
    return f"{PREFIX}{field.upper()}"


def _both_names(field: str) -> str:
    return f"{_flag(field)} ({_variable(field)})"
