"""The mathematics of efficient-KAN: splines, the layer, the network, and reading checkpoints.

This package imports torch and nothing else of the project.
"""

from kan_model.activations import resolve_activation
from kan_model.checkpoint import load_checkpoint
from kan_model.errors import ActivationError, CheckpointError, KanModelError
from kan_model.inspection import Inspection, inspect_checkpoint
from kan_model.layer import KANLinear
from kan_model.model import KAN

__all__ = [
    "KAN",
    "ActivationError",
    "CheckpointError",
    "Inspection",
    "KANLinear",
    "KanModelError",
    "inspect_checkpoint",
    "load_checkpoint",
    "resolve_activation",
]
