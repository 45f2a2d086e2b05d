"""Requests that arrive together travel together, and none of them suffers for another."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from grafos_core import failure
from grafos_core.failure import FabricError, InvariantViolation
from grafos_proto.wire.coalescing import BATCH_MAX, WAITING_MAX, Coalescer
from tests.services.admission.world import at_once, codes, eventually

LONG_MS = 10_000


class Line:
    """The way to the ledger: each message waits until it is let through."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []
        self.errors: list[BaseException] = []
        self._open = threading.Semaphore(0)

    def let_through(self, count: int) -> None:
        self._open.release(count)

    def __call__(self, asks: Sequence[int]) -> Sequence[int]:
        self.sent.append(list(asks))
        assert self._open.acquire(timeout=10)
        if self.errors:
            raise self.errors.pop(0)
        return [10 * each for each in asks]


class Asked(threading.Thread):
    """One caller, from its question to what it got."""

    def __init__(self, coalescer: Coalescer[int, int], ask: int, timeout_ms: int = LONG_MS) -> None:
        super().__init__(daemon=True)
        self.got: Any = None
        self._call = (coalescer, ask, timeout_ms)
        self.start()

    def run(self) -> None:
        coalescer, ask, timeout_ms = self._call
        try:
            self.got = coalescer(ask, timeout_ms)
        except (FabricError, InvariantViolation) as error:
            self.got = error
        except OSError as error:
            self.got = error

    def result(self) -> Any:
        self.join(10)
        return self.got


@pytest.fixture
def line() -> Line:
    return Line()


def queued(coalescer: Coalescer[int, int], count: int) -> None:
    eventually(lambda: len(coalescer._queue) == count)


def led(line: Line, coalescer: Coalescer[int, int], **how: Any) -> Asked:
    """The first caller, whose message is under way."""
    leader = Asked(coalescer, 0, **how)
    eventually(lambda: line.sent == [[0]])
    return leader


def test_one_request_is_sent_at_once_and_alone(line: Line) -> None:
    line.let_through(1)
    assert Coalescer(line)(7, LONG_MS) == 70
    assert line.sent == [[7]]


def test_what_arrives_meanwhile_goes_in_one_message_and_each_gets_its_own(line: Line) -> None:
    coalescer = Coalescer(line)
    leader = led(line, coalescer)
    others = []
    for ask in range(1, 6):
        others.append(Asked(coalescer, ask))
        queued(coalescer, ask)
    line.let_through(2)
    assert [each.result() for each in (leader, *others)] == [0, 10, 20, 30, 40, 50]
    assert line.sent == [[0], [1, 2, 3, 4, 5]]


def test_the_lead_is_handed_over_until_nobody_waits(line: Line) -> None:
    """The first caller leaves with its answer; it does not serve those who come later."""
    coalescer = Coalescer(line)
    leader = led(line, coalescer)
    second = Asked(coalescer, 1)
    queued(coalescer, 1)
    line.let_through(1)
    assert leader.result() == 0
    eventually(lambda: len(line.sent) == 2)
    third = Asked(coalescer, 2)
    queued(coalescer, 1)
    line.let_through(3)
    assert (second.result(), third.result()) == (10, 20)
    eventually(lambda: not coalescer._sending)
    assert coalescer(3, LONG_MS) == 30
    assert line.sent == [[0], [1], [2], [3]]


def test_no_message_is_larger_than_the_ledger_takes(line: Line) -> None:
    coalescer = Coalescer(line)
    leader = led(line, coalescer)
    others = [Asked(coalescer, ask) for ask in range(1, BATCH_MAX + 11)]
    queued(coalescer, len(others))
    line.let_through(3)
    assert sorted(each.result() for each in others) == [10 * n for n in range(1, BATCH_MAX + 11)]
    assert leader.result() == 0
    assert [len(batch) for batch in line.sent] == [1, BATCH_MAX, 10]


def test_the_error_of_a_message_reaches_everybody_in_it_and_nobody_else(line: Line) -> None:
    coalescer = Coalescer(line)
    leader = led(line, coalescer)
    others = [Asked(coalescer, ask) for ask in (1, 2, 3)]
    queued(coalescer, 3)
    line.let_through(1)
    eventually(lambda: len(line.sent) == 2)
    late = Asked(coalescer, 4)
    queued(coalescer, 1)
    line.errors = [failure.of("UNREACHABLE")]
    line.let_through(1)
    assert codes([each.result() for each in others]) == ["UNREACHABLE"] * 3
    line.let_through(1)
    assert (leader.result(), late.result()) == (0, 40)


@pytest.mark.parametrize("led_by_caller", [True, False])
@pytest.mark.parametrize(
    "broken", [failure.of("UNREACHABLE"), OSError(5, "planted"), InvariantViolation("planted")]
)
def test_whatever_breaks_a_message_the_next_one_is_sent(
    broken: Exception, led_by_caller: bool, line: Line
) -> None:
    coalescer = Coalescer(line)
    first = led(line, coalescer)
    second = Asked(coalescer, 1)
    queued(coalescer, 1)
    if not led_by_caller:
        line.let_through(1)
        assert first.result() == 0
    line.errors = [broken]
    line.let_through(1)
    got = (first if led_by_caller else second).result()
    expected = InvariantViolation if isinstance(broken, InvariantViolation) else FabricError
    assert isinstance(got, expected), got
    line.let_through(2)
    if led_by_caller:
        assert second.result() == 10
    assert coalescer(2, 2_000) == 20


def test_an_answer_too_few_is_a_broken_law_for_all_who_asked() -> None:
    coalescer: Coalescer[int, int] = Coalescer(lambda asks: [])
    with pytest.raises(InvariantViolation):
        coalescer(1, LONG_MS)


def test_who_waits_no_longer_is_taken_back_and_harms_nobody(line: Line) -> None:
    coalescer = Coalescer(line)
    leader = led(line, coalescer)
    hasty = Asked(coalescer, 1, timeout_ms=50)
    patient = Asked(coalescer, 2)
    refused = hasty.result()
    assert (refused.code, refused.detail) == ("DEADLINE", "nothing was asked yet")
    line.let_through(2)
    assert (leader.result(), patient.result()) == (0, 20)
    assert line.sent == [[0], [2]]


def test_who_gives_up_while_its_message_travels_is_told_that_nothing_is_known(line: Line) -> None:
    coalescer = Coalescer(line)
    leader = led(line, coalescer)
    hasty = Asked(coalescer, 1, timeout_ms=500)
    patient = Asked(coalescer, 2)
    queued(coalescer, 2)
    line.let_through(1)
    assert hasty.result().detail == "whether it took effect is not known"
    line.let_through(1)
    assert (leader.result(), patient.result()) == (0, 20)


def test_a_message_of_several_is_sent_on_nobodys_behalf() -> None:
    """Else one caller's short deadline would cut the others off."""
    threads: dict[int, str] = {}
    begun, go = threading.Event(), threading.Event()

    def send(asks: Sequence[int]) -> Sequence[int]:
        threads.update((ask, threading.current_thread().name) for ask in asks)
        begun.set()
        assert go.wait(10)
        return asks

    coalescer = Coalescer(send)
    alone = Asked(coalescer, 1)
    assert begun.wait(10)
    others = [Asked(coalescer, ask) for ask in (2, 3)]
    queued(coalescer, 2)
    go.set()
    assert [each.result() for each in (alone, *others)] == [1, 2, 3]
    assert threads == {1: alone.name, 2: "coalesced", 3: "coalesced"}


def test_more_than_can_wait_are_refused_and_told_when_to_come_back(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert WAITING_MAX >= 4 * BATCH_MAX
    monkeypatch.setattr("grafos_proto.wire.coalescing.WAITING_MAX", 2)
    coalescer = Coalescer(line)
    leader = led(line, coalescer)
    others = [Asked(coalescer, ask) for ask in (1, 2)]
    queued(coalescer, 2)
    refused = Asked(coalescer, 3).result()
    assert (refused.code, refused.retry_after_ms) == ("RATE", 100)
    line.let_through(2)
    assert leader.result() == 0
    assert sorted(each.result() for each in others) == [10, 20]


def test_a_thousand_calls_from_many_threads_each_get_their_own_answer() -> None:
    coalescer: Coalescer[int, int] = Coalescer(lambda asks: [10 * ask for ask in asks])

    def run(start: int) -> bool:
        return all(coalescer(n, LONG_MS) == 10 * n for n in range(start, start + 60))

    assert at_once(*(lambda start=i * 60: run(start) for i in range(16))) == [True] * 16
    assert (coalescer._sending, len(coalescer._queue)) == (False, 0)
