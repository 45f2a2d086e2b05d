"""Threads of one connection share messages, and none of them suffers for another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from grafos import Bundle, FabricError, MemBuilder, MemLease, RateLimited
from grafos.leasekit import RenewalManager, RenewalPolicy
from grafos_core import failure
from tests.sdk.world import World

COUNT = 12


def page(world: World) -> MemBuilder:
    return MemBuilder().min_bytes(4096)


def at_once(count: int, work: Callable[[], MemLease]) -> list[MemLease | FabricError]:
    """What became of each."""
    met = threading.Barrier(count)

    def one(_: int) -> MemLease | FabricError:
        met.wait(20)
        try:
            return work()
        except FabricError as refused:
            return refused

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


class Gate:
    """Holds the first calls of one method until it is opened."""

    def __init__(self, world: World, method: str, calls: int = 2) -> None:
        self.opened, self.arrived = threading.Event(), threading.Semaphore(0)
        self._left, self._method, self._lock = calls, method, threading.Lock()
        world.admission.before = self._before

    def _before(self, method: str) -> None:
        with self._lock:
            holds = method == self._method and self._left > 0
            self._left -= holds
        if holds:
            self.arrived.release()
            assert self.opened.wait(20)


def test_a_lone_call_is_the_plain_call(world: World) -> None:
    with page(world).fabric(world.fabric()).acquire() as lease:
        lease.renew(30)
    assert len(world.admission.requests("Acquire")) == 1
    assert len(world.admission.requests("Renew")) == 1
    assert world.admission.requests("AcquireMany") == []
    assert world.admission.requests("RenewMany") == []


def test_what_gathers_behind_two_calls_goes_in_one_message(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grafos._together.PATIENCE_MS", 15_000)
    fabric, gate = world.fabric(), Gate(world, "Acquire")
    builder = page(world).fabric(fabric)

    def open_when_all_wait() -> None:
        for _ in range(2):
            assert gate.arrived.acquire(timeout=20)
        for _ in range(1_000):
            if len(fabric._together._lines["Acquire"]._queue) == COUNT - 2:
                break
            threading.Event().wait(0.005)
        gate.opened.set()

    opener = threading.Thread(target=open_when_all_wait)
    opener.start()
    leases = at_once(COUNT, builder.acquire)
    opener.join(20)
    assert [type(each) for each in leases] == [MemLease] * COUNT
    assert sum(len(x.requests) for x in world.admission.requests("AcquireMany")) == COUNT - 2
    assert len(world.admission.requests("AcquireMany")) <= 2
    for each in leases:
        assert isinstance(each, MemLease)
        each.release()


def test_who_would_wait_behind_a_call_that_hangs_goes_his_own_way(world: World) -> None:
    fabric, gate = world.fabric(), Gate(world, "Acquire")
    builder = page(world).fabric(fabric)
    with ThreadPoolExecutor(2) as pool:
        hanging = [pool.submit(builder.acquire) for _ in range(2)]
        for _ in hanging:
            assert gate.arrived.acquire(timeout=20)
        with builder.acquire():  # the third
            assert not any(each.done() for each in hanging)
        gate.opened.set()
        for each in hanging:
            each.result(20).release()


def test_a_message_that_came_to_nothing_is_asked_again_alone_with_the_same_ids(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grafos._together.PATIENCE_MS", 15_000)
    fabric, gate = world.fabric(), Gate(world, "Acquire")
    held = gate._before

    def before(method: str) -> None:
        if method == "AcquireMany":
            raise failure.of("VERSION", "an admission of former days")
        held(method)

    world.admission.before = before
    builder = page(world).fabric(fabric)
    threading.Timer(0.3, gate.opened.set).start()
    leases = at_once(COUNT, builder.acquire)
    assert [type(each) for each in leases] == [MemLease] * COUNT
    shared = {y.request_id for x in world.admission.requests("AcquireMany") for y in x.requests}
    alone = [x.request_id for x in world.admission.requests("Acquire")]
    assert shared <= set(alone)
    assert len(alone) == COUNT
    for each in leases:
        assert isinstance(each, MemLease)
        each.release()


def test_each_of_a_shared_message_fails_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grafos._together.PATIENCE_MS", 15_000)
    fabric, gate = world.fabric(), Gate(world, "Acquire")
    acquire = world.admission.Acquire
    numbers = iter(range(1_000))

    def some(request: object, context: object) -> object:
        if next(numbers) % 3 == 2:
            raise failure.of("QUOTA")
        return acquire(request, context)

    monkeypatch.setattr(world.admission, "Acquire", some)
    builder = page(world).fabric(fabric)
    threading.Timer(0.3, gate.opened.set).start()
    found = at_once(COUNT, builder.acquire)
    refused = [each for each in found if isinstance(each, FabricError)]
    assert len(refused) == (COUNT - 2) // 3, "of those that went together"
    assert all(isinstance(each, RateLimited) and each.code == "QUOTA" for each in refused)
    for each in found:
        if isinstance(each, MemLease):
            each.release()


def test_a_tick_renews_all_that_is_due_in_one_call(world: World) -> None:
    fabric, manager = world.fabric(), RenewalManager()
    leases = [page(world).fabric(fabric).lease_secs(5).acquire() for _ in range(5)]
    policy = RenewalPolicy(renew_at_fraction=0.05, jitter_fraction=0.0, min_renew_secs=0)
    for lease in leases:
        manager.register(lease, policy=policy)
    world.admission.before = lambda method: None
    ended = leases[2]
    ended.release()
    threading.Event().wait(0.6)
    summary = manager.tick()
    assert len(summary.renewed) == 4
    (shared,) = world.admission.requests("RenewMany")
    assert len(shared.requests) == 4
    for lease in leases:
        lease.release()


def test_a_tick_that_reaches_nobody_fails_each_and_moves_no_deadline(world: World) -> None:
    fabric, manager = world.fabric(), RenewalManager()
    leases = [page(world).fabric(fabric).lease_secs(5).acquire() for _ in range(3)]
    for lease in leases:
        manager.register(lease, policy=RenewalPolicy(renew_at_fraction=0.05, jitter_fraction=0.0))

    def away(method: str) -> None:
        raise failure.of("INTERNAL")

    world.admission.before = away
    threading.Event().wait(0.6)
    until = [lease.remaining_ms() for lease in leases]
    summary = manager.tick()
    assert len(summary.failed) == 3
    assert all(lease.remaining_ms() <= before for lease, before in zip(leases, until, strict=True))
    world.admission.before = lambda method: None
    for lease in leases:
        lease.release()


def test_a_bundle_is_renewed_in_one_call(world: World) -> None:
    with Bundle(*[page(world)] * 3).fabric(world.fabric()).acquire() as leases:
        leases.renew(90)
        (shared,) = world.admission.requests("RenewMany")
        assert [x.lease_id for x in shared.requests] == list(leases.lease_ids)
        assert all(each.remaining_ms() > 80_000 for each in leases)
