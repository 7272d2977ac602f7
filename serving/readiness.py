"""Whether requests can be sent here: what balancers are told, and when that changes."""

import threading
from collections.abc import Callable


class Readiness:
    """Ready while some model is served, requests run, nothing drains, and other processes agree.

    Safe to call from several threads.

    Args:
        others: Whether all other processes on this port are ready; True if there are none.
        on_own_change: Told whether this process is ready, whatever the others are.
    """

    def __init__(
        self, others: bool = True, on_own_change: Callable[[bool], None] = lambda own: None
    ) -> None:
        self._others = others
        self._on_own_change = on_own_change
        self._on_change: Callable[[bool], None] = lambda ready: None
        self._serving = False
        self._draining = False
        self._stalled = False
        self._own = False
        self._lock = threading.RLock()

    @property
    def ready(self) -> bool:
        """Whether they can."""
        return self._own and self._others

    @property
    def own(self) -> bool:
        """Whether this process is ready, whatever the others are."""
        return self._own

    def watch(self, on_change: Callable[[bool], None]) -> None:
        """Have something told whether they can, from now on; twice the same does no harm."""
        with self._lock:
            self._on_change = on_change
            self._update()

    def serve(self, serving: bool) -> None:
        """Say whether some model is served."""
        with self._lock:
            self._serving = serving
            self._update()

    def drain(self) -> None:
        """Be ready no more."""
        with self._lock:
            self._draining = True
            self._update()

    def stall(self, stalled: bool) -> None:
        """Say whether requests wait and nothing is run."""
        with self._lock:
            self._stalled = stalled
            self._update()

    def hear(self, others: bool) -> None:
        """Learn whether all other processes are ready."""
        with self._lock:
            self._others = others
            self._update()

    def _update(self) -> None:
        own = self._serving and not self._draining and not self._stalled
        if own != self._own:
            self._own = own
            self._on_own_change(own)
        self._on_change(self.ready)
