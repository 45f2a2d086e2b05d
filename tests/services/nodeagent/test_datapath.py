"""What happens between the two looks at the gate page, with the gate closed at the worst moment."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from grafos_core import failure
from grafos_core.failure import FabricError, Fenced, Incompatible, LeaseExpired, Revoked
from grafos_core.lease import Kind
from services.nodeagent.datapath import DataPath, Ended, LeaseTable, OpenLease
from services.nodeagent.gatepage import CellState, GatePage

SLOT, EPOCH, KEY = 3, 9, "k" * 43
DEADLINE_MS = 1_000


class Shelf:
    """Bytes in a list, and something that happens while they are moved."""

    def __init__(self) -> None:
        self.data = bytearray(4096)
        self.meanwhile: Callable[[], None] = lambda: None

    def read(self, offset: int, length: int) -> bytes:
        found = bytes(self.data[offset : offset + length])
        self.meanwhile()
        return found

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self.meanwhile()
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None: ...

    def raise_deadline(self, deadline_ms: int) -> None: ...

    def close(self) -> None: ...


class Counter:
    """One open lease and the way to its bytes."""

    def __init__(self) -> None:
        self.gate, self.table, self.shelf = GatePage.create(8), LeaseTable(), Shelf()
        self.now_ms = 0
        self.broken: list[tuple[str, str]] = []
        self.lease_id = secrets.token_hex(16)
        self.path = DataPath(
            self.gate,
            self.table,
            lambda: self.now_ms * 1_000_000,
            lambda lease_id, why: self.broken.append((lease_id, why)),
        )
        cell = (SLOT, CellState.OPEN, EPOCH, DEADLINE_MS * 1_000_000, bytes.fromhex(self.lease_id))
        self.gate.write_control(*cell)
        self.gate.write_warden(*cell)
        self.table.open(
            OpenLease(
                lease_id=self.lease_id,
                slot=SLOT,
                epoch=EPOCH,
                generation=1,
                kind=Kind.MEM,
                size_bytes=4096,
                holder_key=KEY,
                deadline_ms=DEADLINE_MS,
                session="",
                descriptor=False,
                ops=frozenset({"read", "write"}),
                storage=self.shelf,
            )
        )

    def read(self) -> tuple[bytes, int]:
        return self.path.read(KEY, self.lease_id, EPOCH, offset=0, length=8)

    def write(self) -> int:
        return self.path.write(KEY, self.lease_id, EPOCH, offset=0, data=b"x" * 8, flush=False)

    def close(self, cause: FabricError) -> None:
        self.gate.close_control(SLOT)
        self.table.remember(self.lease_id, Ended(KEY, cause))


@pytest.fixture
def counter() -> Iterator[Counter]:
    made = Counter()
    yield made
    assert made.gate.in_flight(SLOT) == 0, "whatever happened, nothing counts as in flight"
    made.gate.close()


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_lease_that_ends_while_its_bytes_move_gives_nothing_and_takes_nothing(
    counter: Counter, operation: str
) -> None:
    counter.shelf.meanwhile = lambda: counter.close(failure.of("REVOKED", cause="preempted"))
    with pytest.raises(Revoked) as refusal:
        getattr(counter, operation)()
    assert refusal.value.cause == "preempted"


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_deadline_that_passes_while_bytes_move_counts(counter: Counter, operation: str) -> None:
    def late() -> None:
        counter.now_ms = DEADLINE_MS

    counter.shelf.meanwhile = late
    with pytest.raises(LeaseExpired):
        getattr(counter, operation)()


def test_while_bytes_move_the_operation_is_in_flight(counter: Counter) -> None:
    seen: list[int] = []
    counter.shelf.meanwhile = lambda: seen.append(counter.gate.in_flight(SLOT))
    counter.read()
    counter.write()
    assert seen == [1, 1]
    assert counter.path.wait_quiet(SLOT) == 0


def test_a_device_that_fails_because_the_lease_ended_is_not_called_broken(
    counter: Counter,
) -> None:
    def cut() -> None:
        counter.close(failure.of("LEASE_EXPIRED"))
        raise OSError(errno.EIO, "gone")

    counter.shelf.meanwhile = cut
    with pytest.raises(LeaseExpired):
        counter.read()
    assert counter.broken == []


@pytest.mark.parametrize(
    ("number", "code", "reported"),
    [(errno.EIO, "IO", ["EIO"]), (errno.ENOSPC, "DISK", []), (errno.EFBIG, "DISK", [])],
)
def test_d5_a_devices_errors_are_typed_and_a_broken_one_is_reported(
    counter: Counter, number: int, code: str, reported: list[str]
) -> None:
    def fail() -> None:
        raise OSError(number, "as ordered")

    counter.shelf.meanwhile = fail
    with pytest.raises(FabricError) as refusal:
        counter.write()
    assert refusal.value.code == code
    assert [why for _, why in counter.broken] == reported


def test_the_oldest_cause_gives_way_and_then_the_lease_was_never_there(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.nodeagent.datapath.ENDED_MAX", 2)
    ids = [secrets.token_hex(16) for _ in range(3)]
    for each in ids:
        counter.table.remember(each, Ended(KEY, failure.of("LEASE_RELEASED")))
    codes: list[Any] = []
    for each in ids:
        with pytest.raises(FabricError) as refusal:
            counter.table.find(each, KEY)
        codes.append(refusal.value.code)
    assert codes == ["NOT_FOUND", "LEASE_RELEASED", "LEASE_RELEASED"]


def test_without_a_cause_a_closed_gate_is_a_fence(counter: Counter) -> None:
    counter.gate.close_warden(SLOT)
    with pytest.raises(Fenced):
        counter.read()


def test_a_stream_that_ends_outside_the_lease_is_refused_before_it_begins(
    counter: Counter,
) -> None:
    with pytest.raises(Incompatible) as refusal:
        counter.path.check_read(KEY, counter.lease_id, EPOCH, offset=0, length=4097)
    assert refusal.value.code == "EXTENT"
