"""The fused KANLinear operator for onnxruntime on CPU: one node a layer, no tensor in between.

The library is C++ (src/) and is built when the package is installed, if there is a compiler.
Without it, the same model file runs on the standard operators that it also holds.

This package imports nothing of ours, and no torch. Its users import it, never the reverse.
"""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

DOMAIN = "kanserve"
OPERATOR = "KANLinear1"
"""Name of the operator; the digit is its version, because onnxruntime heeds no version of a domain.

A library that means something else by its inputs or attributes must have another name.
"""

ACTIVATIONS = ("silu", "gelu", "relu", "tanh", "identity")
ORDERS = range(1, 6)
MAX_GRID_SIZE = 2**16

_LIBRARY = "libkan_ops.so"


def library_path() -> Path | None:
    """Find the library inside the installed package; None if it was not built."""
    path = Path(str(files(__name__).joinpath(_LIBRARY)))
    return path if path.is_file() else None


def register(options: "SessionOptions", instructions: str | None = None) -> None:
    """Let the sessions made with these options run KANLinear layers fused.

    Call it after the number of threads is set.

    Args:
        options: Of the session to be made.
        instructions: `avx512vbmi2`, `avx512`, `avx2` or `portable`; None takes the best that the
            processor has.

    Raises:
        FileNotFoundError: The library was not built.
        RuntimeError: onnxruntime refuses it, or the processor lacks the instructions.
    """
    path = library_path()
    if path is None:
        raise FileNotFoundError(NOT_BUILT)
    if options.intra_op_num_threads > 0:
        options.add_session_config_entry("kan_ops.threads", str(options.intra_op_num_threads))
    if instructions is not None:
        options.add_session_config_entry("kan_ops.instructions", instructions)
    options.register_custom_ops_library(str(path))


NOT_BUILT = (
    "kan_ops: the operator library was not built when kanserve was installed, most likely for want "
    "of a C++17 compiler; models run on standard operators. Install one and reinstall kanserve; "
    "pip's --verbose shows what the build says"
)
