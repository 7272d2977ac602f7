"""`python -m serving --model-repository DIR`: the command line of the server.

Exit codes: 0 stopped by a signal, 1 refused to start, 2 wrong usage. stdout stays empty but for
`--print-config`, `--print-completion` and `--kanserve-version`; stderr has one JSON object a line.
"""

import gc
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from serving.server import Server
    from serving.settings import Settings
    from serving.supervisor.server import MultiprocessServer


_COMPLETION = "--print-completion"
_VERSION = {"--kanserve-version", "--version"}  # the latter is what people try
_LOOK_S = 0.2


class _Ends:
    """The signals that ask for the end.

    Python runs a handler between any two steps of the main thread, also between two of
    `Event.wait`, whose lock it would then wait for itself, for ever. A SimpleQueue has no such
    lock.

    Attributes:
        count: How many have come.
        listening: Whether there is something to drain. Before that, a signal ends the process.
    """

    def __init__(self) -> None:
        self.count = 0
        self.listening = False
        self._news: SimpleQueue[None] = SimpleQueue()

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Note a signal."""
        if not self.listening:
            # An exception could come out of any import.
            with suppress(OSError):  # nobody reads it
                os.write(2, _stopped_line(time.time_ns()))
            os._exit(0)
        self.count += 1
        self._news.put(None)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the next one.

        Now and then it looks up: a signal that comes just before a thread goes to sleep does not
        wake it, and its handler is run only once it is awake.
        """
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = end - time.monotonic()
            with suppress(Empty):
                self._news.get(timeout=min(max(left, 0.0), _LOOK_S))
                return
            if left <= _LOOK_S:
                return


def _stopped_line(now_ns: int) -> bytes:
    """Write the line `stopped` as logs.py does, without anything that is yet to be imported.

    Args:
        now_ns: Nanoseconds since 1970.
    """
    seconds, micros = divmod(now_ns // 1000, 10**6)
    told = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{micros:06}Z"
    return f'{{"event": "stopped", "level": "info", "time": "{told}"}}\n'.encode()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; a second one does not wait for requests to end.

    Args:
        argv: Arguments after the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    ends = _Ends()
    for signum in (signal.SIGTERM, signal.SIGINT):  # before models load, which may take long
        signal.signal(signum, ends.on_signal)

    # All are read at import. gRPC's log is not JSON; onnxruntime would send usage data home and
    # keep a database in the user's folder.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import structlog

    from kan_bundle import __version__
    from kan_bundle.errors import BundleError
    from serving import addresses
    from serving.configuration import as_toml, completion, read_settings, unknown_variables
    from serving.errors import StartupError, WrongSetting
    from serving.observability.logs import configure_logging
    from serving.settings import Settings

    configure_logging("info")
    log = structlog.get_logger()
    try:
        if given and given[0].partition("=")[0] == _COMPLETION:
            # By itself: nothing else need be right for it.
            shell = " ".join(given)[len(_COMPLETION) + 1 :]
            print(completion(Settings, "kan-serve", shell))
            return 0
        if _VERSION & set(given):  # no value of a flag looks like this
            print(f"kanserve {__version__}")
            return 0
        settings = read_settings(Settings, given)
        if settings.print_config:
            print(as_toml(settings, given), end="")
            return 0
        configure_logging(settings.log_level)
        for name, nearest in unknown_variables(Settings).items():
            log.warning("unknown_variable", variable=name, nearest=nearest or None)
        if settings.workers is None:
            settings = settings.model_copy(update={"workers": _default_workers(settings)})
        with _chosen(settings) as server:
            ends.listening = True
            # What has been made by now stays: collections need not look at it again and again.
            gc.collect()
            gc.freeze()
            addresses.announce(
                settings,
                grpc=server.address,
                metrics=server.metrics_address,
                health=server.health_address,
                ready=server.ready,
            )
            ends.wait()
            log.info("draining", seconds=settings.drain_s)
            server.drain()
            ends.wait(settings.drain_s)
            server.stop(settings.grace_s, lambda: ends.count > 1)
    except WrongSetting as error:
        log.error("wrong_setting", reason=str(error))
        return 2
    except (StartupError, BundleError) as error:
        log.error("refused_to_start", reason=str(error))
        return 1
    log.info("stopped")
    # Not `return`: a thread in which a model still runs would hold the process.
    os._exit(0)


def _default_workers(settings: "Settings") -> int:
    """Choose how many processes serve.

    Raises:
        LayoutError: The repository cannot be read.
    """
    from kan_bundle.layout import model_bytes
    from serving.runtime import default_workers

    models = model_bytes(settings.model_repository)
    return default_workers(settings.provider, settings.engine_threads, models)


def _chosen(settings: "Settings") -> "AbstractContextManager[Server | MultiprocessServer]":
    """Serve in this process, or in several others."""
    if settings.processes > 1:
        from serving.supervisor.server import supervising

        return supervising(settings)
    from serving.runtime import require_onnxruntime

    require_onnxruntime()
    from serving.server import running  # imports onnxruntime

    return running(settings)


if __name__ == "__main__":
    sys.exit(main())
