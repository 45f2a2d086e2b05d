"""A process that formats a store, starts it and writes batches, and says what is durable.

Run as a program it forks one child after another; an injected fault hits the n-th durable call of
the n-th child. strace counts calls for each process on its own and is told one number, so child n
makes that number less n idle calls first. The last child is the one that no fault reached.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from grafos_core import failure
from grafos_core.chain import Chain, Record, Seal, VerifySeal, seal_bytes
from grafos_core.surface_state import SurfaceState
from services.nodeagent.store import Store, format_store

INCARNATION = "4f" * 16
SEGMENT_BYTES, BATCH_BYTES_MAX = 4096, 1024
BATCHES = 9
"""Enough to go on in a second segment."""
CALLS_MAX = 64
HALTED, UNTYPED, FULL = 3, 4, 5
"""How a child ended: a typed failure, another one, or well but without a segment in reserve."""


class Writer:
    """The part of an agent that records: a chain, a state, a surface and a store."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder, segment_bytes=SEGMENT_BYTES, batch_bytes_max=BATCH_BYTES_MAX)
        try:
            self.key = self.store.signing_key()
            self.surface, found = self.store.start(verifier(self.key))
        except failure.FabricError:
            self.store.close()
            raise
        self.state: SurfaceState = found.state
        self.chain = Chain(
            "node-1", INCARNATION, self.surface.slot.boot_epoch, found.head, found.number
        )

    def record(self, epoch: int) -> int:
        """One bind, durable when this returns its number."""
        if self.surface.should_roll():
            records = [self._record("agent.tables", 0, body) for body in self.state.tables()]
            sealed, tables_hash = self._seal(records), self.state.tables_hash()
            self.store.perform(self.surface.begin_segment(records, sealed, tables_hash))
        bound: dict[str, object] = {
            "kind": "mem",
            "amount": 4096,
            "extent_offset": 0,
            "generation": 0,
            "holder_key": "k" * 300,  # long, so that a segment is soon full
        }
        record = self._record("agent.bound", epoch, bound)
        self.state.fold(record)
        self.store.perform(self.surface.append([record], self._seal([record])))
        return record.number

    def _record(self, kind: str, epoch: int, body: dict[str, object]) -> Record:
        return self.chain.append(
            kind, wall_ms=1, boottime_ns=1, lease_id="ab" * 16, epoch=epoch, body=body
        )

    def _seal(self, records: list[Record]) -> Seal:
        last = records[-1]
        signature = self.key.sign(seal_bytes(INCARNATION, last.number, last.hash))
        return Seal(last.number, last.hash, "node", signature)


def verifier(key: Ed25519PrivateKey) -> VerifySeal:
    public = key.public_key()

    def verify(key_id: str, message: bytes, signature: bytes) -> bool:
        public.verify(signature, message)
        return key_id == "node"

    return verify


def scenario(folder: Path, say: int) -> Store:
    format_store(folder, INCARNATION, segment_bytes=SEGMENT_BYTES)
    os.write(say, b"formatted 0\n")
    writer = Writer(folder)
    os.write(say, b"started 0\n")
    for epoch in range(1, BATCHES + 1):
        os.write(say, b"sealed %d\n" % writer.record(epoch))
    return writer.store


def main(root: Path, call: str) -> None:
    idle = os.open("/dev/null", os.O_RDWR)
    for nth in range(1, CALLS_MAX):
        folder = root / str(nth)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            for _ in range(CALLS_MAX - nth):
                try:
                    os.pwrite(idle, b"", 0) if call == "pwrite64" else os.fdatasync(idle)
                except OSError:
                    pass  # it was counted, and that is what it was for
            say = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                store = scenario(folder / "state", say)
            except failure.FabricError:
                os._exit(HALTED)
            except OSError:
                os._exit(UNTYPED)
            os._exit(FULL if store.full else 0)
        _, status = os.waitpid(child, 0)
        (folder / "status").write_text(str(os.waitstatus_to_exitcode(status)))
        if status == 0:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
