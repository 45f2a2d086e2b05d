"""The load itself is tried: what it notes, and that it would notice foreign bytes."""

from __future__ import annotations

import queue
import subprocess
import sys
import time

import pytest

from grafos._memory import MemLease
from grafos_core import failure
from tests.chaos.episode import kill_together
from tests.chaos.load import Held, Journal, Note, Worker, pattern
from tests.chaos.machine import alive_of, left_behind

LEASE = "ab" * 16


class Memory(MemLease):
    """Bytes of our own in the place of a lease's, to be spoiled."""

    lease_id, epoch = LEASE, 7

    def __init__(self) -> None:
        self.bytes = bytearray(4096)
        self.refuses = False

    def mem(self) -> Memory:  # type: ignore[override]
        return self

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.bytes[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        if self.refuses:
            raise failure.of("UNREACHABLE")
        self.bytes[offset : offset + len(data)] = data

    def __del__(self) -> None:
        pass


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def held(memory: Memory) -> Held:
    return Held(memory, places=64)


def test_own_bytes_are_right(held: Held) -> None:
    held.write(3)
    assert held.read(3) == held.read(4) == ""


@pytest.mark.parametrize(
    ("lease_id", "epoch", "place"),
    [("cd" * 16, 7, 3), (LEASE, 6, 3), (LEASE, 7, 4)],
)
def test_bytes_of_another_lease_epoch_or_place_are_noticed(
    held: Held, memory: Memory, lease_id: str, epoch: int, place: int
) -> None:
    held.write(3)
    memory.bytes[3 * 64 : 4 * 64] = pattern(lease_id, epoch, place, 1, 64)
    assert "other bytes" in held.read(3)


def test_a_write_that_went_missing_is_noticed(held: Held, memory: Memory) -> None:
    held.write(3)
    memory.bytes[3 * 64 : 4 * 64] = bytes(64)
    assert "zeros" in held.read(3)


def test_what_was_never_written_must_be_zeros(held: Held, memory: Memory) -> None:
    memory.bytes[0] = 1
    assert "other bytes" in held.read(0)


def test_after_a_write_without_an_answer_old_and_new_are_both_right(
    held: Held, memory: Memory
) -> None:
    held.write(3)
    old = held.read(3)
    memory.refuses = True
    with pytest.raises(failure.Disconnected):
        held.write(3)
    assert held.read(3) == old == ""
    memory.bytes[3 * 64 : 4 * 64] = pattern(LEASE, 7, 3, 2, 64)
    assert held.read(3) == ""


def test_a_failure_without_a_type_is_noted_as_wrong() -> None:
    notes: list[Note] = []
    worker = Worker(None, Journal(notes.append), "seed", queue.Queue())  # type: ignore[arg-type]

    def broken() -> None:
        worker.stop()
        raise KeyError("nobody catches this")

    worker._cycle = broken  # type: ignore[method-assign]
    worker.run()
    assert [note.what for note in notes] == ["wrong"]


def test_processes_are_killed_together_and_a_survivor_is_seen() -> None:
    sleepers = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) for _ in range(3)]
    pids = {str(n): each.pid for n, each in enumerate(sleepers)}
    begun = time.monotonic()
    kill_together([each.pid for each in sleepers[:2]])
    assert time.monotonic() - begun < 5
    try:
        assert alive_of(pids) == [f"2 ({sleepers[2].pid})"]
        assert left_behind(pids, seconds=0.1) == [f"a process is left: 2 ({sleepers[2].pid})"]
    finally:
        sleepers[2].kill()
        for each in sleepers:
            each.wait()
            assert each.stdin is not None
            each.stdin.close()
