"""A lease is open only while both cells of the gate page say so, whole and in time."""

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from grafos_core import failure
from services.nodeagent.gatepage import CellState, GatePage, Verdict

LEASE, OTHER = bytes(range(16)), bytes(range(1, 17))
OPEN, CLOSED, FREE = CellState.OPEN, CellState.CLOSED, CellState.FREE
READS = 20_000


@pytest.fixture
def page() -> Iterator[GatePage]:
    page = GatePage.create(8)
    yield page
    page.close()


def open_both(
    page: GatePage, slot: int = 3, *, control_ns: int = 100, warden_ns: int = 100
) -> None:
    page.write_control(slot, OPEN, 7, control_ns, LEASE)
    page.write_warden(slot, OPEN, 7, warden_ns, LEASE)


def test_open_needs_both_cells(page: GatePage) -> None:
    assert page.verdict(3, LEASE, 7, 50) is Verdict.FREE
    page.write_control(3, OPEN, 7, 100, LEASE)
    assert page.verdict(3, LEASE, 7, 50) is Verdict.CLOSED, "the warden has not said so yet"
    page.write_warden(3, OPEN, 7, 100, LEASE)
    assert page.verdict(3, LEASE, 7, 50) is Verdict.OPEN
    assert page.verdict(2, LEASE, 7, 50) is Verdict.FREE


def test_the_warden_alone_opens_nothing(page: GatePage) -> None:
    page.write_warden(3, OPEN, 7, 100, LEASE)
    assert page.verdict(3, LEASE, 7, 50) is Verdict.FREE


def test_either_writer_closes_alone_and_the_other_cannot_undo_it(page: GatePage) -> None:
    open_both(page)
    page.close_warden(3)
    page.write_control(3, OPEN, 7, 200, LEASE)
    assert page.verdict(3, LEASE, 7, 50) is Verdict.CLOSED
    open_both(page)
    page.close_control(3)
    page.write_warden(3, OPEN, 7, 200, LEASE)
    assert page.verdict(3, LEASE, 7, 50) is Verdict.CLOSED


def test_the_earlier_deadline_counts(page: GatePage) -> None:
    open_both(page, control_ns=100, warden_ns=200)
    assert page.verdict(3, LEASE, 7, 99) is Verdict.OPEN
    assert page.verdict(3, LEASE, 7, 100) is Verdict.EXPIRED
    open_both(page, control_ns=200, warden_ns=100)
    assert page.verdict(3, LEASE, 7, 100) is Verdict.EXPIRED


def test_another_lease_or_epoch_is_stale(page: GatePage) -> None:
    open_both(page)
    assert page.verdict(3, OTHER, 7, 50) is Verdict.STALE
    assert page.verdict(3, LEASE, 6, 50) is Verdict.STALE
    assert page.verdict(3, LEASE, 8, 50) is Verdict.STALE


def test_cells_that_name_different_leases_open_neither(page: GatePage) -> None:
    open_both(page)
    page.write_control(3, OPEN, 8, 100, OTHER)
    assert page.verdict(3, LEASE, 7, 50) is Verdict.STALE
    assert page.verdict(3, OTHER, 8, 50) is Verdict.CLOSED


def test_one_store_closes_all_for_good(page: GatePage) -> None:
    other = GatePage.attach(os.dup(page.fd))
    for slot in range(8):
        open_both(page, slot)
    other.close_all_warden()
    assert {page.verdict(slot, LEASE, 7, 50) for slot in range(8)} == {Verdict.CLOSED}
    open_both(page)
    assert page.verdict(3, LEASE, 7, 50) is Verdict.CLOSED
    other.close()


def test_control_closes_all_too(page: GatePage) -> None:
    open_both(page)
    page.close_all_control()
    assert page.verdict(3, LEASE, 7, 50) is Verdict.CLOSED


def test_what_is_in_flight_is_counted_per_slot_and_seen_by_others(page: GatePage) -> None:
    control = GatePage.attach(os.dup(page.fd))
    page.enter(3)
    page.enter(3)
    page.enter(4)
    page.leave(3)
    assert [control.in_flight(slot) for slot in (3, 4, 5)] == [1, 1, 0]
    control.reset_in_flight()
    assert [page.in_flight(slot) for slot in (3, 4, 5)] == [0, 0, 0]
    with pytest.raises(failure.InvariantViolation):
        page.leave(3)
    control.close()


def test_nobody_can_cut_the_page_short_or_loosen_its_seals(page: GatePage) -> None:
    for change in (
        lambda: os.ftruncate(page.fd, 0),
        lambda: os.ftruncate(page.fd, 1 << 20),
        lambda: fcntl.fcntl(page.fd, 1033, 8),
    ):
        with pytest.raises(PermissionError):
            change()


def test_a_page_that_is_not_one_is_refused() -> None:
    unsealed = os.memfd_create("grafos-gate", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    with pytest.raises(failure.Incompatible):
        GatePage.attach(unsealed)
    fcntl.fcntl(unsealed, 1033, 7)
    with pytest.raises(failure.Incompatible):
        GatePage.attach(unsealed)
    os.pwrite(unsealed, b"GRAFGATE" + (9).to_bytes(8, "little") + (8).to_bytes(8, "little"), 0)
    with pytest.raises(failure.Incompatible, match="version 9"):
        GatePage.attach(unsealed)
    os.pwrite(unsealed, (1).to_bytes(8, "little") + (9).to_bytes(8, "little"), 8)
    with pytest.raises(failure.Incompatible, match="size"):
        GatePage.attach(unsealed)
    os.close(unsealed)


def hammer(page: GatePage) -> None:
    """Open in time, or closed and overdue: anything else a reader sees is a mixture."""
    while True:
        page.write_control(3, OPEN, 7, 100, LEASE)
        page.write_control(3, CLOSED, 7, 0, LEASE)


def test_a_reader_never_sees_a_mixture_of_two_states(page: GatePage) -> None:
    open_both(page)
    child = os.fork()
    if child == 0:
        try:
            hammer(page)
        finally:
            os._exit(1)
    try:
        seen = [page.verdict(3, LEASE, 7, 50) for _ in range(READS)]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert set(seen) == {Verdict.OPEN, Verdict.CLOSED}


def write_and_die(page: GatePage, line: int) -> None:
    """Killed before the `line`-th line inside the cell's write takes effect."""
    remaining = line

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal remaining
        if frame.f_code is not GatePage._write.__code__:
            return trace
        if event == "line":
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    page.write_control(3, OPEN, 7, 0, LEASE)
    os._exit(0)


def test_a_writer_killed_in_the_middle_leaves_the_cell_closed(page: GatePage) -> None:
    seen = []
    for line in range(1, 60):
        open_both(page)
        child = os.fork()
        if child == 0:
            write_and_die(page, line)
        _, status = os.waitpid(child, 0)
        sequence = page._words[page._cell(3, 0)]
        verdict = page.verdict(3, LEASE, 7, 50)
        seen.append(verdict)
        assert (verdict is Verdict.CLOSED) == (sequence % 2 == 1)
        if os.WIFEXITED(status):
            break
    assert seen[0] is Verdict.OPEN, "killed before it wrote anything: the old state stands"
    assert seen[-1] is Verdict.EXPIRED, "not killed at all: the new state stands"
    assert Verdict.CLOSED in seen
    assert set(seen) == {Verdict.OPEN, Verdict.CLOSED, Verdict.EXPIRED}
    open_both(page)
    assert page.verdict(3, LEASE, 7, 50) is Verdict.OPEN, "the next writer sets it right"
