"""What can go wrong on the way from a file to a network.

    KanModelError
    ├── CheckpointError   the file is not a usable efficient-KAN checkpoint
    └── ActivationError   the base activation named by the user cannot be had

Wrong arguments to a layer or a network are plain `ValueError`, as in torch itself.
"""


class KanModelError(Exception):
    """Anything about a model that its owner can put right; the message says how."""


class CheckpointError(KanModelError):
    """The file is not a usable efficient-KAN checkpoint."""


class ActivationError(KanModelError):
    """The base activation asked for is unknown or cannot be built."""
