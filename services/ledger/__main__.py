"""`python -m services.ledger`: flags, wiring, and nothing else."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Sequence
from typing import Any, Final

from grafos_core import commands as c
from grafos_core import jws
from grafos_core.commands import Event
from grafos_core.lessor import Lessor
from grafos_core.quota import UNLIMITED, Limit
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import audit_pb2_grpc, ledger_pb2_grpc
from grafos_proto.wire.credentials import IdentityFiles
from services.ledger.meters import Meters
from services.ledger.nodes import Nodes
from services.ledger.sender import Sender
from services.ledger.server import SOFTWARE, LedgerServicer, add_receipt_key
from services.ledger.store import RESERVE_BYTES, Store
from services.ledger.writer import Ledger
from services.runtime import flags
from services.runtime.client import Remote
from services.runtime.flags import Flag, Values
from services.runtime.limits import Limits
from services.runtime.process import Process, run_service
from services.runtime.server import Listener, Service
from services.runtime.signing import SigningKey

MEBIBYTE: Final = 1024 * 1024
FLAGS: Final = (
    Flag("reserve-mib", "room kept for when the disk is full", str(RESERVE_BYTES // MEBIBYTE),
         flags.number(1, 4096)),
    Flag("quota-amount", "of each tenant and kind where none is set", str(UNLIMITED),
         flags.number(0, UNLIMITED)),
    Flag("quota-count", "leases of each tenant and kind where none is set", str(UNLIMITED),
         flags.number(0, UNLIMITED)),
)  # fmt: skip
GATES: Final = ("store", "clock", "disk")
LIMITS: Final = Limits(
    receive_bytes_max=MEBIBYTE,
    streams_per_connection_max=64,
    connections_max=8,
    connection_age_ms_max=300_000,
    calls_per_identity_max=256,
)
"""For services and nodes: a registration lists up to 10,000 live leases."""


def start(process: Process) -> None:
    values, files = process.values, process.identity()
    store = Store.open(process.state_dir / "events", reserve_bytes=values.reserve_mib * MEBIBYTE)
    process.on_stop(store.close)
    lessor = Lessor(default_limit=Limit(values.quota_amount, values.quota_count))
    keys, meters = jws.Keys(), Meters(process.metrics)
    replay(store, lessor, keys)
    for lease in lessor.state.leases.values():
        meters.note(lease)
    process.log.info(
        "ledger.replayed", records=store.number, leases=len(lessor.state.leases),
        sqlite=sqlite3.sqlite_version, incarnation=store.incarnation,
    )  # fmt: skip
    ledger = Ledger(
        store, lessor, clock=process.clock, log=process.log, meters=meters,
        readiness=process.readiness, halt=process.halt,
    )  # fmt: skip
    own = Identity(values.trust_domain, Role.SERVICE, None, "ledger")
    clear_key = _key(process, "clear.key")
    ledger.begin(_own_keys(own, store.key, clear_key), _started(store.key))
    servicer = LedgerServicer(ledger, keys, clear_key, own)
    wakes = _wire(process, ledger, store, servicer, files, lessor)

    def happened(events: Sequence[Event]) -> None:
        for event in events:
            _learn(event, lessor, keys)
        for wake in wakes:
            wake()

    ledger.on_events = happened
    ledger.start()
    process.on_stop(ledger.stop)
    meters.show(lambda question: ledger.read(question, 1_000))
    process.readiness.open("store")
    _serve(process, servicer, files)


def replay(store: Store, lessor: Lessor, keys: jws.Keys) -> None:
    """Verify what is on disk and make the state of it again."""

    def apply(event: Event) -> None:
        lessor.replay(event)
        _learn(event, lessor, keys)

    store.replay(apply)


def _learn(event: Event, lessor: Lessor, keys: jws.Keys) -> None:
    """Believe the receipts of a node from its registration on, also of its earlier keys."""
    if event.kind == "node.registered":
        key = lessor.state.keys[event.body["receipt_key_id"]]
        add_receipt_key(keys, key, event.body["incarnation"])


def _started(seal_key: SigningKey) -> dict[str, Any]:
    return {"software": SOFTWARE, "sqlite": sqlite3.sqlite_version, "seal_key": seal_key.key_id}


def _own_keys(own: Identity, seal: SigningKey, clear: SigningKey) -> list[c.Command]:
    return [
        c.PublishKey(c.PublishedKey(key.key_id, str(own), use, key.public_key))
        for key, use in ((seal, "seal"), (clear, "clear"))
    ]


def _key(process: Process, name: str) -> SigningKey:
    path = process.state_dir / name
    return SigningKey.load(path) if path.exists() else SigningKey.make(path)


def _wire(
    process: Process, ledger: Ledger, store: Store, servicer: LedgerServicer, files: IdentityFiles,
    lessor: Lessor,
) -> list[Any]:  # fmt: skip
    """The two that speak to others by themselves; what to call when something has happened."""
    values = process.values
    nodes = Nodes(
        ledger, servicer.obligation, servicer.credit, provider=files,
        trust_domain=values.trust_domain, dice=process.dice, clock=process.clock, log=process.log,
    )  # fmt: skip
    ledger.on_obligations = nodes.wake
    owing = list(lessor.state.nodes.values())  # the ledger's thread has not begun
    nodes.start()
    process.on_stop(nodes.stop)
    nodes.wake(node.node_id for node in owing if node.owing)
    if not values.audit:
        return []
    audit = Identity(values.trust_domain, Role.SERVICE, None, "audit")
    remote = Remote(
        values.audit, audit, files, audit_pb2_grpc.AuditServiceStub, dice=process.dice,
        clock=process.clock,
    )  # fmt: skip
    sender = Sender(ledger, store, remote, readiness=process.readiness, log=process.log)
    sender.start()
    process.on_stop(sender.stop)
    return [sender.wake]


def _serve(process: Process, servicer: LedgerServicer, files: IdentityFiles) -> None:
    service = Service(
        "grafos.v1.LedgerService", ledger_pb2_grpc.add_LedgerServiceServicer_to_server, servicer
    )
    endpoints = [e for e in (process.values.listen, process.values.control_listen) if e]
    listeners = [Listener(e, [service], limits=LIMITS, control=True) for e in endpoints]
    process.serve(listeners, files)


def main(arguments: Sequence[str] | None = None) -> int:
    values: Values = flags.read(
        "grafos-ledger", "Remembers who holds what.", FLAGS, arguments=arguments,
        without=("ledger",),
    )  # fmt: skip
    gates = [*GATES, *(["audit"] if values.audit else [])]
    return run_service(Process("ledger", values, gates=gates), start)


if __name__ == "__main__":
    sys.exit(main())
