"""What can go wrong while serving, by whose fault it is. Nothing here knows gRPC.

    ServingError
    ├── RequestError          the caller's
    │   ├── InvalidRequest      a tensor is not what the model takes
    │   └── ModelNotFound       no such model or version
    ├── ModelNotReady         the operator's: the model is known and was refused at load
    ├── EngineError           ours, while running
    └── StartupError          the operator's: the server refuses to start

The message of a `RequestError` or `ModelNotReady` is sent to the client as it is, so it never
holds a path or another error's text. The others' messages are for the log alone.
"""


class ServingError(Exception):
    """Anything that goes wrong while serving."""


class RequestError(ServingError):
    """The caller asked for something that cannot be; the message is sent to the caller."""


class InvalidRequest(RequestError):
    """A tensor of the request is not what the model takes."""


class ModelNotFound(RequestError):
    """There is no such model, or no such version of it."""


class ModelNotReady(ServingError):
    """The model is known, but was refused at load; the message is sent to the caller."""


class EngineError(ServingError):
    """The model could not be run."""


class StartupError(ServingError):
    """The server refuses to start; the message says what to change."""
