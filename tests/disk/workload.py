"""Small programs that keep promises on disk, recorded call by call.

    python -m tests.disk.workload <store> <folder>

Each uses the real store of one process as that process does, and writes two lines into `said` for
each promise: `about <number> <hash>` before it is written, `kept <number>` when it is durable.
Started again on the same folder it goes on where it was, and `kept` then also means what it found
and would tell others of.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from grafos_core.chain import Chain, Seal, seal_bytes
from grafos_core.commands import Event
from grafos_core.failure import FabricError
from services.audit import store as chains
from services.audit.desk import Desk, Offer
from services.ledger import store as events
from services.ledger.records import seals_over, to_records
from services.nodeagent.store import format_store, is_formatted
from services.nodeagent.wardenlog import Journal, Taken, read_journal
from services.runtime.clock import SystemClock
from services.runtime.health import Readiness
from services.runtime.logs import Log
from services.runtime.signing import key_id_of
from services.runtime.telemetry import Metrics
from tests.disk.crash import SAID
from tests.services.nodeagent.surface_writer import INCARNATION, SEGMENT_BYTES, Writer

RESERVE_BYTES: Final = 64 * 1024
BATCHES: Final = (1, 3, 1, 9, 2, 1)
"""Records in each promise of the ledger."""
FOLD_EACH: Final = 3
"""Promises until the log is folded into the table, which happens seldom in real life."""
OFFERS: Final = 5
BINDS: Final = 9
TAKES: Final = 4


class Said:
    """The words given, in the order in which they were given."""

    def __init__(self, folder: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(folder / SAID, flags, 0o600)

    def about(self, number: int, hash: bytes = b"") -> None:
        os.write(self._fd, f"about {number} {hash.hex()}\n".encode())

    def kept(self, number: int) -> None:
        os.write(self._fd, f"kept {number}\n".encode())


def ledger(folder: Path) -> None:
    said = Said(folder)
    events.CHECKPOINT_COMMITS = FOLD_EACH  # type: ignore[misc]
    store = events.Store.open(folder / "events", reserve_bytes=RESERVE_BYTES)
    store.replay(lambda event: None)
    chain = store.chain()
    for count in BATCHES:
        made = [Event("lease.denied", n, body={"filler": "x" * 900}) for n in range(count)]
        records = to_records(made, chain, 1)
        said.about(records[-1].number, records[-1].hash)
        store.append(records, seals_over(records, store.key))
        said.kept(records[-1].number)
        store.maintain()
    store.close()


def desk_on(store: chains.Store) -> Desk:
    return Desk(
        store, clock=SystemClock(), log=Log("audit", level="error"), readiness=Readiness(["disk"]),
        metrics=Metrics(), halt=lambda: None,
    )  # fmt: skip


class Origin:
    """A node that hands its chain to the collector."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self._chain = Chain("node-1", INCARNATION, 1)

    def offer(self, count: int) -> Offer:
        """Its next records, the last of them sealed."""
        body = {"filler": "y" * 700}
        made = [
            self._chain.append("agent.clock", wall_ms=1, boottime_ns=1, body=body)
            for _ in range(count)
        ]
        number, hash = made[-1].number, made[-1].hash
        public_key = self._key.public_key().public_bytes_raw()
        key_id = key_id_of(public_key)
        signature = self._key.sign(seal_bytes(INCARNATION, number, hash))
        data, seals = [each.data for each in made], [Seal(number, hash, key_id, signature)]
        return Offer("node-1", INCARNATION, data, seals, key_id, public_key)


def audit(folder: Path) -> None:
    said = Said(folder)
    chains.CHECKPOINT_COMMITS = FOLD_EACH  # type: ignore[misc]
    store = chains.Store.open(folder / "chains")
    desk = desk_on(store)
    if known := collected(desk):
        said.kept(known)  # whoever asks for its head is told of it, and lets go of its own copy
        store.close()
        return
    origin = Origin()
    for count in range(1, OFFERS + 1):
        offer = origin.offer(count)
        said.about(offer.seals[-1].number, offer.seals[-1].hash)
        (answer,) = desk._handle([offer])
        if isinstance(answer, FabricError):
            raise answer
        said.kept(answer.number)
        desk._countersign()
        store.maintain()
    store.close()


def collected(desk: Desk) -> int:
    """The number of the last record of the node's chain; 0: none."""
    return desk._collector.position("node-1", INCARNATION).number if desk._keys else 0


def agent(folder: Path) -> None:
    said = Said(folder)
    if not is_formatted(folder):
        format_store(folder, INCARNATION, segment_bytes=SEGMENT_BYTES)
    writer = Writer(folder)
    said.kept(writer.chain.number)
    for epoch in range(1, BINDS + 1):
        said.kept(writer.record(epoch))
    writer.store.close()


def warden(folder: Path) -> None:
    said = Said(folder)
    journal = Journal(folder / "warden", 1)
    found = len(read_journal(journal.path))
    for number in range(found + 1, found + TAKES + 1):
        said.about(number)
        journal.append([taken(number)])
        said.kept(number)


def taken(number: int) -> Taken:
    measured = {"bytes": "z" * 400}
    return Taken(f"{number:032x}", number, number, "deadline", "memfd", measured)


WORKLOADS: Final[Mapping[str, Callable[[Path], None]]] = {
    "ledger": ledger, "audit": audit, "agent": agent, "warden": warden,
}  # fmt: skip


def main(words: list[str]) -> None:
    WORKLOADS[words[0]](Path(words[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
