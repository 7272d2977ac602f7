"""What can stop an export, beside a bad checkpoint (`kan_model.errors`) or layout (`kan_bundle`).

ExportError
├── ConversionError   a file could not be written in the form that was asked for
└── ParityError       the files do not compute what the checkpoint computes
"""


class ExportError(Exception):
    """An export that was refused; the message says why and what to do."""


class ConversionError(ExportError):
    """A file could not be written in the form that was asked for."""


class ParityError(ExportError):
    """The files as written do not compute what the checkpoint computes."""
