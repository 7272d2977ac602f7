"""What can go wrong while serving, by whose fault it is. Nothing here knows gRPC.

ServingError
├── VisibleError          its message is sent to the client, so it holds no path, no other
│   │                     error's text, and never more than a line of what the client sent
│   ├── InvalidRequest      the caller's: a tensor is not what the model takes
│   ├── ModelNotFound       the caller's: no such model or version
│   └── ModelNotReady       the operator's: the model is known and was refused at load
├── EngineError           ours, while running; for the log
└── StartupError          the operator's: the server refuses to start; for the log
└── WrongSetting        a flag or an environment variable has no usable value
"""


class ServingError(Exception):
    """Anything that goes wrong while serving."""


class VisibleError(ServingError):
    """An error whose message the client is sent."""


class InvalidRequest(VisibleError):
    """A request, or a tensor of it, is not what the model takes."""


class ModelNotFound(VisibleError):
    """There is no such model, or no such version of it."""


class ModelNotReady(VisibleError):
    """The model is known, but was refused at load."""


class EngineError(ServingError):
    """The model could not be run."""


class StartupError(ServingError):
    """The server refuses to start; the message says what to change."""


class WrongSetting(StartupError):
    """A flag or an environment variable has no usable value."""
