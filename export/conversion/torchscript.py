"""A network to TorchScript.

Traced, because a network may be any module, and scripting takes only some. A traced program is
fixed to as many dimensions as its example has. torch deprecates TorchScript in favour of
torch.export; it is written for the C++ and mobile runtimes that still read it.
"""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from export.conversion.gradients import script_graph, trace_gradients
from export.errors import conversion
from export.network import Call
from export.parts import restored_attributes
from export.quiet import captured

METADATA_FILE = "kanserve.json"

_LARGEST_IN_MEMORY = 2**28
_ROOM_BESIDE_WEIGHTS = 2**24


@captured()
def write_torchscript(
    network: Call, example: tuple[Tensor, ...], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write a network as TorchScript.

    Args:
        network: In evaluation mode, float32; takes one tensor for each input, gives a tuple.
        example: Inputs of at least two rows.
        path: Where to write.
        metadata: Written to the archive as `extra/kanserve.json`.

    Raises:
        ConversionError: The network cannot be converted.
        OSError: There is no room for it.
    """
    extra = {METADATA_FILE: json.dumps(dict(metadata), indent=2)}
    with restored_attributes(network), conversion("TorchScript"), torch.no_grad():
        # check_trace would only compare the trace with itself; parity.py compares the saved file.
        if network.uses_gradients:
            scripted = script_graph(trace_gradients(network, example))
            program = torch.jit.trace(_OneIsNoTuple(scripted), example, check_trace=False)
        else:
            program = torch.jit.trace(_OneIsNoTuple(network), example, check_trace=False)
        _save(program, path, extra)


def _save(program: torch.jit.ScriptModule, path: Path, extra: Mapping[str, str]) -> None:
    """Write a program. torch itself ends the process where the disk is full, and leaves its half.

    Raises:
        OSError: There is no room for it.
    """
    tensors = (*program.parameters(), *program.buffers())
    size = sum(tensor.nbytes for tensor in tensors)
    if size <= _LARGEST_IN_MEMORY:
        content = io.BytesIO()
        torch.jit.save(program, content, _extra_files=dict(extra))
        path.write_bytes(content.getbuffer())
        return
    with path.open("wb") as file:  # which torch writes anew, where there was room a moment ago
        os.posix_fallocate(file.fileno(), 0, size + _ROOM_BESIDE_WEIGHTS)
    torch.jit.save(program, path, _extra_files=dict(extra))


class _OneIsNoTuple(nn.Module):
    """A network with one output returns it as it is, as its author wrote it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.network(*inputs)
        return outputs[0] if len(outputs) == 1 else outputs
