"""What is lent at this moment, as things: descriptors, keys, extents, and the steps that end them.

Rules. Control's own copies live here and nowhere else. A step of a teardown reports what it found,
flat and short, or raises; finding something left is a failure. Steps may be done again: each leaves
what it has done. Made by the owner or by a pool's thread, one lease by one thread at a time.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any, Final

from grafos_core import failure
from grafos_core.failure import invariant
from grafos_core.lease import BLOCK_BYTES, Kind
from grafos_core.node_effects import BoundFacts
from grafos_core.teardown import Step
from services.nodeagent import leftovers
from services.nodeagent.devices.block import BlockDevice
from services.nodeagent.devices.blocklease import BlockIdentity, create_tags, new_key, wipe
from services.nodeagent.devices.memory import MemoryDevice
from services.nodeagent.exports import ANY_AGE, Exports
from services.runtime.clock import SYSTEM
from services.runtime.faults import fault

KEY_NUMBER: Final = 1
"""Of the first and, so far, only key of a lease."""
NO_DESCRIPTOR: Final = -1
LOOK_MS: Final = 250
"""How long a look into every process counts; on a full machine it takes about as long."""

Evidence = dict[str, int | str | bool]


@dataclass(slots=True)
class Held:
    """One lent slice. Of one that an agent before us lent, perhaps only its memory is known."""

    facts: BoundFacts
    memory_fd: int = NO_DESCRIPTOR
    tags_fd: int = NO_DESCRIPTOR
    key: bytearray | None = None
    exported: bool = False
    """Its descriptor may have left the agent."""
    unreachable: str = ""
    """Why it could not be known at the last look whether its memory is gone; empty: it could."""

    def close(self) -> None:
        for fd in (self.memory_fd, self.tags_fd):
            if fd != NO_DESCRIPTOR:
                os.close(fd)
        self.memory_fd = self.tags_fd = NO_DESCRIPTOR


class Slices:
    """The devices, and what is lent of them. Thread-safe."""

    def __init__(
        self,
        incarnation: str,
        memory: MemoryDevice | None,
        block: BlockDevice | None,
        exports: Exports | None = None,
    ) -> None:
        """`exports` None: of a process that hands out nothing."""
        self._incarnation, self.memory, self.block = incarnation, memory, block
        self._exports = exports
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}
        self._looking = threading.Lock()
        self._looked_ms = -LOOK_MS

    def held(self, lease_id: str) -> Held | None:
        return self._held.get(lease_id)

    def adopt(self, facts: BoundFacts, memory_fd: int | None, unreachable: str) -> None:
        """A lease of the boot before, with its memory where the warden or /proc still had it."""
        fd = NO_DESCRIPTOR if memory_fd is None else memory_fd
        held = Held(facts, fd, exported=self.may_be_out(facts), unreachable=unreachable)
        with self._lock:
            invariant(facts.lease_id not in self._held, "a lease is adopted once")
            self._held[facts.lease_id] = held

    def may_be_out(self, facts: BoundFacts) -> bool:
        """Whether a descriptor of a lease of the boots before may be in a holder's hands."""
        return facts.may_export and (self._exports is None or facts.lease_id in self._exports)

    def export(self, held: Held, since_ticks: int) -> None:
        """It counts as handed out to a process that began then, also for the agents after us. Only
        then may it leave."""
        with self._lock:
            if self._exports is not None:
                self._exports.add(held.facts.lease_id, since_ticks)
            held.exported = True

    def create(self, facts: BoundFacts) -> None:
        """Make the slice usable; on a failure nothing is left of it."""
        fault("bind.device")
        if facts.kind is Kind.MEM and self.memory is not None:
            fd = self.memory.create(facts.lease_id, self._incarnation, facts.amount)
            held = Held(facts, memory_fd=fd)
        elif facts.kind is Kind.BLOCK and self.block is not None:
            held = Held(facts, tags_fd=create_tags(self._identity(facts)), key=new_key())
        else:
            raise failure.of("SCOPE", "this node does not offer the kind")
        with self._lock:
            self._held[facts.lease_id] = held

    def descriptors(self, lease_id: str) -> list[int]:
        """What the warden guards: the memory; of blocks nothing, their key dies with us."""
        held = self._held.get(lease_id)
        return [] if held is None or held.memory_fd == NO_DESCRIPTOR else [held.memory_fd]

    def opening(self, facts: BoundFacts) -> tuple[dict[str, Any], list[int]]:
        """What a front needs to serve it: fields of `open`, and descriptors."""
        held = self._held[facts.lease_id]
        if facts.kind is Kind.MEM:
            opening = {"size_bytes": facts.amount, "descriptor": facts.may_export}
            return opening, [held.memory_fd]
        invariant(held.key is not None, "an open block lease has its key")
        fields: dict[str, Any] = {
            "size_bytes": facts.amount * BLOCK_BYTES,
            "descriptor": False,
            "extent_offset": facts.extent_offset,
            "extent_blocks": facts.amount,
            "key": bytes(held.key or b""),
            "key_number": KEY_NUMBER,
            "incarnation": self._incarnation,
        }
        return fields, [held.tags_fd]

    def destroy_key(self, lease_id: str) -> None:
        """From here on nothing can decrypt its blocks. Idempotent."""
        held = self._held.get(lease_id)
        if held is not None and held.key is not None:
            wipe(held.key)
            held.key = None

    def run(self, step: Step, facts: BoundFacts) -> Evidence:
        """One step; what it found."""
        fault(f"teardown.{step.value}")
        held = self._held.get(facts.lease_id) or Held(facts, exported=facts.may_export)
        if held.unreachable:
            self._look_again(held)
        if step is Step.REAP:
            return {"processes": 0}  # memory and blocks have none
        if step is Step.ERASE:
            return self._erase(held)
        invariant(step is Step.MEASURE, "the front quiesces, nobody else")
        return self._measure(held)

    def forget(self, lease_id: str) -> None:
        """It is proved back: close what is left of it."""
        with self._lock:
            held = self._held.pop(lease_id, None)
            if self._exports is not None:
                self._exports.remove(lease_id)
        if held is not None:
            held.close()

    def _look_again(self, held: Held) -> None:
        """Who could not be asked may be gone by now. All such leases share one look."""
        with self._looking:
            if SYSTEM.boot_ms() - self._looked_ms < LOOK_MS:
                return
            with self._lock:
                lost = {each.facts.lease_id: each for each in self._held.values()
                        if each.unreachable}  # fmt: skip
            facts = [each.facts for each in lost.values()]
            result = leftovers.search(self._incarnation, facts, self.since)
            self._looked_ms = SYSTEM.boot_ms()
            for lease_id, each in lost.items():
                each.memory_fd = result.memory.get(lease_id, NO_DESCRIPTOR)
                each.unreachable = result.unreachable.get(lease_id, "")

    def since(self, lease_id: str) -> int | None:
        """When the oldest process that was given it had begun; None: it never left the agent."""
        return ANY_AGE if self._exports is None else self._exports.since(lease_id)

    def _erase(self, held: Held) -> Evidence:
        facts = held.facts
        if facts.kind is Kind.BLOCK:
            block = self._block()
            return {"erased": block.erase(facts.extent_offset, facts.amount)}
        if held.memory_fd == NO_DESCRIPTOR:
            return {"erased": "not reached" if held.unreachable else "nothing left"}
        invariant(self.memory is not None, "memory was lent by a memory device")
        if self.memory is not None:
            self.memory.erase(held.memory_fd, scrub=facts.policy.scrub)
        return {"erased": "truncated"}

    def _measure(self, held: Held) -> Evidence:
        facts = held.facts
        if facts.kind is Kind.BLOCK:
            found = self._block().measure(facts.extent_offset, facts.amount)
        elif held.unreachable:
            raise failure.of("IO", held.unreachable)
        elif held.memory_fd == NO_DESCRIPTOR:
            found = {"found": 0, "clean": True}
        else:
            invariant(self.memory is not None, "memory was lent by a memory device")
            found = self.memory.measure(held.memory_fd, exported=held.exported)  # type: ignore[union-attr]
        if found.get("clean") is not True:
            raise failure.of("IO", f"something is left: {_numbers(found)}")
        return found

    def _block(self) -> BlockDevice:
        if self.block is None:
            raise failure.of("IO", "this agent has no block device")
        return self.block

    def _identity(self, facts: BoundFacts) -> BlockIdentity:
        return BlockIdentity(
            self._incarnation,
            facts.lease_id,
            facts.epoch,
            KEY_NUMBER,
            facts.extent_offset,
            facts.amount,
        )


def _numbers(found: Evidence) -> str:
    """What was counted, without what follows from it."""
    counted = (f"{name} {value}" for name, value in found.items() if type(value) is int and value)
    return ", ".join(counted)
