"""A bundle is all or nothing, whichever fabric it is of; and then its leases are leases."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from grafos import (
    BlockBuilder,
    Bundle,
    FabricError,
    Incompatible,
    LeaseExpired,
    MemBuilder,
    RateLimited,
    aio,
)
from grafos.testing import assert_no_leaks
from grafos_core import bundle
from tests.conformance.conftest import Running


@pytest.fixture(autouse=True)
def clean(running: Running) -> Generator[None, None, None]:
    """No test leaves a lease or a fence to the next one."""
    yield
    running.connection.poll()
    assert_no_leaks(running.connection)


@contextmanager
def refused(kind: type[FabricError], code: str, member: int | None = None) -> Generator[None]:
    with pytest.raises(kind) as raised:
        yield
    assert raised.value.code == code
    assert bundle.member_of(raised.value) == member


def page() -> MemBuilder:
    return MemBuilder().min_bytes(4096).lease_secs(30)


def blocks(count: int = 2) -> BlockBuilder:
    return BlockBuilder().min_blocks(count).lease_secs(30)


def held(running: Running) -> int:
    return sum(1 for each in running.connection.leases() if each.state in ("pending", "active"))


class TestAcquired:
    def test_members_of_different_kinds_come_in_the_order_they_were_asked_for(self) -> None:
        with Bundle(page(), blocks(), page()).acquire() as leases:
            memory, disk, more = leases
            assert [each.kind for each in leases] == ["mem", "block", "mem"]
            memory.mem().write(0, b"hello")
            more.mem().write(0, b"fabric")
            disk.block().write_block(1, b"x" * 4096)
            assert memory.mem().read(0, 5) == b"hello"
            assert disk.block().read_block(1) == b"x" * 4096
            assert len(set(leases.lease_ids)) == 3
            assert leases.valid

    def test_release_gives_one_receipt_each_and_the_same_ones_again(self) -> None:
        leases = Bundle(page(), blocks()).acquire()
        receipts = leases.release()
        assert [each.lease_id for each in receipts] == list(leases.lease_ids)
        assert [each.kind for each in receipts] == ["mem", "block"]
        assert [each.lease_id for each in leases.release()] == list(leases.lease_ids)
        assert not leases.valid

    def test_one_is_released_and_the_others_go_on(self) -> None:
        with Bundle(page(), page()).acquire() as (first, second):
            first.release()
            second.mem().write(0, b"still here")
            assert second.mem().read(0, 10) == b"still here"
            assert not first.valid

    def test_renewing_the_bundle_renews_all(self) -> None:
        with Bundle(page(), blocks()).acquire() as leases:
            assert leases.remaining_ms() <= 30_000
            assert leases.renew(120) > 100_000
            assert all(each.remaining_ms() > 100_000 for each in leases)
            assert [each.generation for each in leases] == [2, 2]

    def test_renewing_names_the_member_that_could_not_be(self) -> None:
        with Bundle(page(), page()).acquire() as leases:
            leases[0].release()
            with refused(LeaseExpired, "LEASE_RELEASED", 0):
                leases.renew(120)
            assert leases[1].remaining_ms() > 100_000, "the others are renewed all the same"

    def test_members_can_be_added_one_by_one(self) -> None:
        empty = Bundle.new()
        full = empty.add(page()).add(blocks())
        assert (len(empty), len(full)) == (0, 2)
        with full.acquire() as leases:
            assert [each.kind for each in leases] == ["mem", "block"]

    def test_the_twin_does_the_same(self) -> None:
        async def work() -> None:
            asked = aio.Bundle(
                aio.MemBuilder().min_bytes(4096), aio.BlockBuilder().min_blocks(1)
            ).wait(5)
            async with asked.acquire() as leases:
                memory, disk = leases
                await memory.mem().write(0, b"x")
                assert await memory.mem().read(0, 1) == b"x"
                assert disk.kind == "block"
                assert await leases.renew(60) > 50_000
            assert [each.kind for each in await leases.release()] == ["mem", "block"]

        asyncio.run(work())


class TestRefused:
    def test_nothing_is_granted_when_one_term_cannot_be_met(self, running: Running) -> None:
        with refused(Incompatible, "CAPACITY", 1):
            Bundle(page(), MemBuilder().min_bytes(1 << 50), page()).acquire()
        with refused(Incompatible, "NO_MATCH", 2):
            Bundle(page(), blocks(), page().where(zone="nowhere")).acquire()
        assert held(running) == 0

    def test_what_fits_alone_and_not_together_is_refused_whole(self, running: Running) -> None:
        total = total_blocks()
        most = total * 2 // 3
        with refused(Incompatible, "CAPACITY", 1):
            Bundle(blocks(most), blocks(most)).acquire()
        assert held(running) == 0
        with blocks(most).acquire():
            with refused(RateLimited, "NO_CAPACITY", 1):
                Bundle(page(), blocks(most)).acquire()
            assert held(running) == 1

    def test_a_bundle_waits_as_a_whole(self, running: Running) -> None:
        total = total_blocks()
        in_the_way = blocks(total).acquire()
        done: list[bool] = []

        def wait() -> None:
            with Bundle(page(), blocks()).fabric(running.connection).wait(15).acquire():
                done.append(True)

        if not hasattr(running, "advance"):
            waiting = threading.Thread(target=wait)
            waiting.start()
            threading.Event().wait(0.3)
            assert held(running) == 1, "it holds nothing while it waits"
            in_the_way.release()
            waiting.join(20)
            assert done == [True]
            return
        with refused(RateLimited, "NO_CAPACITY", 1):
            Bundle(page(), blocks()).wait(2).acquire()
        in_the_way.release()
        wait()
        assert done == [True]

    def test_bad_bundles_are_refused_before_anybody_is_asked(self, running: Running) -> None:
        with refused(Incompatible, "EMPTY"):
            Bundle().acquire()
        with refused(Incompatible, "RANGE"):
            Bundle(*[page()] * 17)
        with refused(Incompatible, "MISSING_FIELD", 1):
            Bundle(page(), MemBuilder()).acquire()
        with refused(Incompatible, "INVALID"):
            Bundle(page().wait(3))
        with refused(Incompatible, "INVALID"):
            Bundle("not a builder")  # type: ignore[arg-type]
        with refused(Incompatible, "RANGE"):
            Bundle(page()).wait(601)
        assert held(running) == 0

    def test_sixteen_are_not_too_many(self) -> None:
        with Bundle(*[page()] * 16).acquire() as leases:
            assert len({each.epoch for each in leases}) == 16


def total_blocks() -> int:
    """How many the only node offers: it says so to whoever asks for too many."""
    with pytest.raises(Incompatible) as raised:
        blocks(1 << 40).acquire()
    return int(raised.value.detail.split(", ")[1].split()[0])
