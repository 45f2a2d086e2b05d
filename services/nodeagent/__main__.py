"""`python -m services.nodeagent`: reads the flags, puts the rooms together, opens the listeners.

lock, book ─► leftovers ─► gate page, devices ─► core ─► warden ─► front ─► ledger, collector
                                                   └ the last boot's leases are taken back
self-tests ─► ready
"""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from grafos_core import failure, spiffe
from grafos_core.failure import FabricError
from grafos_core.lease import BLOCK_BYTES, Kind, LeaseId
from grafos_core.node import EVIDENCE_MS_MAX, Instant, Limits, NodeCore
from grafos_core.spiffe import Identity, Role
from grafos_core.token import audience_of
from grafos_proto.v1 import audit_pb2_grpc, node_pb2_grpc
from grafos_proto.wire.credentials import IdentityFiles
from services.nodeagent import leftovers
from services.nodeagent.auditlink import AuditLink, Origin
from services.nodeagent.book import Book
from services.nodeagent.control import Control, Rooms, short_enough
from services.nodeagent.devices.block import BlockDevice
from services.nodeagent.devices.memory import MemoryDevice, advertised_bytes
from services.nodeagent.exports import Exports
from services.nodeagent.frontline import FrontFlags, FrontLine
from services.nodeagent.gatepage import GatePage
from services.nodeagent.ledgerlink import LedgerLink
from services.nodeagent.leftovers import Leftovers
from services.nodeagent.meters import Meters
from services.nodeagent.nodecontrol import NodeControlServicer
from services.nodeagent.pidwatch import ProcessWatch
from services.nodeagent.registrar import Endpoints, Registrar
from services.nodeagent.slices import Slices
from services.nodeagent.store import Store, format_store, is_formatted
from services.nodeagent.trust import TrustedKeys
from services.nodeagent.wardenline import WardenLine
from services.runtime import client, flags
from services.runtime.client import Remote
from services.runtime.flags import Flag, Values
from services.runtime.process import Process, run_service
from services.runtime.server import Listener, Service

BLOCK_BYTES_DEFAULT: Final = 256 << 20
BYTES_MAX: Final = 1 << 50
LABELS_MAX: Final = 32
CLEARS_PROVED_CLEAN: Final = "clears what is proved clean"
FRONT_S_MAX: Final = 15.0
DRAIN_S: Final = 5.5
CREDIT_S: Final = 2.0
SENT_S: Final = 1.0
"""For the collector, who else gets it from the next boot."""
GRACE_MS: Final = 4_000
ROOM_MS: Final = 1_000
"""How often a full disk is asked whether there is room again."""
GATES: Final = (
    "persistence", "audit_anchor", "replay", "ledger", "revocations", "clock", "warden",
)  # fmt: skip
_GATE_OF_HOLD: Final = {
    "NOT_READY": "replay", "WARDEN_LOST": "warden", "SPOOL_FULL": "persistence",
    "REVOCATION_STALE": "revocations", "CLOCK_REGRESSED": "clock",
}  # fmt: skip


def labels(text: str) -> dict[str, str]:
    """`name=value,name=value`."""
    found = dict(part.partition("=")[::2] for part in text.split(",") if part)
    if len(found) > LABELS_MAX:
        raise ValueError(f"at most {LABELS_MAX} labels")
    for name in found:
        spiffe.check_identifier(name, what="label")
    return found


FLAGS: Final = (
    Flag("node-id", "this node's name in the fabric; empty: as in its certificate"),
    Flag("memory-bytes", "memory to lend; -1: a quarter of what is available", "-1",
         flags.number(-1, BYTES_MAX)),
    Flag("block-bytes", "size of the file that blocks are lent from; 0: none",
         str(BLOCK_BYTES_DEFAULT), flags.number(0, BYTES_MAX)),
    Flag("labels", "what selectors find: name=value,…", "", labels),
    Flag("ledger", "address of the ledger", None, flags.endpoint),
    Flag("clear-proved-clean", "free fenced slices that a probe has proved clean, by itself",
         "off", flags.switch, bare="on"),
)  # fmt: skip


@dataclass(slots=True)
class Agent:
    """What `start` has put together."""

    control: Control
    registrar: Registrar
    ledger: LedgerLink
    book: Book
    audit: AuditLink | None = None


def start(process: Process) -> None:
    files = process.identity()
    identity = checked_identity(files, process.values)
    book = open_book(process, identity.name)
    if process.values.clear_proved_clean:
        process.readiness.policies.append(CLEARS_PROVED_CLEAN)
    memory, block = devices(process.values, process.state_dir)
    capacities = capacities_of(memory, block)
    rooms = Rooms(
        book,
        GatePage.create(Limits().leases_max),
        Slices(book.incarnation, memory, block, exports_of(process.state_dir, book)),
        TrustedKeys(identity.trust_domain, audience_of(identity.name, book.incarnation)),
        ProcessWatch(),
        Meters(process.metrics, process.clock.boot_ns),
        process.clock,
        process.log,
    )
    agent = assemble(process, files, identity, rooms, capacities)
    run(process, files, agent, capacities)


def checked_identity(files: IdentityFiles, values: Values) -> Identity:
    """Ours, as the certificate says; a flag that says otherwise is a mistake."""
    identity = files().identity
    if identity.role is not Role.NODE or values.node_id not in ("", identity.name):
        raise failure.of("IDENTITY", "the certificate is not this node's")
    return identity


def open_book(process: Process, node_id: str) -> Book:
    """The durable surface, formatted at the very first start."""
    folder: Path = process.state_dir
    is_new = not is_formatted(folder)
    if is_new:
        format_store(folder, secrets.token_hex(16))
    book = Book(Store(folder), node_id)
    now = Instant(*process.clock.instant())
    kinds = ("agent.formatted", "agent.started") if is_new else ("agent.started",)
    about = {"boot_epoch": book.boot_epoch, "rolled_forward": book.rolled_forward}
    book.append([(kind, "", 0, about) for kind in kinds], now=now, time_floor_ms=0)
    process.readiness.open("persistence")
    process.readiness.open("audit_anchor")
    return book


def exports_of(folder: Path, book: Book) -> Exports:
    past = (*book.recollection.open_binds, *book.recollection.fenced)
    return Exports(folder / "exports", [facts.lease_id for facts in past if facts.may_export])


def devices(values: Values, folder: Path) -> tuple[MemoryDevice | None, BlockDevice | None]:
    memory_bytes = values.memory_bytes if values.memory_bytes >= 0 else advertised_bytes()
    block_bytes = values.block_bytes - values.block_bytes % BLOCK_BYTES
    memory = MemoryDevice(memory_bytes) if memory_bytes else None
    block = BlockDevice(folder / "blocks", block_bytes) if block_bytes else None
    return memory, block


def capacities_of(memory: MemoryDevice | None, block: BlockDevice | None) -> dict[Kind, int]:
    found: dict[Kind, int] = {}
    if memory is not None:
        found[Kind.MEM] = memory.capacity_bytes - memory.capacity_bytes % BLOCK_BYTES
    if block is not None:
        found[Kind.BLOCK] = block.block_count
    return found


def assemble(
    process: Process,
    files: IdentityFiles,
    identity: Identity,
    rooms: Rooms,
    capacities: dict[Kind, int],
) -> Agent:
    """Everything made, nothing started."""
    book, values = rooms.book, process.values
    past = book.recollection
    found, unexported = take_over(process.state_dir, rooms)
    recovered = replace(
        past.recovered(capacities, book.time_floor_ms), unexported=frozenset(unexported)
    )
    core = NodeCore(
        identity.name, book.incarnation, capacities, recovered, Instant(*process.clock.instant()),
        clears_proved_clean=values.clear_proved_clean,
    )  # fmt: skip
    watcher = GateKeeper(process, book, capacities)
    control = Control(identity, core, rooms, found, process.halt, watcher.tick)
    endpoints = Endpoints(control=values.control_listen or "")
    registrar = Registrar(control, capacities, values.labels or {}, endpoints, process.readiness)
    channel = client.channel(
        values.ledger, files, Identity(identity.trust_domain, Role.SERVICE, None, "ledger")
    )
    ledger = LedgerLink(channel, registrar, control.sign_receipt)
    registrar.register_soon = rooms.keys.ask_for_list = ledger.register_soon
    watcher.follow(control, registrar, rooms.slices)
    front = FrontLine(
        front_flags(process, files, rooms.gate.fd),
        control,
        rooms.watch,
        control.in_owner,
        control.front_lost,
        process.clock.boot_ms,
    )
    warden = WardenLine(
        process.state_dir,
        rooms.gate.fd,
        book.boot_epoch,
        rooms.watch,
        control.in_owner,
        control,
        process.clock.boot_ms,
        development=values.mode == "development",
    )
    control.equip(front, warden, ledger)
    control.performer.proofs.update(past.proofs)
    expired = found.expired()
    for lease_id, late_us in expired.items():
        rooms.meters.taken(lease_id, late_us)
    for facts in past.open_binds:
        code = "LEASE_EXPIRED" if facts.lease_id in expired else "AGENT_LOST"
        control.performer.remember_end(facts, failure.of(code, lease_id=facts.lease_id))
    agent = Agent(control, registrar, ledger, book)
    if values.audit:
        agent.audit = audit_link(process, files, identity, book)
    return agent


def take_over(folder: Path, rooms: Rooms) -> tuple[Leftovers, list[LeaseId]]:
    """What the boots before left, bound or fenced, and of which leases nothing was handed out."""
    past, slices = rooms.book.recollection, rooms.slices
    leases = (*past.open_binds, *past.fenced)
    out = {facts.lease_id for facts in leases if slices.may_be_out(facts)}

    def exported(lease_id: str) -> int | None:
        return slices.since(lease_id) if lease_id in out else None

    found = leftovers.gather(folder, rooms.book.incarnation, leases, exported)
    for facts in leases:
        lease_id = facts.lease_id
        memory_fd, unreachable = found.memory.get(lease_id), found.unreachable.get(lease_id, "")
        slices.adopt(facts, memory_fd, unreachable)
    return found, [facts.lease_id for facts in leases if facts.lease_id not in out]


def front_flags(process: Process, files: IdentityFiles, gate_fd: int) -> FrontFlags:
    values, folder = process.values, process.state_dir
    return FrontFlags(
        gate_fd=gate_fd,
        listen=values.listen,
        identity_dir=str(values.identity_dir or folder / "identity"),
        handover=short_enough(str(folder / "front" / "handover.sock")),
        block_file=str(folder / "blocks"),
        block_bytes=values.block_bytes - values.block_bytes % BLOCK_BYTES,
        log_level=values.log_level,
        development=values.mode == "development",
    )


def audit_link(process: Process, files: IdentityFiles, identity: Identity, book: Book) -> AuditLink:
    remote = Remote(
        process.values.audit,
        Identity(identity.trust_domain, Role.SERVICE, None, "audit"),
        files,
        audit_pb2_grpc.AuditServiceStub,
        dice=process.dice,
        clock=process.clock,
    )
    origin = Origin(identity.name, book.incarnation, book.public_key, book.key_id)
    return AuditLink(remote, origin, book, lambda number: None, process.log)


def run(process: Process, files: IdentityFiles, agent: Agent, capacities: dict[Kind, int]) -> None:
    """Start everything, in the order of who needs whom; returns when holders can come."""
    control = agent.control
    process.grace_ms = GRACE_MS
    control.rooms.watch.start()
    control.start()
    process.on_stop(lambda: stop(process, agent))
    endpoint = await_front(control)
    servicer = NodeControlServicer(control)
    service = Service(
        "grafos.v1.NodeControl", node_pb2_grpc.add_NodeControlServicer_to_server, servicer
    )
    listen = process.values.control_listen or "127.0.0.1:0"
    server = process.serve([Listener(listen, [service], control=True)], files)
    agent.registrar.announce(front=endpoint, control=server.endpoints[0])
    server.endpoints.insert(0, endpoint)
    control.rooms.meters.watch(
        control.leases, capacities, lambda: unsent_s(agent.book, process.clock.wall_ms())
    )
    agent.ledger.start()
    if agent.audit is not None:
        agent.book.on_sealed = agent.audit.sealed
        agent.audit.start()


def await_front(control: Control) -> str:
    """Where holders connect."""
    if not control.front_ready.wait(FRONT_S_MAX):
        raise failure.of("NOT_READY", "the front does not come up")
    return control.front.endpoint


def unsent_s(book: Book, wall_ms: int) -> float:
    oldest_ms = book.oldest_unacknowledged_ms()
    return 0.0 if oldest_ms is None else max(0, wall_ms - oldest_ms) / 1000


def stop(process: Process, agent: Agent) -> None:
    """Take every lease back and have it credited, if the ledger answers; then end all processes."""
    is_empty = agent.control.drain(DRAIN_S)
    credited = agent.ledger.wait_sent(CREDIT_S)
    process.log.info("agent.drained", all_proved_back=is_empty, all_credited=credited)
    agent.ledger.stop()
    if agent.audit is not None:
        agent.audit.wait_sent(SENT_S)
        agent.audit.stop()
    agent.control.stop()


class GateKeeper:
    """Turns what the core, the ledger's silence and the self-tests say into gates and holds.

    `tick` is called in the owner's thread, the self-tests run in one of their own.
    """

    def __init__(self, process: Process, book: Book, capacities: dict[Kind, int]) -> None:
        self._process, self._book, self._capacities = process, book, capacities
        self._control: Control | None = None
        self._registrar: Registrar | None = None
        self._shown: dict[str, str] = {}
        self._tested = False
        self._next_ms = self._room_ms = 0
        self._restarts = (0, 0)

    def follow(self, control: Control, registrar: Registrar, slices: Slices) -> None:
        self._control, self._registrar, self._slices = control, registrar, slices

    def tick(self, now: Instant) -> None:
        control, registrar = self._control, self._registrar
        if now.boot_ms < self._next_ms or control is None or registrar is None:
            return
        self._next_ms = now.boot_ms + 100
        core = control.core
        if self._book.is_full and now.boot_ms >= self._room_ms:
            self._room_ms = now.boot_ms + ROOM_MS
            self._book.make_room()
        if self._book.is_full:
            core.hold_binds("SPOOL_FULL", "the spool has room for endings only")
        else:
            core.allow_binds("SPOOL_FULL")
        if not self._tested and not core.recovering:
            self._tested = True
            threading.Thread(target=self._selftest, name="selftest", daemon=True).start()
        closed = dict.fromkeys(GATES, "")
        for code, why in core.closed_gates(now).items():
            closed[_GATE_OF_HOLD.get(code, "replay")] = why
        contact_ms = registrar.contact_ms
        if contact_ms is None or now.boot_ms - contact_ms > EVIDENCE_MS_MAX:
            closed["ledger"] = "no answer from the ledger"
        self._show(closed)

    def _show(self, closed: dict[str, str]) -> None:
        changed = {name: why for name, why in closed.items() if self._shown.get(name) != why}
        self._shown = closed
        for name, why in changed.items():
            if why:
                self._process.readiness.close(name, why)
            else:
                self._process.readiness.open(name)
        if changed and self._registrar is not None:
            self._registrar.changed()

    def _selftest(self) -> None:
        """Each device on its canary; only what works is bound."""
        assert self._control is not None
        tests: dict[Kind, Callable[[], Any]] = {}
        if self._slices.memory is not None:
            tests[Kind.MEM] = self._slices.memory.selftest
        if self._slices.block is not None:
            tests[Kind.BLOCK] = self._slices.block.selftest
        passed = set()
        for kind, test in tests.items():
            try:
                test()
            except (FabricError, OSError) as error:
                self._process.log.error("selftest.failed", error, kind=kind.value)
                self._process.readiness.close("device", str(error), kind=kind.value)
            else:
                passed.add(kind)
                self._process.readiness.open("device", kind=kind.value)
        control, ready = self._control, frozenset(passed)

        def turn_ready() -> None:
            control.core.set_ready_kinds(ready)
            control.core.allow_binds("NOT_READY")
            self._next_ms = 0

        control.in_owner(turn_ready)


def main() -> int:
    values = flags.read(
        "services.nodeagent",
        "Lends this machine's memory and disk, and takes them back.",
        FLAGS,
    )
    kinds = [Kind.MEM.value] if values.memory_bytes else []
    kinds += [Kind.BLOCK.value] if values.block_bytes else []
    return run_service(Process("nodeagent", values, gates=GATES, kinds=kinds), start)


if __name__ == "__main__":
    sys.exit(main())
