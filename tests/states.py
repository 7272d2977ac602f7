"""State dicts to make checkpoints of."""

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from export.building import read_network
from export.report import Report
from kan_model import KAN, load_checkpoint
from tests import zoo

State = dict[str, Any]


def good() -> State:
    torch.manual_seed(0)
    return dict(KAN([2, 3, 1]).state_dict())


def saved(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    return path


def without(state: State, *keys: str) -> State:
    return {key: value for key, value in state.items() if key not in keys}


def with_value(state: State, key: str, index: tuple[int, ...], value: float) -> State:
    state[key] = state[key].clone()
    state[key][index] = value
    return state


def assert_same(path: Path, network: zoo.KAN, **options: Any) -> None:
    x = torch.linspace(-3, 3, 60).reshape(20, 3)
    found = load_checkpoint(path, **options)(x)
    torch.testing.assert_close(found, network(x), rtol=1e-5, atol=1e-6)


def network_of(path: Path, **options: Any) -> tuple[nn.Module, str]:
    """Read the network that an export would take, and what it says on the way."""
    stream = io.StringIO()
    wanted = {"activation": None, "prefix": None, "model": None, "trust_pickle": False} | options
    report = Report(Console(file=stream, width=300, highlight=False))
    return read_network(path, **wanted, report=report), stream.getvalue()
