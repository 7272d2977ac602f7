"""From a trained KAN to a verified bundle: `python -m export`, and the same in Python."""

from export.errors import (
    ConversionError,
    ExportError,
    InputError,
    NetworkError,
    ParityError,
    SigningError,
)
from export.pipeline import export_checkpoint, export_module

__all__ = [
    "ConversionError",
    "ExportError",
    "InputError",
    "NetworkError",
    "ParityError",
    "SigningError",
    "export_checkpoint",
    "export_module",
]
