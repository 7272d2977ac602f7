"""A client of the server: numpy arrays in, numpy arrays out.

    with KanClient("127.0.0.1:8001") as client:
        y = client.infer("digits", x)

It needs grpcio, protobuf and numpy; nothing of the rest of `serving`, and no runtime for models.
The command `kan-client` is the same from a shell.
"""

from serving.client.aio import AsyncKanClient
from serving.client.batches import Answer
from serving.client.credentials import Tls
from serving.client.errors import (
    ClientError,
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
