"""The real stores, started on a disk that a power cut has left; what is wrong with what they find.

law   it starts; every promise is kept; what else is there is a promise that was being made,
      whole; its chain verifies; and it goes on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from grafos_core.commands import Event
from grafos_core.failure import FabricError, InvariantViolation
from services.audit import store as chains
from services.ledger import store as events
from services.ledger.records import seals_over, to_records
from services.nodeagent.store import format_store, is_formatted
from services.nodeagent.wardenlog import Journal, read_journal
from tests.disk.crash import Judge
from tests.disk.workload import RESERVE_BYTES, collected, desk_on, taken
from tests.services.nodeagent.surface_writer import INCARNATION, SEGMENT_BYTES, Writer


def kept(said: Sequence[str]) -> int:
    return max((int(line.split()[1]) for line in said if line.startswith("kept")), default=0)


def about(said: Sequence[str]) -> dict[int, str]:
    """Number to hash, of all that was ever going to be promised."""
    lines = [line.split(" ") for line in said if line.startswith("about")]
    return {int(number): hash for _, number, hash in lines}


def among(number: int, hash: str, said: Sequence[str]) -> str:
    if number < kept(said):
        return f"{kept(said)} was promised, and {number} is the last that is there"
    if number and about(said).get(number) != hash:
        return f"{number} was never the end of a promise"
    return ""


def ledger(folder: Path, said: Sequence[str]) -> str:
    path = folder / "events"
    path.mkdir(mode=0o700, exist_ok=True)
    try:
        store = events.Store.open(path, reserve_bytes=RESERVE_BYTES)
    except FabricError as refused:
        return f"does not start: {refused}: {refused.detail}"
    try:
        store.replay(lambda event: None)
        wrong = among(store.number, store.head.hex(), said)
        more = to_records([Event("lease.denied", 1)], store.chain(), 1)
        store.append(more, seals_over(more, store.key))
    except FabricError as refused:
        return f"does not start: {refused}: {refused.detail}"
    finally:
        store.close()
    return wrong


def audit(folder: Path, said: Sequence[str]) -> str:
    path = folder / "chains"
    path.mkdir(mode=0o700, exist_ok=True)
    try:
        store = chains.Store.open(path)
    except FabricError as refused:
        return f"does not start: {refused}: {refused.detail}"
    try:
        desk = desk_on(store)
        number = collected(desk)
        head = desk._collector.position("node-1", INCARNATION).head.hex() if number else ""
        wrong = among(number, head, said)
        desk._countersign()
        return wrong or store.broken
    except FabricError as refused:
        return f"does not start: {refused}: {refused.detail}"
    finally:
        store.close()


def agent(folder: Path, said: Sequence[str]) -> str:
    try:
        if not is_formatted(folder):
            if said:
                return "its format is gone"
            format_store(folder, INCARNATION, segment_bytes=SEGMENT_BYTES)
        writer = Writer(folder)
    except (FabricError, InvariantViolation) as refused:
        detail = refused.detail if isinstance(refused, FabricError) else ""
        return f"does not start: {refused}: {detail}"
    try:
        number = writer.chain.number
        if not kept(said) <= number <= kept(said) + 2:
            return f"{kept(said)} was promised, and {number} is the last that is there"
        return "" if writer.record(1_000) > number else "the number fell"
    finally:
        writer.store.close()


def warden(folder: Path, said: Sequence[str]) -> str:
    path = folder / "warden" / "1.journal"
    found = read_journal(path) if path.exists() else []
    if found != [taken(number + 1) for number in range(len(found))]:
        return "the journal has something that was never written"
    if not kept(said) <= len(found) <= max(about(said), default=0):
        return f"{kept(said)} were promised, and {len(found)} are there"
    journal = Journal(folder / "warden", 1)
    journal.append([taken(len(found) + 1)])
    went_on = len(read_journal(path)) == len(found) + 1
    return "" if went_on else "what follows is not found"


JUDGES: Final[Mapping[str, Judge]] = {
    "ledger": ledger, "audit": audit, "agent": agent, "warden": warden,
}  # fmt: skip
