"""From a trained KAN to a verified bundle: `python -m export`, and the same in Python."""

from typing import TYPE_CHECKING, Any

from export.errors import (
    ConversionError,
    ExpectationError,
    ExportError,
    InputError,
    NetworkError,
    ParityError,
    SigningError,
    WarningsError,
)

if TYPE_CHECKING:
    from export.api import export_checkpoint, export_module

__all__ = [
    "ConversionError",
    "ExpectationError",
    "ExportError",
    "InputError",
    "NetworkError",
    "ParityError",
    "SigningError",
    "WarningsError",
    "export_checkpoint",
    "export_module",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for, so that help and wrong usage come at once."""
    if name in ("export_checkpoint", "export_module"):
        from export import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
