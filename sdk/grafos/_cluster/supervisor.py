"""The process that keeps the fabric of this machine running.

It starts every service at once, hands each the secret for its first certificate, starts again what
dies, and at the end stops everything in order: agents first, so that what they tear down is still
credited, the ledger last.

    start ──► all announced and ready ──► (somebody dies ──► pause ──► started again) ──► stop

Rules. One thread owns the processes; the others (identities, telephone, readiness) ask for a
snapshot under the lock, and put their wishes into a queue. A second supervisor on the same folders
is refused by a lock on both. Whatever ends the supervisor ends its processes: they hold the reading
end of a pipe that only it can write.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import select
import selectors
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grafos._clock import boot_ms, wall_ms
from grafos._cluster import child as children
from grafos._cluster import description as descriptions
from grafos._cluster.child import BackOff, Child
from grafos._cluster.description import ClusterDescription, NodeDescription
from grafos._cluster.layout import Layout
from grafos._cluster.logfile import last_words, rotate
from grafos._cluster.processes import descendants
from grafos._cluster.programs import Plan, Program, programs
from grafos._cluster.readiness import Watch
from grafos._cluster.remembered import remembered
from grafos._cluster.telephone import Telephone
from grafos_core import failure
from grafos_core.failure import FabricError

if TYPE_CHECKING:
    from grafos._cluster.identities import Identities

TICK_MS: Final = 1_000
STOP_MS_MAX: Final = 8_000
"""For one group of processes to drain; then they are killed."""
USAGE_STATUS: Final = 2
START_DEATHS_MAX: Final = 6
"""In about eight seconds: what a supervisor that was killed has left behind ends in less."""


@dataclass(slots=True)
class Slot:
    """The place of one process: whoever fills it now, and how often it had to be filled again."""

    program: Program
    child: Child | None = None
    restarts: int = 0
    last_status: int | None = None
    back_off: BackOff = field(default_factory=BackOff)


class Supervisor:
    """Constructed without effect; `run` does everything and returns the exit status."""

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        *,
        environment: Mapping[str, str],
        parent_fd: int | None = None,
        ready_fd: int | None = None,
        ephemeral: bool = False,
    ) -> None:
        """`parent_fd`: a pipe whose end ends us. `ready_fd`: gets one JSON line when the fabric is
        ready or cannot be. `ephemeral`: both folders are removed at the end."""
        self._plan, self._layout, self._environment = plan, layout, environment
        self._parent_fd, self._ready_fd, self._ephemeral = parent_fd, ready_fd, ephemeral
        self._slots: dict[str, Slot] = {}
        self._lock = threading.Lock()
        self._wishes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake_reading, self._wake_writing = -1, -1
        self._lifeline_reading, self._lifeline_writing = -1, -1
        self._identities: Identities | None = None
        self._watch = Watch(self._http_endpoints, self._wake)
        self._started_ms = 0
        self._stopping = ""
        self._was_ready = False
        self._rotation_due_ms = 0

    def run(self) -> int:
        """Until told to stop."""
        self._started_ms = boot_ms()
        try:
            self._layout.prepare()
            locks = [_lock(folder) for folder in (self._layout.state, self._layout.run)]
            self._plan = remembered(self._plan, self._layout.state)
        except FabricError as refusal:
            self._report({"ready": False, "code": refusal.code, "why": refusal.detail})
            raise
        self._open_pipes()
        telephone = Telephone(self._layout.supervisor_socket, self._answer)
        try:
            self._start_all()
            telephone.start()
            self._watch.start()
            while not self._stopping:
                self._step()
            status = 0
        except FabricError as refusal:
            self._say("supervisor.refused", code=refusal.code, detail=refusal.detail)
            self._report({"ready": False, "code": refusal.code, "why": refusal.detail})
            status = 1
        finally:
            self._stop_all(telephone)
        for descriptor in locks:
            os.close(descriptor)
        return status

    # starting

    def _open_pipes(self) -> None:
        self._wake_reading, self._wake_writing = os.pipe()
        os.set_blocking(self._wake_writing, False)
        os.set_blocking(self._wake_reading, False)
        signal.set_wakeup_fd(self._wake_writing, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda given, _: self._end(signal.Signals(given).name))
        self._lifeline_reading, self._lifeline_writing = os.pipe()
        self._selector.register(self._wake_reading, selectors.EVENT_READ, self._woken)
        if self._parent_fd is not None:
            self._selector.register(self._parent_fd, selectors.EVENT_READ, self._parent_ended)

    def _start_all(self) -> None:
        """All processes first: they load for half a second, and so do we."""
        for program in programs(self._plan, self._layout):
            slot = self._slots[program.name] = Slot(program)
            self._start(slot)
        self._identities = self._open_identities()
        self._describe()
        for slot in self._slots.values():
            self._deliver(slot)

    def _open_identities(self) -> Identities:
        from grafos._cluster.identities import Identities  # slow to load: see the module

        identities = Identities(
            self._layout.authority,
            self._layout.identity_socket,
            trust_domain=self._plan.trust_domain,
            operator_uid=os.getuid(),
        )
        if self._plan.join_listen:
            identities.listen_for_machines(self._plan.join_listen)
        identities.start()
        return identities

    def _start(self, slot: Slot) -> None:
        self._layout.service_state(slot.program.name).mkdir(mode=0o700, exist_ok=True)
        now_ms = boot_ms()
        try:
            made = children.start(
                slot.program, self._layout, self._lifeline_reading, self._environment, now_ms
            )
        except OSError as error:  # no memory, no process numbers: may be over soon
            slot.back_off.died(started_ms=now_ms, now_ms=now_ms)
            return self._say("process.not_started", process=slot.program.name, why=str(error))
        with self._lock:
            slot.child = made
        self._selector.register(made.pidfd, selectors.EVENT_READ, lambda: self._died(slot))
        self._selector.register(made.ready_fd, selectors.EVENT_READ, lambda: self._heard(slot))
        self._say("process.started", process=slot.program.name, pid=made.pid)
        if self._identities is not None:
            self._deliver(slot)

    def _deliver(self, slot: Slot) -> None:
        assert self._identities is not None
        if slot.child is None or slot.child.secret_fd < 0:
            return
        program = slot.program
        try:
            slot.child.deliver(self._identities.secret_for(program.role, program.identity))
        except FabricError as refusal:  # too many at a time: it is started again later
            slot.child.deliver("")
            self._say("process.no_secret", process=program.name, code=refusal.code)

    # the loop

    def _step(self) -> None:
        now_ms = boot_ms()
        due = [slot.back_off.due_ms for slot in self._slots.values()]
        wait_ms = min([TICK_MS, *(max(0, each - now_ms) for each in due if each is not None)])
        events = self._selector.select(wait_ms / 1000)
        for key, _ in events:
            if self._selector.get_map().get(key.fd) is key:  # else the one before ended it
                key.data()
        for slot in self._slots.values():
            if not self._stopping and slot.back_off.take(boot_ms()):
                slot.restarts += 1
                self._start(slot)
        if now_ms >= self._rotation_due_ms:
            self._rotation_due_ms = now_ms + TICK_MS
            for name in self._slots:
                rotate(self._layout.log(name))
            rotate(self._layout.supervisor_log)

    def _woken(self) -> None:
        try:
            os.read(self._wake_reading, 4096)
        except BlockingIOError:
            pass  # read already
        while not self._wishes.empty():
            self._wishes.get()()
        if not self._was_ready and self._all_ready():
            self._was_ready = True
            took_ms = boot_ms() - self._started_ms
            self._say("supervisor.ready", took_ms=took_ms)
            self._report({"ready": True, "took_ms": took_ms})

    def _parent_ended(self) -> None:
        assert self._parent_fd is not None
        if not os.read(self._parent_fd, 1):
            self._selector.unregister(self._parent_fd)
            self._end("parent ended")

    def _heard(self, slot: Slot) -> None:
        child = slot.child
        assert child is not None
        descriptor = child.ready_fd
        is_complete = child.hear()
        if child.ready_fd < 0:
            self._selector.unregister(descriptor)
        if is_complete:
            self._describe()
            self._watch.hurry()

    def _died(self, slot: Slot) -> None:
        child = slot.child
        assert child is not None
        self._forget(child)
        with self._lock:
            slot.child = None
            slot.last_status = child.reap()
        pause_ms = slot.back_off.died(started_ms=child.started_ms, now_ms=boot_ms())
        name, status = slot.program.name, slot.last_status
        self._say("process.died", process=name, pid=child.pid, status=status, pause_ms=pause_ms)
        if not self._was_ready:
            self._give_up_if_hopeless(slot, child)

    def _give_up_if_hopeless(self, slot: Slot, child: Child) -> None:
        """Before the fabric has ever been ready, what cannot start must not look like patience."""
        name = slot.program.name
        why = last_words(self._layout.log(name))
        if slot.last_status == USAGE_STATUS:
            raise failure.of("OPTION", f"{name} does not take its flags: {why}")
        if not child.http and slot.back_off.deaths >= START_DEATHS_MAX:
            raise failure.of("NOT_READY", f"{name} ended {slot.back_off.deaths} times: {why}")

    def _forget(self, child: Child) -> None:
        for descriptor in (child.pidfd, child.ready_fd):
            if descriptor >= 0:
                self._selector.unregister(descriptor)

    # what others see and want; called from any thread

    def _wake(self) -> None:
        try:
            os.write(self._wake_writing, b"\0")
        except BlockingIOError:
            pass  # it is awake

    def _end(self, why: str) -> None:
        self._stopping = self._stopping or why
        self._wake()

    def _wish(self, what: Callable[[], None]) -> None:
        self._wishes.put(what)
        self._wake()

    def _http_endpoints(self) -> dict[str, str]:
        with self._lock:
            return {
                name: slot.child.http
                for name, slot in self._slots.items()
                if slot.child is not None and slot.child.http
            }

    def _all_ready(self) -> bool:
        asked = self._http_endpoints()
        return len(asked) == len(self._slots) and all(
            self._watch.of(name, where).ready for name, where in asked.items()
        )

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request:
            case {"op": "status"}:
                self._watch.look_now()
                return self.snapshot()
            case {"op": "fault", "process": str(name), "fault": str(fault)}:
                if name not in self._slots:
                    raise failure.of("NOT_FOUND", f"no process is called {name}")
                self._wish(lambda: self._set_fault(name, fault))
                return {"ok": True}
            case {"op": "stop"}:
                self._end("asked to stop")
                return {"ok": True}
        raise failure.of("INVALID", "not a question that a supervisor knows")

    def _set_fault(self, name: str, fault: str) -> None:
        """From the next start of that process on."""
        slot = self._slots[name]
        slot.program = replace(slot.program, fault=fault)

    def snapshot(self) -> dict[str, Any]:
        """What `grafos status` shows."""
        now_ms = boot_ms()
        with self._lock:
            pids = [slot.child.pid for slot in self._slots.values() if slot.child is not None]
            below = descendants(pids)
            shown = [self._shown(slot, below, now_ms) for slot in self._slots.values()]
        return {
            "v": 1,
            "ready": all(each["ready"] for each in shown),
            "state_dir": str(self._layout.state),
            "run_dir": str(self._layout.run),
            "supervisor": {
                "pid": os.getpid(),
                "start": descriptions.start_ticks(os.getpid()),
                "uptime_ms": now_ms - self._started_ms,
            },
            "processes": shown,
        }

    def _shown(
        self, slot: Slot, below: Mapping[int, list[dict[str, Any]]], now_ms: int
    ) -> dict[str, Any]:
        child, program = slot.child, slot.program
        endpoints = dict(program.endpoints)
        if child is None:
            return {
                "name": program.name, "state": "restarting", "pid": None, "start": None,
                "ready": False, "closed_gates": {"process": "not running"}, "ready_kinds": [],
                "policies": [], "endpoints": endpoints, "restarts": slot.restarts, "uptime_ms": 0,
                "last_status": slot.last_status, "children": [],
            }  # fmt: skip
        if child.http:
            endpoints["http"] = child.http
        return {
            "name": program.name, "state": "running" if child.http else "starting",
            "pid": child.pid, "start": descriptions.start_ticks(child.pid),
            **self._watch.of(program.name, child.http).shown(),
            "endpoints": endpoints, "restarts": slot.restarts,
            "uptime_ms": now_ms - child.started_ms, "last_status": slot.last_status,
            "children": below.get(child.pid, []),
        }  # fmt: skip

    def _describe(self) -> None:
        assert self._identities is not None
        http = self._http_endpoints()
        nodes = [slot.program for slot in self._slots.values() if slot.program.is_node]
        services = {name: slot.program.endpoints for name, slot in self._slots.items()}
        descriptions.save(
            self._layout.description,
            ClusterDescription(
                trust_domain=self._identities.trust_domain,
                identity_socket=str(self._layout.identity_socket),
                ca_file=str(self._identities.ca_file),
                state_dir=str(self._layout.state),
                admission=services["admission"]["listen"],
                admission_control=services["admission"]["control"],
                join=self._identities.join,
                ledger=services["ledger"]["listen"],
                audit=services["audit"]["listen"],
                nodes=tuple(_node_description(node, http) for node in nodes),
                supervisor_pid=os.getpid(),
                supervisor_start=descriptions.start_ticks(os.getpid()) or 0,
                supervisor_socket=str(self._layout.supervisor_socket),
                http={name: where for name, where in http.items() if name in services},
            ),
        )

    def _report(self, line: dict[str, Any]) -> None:
        descriptor, self._ready_fd = self._ready_fd, None
        if descriptor is None:
            return
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
        except OSError:
            pass  # whoever waited has gone
        os.close(descriptor)

    # stopping

    def _stop_all(self, telephone: Telephone) -> None:
        self._say("supervisor.stopping", why=self._stopping or "refused")
        self._layout.description.unlink(missing_ok=True)
        self._watch.stop()
        slots = list(self._slots.values())
        for group in (
            [slot for slot in slots if slot.program.is_node],
            *(
                [slot]
                for name in ("admission", "audit", "ledger")
                if (slot := self._slots.get(name))
            ),
        ):
            self._stop_group(group)
        telephone.stop()
        if self._identities is not None:
            self._identities.stop()
        for descriptor in (self._lifeline_reading, self._lifeline_writing):
            os.close(descriptor)
        self._say("supervisor.stopped")
        if self._ephemeral:
            for folder in (self._layout.run, self._layout.state):
                shutil.rmtree(folder, ignore_errors=True)
            try:
                self._layout.state.parent.rmdir()
            except OSError:
                pass  # something else is in it, which is not ours

    def _stop_group(self, group: Sequence[Slot]) -> None:
        running = [slot.child for slot in group if slot.child is not None]
        for number, patience_ms in ((signal.SIGTERM, STOP_MS_MAX), (signal.SIGKILL, 5_000)):
            for child in running:
                if number == signal.SIGKILL:
                    self._say("process.killed", process=child.program.name, pid=child.pid)
                child.signal(number)
            running = _still_running(running, boot_ms() + patience_ms)
            if not running:
                break
        for slot in group:
            if slot.child is not None and slot.child not in running:
                self._forget(slot.child)
                with self._lock:
                    ended, slot.child = slot.child, None
                slot.last_status = ended.reap()

    def _say(self, event: str, **fields: Any) -> None:
        now = datetime.fromtimestamp(wall_ms() / 1000, UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": "info", "service": "supervisor", "event": event, **fields}
        try:
            sys.stderr.write(json.dumps(line) + "\n")
            sys.stderr.flush()
        except OSError:
            pass  # nobody reads; the fabric runs on


def _node_description(program: Program, http: Mapping[str, str]) -> NodeDescription:
    return NodeDescription(
        node_id=program.identity,
        front=program.endpoints["listen"],
        control=program.endpoints["control"],
        http=http.get(program.name, ""),
    )


def _still_running(running: Sequence[Child], until_ms: int) -> list[Child]:
    """Those that have not ended when the time is up."""
    left = list(running)
    while left and (wait_ms := until_ms - boot_ms()) > 0:
        poller = select.poll()
        for child in left:
            poller.register(child.pidfd, select.POLLIN)
        ended = {descriptor for descriptor, _ in poller.poll(wait_ms)}
        left = [child for child in left if child.pidfd not in ended]
    return left


def _lock(folder: Path) -> int:
    """Held by its descriptor until we end, however that is; the file says who holds it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(folder / descriptions.LOCK_FILE, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise failure.of("PRECONDITION", f"another supervisor uses {folder}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {descriptions.start_ticks(os.getpid())}\n".encode(), 0)
    return descriptor
