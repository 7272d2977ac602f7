"""A network to TorchScript, and back to something that runs.

Traced, because the base activation may be any module, and scripting takes only some. A traced
program is fixed to two-dimensional inputs. torch deprecates TorchScript in favour of torch.export;
it is written for the C++ and mobile runtimes that still read it.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.errors import conversion

METADATA_FILE = "kanserve.json"


def write_torchscript(
    network: nn.Module, in_features: int, path: Path, metadata: Mapping[str, str]
) -> None:
    """Write a network as TorchScript.

    Args:
        network: In evaluation mode, float32; takes (batch, in), gives (batch, out).
        in_features: Width of the input.
        path: Where to write.
        metadata: Written to the archive as `extra/kanserve.json`.

    Raises:
        ConversionError: The network cannot be converted.
    """
    extra = {METADATA_FILE: json.dumps(dict(metadata), indent=2)}
    with _deprecation_accepted(), conversion("TorchScript"), torch.no_grad():
        # check_trace would only compare the trace with itself; parity.py compares the saved file.
        program = torch.jit.trace(network, (torch.zeros(2, in_features),), check_trace=False)
        torch.jit.save(program, path, _extra_files=extra)


def load_torchscript(path: Path) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Load a TorchScript file that this process has just written. It is code: never load others."""
    with _deprecation_accepted():
        program = torch.jit.load(path, map_location="cpu")

    @torch.no_grad()
    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = program(torch.from_numpy(x)).numpy()
        return output

    return run


@contextmanager
def _deprecation_accepted() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"`torch\.jit\..*is deprecated", category=DeprecationWarning
        )
        yield
