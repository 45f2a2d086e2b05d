"""What a lease is to its holder, whichever fabric it is of: asked for, used, kept alive, lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest

from grafos import (
    BlockBuilder,
    Denied,
    Fabric,
    FabricError,
    Incompatible,
    LeaseExpired,
    LeaseStatus,
    MemBuilder,
    MemLease,
    Notice,
    RateLimited,
    Revoked,
)
from grafos._clock import wall_ms
from grafos.leasekit import RenewalManager
from grafos.observe import FabricMetrics
from grafos.testing import assert_no_leaks, leaks
from tests.conformance.conftest import Running

LetPass = Callable[[float], None]


@pytest.fixture(autouse=True)
def clean(running: Running) -> Generator[None, None, None]:
    """No test leaves a lease or a fence to the next one."""
    yield
    running.connection.poll()
    assert_no_leaks(running.connection)


@contextmanager
def refused(kind: type[FabricError], code: str) -> Generator[None, None, None]:
    with pytest.raises(kind) as raised:
        yield
    assert raised.value.code == code


def page(ttl_s: float = 30) -> MemBuilder:
    return MemBuilder().min_bytes(4096).lease_secs(ttl_s)


class TestAsking:
    def test_amounts_are_rounded_up_to_pages_and_an_arena_starts_as_zeros(self) -> None:
        with MemBuilder().min_bytes(5000).acquire() as lease:
            assert lease.mem().arena_size == 8192
            assert lease.mem().read(0, 8192) == bytes(8192)

    def test_a_label_that_no_node_has_is_never_matched(self) -> None:
        with refused(Incompatible, "NO_MATCH"):
            page().where(zone="nowhere").acquire()
        with page().where(node="n1").acquire() as lease:
            assert lease.node_id == "n1"

    def test_what_can_never_fit_is_refused_at_once_even_by_who_waits(self) -> None:
        before_ms = wall_ms()
        with refused(Incompatible, "CAPACITY"):
            MemBuilder().min_bytes(1 << 44).wait(60).acquire()
        assert wall_ms() - before_ms < 5_000

    def test_what_is_in_use_is_refused_and_can_be_waited_for(self) -> None:
        most = 160 << 20
        with MemBuilder().min_bytes(most).lease_secs(2).acquire() as first:
            with refused(RateLimited, "NO_CAPACITY"):
                MemBuilder().min_bytes(most).acquire()
            with MemBuilder().min_bytes(most).wait(20).acquire() as second:
                assert second.epoch > first.epoch
            with pytest.raises(LeaseExpired):
                first.mem().read(0, 1)


class TestUsing:
    def test_bytes_come_back_as_they_were_written(self) -> None:
        with page().acquire() as lease:
            memory = lease.mem()
            memory.write(4000, b"x" * 96)
            into = bytearray(96)
            assert memory.readinto(4000, into) == 96
            assert bytes(into) == memory.read(4000, 96) == b"x" * 96
            with refused(Incompatible, "EXTENT"):
                memory.write(4001, b"x" * 96)

    def test_blocks_are_whole_and_start_as_zeros(self) -> None:
        with BlockBuilder().min_blocks(8).acquire() as lease:
            block = lease.block()
            assert block.read_blocks(0, 8) == bytes(8 * 4096)
            block.write_blocks(6, b"a" * 8192)
            block.flush()
            assert block.read_block(7) == b"a" * 4096
            with refused(Incompatible, "LENGTH"):
                block.write_block(0, b"short")
            with refused(Incompatible, "EXTENT"):
                block.read_blocks(7, 2)

    def test_what_a_lease_says_of_itself_the_ledger_says_too(self, running: Running) -> None:
        with page().acquire() as lease:
            known = running.connection.describe(lease.lease_id)
            assert (known.epoch, known.node_id) == (lease.epoch, "n1")
            assert known.state in ("pending", "active"), "the ledger may not have heard it yet"
            assert abs(known.end_ms - lease.expiry_ms) < 1_000
            assert 29_000 < lease.remaining_ms() < 30_000, "the holder stops before the node"
            (listed,) = running.connection.leases()
            assert listed.lease_id == lease.lease_id
            assert [leak.what for leak in leaks(running)] == ["lease"]

    def test_epochs_only_rise(self) -> None:
        epochs = []
        for _ in range(4):
            with page().acquire() as lease:
                epochs.append(lease.epoch)
        assert epochs == sorted(set(epochs))


class TestTime:
    def test_a_lease_ends_at_its_deadline_and_gives_out_no_byte_after_it(
        self, running: Running, let_pass: LetPass
    ) -> None:
        heard: list[Notice] = []
        lease = page(1).acquire()
        lease.on_notice(heard.append)
        let_pass(1.1)
        with refused(LeaseExpired, "LEASE_EXPIRED"):
            lease.mem().read(0, 1)
        assert lease.status is LeaseStatus.EXPIRED
        running.connection.poll()
        assert [each.kind for each in heard] == ["expired"]
        found = lease.release()
        assert (found.outcome, found.cause, found.credited) == ("torndown", "expired", True)

    def test_a_renewal_moves_end_and_generation_and_never_shortens(self) -> None:
        with page(5).acquire() as lease:
            end_ms, generation = lease.expiry_ms, lease.generation
            assert lease.renew(40) > 38_000
            assert lease.generation > generation
            assert lease.expiry_ms > end_ms + 30_000
            lease.renew(1)
            assert lease.remaining_ms() > 38_000

    def test_a_manager_keeps_a_lease_alive_past_its_first_end(self, let_pass: LetPass) -> None:
        with page(1).acquire() as lease:
            manager = RenewalManager()
            manager.register(lease)
            for _ in range(15):
                let_pass(0.1)
                manager.tick()
            lease.mem().write(0, b"x")
            assert lease.generation > 1

    def test_the_background_keeps_one_alive_that_asked_for_it(self, let_pass: LetPass) -> None:
        with page(1).auto_renew().acquire() as lease:
            let_pass(1.6)
            lease.mem().write(0, b"x")


class TestEnds:
    def test_a_receipt_is_signed_by_the_node_and_says_the_same_again(
        self, running: Running
    ) -> None:
        lease = page().acquire()
        found = lease.release()
        assert found.credited
        assert found.verify(running.connection.keys()) is found
        assert lease.release() is found
        with refused(Denied, "RECEIPT"):
            found.verify([])
        with refused(LeaseExpired, "LEASE_RELEASED"):
            lease.mem().read(0, 1)

    def test_a_revocation_warns_then_ends_and_is_told(
        self, running: Running, let_pass: LetPass
    ) -> None:
        heard: list[Notice] = []
        lease = page().acquire()
        lease.on_notice(heard.append)
        running.connection.revoke(lease.lease_id, reason="drill", grace=0.5)
        let_pass(0.1)
        lease.mem().write(0, b"saved")
        let_pass(0.6)
        with refused(Revoked, "REVOKED"):
            lease.mem().read(0, 1)
        assert [each.kind for each in heard] == ["revoke_warning", "revoked"]

    def test_a_detached_lease_outlives_its_block_and_is_taken_up_again(self) -> None:
        with page().acquire() as lease:
            lease.mem().write(0, b"still there")
            lease.detach()
        with MemBuilder.attach(lease.lease_id) as again:
            assert again.mem().read(0, 11) == b"still there"
            assert (again.epoch, again.generation > lease.generation) == (lease.epoch, True)
        assert lease.status is LeaseStatus.FENCED

    def test_a_lease_of_nobodys_is_not_found(self) -> None:
        with refused(Denied, "NOT_FOUND"):
            MemBuilder.attach("0" * 32)

    def test_an_async_block_gives_back_too(self) -> None:
        async def work() -> MemLease:
            async with page().acquire() as lease:
                lease.mem().write(0, b"x")
            return lease

        assert asyncio.run(work()).status is LeaseStatus.RELEASED


def test_metrics_count_each_lease_once() -> None:
    metrics = FabricMetrics.global_()
    before = metrics.leases_total.value()
    page().acquire().release()
    assert metrics.leases_total.value() == before + 1


def test_threads_acquire_use_and_release_at_the_same_time(running: Running) -> None:
    failed: list[BaseException] = []
    connection: Fabric = running.connection

    def work(number: int) -> None:
        try:
            for _ in range(3):
                with page().fabric(connection).acquire() as lease:
                    lease.mem().write(0, bytes([number]) * 64)
                    assert lease.mem().read(0, 64) == bytes([number]) * 64
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert failed == []
