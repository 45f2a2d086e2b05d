"""One episode: a load, a kill at a moment that nobody chose, and then every law.

    load runs ─► so many operations ─► SIGKILL ─► load runs on, all is up again ─► load ends
              ─► what still lives is ended ─► everything is looked at from outside ─► laws

While an agent is dead one of the holders is stopped, so that it cannot help: whatever it had open
it still has open when the next agent comes.

Rules. The seed draws the moment and the load; the victim is drawn from it, too, or given. Moments
are counted in operations, so that a slow machine kills in the middle of the work as a fast one
does. An episode with fewer than 200 operations proves nothing and is a failed one. Every wait has
a bound, and a bound that is met is a violation.
"""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from grafos import BlockBuilder, MemBuilder
from grafos._cluster.programs import environment
from grafos._connection import to_cluster
from grafos._local import LocalFabric
from grafos_core.failure import FabricError
from tests.chaos.laws import Told, conserved, every_law, exclusive
from tests.chaos.load import HandedOn, Journal, Note, Worker
from tests.chaos.onlooker import Onlooker

VICTIMS: Final[Mapping[str, tuple[str, ...]]] = {
    "ledger": ("ledger",),
    "admission": ("admission",),
    "audit": ("audit",),
    "agent": ("node-n1",),
    "front": ("node-n1/front",),
    "warden": ("node-n1/warden",),
    "agent+warden": ("node-n1/warden", "node-n1"),
    "holder": (),
}
NODES: Final = 2
MEMORY_BYTES: Final = 4 << 20
BLOCK_BYTES: Final = 1 << 20
"""Small, so that the leases compete for the same pages and blocks."""
OPERATIONS_MIN: Final = 200
AFTER_MIN: Final = 60
"""Operations after the kill, at the least."""
BUSY_S_MAX: Final = 60.0
READY_S_MAX: Final = 30.0
SETTLE_S_MAX: Final = 20.0
HOLDER_GONE_S_MAX: Final = 2.5
"""Half of what a lost connection has, to return: a death is seen as one."""
JOIN_S_MAX: Final = 40.0
BOTH_DEAD: Final = ("agent+warden", "disk-warden")
UNKNOWABLE: Final = "processes of other users may still have it"
"""Agent and warden are dead, and a process that may have the memory cannot be looked into."""
LOOK_S: Final = 0.02
GLANCE_S: Final = 0.25


@dataclass(slots=True)
class Report:
    """What came of an episode."""

    seed: int
    victim: str
    operations: int = 0
    at_kill: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    leases: int = 0
    records: int = 0
    glances: int = 0
    fences: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        refused = ", ".join(f"{count} {what}" for what, count in self.refused.most_common(4))
        state = "whole" if not self.wrong else f"{len(self.wrong)} VIOLATIONS"
        return (
            f"seed {self.seed:<6} {self.victim:<13} killed after {self.at_kill:>4} of "
            f"{self.operations:>4} operations, {self.leases} leases, {self.fences} fences, "
            f"{self.records} records, "
            f"{self.seconds:.1f} s: {state} ({refused or 'nothing refused'})"
        )


def new_fabric() -> LocalFabric:
    """What an episode runs in: real processes, little of everything."""
    return LocalFabric(nodes=NODES, memory_bytes=MEMORY_BYTES, block_bytes=BLOCK_BYTES)


class Episode:
    def __init__(self, fabric: LocalFabric, seed: int, victim: str | None = None) -> None:
        self._fabric = fabric
        self._dice = random.Random(f"episode {seed}")
        drawn = self._dice.choice(sorted(VICTIMS))
        self.report = Report(seed, victim or drawn)
        self._told: list[Told] = []
        self._lock = threading.Lock()
        self._handed_on: queue.Queue[HandedOn] = queue.Queue()
        self._workers: list[Worker] = []
        self._threads: list[threading.Thread] = []
        self._holders: list[HolderProcess] = []

    def run(self) -> Report:
        begun = time.monotonic()
        onlooker = Onlooker(self._fabric)
        connections = [to_cluster(self._fabric.description) for _ in range(2)]
        try:
            self._start(connections)
            self._kill_in_the_middle()
            self._carry_on(onlooker)
            self._stop()
            self._check(onlooker)
        finally:
            for holder in self._holders:
                holder.kill()
            for connection in connections:
                connection.close()
            onlooker.close()
            self.report.seconds = time.monotonic() - begun
        return self.report

    # load

    def _start(self, connections: Sequence[Any]) -> None:
        seed = self.report.seed
        for number in range(3):
            worker = Worker(
                connections[number % 2], Journal(self._note), f"{seed}/{number}", self._handed_on
            )
            thread = threading.Thread(target=worker.run, name=f"load-{number}", daemon=True)
            self._workers.append(worker)
            self._threads.append(thread)
            thread.start()
        for number in range(2):
            self._holders.append(HolderProcess(self._fabric, f"{seed}/holder-{number}", self._note))

    def _note(self, note: Note) -> None:
        with self._lock:
            if note.what in ("done", "failed"):
                self.report.operations += 1
            if note.what == "failed":
                self.report.refused[note.text] += 1
            elif note.what == "wrong":
                self.report.wrong.append(note.text)
            elif note.told is not None:
                self._told.append(note.told)
                self.report.leases += note.told.verb == "acquire"

    def _wait_operations(self, count: int) -> None:
        until = time.monotonic() + BUSY_S_MAX
        while self.report.operations < count:
            if time.monotonic() >= until:
                found = self.report.operations
                self.report.wrong.append(f"only {found} of {count} operations in {BUSY_S_MAX} s")
                return
            time.sleep(LOOK_S)

    # harm

    def _kill_in_the_middle(self) -> None:
        self._wait_operations(self._dice.randint(40, 180))
        if self.report.victim == "holder":
            for holder in self._holders:  # both have to be at it
                holder.wait_busy()
        time.sleep(self._dice.uniform(0, 0.04))
        self.report.at_kill = self.report.operations
        if self.report.victim == "holder":
            self._kill_holder()
            return
        if self.report.victim.startswith("agent"):
            self._holders[1].wait_busy()
            self._holders[1].pause()  # it hears nothing, and lets go of nothing by itself
        found = self._fabric.pids()
        missing = [name for name in VICTIMS[self.report.victim] if name not in found]
        if missing:
            self.report.wrong.append(f"there is no {missing[0]} to kill")
            return
        kill_together([found[name] for name in VICTIMS[self.report.victim]])

    def _kill_holder(self) -> None:
        holder = self._holders[0]
        holder.kill()
        theirs = holder.lost_leases()
        left = self._onlook(theirs)
        self.report.wrong += [f"law 5: its holder is dead, and it lives: {each}" for each in left]

    def _onlook(self, leases: set[str]) -> list[str]:
        onlooker = Onlooker(self._fabric)
        try:
            return onlooker.wait_settled(leases, HOLDER_GONE_S_MAX)
        finally:
            onlooker.close()

    def _carry_on(self, onlooker: Onlooker) -> None:
        """Until everything runs again and enough was done; with glances at what can be seen."""
        until = time.monotonic() + READY_S_MAX
        enough = max(OPERATIONS_MIN, self.report.at_kill + AFTER_MIN)
        while not self._is_ready() or self.report.operations < enough:
            if time.monotonic() >= until:
                self.report.wrong.append(
                    f"not ready again after {READY_S_MAX} s: {self._why_not_ready()}"
                )
                break
            if self.report.operations >= enough:
                self._ease()
            self._glance(onlooker)
            time.sleep(GLANCE_S)
        self._glance(onlooker)
        self._holders[1].resume()
        self._wait_operations(enough)

    def _ease(self) -> None:
        for worker in self._workers:
            worker.ease()
        for holder in self._holders:
            holder.ease()

    def _is_ready(self) -> bool:
        try:
            return bool(self._fabric.status()["ready"])
        except FabricError:
            return False

    def _why_not_ready(self) -> str:
        try:
            processes = self._fabric.status()["processes"]
        except FabricError as refused:
            return str(refused)
        return str({each["name"]: each["closed_gates"] for each in processes if not each["ready"]})

    def _glance(self, onlooker: Onlooker) -> None:
        """Laws that hold at every instant, while the load runs and whoever answers, answers."""
        try:
            books = onlooker.books()
            totals = {(book.node_id, book.kind): book.total for book in books}
            wrong = conserved(books) + exclusive("the nodes", onlooker.node_slices(), totals)
            wrong += onlooker.outliving()
        except FabricError:
            return  # somebody is dead just now
        self.report.glances += 1
        self.report.wrong += wrong

    # end

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        for holder in self._holders:
            holder.stop()
        until = time.monotonic() + JOIN_S_MAX
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                self.report.wrong.append(f"{thread.name} hangs")
        for holder in self._holders:
            self.report.wrong += holder.wait(max(0.0, until - time.monotonic()))

    def _check(self, onlooker: Onlooker) -> None:
        wrong = self.report.wrong
        if self.report.operations < OPERATIONS_MIN:
            wrong.append(f"only {self.report.operations} operations: this proves nothing")
        wrong += self._still_serves()
        try:
            onlooker.end_all()
            left = onlooker.wait_settled(None, SETTLE_S_MAX, also_fenced=True)
            wrong += self._clear_fences(onlooker)
            left = left or onlooker.wait_settled(None, SETTLE_S_MAX)
            wrong += [f"law 5: it has ended, and is not settled: {each}" for each in left]
            scene, unverified = onlooker.scene(self._told, SETTLE_S_MAX)
        except FabricError as refused:
            wrong.append(f"the fabric cannot be looked at: {refused}")
            return
        wrong += unverified + every_law(scene)
        wrong += [f"a memory is left open: {each}" for each in scene.memories if each.size_bytes]
        wrong += [f"not all is free: {book}" for book in scene.books if book.free != book.total]
        self.report.records = len(scene.ledger_chain) + sum(map(len, scene.node_chains.values()))

    def _clear_fences(self, onlooker: Onlooker) -> list[str]:
        """Fences are lawful only where nobody is left who could know, and an order ends them."""
        fences = onlooker.clear_fences()
        self.report.fences = len(fences)
        return [
            f"{lease_id} is fenced without need: {cause}"
            for lease_id, cause in fences.items()
            if self.report.victim not in BOTH_DEAD or UNKNOWABLE not in cause
        ]

    def _still_serves(self) -> list[str]:
        """Each node and each kind, for a newcomer."""
        wrong = []
        with to_cluster(self._fabric.description) as newcomer:
            for node in self._fabric.description.nodes:
                for builder in (MemBuilder().min_bytes(4096), BlockBuilder().min_blocks(1)):
                    asked = builder.where(node=node.node_id).wait(10).fabric(newcomer)
                    try:
                        receipt = asked.acquire().release()
                    except FabricError as refused:
                        wrong.append(f"{node.node_id} does not serve {builder.kind}: {refused}")
                        continue
                    if not receipt.credited:
                        wrong.append(f"{node.node_id}: {builder.kind} was not credited in time")
        return wrong


class HolderProcess:
    """`python -m tests.chaos.holder`, and what it has said."""

    def __init__(self, fabric: LocalFabric, seed: str, note: Any) -> None:
        self._note = note
        self._held: dict[str, Told] = {}
        self._busy = threading.Event()
        self._killed = self._eased = False
        paths = os.pathsep.join(filter(None, sys.path))
        words = [sys.executable, "-m", "tests.chaos.holder", str(fabric.layout.description), seed]
        self._process = subprocess.Popen(
            [*words, "2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(os.environ, "") | {"PYTHONPATH": paths},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.endswith(b"\n"):
                return
            what, text, told = json.loads(line)
            note = Note(what, text, None if told is None else Told(**told))
            if note.told is not None:
                self._remember(note.told)
                self._busy.set()
            self._note(note)

    def _remember(self, told: Told) -> None:
        if told.verb == "acquire":
            self._held[told.lease_id] = told
        elif told.verb in ("release", "detach"):
            self._held.pop(told.lease_id, None)

    def wait_busy(self) -> None:
        self._busy.wait(BUSY_S_MAX)

    def lost_leases(self) -> set[str]:
        """After a kill: what it held for itself and can give back no more."""
        return set(self._held)

    def ease(self) -> None:
        if self._eased or self._killed:
            return
        self._eased = True
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if not self._killed:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self, seconds: float) -> list[str]:
        """What is wrong with its end."""
        if self._killed:
            return []
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return ["a holder's process hangs"]
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode("utf-8", "replace")
        return [f"a holder ended with {status}: {said[-500:]}"] if status else []

    def kill(self) -> None:
        """SIGKILL, and it has ended, and all it said was heard."""
        self._killed = True
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(JOIN_S_MAX)
        self._reader.join(JOIN_S_MAX)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None and not pipe.closed:
                pipe.close()


def kill_together(pids: Sequence[int]) -> None:
    """SIGKILL to all of them with nothing in between; they have ended when this returns."""
    descriptors = [os.pidfd_open(pid) for pid in pids]
    try:
        for descriptor in descriptors:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        until = time.monotonic() + 5
        for pid in pids:
            while os.path.exists(f"/proc/{pid}/fd/0") and time.monotonic() < until:
                time.sleep(0.001)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
