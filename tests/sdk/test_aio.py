"""The twin does what the SDK does, is described as it is, and gives back what a lost task took."""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Any

import pytest

import grafos
from grafos import (
    Denied,
    Disconnected,
    FabricError,
    Fenced,
    Incompatible,
    LeaseExpired,
    LeaseStatus,
    RateLimited,
    Revoked,
    _clock,
    aio,
)
from grafos._builder import Builder
from grafos.aio import _lanes
from grafos.aio._lanes import Opening
from grafos.testing import VirtualFabric, assert_no_leaks, fabric, leaks
from tests.sdk.world import World

TWINS = [
    (grafos.Lease, aio.Lease), (grafos.MemLease, aio.MemLease),
    (grafos.BlockLease, aio.BlockLease), (grafos.FabricMem, aio.FabricMem),
    (grafos.FabricBlock, aio.FabricBlock), (grafos.MemBuilder, aio.MemBuilder),
    (grafos.BlockBuilder, aio.BlockBuilder), (grafos.Fabric, aio.Fabric),
    (grafos.SharedLease, aio.SharedLease), (grafos.Bundle, aio.Bundle),
    (grafos.BundleLease, aio.BundleLease),
]  # fmt: skip
OURS = {"sync", "notices", "endpoint", "closed"}
"""Members of the twin alone, and attributes that an original has only once it is made."""
AT_ONCE = {"remaining_ms", "on_notice", "mem", "block", "map", "index", "count"}
"""What asks nobody; and whatever a builder has but these two."""
OPENING = {"acquire", "attach"}


@pytest.fixture
def virtual() -> Generator[VirtualFabric, None, None]:
    with fabric(nodes=2, memory="1MiB", blocks="1MiB") as made:
        yield made
        made.check()
        assert_no_leaks(made)


@contextmanager
def refused(kind: type[FabricError], code: str) -> Generator[None, None, None]:
    with pytest.raises(kind) as raised:
        yield
    assert raised.value.code == code


def page() -> aio.MemBuilder:
    return aio.MemBuilder().min_bytes(4096)


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 30))


def members(of: type) -> set[str]:
    return {name for name in dir(of) if not name.startswith("_")}


class TestInStep:
    """What `grafos` says of itself, the twin says too."""

    def test_the_modules_have_the_same_names(self) -> None:
        assert aio.__all__ == grafos.__all__
        assert {name for name in grafos.__all__ if getattr(aio, name) is None} == set()
        same = set(grafos.__all__) - {sync.__name__ for sync, _ in TWINS} - {"connect"}
        for name in same - {"local_fabric", "open_share", "Share"}:
            assert getattr(aio, name) is getattr(grafos, name)

    @pytest.mark.parametrize(("sync", "twin"), TWINS, ids=lambda each: each.__name__)
    def test_the_classes_have_the_same_members(self, sync: type, twin: type) -> None:
        assert members(twin) - OURS == members(sync)

    @pytest.mark.parametrize(("sync", "twin"), TWINS, ids=lambda each: each.__name__)
    def test_they_have_the_same_words_and_parameters(self, sync: type, twin: type) -> None:
        for name in members(sync):
            theirs, ours = getattr(sync, name), getattr(twin, name)
            if not callable(theirs) or isinstance(theirs, type):
                static = inspect.getattr_static(sync, name)
                if isinstance(static, property):
                    assert inspect.getattr_static(twin, name).__doc__ == static.__doc__, name
                continue
            assert inspect.getdoc(ours) == inspect.getdoc(theirs), name
            if name != "attach":
                assert parameters(ours) == parameters(theirs), f"{sync.__name__}.{name}"

    @pytest.mark.parametrize(("sync", "twin"), TWINS, ids=lambda each: each.__name__)
    def test_what_may_wait_is_awaited_and_nothing_else(self, sync: type, twin: type) -> None:
        for name in members(sync) - OPENING:
            if not inspect.isfunction(getattr(sync, name)):
                continue
            found = getattr(twin, name)
            waits = inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found)
            may = name not in AT_ONCE and not issubclass(sync, Builder | grafos.Bundle)
            assert waits is may, f"{twin.__name__}.{name}"

    @pytest.mark.parametrize(("sync", "twin"), TWINS, ids=lambda each: each.__name__)
    def test_methods_are_written_out_for_type_checkers(self, sync: type, twin: type) -> None:
        made = {
            name for name in members(sync)
            if hasattr(getattr(twin, name), "__wrapped__")
        }  # fmt: skip
        assert made == set()

    def test_what_was_given_has_the_same_members(self) -> None:
        assert members(aio.Share) - OURS == members(grafos.Share)

    @pytest.mark.parametrize("name", ["connect", "local_fabric", "open_share"])
    def test_the_functions_have_the_same_words_and_parameters(self, name: str) -> None:
        theirs, ours = getattr(grafos, name), getattr(aio, name)
        assert ours.__doc__ == theirs.__doc__
        assert parameters(ours) == parameters(theirs)

    def test_an_option_of_a_later_version_is_refused_by_name_here_too(self) -> None:
        with refused(Incompatible, "OPTION"):
            page().priority("high")
        with pytest.raises(AttributeError):
            page().no_such_option(1)


def parameters(of: Any) -> list[tuple[str, Any, Any, str]]:
    """Name, kind, default and type of each; a fabric may be given as either twin."""
    return [
        (each.name, each.kind, each.default, str(each.annotation))
        for each in inspect.signature(of).parameters.values()
    ]


class TestUse:
    def test_memory_and_blocks_hold_bytes(self, virtual: VirtualFabric) -> None:
        async def work() -> None:
            async with page().acquire() as lease:
                await lease.mem().write(0, b"hello fabric")
                assert await lease.mem().read(0, 12) == b"hello fabric"
                into = bytearray(5)
                assert await lease.mem().readinto(6, into) == 5
                assert into == b"fabri"
                assert lease.sync.mem().read(0, 5) == b"hello"
                await lease.mem().write_many([(64, b"ab"), (66, b"cd")])
                assert await lease.mem().read_many([(64, 4)]) == [b"abcd"]
                assert await lease.mem().fetch_add(128, 5) == 0
                assert await lease.mem().compare_and_swap(128, 5, 6) == 5
            assert (await lease.release()).credited
            async with aio.BlockBuilder().min_blocks(2).acquire() as blocks:
                await blocks.block().write_block(1, b"x" * 4096)
                await blocks.block().flush()
                assert (await blocks.block().read_blocks(0, 2))[4096:] == b"x" * 4096

        run(work)

    def test_a_lease_can_be_awaited_or_entered_and_says_what_it_says(
        self, virtual: VirtualFabric
    ) -> None:
        async def work() -> None:
            lease = await page().lease_secs(5).acquire()
            sync = lease.sync
            assert (lease.lease_id, lease.epoch) == (sync.lease_id, sync.epoch)
            assert lease.status is LeaseStatus.ACTIVE
            assert await lease.renew(60) > 50_000
            receipt = await lease.release()
            assert receipt.verify(await aio.Fabric(virtual.connect()).keys()) is receipt
            async with await page().acquire() as again:
                assert again.valid

        run(work)

    def test_failures_are_the_same_ones(self, virtual: VirtualFabric) -> None:
        async def work() -> None:
            lease = await page().lease_secs(5).acquire()
            with refused(Incompatible, "EXTENT"):
                await lease.mem().read(4096, 1)
            virtual.advance(6)
            with refused(LeaseExpired, "LEASE_EXPIRED"):
                await lease.mem().read(0, 1)
            with refused(Denied, "NOT_FOUND"):
                await aio.MemBuilder.attach("0" * 32)
            with refused(Incompatible, "CAPACITY"):
                await aio.MemBuilder().min_bytes(1 << 40).acquire()
            with virtual.fail_teardown("n1"):
                with refused(Fenced, "QUARANTINED"):
                    async with page().where(node="n1").acquire():
                        pass
            virtual.clear_fence(virtual.fences()[0].lease_id, "looked at it")

        run(work)

    def test_who_is_warned_reports_and_need_not_wait(self, virtual: VirtualFabric) -> None:
        async def work() -> None:
            lease = await page().acquire()
            before_ms = virtual.now_ms
            (order,) = await aio.Fabric(virtual.connection).revoke(lease.lease_id, grace=30)
            assert order.failure is None
            notices = lease.notices()
            assert (await anext(notices)).kind == "revoke_warning"
            receipt = await lease.checkpoint_done()
            assert receipt.revoke_stage == "checkpoint_reported"
            assert lease.status is LeaseStatus.REVOKED
            assert virtual.now_ms - before_ms < 1_000

        run(work)

    def test_notices_are_iterated_until_the_lease_is_over(self, virtual: VirtualFabric) -> None:
        async def work() -> None:
            lease = await page().acquire()
            notices = lease.notices()
            virtual.revoke(lease.lease_id, "drill", grace=5)
            heard = []
            async for notice in notices:
                heard.append(notice.kind)
                virtual.advance(5)
            assert heard == ["revoke_warning", "revoked"]
            with refused(Revoked, "REVOKED"):
                await lease.mem().read(0, 1)

        run(work)

    def test_callbacks_run_in_the_loop(self, virtual: VirtualFabric) -> None:
        async def work() -> None:
            heard: asyncio.Queue[int] = asyncio.Queue()
            lease = await page().lease_secs(2).acquire()
            lease.on_notice(lambda notice: heard.put_nowait(threading.get_ident()))
            virtual.advance(3)
            await aio.Fabric(virtual.connection).poll()
            assert await heard.get() == threading.get_ident()

        run(work)

    def test_leases_are_listed_and_attached(self, virtual: VirtualFabric) -> None:
        async def work() -> None:
            lease = await page().keep().acquire()
            connection = aio.Fabric(virtual.connection)
            assert [each.lease_id async for each in connection.leases()] == [lease.lease_id]
            assert (await connection.describe(lease.lease_id)).state == "active"
            async with aio.MemBuilder.attach(lease.lease_id) as again:
                assert again.generation == 2

        run(work)

    def test_each_task_asks_the_fabric_of_its_own_block(self) -> None:
        async def work() -> None:
            with fabric() as one, fabric(seed=1) as other:
                met = asyncio.Barrier(2)

                async def use(world: VirtualFabric) -> None:
                    async with aio.Fabric(world.connect()):
                        await met.wait()
                        async with page().acquire():
                            assert len(world.leases()) == 1
                            await met.wait()

                await asyncio.gather(use(one), use(other))

        run(work)

    def test_it_works_over_a_real_wire(self, world: World) -> None:
        async def work() -> None:
            async with aio.Fabric(world.fabric()) as connection:
                assert connection.tenant == "acme"
                async with page().acquire() as lease:
                    await lease.mem().write(0, b"x")
                    assert await lease.mem().read(0, 1) == b"x"
            assert connection.closed

        run(work)

    def test_two_loops_in_two_threads_share_one_fabric(self, virtual: VirtualFabric) -> None:
        failed: list[BaseException] = []

        async def work() -> None:
            for _ in range(5):
                held = [await page().acquire() for _ in range(3)]
                await asyncio.gather(*(each.mem().write(0, b"x") for each in held))
                await asyncio.gather(*(each.release() for each in held))

        def loop() -> None:
            try:
                run(work)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=loop) for _ in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
        assert failed == []

    def test_what_is_left_behind_is_named_by_where_it_was_asked_for(self) -> None:
        with fabric() as world:

            async def leave() -> aio.MemLease:
                return await page().acquire()

            lease = run(leave)
            (leak,) = leaks(world)
            assert f"{__file__}:" in leak.acquired_at
            assert leak.acquired_at.endswith("in leave")
            lease.sync.release()


class TestCancelled:
    """A test holds the SDK's call at a gate, cancels the task that waits for it, and opens it."""

    def test_a_lease_that_comes_too_late_is_given_back(
        self, virtual: VirtualFabric, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, gate = threading.Event(), threading.Event()
        acquire = Builder.acquire

        def held(builder: Any) -> Any:
            begun.set()
            lease = acquire(builder)
            assert gate.wait(20)
            return lease

        monkeypatch.setattr(Builder, "acquire", held)

        async def work() -> None:
            task = asyncio.create_task(_taken(page().acquire()))
            await asyncio.to_thread(begun.wait, 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(virtual.leases()) == 1, "it was granted to nobody"
            gate.set()
            await _until(lambda: virtual.leases() == [])

        run(work)

    def test_an_acquire_that_has_not_begun_never_begins(
        self, virtual: VirtualFabric, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = threading.Event()
        lane = _lanes.Lane("narrow", 1)
        monkeypatch.setattr(_lanes, "ASKING", lane)

        async def work() -> None:
            lane.submit(lambda: gate.wait(20))
            task = asyncio.create_task(_taken(page().acquire()))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.set()
            await asyncio.wrap_future(lane.submit(lambda: None))
            assert virtual.leases() == []
            assert virtual._control.lessor.state.released == {}

        run(work)

    def test_a_release_happens_although_its_task_is_gone(
        self, virtual: VirtualFabric, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = threading.Event()
        lane = _lanes.Lane("narrow", 1)
        monkeypatch.setattr(_lanes, "DOING", lane)

        async def work() -> None:
            lease = await page().acquire()
            lane.submit(lambda: gate.wait(20))
            task = asyncio.create_task(lease.release())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.set()
            await _until(lambda: virtual.leases() == [])

        run(work)

    def test_a_block_that_is_cancelled_gives_back(self, virtual: VirtualFabric) -> None:
        async def work() -> None:
            inside = asyncio.Event()

            async def block() -> None:
                async with page().acquire():
                    inside.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(block())
            await inside.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert virtual.leases() == []

        run(work)

    def test_waiting_for_room_does_not_stand_in_the_way_of_who_makes_it(self, world: World) -> None:
        """More tasks wait than there are threads to wait in; a release goes by another lane."""
        gate = threading.Event()
        lease = grafos.MemBuilder().fabric(world.fabric()).min_bytes(1).acquire()

        async def work() -> None:
            waiting = [
                asyncio.create_task(_lanes.ask(lambda: gate.wait(20), lambda _: None))
                for _ in range(_lanes.ASKING_THREADS_MAX + 4)
            ]
            await asyncio.wait_for(aio.MemLease(lease).release(), 5)
            gate.set()
            await asyncio.gather(*waiting)

        run(work)

    def test_a_buffer_is_not_written_to_behind_the_back_of_who_left(
        self, virtual: VirtualFabric, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, gate = threading.Event(), threading.Event()
        readinto = grafos.FabricMem.readinto

        def held(memory: Any, offset: int, buffer: Any) -> int:
            begun.set()
            assert gate.wait(20)
            return readinto(memory, offset, buffer)

        async def work() -> None:
            async with page().acquire() as lease:
                await lease.mem().write(0, b"secret")
                monkeypatch.setattr(grafos.FabricMem, "readinto", held)
                buffer = bytearray(6)
                task = asyncio.create_task(lease.mem().readinto(0, buffer))
                await asyncio.to_thread(begun.wait, 20)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                gate.set()
                await asyncio.sleep(0.02)
                assert buffer == bytes(6)

        run(work)


def test_a_long_wait_is_asked_for_in_pieces(virtual: VirtualFabric) -> None:
    """So that no thread is kept for long by a task that is gone."""
    virtual.set_quota(amount=4096)
    asked: list[int] = []
    acquire = virtual._control.methods["Acquire"]

    def heard(request: Any, who: Any) -> Any:
        asked.append(request.wait_ms)
        return acquire(request, who)

    virtual._control.methods["Acquire"] = heard

    async def work() -> None:
        async with page().lease_secs(600).acquire():
            before_ms = virtual.now_ms
            with refused(RateLimited, "QUOTA"):
                await page().wait(7).acquire()
            assert 7_000 <= virtual.now_ms - before_ms < 8_000
        async with page().lease_secs(3).acquire():
            async with page().wait(60).acquire():
                pass

    run(work)
    assert max(asked) == 2_000


def test_a_forked_child_has_threads_of_its_own(virtual: VirtualFabric) -> None:
    async def work() -> None:
        async with page().acquire():
            pass

    run(work)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_in_child, args=(virtual,))
    child.start()
    child.join(20)
    assert child.exitcode == 0


def _in_child(virtual: VirtualFabric) -> None:
    async def work() -> None:
        assert await _lanes.do(threading.active_count) >= 2
        with refused(Disconnected, "FORKED_CHILD"):
            await page().fabric(virtual.connection).acquire()
        assert not _clock.is_virtual

    asyncio.run(work())


async def _taken(opening: Opening[Any]) -> Any:
    return await opening


async def _until(holds: Callable[[], bool]) -> None:
    for _ in range(2_000):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to pass")


class TestSharing:
    def test_a_share_is_given_used_and_taken_back(self, virtual: VirtualFabric) -> None:
        reader = virtual.connect()

        async def work() -> None:
            async with page().acquire() as lease:
                await lease.mem().write(0, b"for both")
                given = await lease.share(to=reader.holder_key, ops=["read"], length=8)
                assert str(given) == given.text
                async with aio.open_share(given.text, fabric=reader) as share:
                    assert await share.mem().read(0, 8) == b"for both"
                    assert [each.state for each in await lease.shares()] == ["open"]
                    await given.end()
                    with refused(Revoked, "REVOKED"):
                        await share.mem().read(0, 8)

        run(work)
