"""The owner thread and its queue; and batches that gather while the owner is busy."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import pytest

from grafos_core import failure
from grafos_core.failure import FabricError, InvariantViolation, invariant
from services.runtime.clock import Instant
from services.runtime.logs import Log
from services.runtime.loop import AWAKE, Batcher, Loop


class Owner:
    """A loop with what it told the outside."""

    def __init__(self, queue_max: int = 1024) -> None:
        self.halted = threading.Event()
        self.ticks: list[Instant] = []
        self.timeout_ms: int | None = None
        self.on_tick: Callable[[], None] = lambda: None
        self.logged = io.StringIO()
        self.loop = Loop(
            "core", on_tick=self._tick, log=Log("test", stream=self.logged),
            halt=self.halted.set, queue_max=queue_max,
        )  # fmt: skip

    def _tick(self, now: Instant) -> int | None:
        self.ticks.append(now)
        self.on_tick()
        return self.timeout_ms


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    made.loop.start()
    yield made
    made.loop.stop()


def test_what_is_posted_runs_in_the_owners_thread_in_order(owner: Owner) -> None:
    seen: list[tuple[int, int]] = []
    with ThreadPoolExecutor(8) as pool:
        for number in range(200):
            owner.loop.post(lambda n=number: seen.append((n, threading.get_ident())))  # type: ignore[misc]
            pool.submit(owner.loop.call, lambda: None)
    owner.loop.call(lambda: None)
    assert [number for number, _ in seen] == list(range(200))
    assert len({ident for _, ident in seen}) == 1


def test_one_at_a_time_whoever_runs_it(owner: Owner) -> None:
    """A counter that is read, let go of and written: two at a time would lose some."""
    count = [0]
    owner.on_tick = lambda: count.__setitem__(0, count[0] + 0)

    def add() -> None:
        seen = count[0]
        threading.Event().wait(0.000_01)
        count[0] = seen + 1

    with ThreadPoolExecutor(8) as pool:
        for number in range(300):
            pool.submit((owner.loop.call, owner.loop.run, owner.loop.post)[number % 3], add)
    owner.loop.call(lambda: None)
    assert count[0] == 300


def borrowing(after: Callable[[], int | None]) -> Owner:
    """An owner who waits for its first tick's timeout, a minute."""
    made = Owner()
    made.loop._after = after
    made.timeout_ms = 60_000
    made.loop.start()
    made.loop.call(lambda: None)
    wait_until(lambda: made.loop._sleeps_until_ms < AWAKE)
    return made


def test_who_finds_nobody_before_him_runs_it_himself() -> None:
    owner = borrowing(lambda: None)
    where: list[int] = []
    owner.loop.run(lambda: where.append(threading.get_ident()))
    assert where == [threading.get_ident()]
    assert owner.loop.call(threading.get_ident) == threading.get_ident()
    assert not owner.loop.is_owner()
    owner.loop.stop()


def test_what_was_borrowed_is_ended_by_after_and_so_is_what_it_posts() -> None:
    story: list[str] = []
    owner = borrowing(lambda: story.append("after"))
    ticks = len(owner.ticks)

    def first() -> None:
        story.append("first")
        owner.loop.post(lambda: story.append("second"))
        owner.loop.run(lambda: story.append("third"))

    story.clear()
    owner.loop.run(first)
    assert story == ["first", "after", "second", "after", "third", "after"]
    assert len(owner.ticks) == ticks, "nothing was wanted of the owner"
    owner.loop.stop()


def test_the_owner_ticks_when_what_was_borrowed_wants_it() -> None:
    wanted_ms = [60_000]
    owner = borrowing(lambda: wanted_ms[0])
    ticks = len(owner.ticks)
    wanted_ms[0] = 5
    owner.loop.run(lambda: None)
    wait_until(lambda: len(owner.ticks) > ticks)
    owner.loop.stop()


def test_without_after_a_tick_follows(owner: Owner) -> None:
    owner.loop.call(lambda: None)
    ticks = len(owner.ticks)
    owner.loop.call(lambda: None)
    wait_until(lambda: len(owner.ticks) > ticks)


@pytest.mark.parametrize("how", ["run", "after"])
def test_what_fails_in_a_borrowed_turn_halts_and_nothing_runs_after_it(how: str) -> None:
    fails = [False]

    def after() -> None:
        if fails[0] and how == "after":
            raise OSError("disk")

    owner = borrowing(after)
    fails[0] = True
    ticks = len(owner.ticks)
    owner.loop.run(lambda: 1 // 0 if how == "run" else None)
    assert owner.halted.is_set()
    with pytest.raises(failure.Disconnected):
        owner.loop.call(lambda: None)
    assert owner.loop.stop()
    assert len(owner.ticks) == ticks


def test_what_comes_while_somebody_borrows_is_run_by_the_owner() -> None:
    owner = borrowing(lambda: None)
    inside, go_on, ran = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        go_on.wait(3)

    borrower = threading.Thread(target=owner.loop.run, args=[slow])
    borrower.start()
    assert inside.wait(3)
    owner.loop.run(ran.set)
    assert not ran.is_set()
    go_on.set()
    assert ran.wait(3)
    borrower.join()
    owner.loop.stop()


def test_an_exception_goes_to_its_caller_and_the_owner_goes_on(owner: Owner) -> None:
    def refuses() -> None:
        raise failure.of("QUOTA")

    with pytest.raises(failure.RateLimited):
        owner.loop.call(refuses)
    with pytest.raises(ZeroDivisionError):
        owner.loop.call(lambda: 1 // 0)
    assert owner.loop.call(lambda: 7) == 7
    assert not owner.halted.is_set()


def test_the_owner_may_call_itself(owner: Owner) -> None:
    assert owner.loop.call(lambda: owner.loop.call(lambda: 3)) == 3


def test_a_broken_law_reaches_its_caller_and_halts(owner: Owner) -> None:
    with pytest.raises(InvariantViolation):
        owner.loop.call(lambda: invariant(False, "conserved"))
    assert owner.halted.wait(3)
    assert "conserved" in owner.logged.getvalue()
    with pytest.raises(failure.Disconnected):
        owner.loop.call(lambda: None)


@pytest.mark.parametrize("how", ["post", "tick"])
def test_what_fails_with_nobody_waiting_halts(owner: Owner, how: str) -> None:
    def fails() -> None:
        raise OSError("disk")

    if how == "post":
        owner.loop.post(fails)
    else:
        owner.on_tick = fails
        owner.loop.wake()
    assert owner.halted.wait(3)


def test_the_tick_comes_when_the_core_asked_for_it(owner: Owner) -> None:
    ticked = threading.Event()
    owner.timeout_ms = 20
    owner.on_tick = lambda: ticked.set() if len(owner.ticks) >= 5 else None
    owner.loop.wake()
    assert ticked.wait(3)
    times = [each.boot_ms for each in owner.ticks[-4:]]
    assert all(15 <= later - earlier < 500 for earlier, later in pairwise(times))


def test_a_flood_of_calls_does_not_hold_up_the_tick(owner: Owner) -> None:
    owner.loop.call(lambda: None)
    before = len(owner.ticks)
    stuck = threading.Event()
    owner.loop.post(lambda: stuck.wait(3))
    done: list[int] = []

    def again() -> None:
        done.append(len(owner.ticks))
        if len(done) < 1_000:
            owner.loop.post(again)

    owner.loop.post(again)
    stuck.set()
    while len(done) < 1_000:
        owner.loop.call(lambda: None)
    assert done[-1] - before >= 3


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    owner = Owner(queue_max=4)
    for _ in range(4):
        owner.loop.post(lambda: None)  # not started: nothing is taken out
    with pytest.raises(failure.RateLimited) as caught:
        owner.loop.call(lambda: None)
    assert caught.value.code == "RATE"
    assert caught.value.retry_after_ms
    assert caught.value.retryable


def test_a_call_gives_up_at_its_deadline(owner: Owner) -> None:
    release = threading.Event()
    owner.loop.post(lambda: release.wait(5))
    with pytest.raises(failure.DeadlineExceeded):
        owner.loop.call(lambda: None, timeout_ms=50)
    release.set()


def test_stopping_runs_what_is_queued_and_refuses_what_comes_later(owner: Owner) -> None:
    ran: list[int] = []
    for number in range(10):
        owner.loop.post(lambda n=number: ran.append(n))  # type: ignore[misc]
    assert owner.loop.stop()
    assert ran == list(range(10))
    with pytest.raises(failure.Disconnected) as caught:
        owner.loop.post(lambda: None)
    assert caught.value.code == "RETRY_LATER"


class Disk:
    """A batch handler that is slow as long as a test wants."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()

    def commit(self, items: list[int]) -> list[int | FabricError]:
        self.batches.append(items)
        self.free.wait(5)
        return [failure.of("QUOTA", str(item)) if item % 10 == 3 else item * 2 for item in items]


def test_what_comes_while_a_batch_is_busy_becomes_the_next_one(owner: Owner) -> None:
    disk = Disk()
    batcher: Batcher[int, int] = Batcher(owner.loop, disk.commit, batch_max=16)
    with ThreadPoolExecutor(40) as pool:
        first = pool.submit(batcher.submit, 0)
        wait_until(lambda: bool(disk.batches))
        rest: list[Future[int]] = [pool.submit(batcher.submit, n) for n in range(1, 31)]
        wait_until(lambda: len(batcher._waiting) == 30)
        disk.free.set()
        assert first.result(5) == 0
        answers = {n: call.exception(5) or call.result() for n, call in enumerate(rest, 1)}
    assert [len(batch) for batch in disk.batches] == [1, 16, 14]
    for number, answer in answers.items():
        if number % 10 == 3:
            assert isinstance(answer, failure.RateLimited)
            assert answer.detail == str(number)
        else:
            assert answer == number * 2


def test_a_handler_that_refuses_a_batch_refuses_each_item_and_goes_on(owner: Owner) -> None:
    full = [True]

    def commit(items: list[int]) -> list[int]:
        if full[0]:
            raise failure.of("DISK")
        return items

    batcher: Batcher[int, int] = Batcher(owner.loop, commit)
    with pytest.raises(failure.Incompatible):
        batcher.submit(1)
    full[0] = False
    assert batcher.submit_all([1, 2, 3]) == [1, 2, 3]
    assert not owner.halted.is_set()


def test_a_handler_that_breaks_ends_everybody_who_waits_and_halts(owner: Owner) -> None:
    def commit(items: list[int]) -> list[int]:
        raise OSError("broken")

    batcher: Batcher[int, int] = Batcher(owner.loop, commit)
    with pytest.raises(OSError, match="broken"):
        batcher.submit(1)
    assert owner.halted.wait(3)
    with pytest.raises(failure.Disconnected):
        batcher.submit(2)


def test_a_batch_has_room_for_so_many_and_no_more(owner: Owner) -> None:
    disk = Disk()
    batcher: Batcher[int, int] = Batcher(owner.loop, disk.commit, batch_max=2, queue_max=4)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(batcher.submit, 0)
        wait_until(lambda: bool(disk.batches))
        rest = [pool.submit(batcher.submit, 0) for _ in range(4)]
        wait_until(lambda: len(batcher._waiting) == 4)
        with pytest.raises(failure.RateLimited):
            batcher.submit(0)
        disk.free.set()
        assert [call.result(5) for call in [first, *rest]] == [0] * 5


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(5_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it did not happen in time")
