"""What the agent before us left: read from wardens that still live, from journals, and from /proc.

Rules. A warden that outlived its agent has cut every memory to nothing and hands over what it
measured, with the descriptors; it goes when everything is sealed. Where the warden is dead too, the
memory is looked for by its name in every process: whoever still has it, it can be cut there. A
memory that is nowhere is gone; but where a process that may have it cannot be looked into, that is
not known, and the slice is fenced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafos_core import spiffe
from grafos_core.failure import FabricError
from grafos_core.lease import Kind
from grafos_core.node_effects import BoundFacts
from services.nodeagent import wardenlog
from services.nodeagent.ipc import LinkClosed
from services.nodeagent.orphans import recover_leftovers
from services.nodeagent.wardenlog import LivingWarden, Taken


@dataclass(slots=True)
class Leftovers:
    """Found at the start of a boot; `settle` when all of it is proved back."""

    folder: Path
    journal: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """By lease, what a warden measured."""
    memory: dict[str, int] = field(default_factory=dict)
    """By lease, a descriptor of its memory; ours."""
    unreachable: dict[str, str] = field(default_factory=dict)
    """By lease, why it is not known whether its memory is gone."""
    _living: list[LivingWarden] = field(default_factory=list)
    _journals: list[Path] = field(default_factory=list)

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


def gather(state_dir: Path, incarnation: str, open_binds: tuple[BoundFacts, ...]) -> Leftovers:
    """What is known of the leases that were bound when the last boot ended."""
    folder = state_dir / "warden"
    found = Leftovers(folder)
    wanted = {(facts.lease_id, facts.epoch): facts for facts in open_binds}
    for boot_epoch in wardenlog.boot_epochs(folder):
        for entry, fd in _told(found, folder, boot_epoch):
            if (entry.lease_id, entry.epoch) not in wanted:
                _close(fd)
                continue
            found.journal[entry.lease_id] = {**entry.measured, "late_us": entry.late_us}
            if fd is not None:
                _close(found.memory.pop(entry.lease_id, None))
                found.memory[entry.lease_id] = fd
    missing = [
        facts
        for facts in open_binds
        if facts.kind is Kind.MEM and facts.lease_id not in found.memory
    ]
    if missing:
        _search(found, incarnation, missing)
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


def _search(found: Leftovers, incarnation: str, missing: list[BoundFacts]) -> None:
    """In every process: take the memory where it is found, remember who could not be asked."""
    orphans = recover_leftovers(incarnation)
    for orphan in orphans.found:
        if orphan.fd is None:
            found.unreachable[orphan.lease_id] = orphan.error
        elif any(facts.lease_id == orphan.lease_id for facts in missing):
            found.memory[orphan.lease_id] = orphan.fd
        else:
            os.close(orphan.fd)  # of a lease that has ended, and that a holder had kept
    closed_to_us = {uid for _, uid in orphans.unreadable}
    for facts in missing:
        holder_uid = _holder_uid(facts)
        hidden = closed_to_us if holder_uid is None else closed_to_us & {holder_uid}
        known = facts.lease_id in found.memory or facts.lease_id in found.journal
        if hidden and facts.may_export and not known:
            found.unreachable[facts.lease_id] = "processes of other users may still have it"


def _holder_uid(facts: BoundFacts) -> int | None:
    try:
        return spiffe.uid_of_local_holder(spiffe.parse_id(facts.holder))
    except FabricError:
        return None


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
