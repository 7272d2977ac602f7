"""A client of the server: numpy arrays in, numpy arrays out.

    with KanClient("127.0.0.1:8001") as client:
        y = client.infer("digits", x)

It needs grpcio, protobuf and numpy; nothing of the rest of `serving`, and no runtime for models.
The command `kan-client` is the same from a shell.

Names are imported when they are first asked for: `kan-client health` is in this package too, runs
every few seconds, and needs none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.client.aio import AsyncKanClient
    from serving.client.batches import Answer
    from serving.client.credentials import Tls
    from serving.client.errors import (
        ClientError,
        Closed,
        Forked,
        InvalidRequest,
        ModelNotFound,
        Overloaded,
        Refused,
        ServerFault,
        TimedOut,
        Unavailable,
        WrongSetting,
    )
    from serving.client.models import Model, ModelVersion, Tensor
    from serving.client.sync import KanClient

__all__ = [
    "Answer",
    "AsyncKanClient",
    "ClientError",
    "Closed",
    "Forked",
    "InvalidRequest",
    "KanClient",
    "Model",
    "ModelNotFound",
    "ModelVersion",
    "Overloaded",
    "Refused",
    "ServerFault",
    "Tensor",
    "TimedOut",
    "Tls",
    "Unavailable",
    "WrongSetting",
]

_MODULES = {
    "Answer": "batches",
    "AsyncKanClient": "aio",
    "KanClient": "sync",
    "Model": "models",
    "ModelVersion": "models",
    "Tensor": "models",
    "Tls": "credentials",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
