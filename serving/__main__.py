"""`python -m serving --model-repository DIR`: the command line of the server.

Exit codes: 0 stopped by a signal after draining, 1 refused to start, 2 wrong usage.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; a second one stops at once.

    Args:
        argv: Arguments after the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    listening, stop, stop_now = threading.Event(), threading.Event(), threading.Event()

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if not listening.is_set():
            raise KeyboardInterrupt  # nothing to drain yet, so do not wait for models to load
        (stop_now if stop.is_set() else stop).set()

    for signum in (signal.SIGTERM, signal.SIGINT):  # before models load, which may take long
        signal.signal(signum, on_signal)

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read at import; its log is not JSON
    import structlog

    from kan_bundle.errors import BundleError
    from serving.errors import StartupError
    from serving.logs import configure_logging
    from serving.server import running
    from serving.settings import read_settings

    configure_logging("info")
    log = structlog.get_logger()
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv)
    except StartupError as error:
        log.error("wrong_setting", reason=str(error))
        return 2
    configure_logging(settings.log_level)
    try:
        with running(settings) as server:
            listening.set()
            server.announce()
            stop.wait()
            log.info("draining", seconds=settings.drain_s)
            server.drain()
            stop_now.wait(settings.drain_s)
            server.stop(0 if stop_now.is_set() else settings.grace_s)
    except (StartupError, BundleError, OSError) as error:
        log.error("refused_to_start", reason=str(error))
        return 1
    except KeyboardInterrupt:
        pass
    log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
