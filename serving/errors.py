"""What can go wrong while serving, by whose fault it is. Nothing here knows gRPC.

ServingError
├── VisibleError          its message is sent to the client, so it holds no path, no other
│   │                     error's text, and never more than a line of what the client sent
│   ├── InvalidRequest      the caller's: a tensor is not what the model takes
│   ├── NotOffered          the caller's: others have it, this server does not
│   ├── ModelNotFound       the caller's: no such model or version
│   ├── ModelNotReady       the operator's: the model is known and is not served
│   ├── ControlRefused      the operator's: models are not loaded and unloaded so here
│   ├── Unauthenticated     the caller's: it has not said who it is, or nobody knows it
│   ├── Forbidden           the caller's: it is known, and may not do this
│   ├── TooLarge            the caller's: a message or metadata is larger than this server accepts
│   ├── Overloaded          more is asked than can be done; says when to ask again
│   │   └── OverBudget        what calls hold has no room for the bytes of another
│   ├── Expired             the answer would come after the time the caller gave it
│   └── Cancelled           the caller waits no longer
├── EngineError           ours, while running; for the log
└── StartupError          the operator's: the server refuses to start; for the log
    └── WrongSetting        a setting has no usable value
"""


class ServingError(Exception):
    """Anything that goes wrong while serving."""


class VisibleError(ServingError):
    """An error whose message the client is sent."""


class InvalidRequest(VisibleError):
    """A request, or a tensor of it, is not what the model takes."""


class NotOffered(VisibleError):
    """Something is asked for that other servers of the protocol have, and this one has not."""


class ModelNotFound(VisibleError):
    """There is no such model, or no such version of it."""


class ModelNotReady(VisibleError):
    """The model is known, but not served."""


class ControlRefused(VisibleError):
    """A model cannot be loaded or unloaded, or not in this way."""


class Unauthenticated(VisibleError):
    """A caller has not said who it is, or is not known."""


class Forbidden(VisibleError):
    """A caller is known, and may not do this."""


class TooLarge(VisibleError):
    """A message once it is inflated, or metadata, is larger than this server accepts."""


class Overloaded(VisibleError):
    """There is no room for another request.

    Args:
        message: For the client.
        retry_after_s: When there will be, in seconds.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverBudget(Overloaded):
    """The bytes of another message do not fit into --max-inflight-bytes."""


class Expired(VisibleError):
    """The answer would come after the time that the caller gave it."""


class Cancelled(VisibleError):
    """Nobody waits for the answer any longer."""


class EngineError(ServingError):
    """The model could not be run."""


class StartupError(ServingError):
    """The server refuses to start; the message says what to change."""


class WrongSetting(StartupError):
    """A setting has no usable value."""
