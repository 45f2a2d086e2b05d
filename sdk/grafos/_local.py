"""A whole fabric of its own for one program: the real services, as processes, gone with it.

    with local_fabric(nodes=2) as fabric:
        with MemBuilder().min_bytes(4096).acquire() as lease: …

Rules. Everything lies in a temporary folder and ends with this process, however it ends: the
supervisor holds the reading end of a pipe that only this process can write. A child that this
process forks gives its copy of that end away at once. Any number of fabrics may run side by side;
within `with`, builders ask the innermost. Nothing is started before `start` or `with`, and `close`
is idempotent.
"""

from __future__ import annotations

import os
import select
import signal
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from grafos import _clock
from grafos._cluster import description as descriptions
from grafos._cluster.description import ClusterDescription
from grafos._cluster.launch import END_MS_MAX, READY_MS_MAX, Launched, Wanted, launch
from grafos._cluster.layout import Layout
from grafos._cluster.telephone import ask
from grafos_core import failure
from grafos_core.failure import FabricError

if TYPE_CHECKING:
    from grafos._connection import Fabric

MEMORY_BYTES_DEFAULT: Final = 256 << 20
BLOCK_BYTES_DEFAULT: Final = 64 << 20
FOLDER_BYTES_MAX: Final = 48
"""Longer temporary folders leave no room for the names of unix sockets."""
LOOK_MS: Final = 20

_lifelines: weakref.WeakSet[LocalFabric] = weakref.WeakSet()


class LocalFabric:
    """A running fabric that belongs to this process. Made by `local_fabric`."""

    def __init__(
        self,
        *,
        nodes: int = 1,
        memory_bytes: int = MEMORY_BYTES_DEFAULT,
        block_bytes: int = BLOCK_BYTES_DEFAULT,
        faults: Mapping[str, str] | None = None,
        tcp: bool = False,
        modules: Mapping[str, str] | None = None,
        clear_proved_clean: bool = False,
    ) -> None:
        self._wanted = Wanted(
            nodes=nodes, memory_bytes=memory_bytes, block_bytes=block_bytes, tcp=tcp, port_base=0,
            faults=dict(faults or {}), modules=dict(modules or {}), ephemeral=True,
            clear_proved_clean=clear_proved_clean,
        )  # fmt: skip
        self._launched: Launched | None = None
        self._lifeline = -1
        self._connection: Fabric | None = None
        self._is_entered = False
        self._owner_pid = os.getpid()
        self.layout = Layout(Path(), Path())

    # life

    def start(self, *, wait: bool = True) -> Self:
        """Start all processes and, unless told otherwise, wait until they are ready."""
        folder = Path(tempfile.mkdtemp(prefix="grafos-", dir=_short_folder()))
        self.layout = Layout(folder / "state", folder / "run")
        reading, self._lifeline = os.pipe()
        _lifelines.add(self)
        try:
            self._launched = launch(self.layout, self._wanted, parent_fd=reading)
        finally:
            os.close(reading)
        if wait:
            try:
                self._launched.wait_ready()
            except BaseException:
                self.close()
                raise
        return self

    def close(self) -> None:
        """Stop everything and remove it. In a forked child: nothing, the fabric is the parent's."""
        launched, self._launched = self._launched, None
        if launched is None or os.getpid() != self._owner_pid:
            return
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._let_go()
        launched.close()
        try:
            launched.process.wait(END_MS_MAX / 1000)
        except BaseException:
            launched.process.kill()
            launched.process.wait()
            raise
        finally:
            _remove(self.layout.state.parent)

    def __enter__(self) -> Self:
        if self._launched is None:
            self.start()
        self.connection.__enter__()
        self._is_entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_entered and self._connection is not None:
            self._connection.__exit__(kind, error, trace)
        self.close()

    def _let_go(self) -> None:
        descriptor, self._lifeline = self._lifeline, -1
        if descriptor >= 0:
            os.close(descriptor)

    # looking

    @property
    def connection(self) -> Fabric:
        """This process's connection to it, as `connect()` gives one to others."""
        if self._connection is None or self._connection.closed:
            from grafos._connection import to_cluster  # loads gRPC, not before it is needed

            self._connection = to_cluster(self.description)
        return self._connection

    @property
    def description(self) -> ClusterDescription:
        """Where its services are now."""
        found = descriptions.load(self.layout.description)
        if found is None:
            raise failure.of("NOT_READY", "the fabric has not said yet where its services are")
        return found

    @property
    def state_dir(self) -> Path:
        """One folder per process below it: `ledger`, `admission`, `audit`, `node-n1`, …"""
        return self.layout.state

    def status(self) -> dict[str, Any]:
        """What `grafos status -o json` shows."""
        return ask(self.layout.supervisor_socket, {"op": "status"})

    def pids(self) -> dict[str, int]:
        """Process numbers: `ledger`, `node-n1`, `node-n1/front`, `node-n1/warden`, `supervisor`."""
        return {name: pid for name, (pid, _) in self._processes().items()}

    def _processes(self) -> dict[str, tuple[int, int]]:
        """Name to process number and start time, of what runs."""
        status = self.status()
        own = status["supervisor"]
        found = {"supervisor": (int(own["pid"]), int(own["start"]))}
        for each in status["processes"]:
            if each["pid"] is None or each["start"] is None:
                continue
            found[each["name"]] = (each["pid"], each["start"])
            for child in each["children"]:
                found[f"{each['name']}/{child['name']}"] = (child["pid"], child["start"])
        return found

    def wait_ready(self, timeout_ms: int = READY_MS_MAX) -> None:
        """Until every process runs and is ready; raises what is missing when the time is up."""
        until_ms = _clock.boot_ms() + timeout_ms
        while True:
            try:
                if self.status()["ready"]:
                    return
            except FabricError as refusal:
                if refusal.code != "UNREACHABLE":
                    raise
            if _clock.boot_ms() >= until_ms:
                from grafos._cluster.launch import why_not_ready

                raise failure.of("DEADLINE", why_not_ready(self.layout))
            _clock.sleep_ms(LOOK_MS)

    def wait_replaced(self, name: str, pid: int, timeout_ms: int = READY_MS_MAX) -> int:
        """Until another process has this name; its process number."""
        until_ms = _clock.boot_ms() + timeout_ms
        while (now := self.pids().get(name, pid)) == pid:
            if _clock.boot_ms() >= until_ms:
                raise failure.of("DEADLINE", f"{name} (pid {pid}) was not started again")
            _clock.sleep_ms(LOOK_MS)
        return now

    # harming

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to one process by its name in `pids()`; its process number.

        After SIGKILL it has ended when this returns. What dies is started again after a moment.
        """
        found = self._processes().get(name)
        if found is None:
            raise failure.of("NOT_FOUND", f"no process is called {name}")
        pid, start = found
        pidfd = os.pidfd_open(pid)
        try:
            if descriptions.start_ticks(pid) != start:
                raise failure.of("NOT_FOUND", f"{name} has ended by itself")
            signal.pidfd_send_signal(pidfd, number)
            if number == signal.SIGKILL:
                poller = select.poll()
                poller.register(pidfd, select.POLLIN)
                poller.poll(5_000)
        finally:
            os.close(pidfd)
        return pid

    def set_fault(self, name: str, faults: str) -> None:
        """Give a process other faults, or none, from its next start on."""
        ask(self.layout.supervisor_socket, {"op": "fault", "process": name, "fault": faults})


def local_fabric(
    nodes: int = 1,
    *,
    memory_bytes: int = MEMORY_BYTES_DEFAULT,
    block_bytes: int = BLOCK_BYTES_DEFAULT,
    faults: Mapping[str, str] | None = None,
    tcp: bool = False,
    clear_proved_clean: bool = False,
) -> LocalFabric:
    """A fabric of this program's own; a context manager.

    Args:
        nodes: node agents, called n1, n2, …
        memory_bytes: of each node; taken only while it is leased.
        block_bytes: of each node; taken from the disk at once.
        faults: process name to named faults, as in `{"node-n1": "teardown.erase:EIO"}`.
        tcp: loopback ports in the place of unix sockets.
        clear_proved_clean: nodes free fenced slices that a probe has proved clean.

    Raises:
        Degraded: it did not become ready; the reason says which part, and why.
    """
    return LocalFabric(
        nodes=nodes, memory_bytes=memory_bytes, block_bytes=block_bytes, faults=faults, tcp=tcp,
        clear_proved_clean=clear_proved_clean,
    )  # fmt: skip


def _short_folder() -> str:
    """Where temporary folders are made: the usual place, unless that is too deep for sockets."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= FOLDER_BYTES_MAX else "/tmp"


def _remove(folder: Path) -> None:
    """The supervisor has removed what was in it; if it was killed, that is done here."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _forked() -> None:
    """A fork must not keep its parent's fabrics alive."""
    for fabric in list(_lifelines):
        fabric._let_go()


os.register_at_fork(after_in_child=_forked)
