"""The log: one JSON object per event, one line each, on stderr."""

import json
import logging
import sys
import threading
from types import TracebackType
from typing import Any

import structlog

from kan_bundle.escaping import escape


def configure_logging(level: str, **always: Any) -> None:
    """Send every event, the standard library's and warnings included, to stderr as JSON.

    Args:
        level: Name of the least severe level that is written.
        always: What every line has, such as the number of a worker.
    """
    shared: list[structlog.typing.Processor] = [
        lambda logger, method, event: {**event, **always},
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.ExceptionRenderer(
                    # Without the values of local variables, which hold what clients send.
                    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
                ),
                structlog.processors.JSONRenderer(
                    serializer=lambda event, **options: escape(json.dumps(event, **options))
                ),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a log that cannot be written must not fill stderr
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(
        args.exc_type, args.exc_value, args.exc_traceback
    )


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    structlog.get_logger().error("uncaught", exc_info=(kind, error, trace))
