"""What can stop an export, beside a bad checkpoint (`kan_model.errors`) or layout (`kan_bundle`).

ExportError
├── InputError        what the network takes is not known, or does not fit it
├── NetworkError      the network cannot be built, or its weights do not fit it
├── ConversionError   a file could not be written in the form that was asked for
├── ExpectationError  the network does not give the answers that are expected of it
├── ParityError       the files do not compute what the checkpoint computes
├── WarningsError     there were warnings, and each of them is to be a refusal
└── SigningError      the bundle cannot be signed with the key that was given

Ended is no refusal: a signal.
"""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ExportError(Exception):
    """An export that was refused; the message says why and what to do."""


class InputError(ExportError):
    """What the network takes is not known, contradictory, or does not fit it."""


class NetworkError(ExportError):
    """The user's network cannot be built, or its weights do not fit it."""


class ConversionError(ExportError):
    """A file could not be written in the form that was asked for."""


class ExpectationError(ExportError):
    """The network does not give the answers that are expected of it."""


class WarningsError(ExportError):
    """There were warnings, and each of them is to be a refusal."""


class ParityError(ExportError):
    """The files as written do not compute what the checkpoint computes."""


class SigningError(ExportError):
    """The bundle cannot be signed with the key that was given."""


class Ended(BaseException):
    """A signal ends the export.

    It is no SystemExit: for that the user's own code is caught, which is run here.

    Args:
        exit_code: Of the process: 128 and the signal's number.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def cause(error: BaseException) -> str:
    """Say in one line what a user's own code raised, and where."""
    line = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename[:1] != "<"]
    return (
        f"{line} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else line
    )


def refused_samples(error: Exception) -> NetworkError:
    """Say that the network raised something on rows that the user gave."""
    return NetworkError(
        f"the network fails on the samples: {cause(error)}; give rows that it takes"
    )


@contextmanager
def conversion(form: str) -> Iterator[None]:
    """Turn whatever a converter raises for a network into one line.

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
        first = error.__cause__ or error
        line = f"{type(first).__name__}: {first}".strip().partition("\n")[0]
        operator = re.search(r"translating node .*target=(?:torch\.ops\.)?([\w.]+)", line)
        if re.search(r"complex|_fft_", line):
            raise ConversionError(
                f"the network cannot be written as {form}: there is no form of "
                f"{operator[1] if operator else 'what it computes'} for complex numbers there; "
                "compute with real and imaginary parts, and a Fourier transform as a product with "
                "cosines and sines"
            ) from error
        if operator:
            raise ConversionError(
                f"the network cannot be written as {form}: there is no form of "
                f"{operator[1]} there; compute it from other operations"
            ) from error
        raise ConversionError(
            f"the network cannot be written as {form}: {line}; layers and activations of your own "
            "must trace: tensor operations only, no branch on values, no fixed batch"
        ) from error


@contextmanager
def after_tracing(form: str) -> Iterator[None]:
    """Turn whatever fails in a graph that has been traced into one line: a fault of the exporter.

    Args:
        form: What is being written, for the message.

    Raises:
        ConversionError: Something failed.
    """
    try:
        yield
    except (OSError, ConversionError):
        raise
    except Exception as error:  # of several libraries
        line = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise ConversionError(
            f"the graph of the network is not valid {form}: {line}; the network was traced, so "
            "this is a fault of the exporter and not of the network: report it; --inline or "
            "another --opset may avoid it"
        ) from error
