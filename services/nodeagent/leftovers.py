"""What the agent before us left: read from wardens that still live, from journals, and from /proc.

Rules. A warden that outlived its agent has cut every memory to nothing and hands over what it
measured, with the descriptors; it goes when everything is sealed. Where the warden is dead too, the
memory is looked for by its name in every process: whoever still has it, it can be cut there. A
memory that is nowhere is gone; but where a process that may have it cannot be looked into, that is
not known of what was once handed out, and the slice is fenced until a later look finds nothing.
Memory that never left the agent died with the agent's own processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafos_core import spiffe
from grafos_core.failure import FabricError
from grafos_core.lease import Kind
from grafos_core.node_effects import BoundFacts
from services.nodeagent import wardenlog
from services.nodeagent.ipc import LinkClosed
from services.nodeagent.orphans import Closed, recover_leftovers
from services.nodeagent.wardenlog import LivingWarden, Taken

Exported = Callable[[str], int | None]
"""Of a lease: when the oldest process that was given its descriptor had begun, in clock ticks since
the machine's start; None: no descriptor ever left the agent."""


@dataclass(slots=True)
class Leftovers:
    """Found at the start of a boot; `settle` when all of it is proved back."""

    folder: Path
    journal: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """By lease, what a warden measured, why it took it back (`cause`), and how late (`late_us`)."""
    memory: dict[str, int] = field(default_factory=dict)
    """By lease, a descriptor of its memory; ours."""
    unreachable: dict[str, str] = field(default_factory=dict)
    """By lease, why it is not known whether its memory is gone."""
    _living: list[LivingWarden] = field(default_factory=list)
    _journals: list[Path] = field(default_factory=list)

    def expired(self) -> dict[str, int]:
        """Of leases that a warden had ended at their deadline: how late that was."""
        told = self.journal.items()
        return {name: each["late_us"] for name, each in told if each["cause"] == "deadline"}

    def settle(self) -> None:
        """Everything is sealed: wardens may go, and what they wrote."""
        for warden in self._living:
            try:
                warden.done()
            except (LinkClosed, FabricError):
                pass  # it went by itself
        for path in self._journals:
            path.unlink(missing_ok=True)
            path.with_suffix(".sock").unlink(missing_ok=True)
        self._living, self._journals = [], []


@dataclass(frozen=True, slots=True)
class Search:
    """What became of the memory of some leases. What is in neither list is gone."""

    memory: dict[str, int]
    """By lease, a descriptor of it; truncated, and the caller's."""
    unreachable: dict[str, str]
    """By lease, who may still have it."""


def gather(
    state_dir: Path,
    incarnation: str,
    leases: Iterable[BoundFacts],
    exported: Exported,
) -> Leftovers:
    """What is known of leases that were bound or fenced when the last boot ended."""
    folder = state_dir / "warden"
    found = Leftovers(folder)
    wanted = {(facts.lease_id, facts.epoch): facts for facts in leases}
    for boot_epoch in wardenlog.boot_epochs(folder):
        for entry, fd in _told(found, folder, boot_epoch):
            if (entry.lease_id, entry.epoch) not in wanted:
                _close(fd)
                continue
            told = {"cause": entry.cause, "late_us": entry.late_us}
            found.journal[entry.lease_id] = {**entry.measured, **told}
            if fd is not None:
                _close(found.memory.pop(entry.lease_id, None))
                found.memory[entry.lease_id] = fd
    missing = [
        facts
        for facts in wanted.values()
        if facts.kind is Kind.MEM and facts.lease_id not in found.memory
    ]
    if missing:
        _search_all(found, incarnation, missing, exported)
    return found


def _told(found: Leftovers, folder: Path, boot_epoch: int) -> list[tuple[Taken, int | None]]:
    path = folder / f"{boot_epoch}.journal"
    found._journals.append(path)
    warden = LivingWarden.find(folder, boot_epoch)
    if warden is not None:
        try:
            entries = warden.fetch()
        except (LinkClosed, FabricError):
            warden.close()
        else:
            found._living.append(warden)
            return entries
    return [(entry, None) for entry in wardenlog.read_journal(path)]


def _search_all(
    found: Leftovers, incarnation: str, missing: Collection[BoundFacts], exported: Exported
) -> None:
    """Before anything is lent: everything of this incarnation is looked for, also what a holder
    has kept of leases that have ended."""
    result = search(incarnation, missing, exported, everything=True)
    found.memory.update(result.memory)
    for lease_id, why in result.unreachable.items():
        if lease_id not in found.journal:  # else a warden has cut it before it died
            found.unreachable[lease_id] = why


def search(
    incarnation: str,
    missing: Collection[BoundFacts],
    exported: Exported,
    *,
    everything: bool = False,
) -> Search:
    """In every process: take the memory where it is found, tell who could not be asked."""
    names = {facts.lease_id for facts in missing}
    orphans = recover_leftovers(incarnation, only=None if everything else names)
    result = Search({}, {})
    for orphan in orphans.found:
        if orphan.fd is None:
            result.unreachable[orphan.lease_id] = orphan.error
        elif orphan.lease_id in names:
            result.memory[orphan.lease_id] = orphan.fd
        else:
            os.close(orphan.fd)
    for facts in missing:
        known = facts.lease_id in result.memory or facts.lease_id in result.unreachable
        since_ticks = exported(facts.lease_id)
        if since_ticks is not None and not known:
            holder_uid = _holder_uid(facts)
            hidden = [x for x in orphans.closed if x.may_have(holder_uid, since_ticks)]
            if hidden:
                result.unreachable[facts.lease_id] = _named(hidden)
    return result


def _named(hidden: list[Closed]) -> str:
    more = f" and {len(hidden) - 1} more" if len(hidden) > 1 else ""
    return f"{hidden[0]}{more} may have it and cannot be looked into"


def _holder_uid(facts: BoundFacts) -> int | None:
    try:
        return spiffe.uid_of_local_holder(spiffe.parse_id(facts.holder))
    except FabricError:
        return None


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
