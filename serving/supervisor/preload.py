"""What every worker imports, imported once: workers are forked from the process that has it.

They share its memory, and start in a fraction of the time. It has no threads of its own and has
made nothing of gRPC or onnxruntime, which survive a fork only so.
"""

import gc
import sys
from contextlib import suppress

import structlog

from serving.errors import StartupError
from serving.observability.logs import configure_logging
from serving.runtime import require_onnxruntime


def _log_end(kind: type[BaseException], error: BaseException, traceback: object) -> None:
    """Log why this process ends: the system has no process for a worker. Another takes over."""
    configure_logging("info")
    structlog.get_logger().error("fork_failed", reason=f"{kind.__name__}: {error}")


sys.excepthook = _log_end
with suppress(StartupError):  # each worker finds it again, and says so
    require_onnxruntime()
    import serving.server  # noqa: F401 - imports onnxruntime

gc.collect()
gc.freeze()  # what is never looked at stays shared
