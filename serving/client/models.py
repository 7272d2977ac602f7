"""What servers say of their models, as plain values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos import inference_pb2 as pb

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""The protocol's names of types that every element takes the same bytes of, as on the wire."""


_RANGE = re.compile(r"(?P<low>-?[0-9]{1,20})\.\.(?P<high>-?[0-9]{1,20})")


@dataclass(frozen=True)
class Tensor:
    """An input or an output.

    Attributes:
        name: Its name.
        datatype: The protocol's name of its type, such as FP32.
        shape: Its shape; the rows come first, and -1 is any number.
        allowed: Smallest and largest whole number that the model accepts in this input; None if
            all, or if the server does not say.
        rejects_nan: Whether the model accepts no row with NaN in this input.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    allowed: tuple[int, int] | None = None
    rejects_nan: bool = False

    def __str__(self) -> str:
        rules = f" {self.allowed[0]}..{self.allowed[1]}" if self.allowed else ""
        rules += " without NaN" if self.rejects_nan else ""
        return f"{self.name} {self.datatype} {list(self.shape)}{rules}"


@dataclass(frozen=True)
class Model:
    """What a server says of a model.

    Attributes:
        name: Its name.
        versions: Those that are served.
        platform: What runs it.
        inputs: What it takes.
        outputs: What it gives.
        properties: Where it comes from and how it runs, in the server's own words.
        max_rows: Most rows in a message; None if the server does not say.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    properties: Mapping[str, str]
    max_rows: int | None


@dataclass(frozen=True)
class ModelVersion:
    """A version of a model that a server knows of.

    Attributes:
        name: Of the model.
        version: Its number.
        state: READY, LOADING or UNAVAILABLE.
        reason: Why it is not served, or what lies in its folder now is not.
    """

    name: str
    version: str
    state: str
    reason: str


def read_model(found: pb.ModelMetadataResponse, max_rows: int | None) -> Model:
    """Read what a server says of a model.

    Args:
        found: Its metadata.
        max_rows: See `Model`.
    """
    return Model(
        found.name,
        tuple(found.versions),
        found.platform,
        tuple(_input(each, found.properties) for each in found.inputs),
        tuple(Tensor(each.name, each.datatype, tuple(each.shape)) for each in found.outputs),
        dict(found.properties),
        max_rows,
    )


def read_index(found: pb.RepositoryIndexResponse) -> tuple[ModelVersion, ...]:
    """Read which versions a server knows of."""
    return tuple(
        ModelVersion(each.name, each.version, each.state, each.reason) for each in found.models
    )


def _input(found: pb.ModelMetadataResponse.TensorMetadata, properties: Mapping[str, str]) -> Tensor:
    """Read what a server says of an input; other servers' properties state no rules."""
    allowed = _RANGE.fullmatch(properties.get(f"input.{found.name}.allowed", ""))
    return Tensor(
        found.name,
        found.datatype,
        tuple(found.shape),
        (int(allowed["low"]), int(allowed["high"])) if allowed else None,
        properties.get(f"input.{found.name}.rejects_nan") == "true",
    )
