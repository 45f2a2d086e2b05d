"""The SDK's only thread, for those who ask for it: it renews, and with `start()` it listens.

Rules. It starts with the first lease that wants to be renewed in the background, or with `start()`;
it holds no lease alive, and runs callbacks only after `start()`. It wakes when something falls due,
and at the latest after a second. What a renewal fails with it tells by notice, as everything else
does. The most urgent lease goes first, and a node that does not answer is asked for one lease per
beat, so that it costs the leases of other nodes a second and not their lives.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Final

from grafos_core.failure import FabricError

if TYPE_CHECKING:
    from grafos._connection import Fabric
    from grafos._lease import Lease

BEAT_MS_MIN, BEAT_MS_MAX = 5, 1_000
LISTEN_MS: Final = 50
RENEW_MS_MAX: Final = 1_000
"""For one renewal; one that is late is tried again, since there is time left by design."""
STOP_MS_MAX: Final = 2_000
"""A renewal that is under way is let finish."""
_log = logging.getLogger("grafos")


class Pulse:
    """One thread per connection, started on demand."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = weakref.ref(fabric)
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._wake = threading.Event()
        self._stopped = False
        self._listening = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def renew(self, lease: Lease) -> None:
        """Keep this one alive as long as somebody holds it."""
        with self._lock:
            self._leases.add(lease)
        self._start()

    def listen(self) -> None:
        """From now on run callbacks, too."""
        self._listening = True
        self._start()

    def is_quiet(self) -> bool:
        """Whether this is the SDK's own thread and nobody has asked it to call back."""
        return self._thread is threading.current_thread() and not self._listening

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(STOP_MS_MAX / 1000)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="grafos", daemon=True)
                self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        while not self._stopped:
            self._wake.clear()
            try:
                wait_ms = self._beat()
            except Exception:  # one bad beat must not end all renewals
                _log.exception("the thread that renews leases met a fault")
                wait_ms = BEAT_MS_MAX
            self._wake.wait(wait_ms / 1000)

    def _beat(self) -> int:
        fabric = self._fabric()
        if fabric is None:
            self._stopped = True
            return 0
        if self._listening:
            fabric.poll()
        wait_ms = LISTEN_MS if self._listening else BEAT_MS_MAX
        with self._lock:
            leases = sorted(self._leases, key=lambda lease: lease._until_ns)
        silent: set[str] = set()
        for lease in leases:
            if lease.node_id not in silent and lease._renew_due() and not self._renew(lease):
                silent.add(lease.node_id)
            lease._tick()
            timeout_ms = lease._timeout_ms()
            if timeout_ms is None:
                self._leases.discard(lease)
            else:
                wait_ms = min(wait_ms, timeout_ms)
        return max(BEAT_MS_MIN, wait_ms)

    def _renew(self, lease: Lease) -> bool:
        try:
            lease._renew(0, RENEW_MS_MAX)
        except FabricError as failed:
            _log.warning("lease %s was not renewed: %s", lease.lease_id, failed)
            return False
        return True
