"""What can stop an export, beside a bad checkpoint (`kan_model.errors`) or layout (`kan_bundle`).

ExportError
├── ConversionError   a file could not be written in the form that was asked for
└── ParityError       the files do not compute what the checkpoint computes
"""

from collections.abc import Iterator
from contextlib import contextmanager


class ExportError(Exception):
    """An export that was refused; the message says why and what to do."""


class ConversionError(ExportError):
    """A file could not be written in the form that was asked for."""


class ParityError(ExportError):
    """The files as written do not compute what the checkpoint computes."""


@contextmanager
def conversion(form: str) -> Iterator[None]:
    """Turn whatever a converter raises into one line.

    Args:
        form: What is being written, for the message.

    Raises:
        ConversionError: The converter failed, for a reason of the network's own.
    """
    try:
        yield
    except (OSError, ConversionError):
        raise
    except Exception as error:  # converters fail in many ways and at great length
        cause = error.__cause__ or error
        line = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
        raise ConversionError(
            f"the network cannot be written as {form}: {line}; an activation of your own must "
            "trace: tensor operations only, no branch on values"
        ) from error
