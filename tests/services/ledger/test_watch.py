"""Who watches misses nothing, hears nothing twice, and holds nobody up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from grafos_core import chain
from grafos_core.failure import FabricError
from grafos_proto.v1 import lease_pb2, ledger_pb2
from grafos_proto.wire import failures
from services.ledger.watchers import WAITING_MAX, Happening, Watcher, Watchers
from tests.services.ledger.house import Caller, House, Node, ServiceProcess


class Watching:
    """A watch that is read until something has come."""

    def __init__(self, caller: Caller, **ask: Any) -> None:
        self.call = caller.stream("Watch", ledger_pb2.WatchRequest(**ask), timeout_s=20)
        self.events: list[ledger_pb2.Event] = []
        self.revision = 0
        self._read()

    def _read(self) -> None:
        with failures.status_to_failures():
            answer = next(self.call)
        self.revision = max(self.revision, answer.revision)
        self.events += answer.events

    def until(self, seen: Callable[[Watching], bool]) -> None:
        end_s = time.monotonic() + 10
        while not seen(self):
            assert time.monotonic() < end_s, [event.kind for event in self.events]
            self._read()

    def history(self) -> list[int]:
        return [event.revision for event in self.events if event.revision]

    def close(self) -> None:
        self.call.cancel()


@pytest.fixture
def watch(admission: Caller) -> Iterator[Callable[..., Watching]]:
    made: list[Watching] = []

    def begin(caller: Caller = admission, **ask: Any) -> Watching:
        made.append(Watching(caller, **ask))
        return made[-1]

    yield begin
    for each in made:
        each.close()


Begin = Callable[..., Watching]


def test_a_watch_resumes_after_any_revision_without_gap_or_repetition(
    admission: Caller, node: Node, watch: Begin
) -> None:
    for _ in range(4):
        admission.grant(node)
    whole = watch()
    whole.until(lambda seen: len(seen.events) >= 9)
    last = whole.history()[-1]
    assert whole.history() == list(range(1, last + 1))
    chain.verify([event.record for event in whole.events])
    for after in (1, 3, last - 1):
        resumed = watch(from_revision=after)
        admission.grant(node)
        last += 1
        resumed.until(lambda seen: last in seen.history())  # noqa: B023
        assert resumed.history() == list(range(after + 1, last + 1))


def test_events_carry_the_lease_and_its_node(admission: Caller, node: Node, watch: Begin) -> None:
    live = watch(live_only=True)
    lease = admission.grant(node)
    live.until(lambda seen: bool(seen.history()))
    (event,) = [each for each in live.events if each.revision]
    assert (event.kind, event.lease) == ("lease.granted", lease)
    (book,) = [each for each in event.node.books if each.kind == lease_pb2.KIND_MEM]
    assert book.leased == 4096


def test_a_watch_says_that_it_lives_while_nothing_happens(watch: Begin) -> None:
    quiet = watch(live_only=True)
    began_s, revision = time.monotonic(), quiet.revision
    quiet._read()
    assert time.monotonic() - began_s < 2
    assert (quiet.revision, quiet.history()) == (revision, [])


def test_a_nodes_presence_is_told_with_each_of_its_registrations(node: Node, watch: Begin) -> None:
    live = watch(live_only=True)
    node.register()
    live.until(lambda seen: bool(seen.events))
    (event,) = live.events
    assert (event.kind, event.revision) == ("node.presence", 0)
    assert event.node.evidence_age_ms < 1_000
    assert event.node.readiness.ready


def test_a_node_that_falls_silent_is_told_as_lost(node: Node, watch: Begin) -> None:
    live = watch(live_only=True)
    live.until(lambda seen: "node.lost" in [event.kind for event in seen.events])
    (event,) = [event for event in live.events if event.kind == "node.lost"]
    assert event.node.lost
    (book,) = [each for each in event.node.books if each.kind == lease_pb2.KIND_MEM]
    assert (book.free, book.withheld) == (0, book.total)


def test_a_node_hears_of_its_own_leases_alone(
    house: House, ledger: ServiceProcess, admission: Caller, node: Node, watch: Begin
) -> None:
    other = Node(house, ledger.endpoint, "n2")
    other.register()
    own = watch(caller=other.caller, node_id="n1")
    admission.grant(node)
    mine = admission.grant(other)
    own.until(lambda seen: any(event.lease.lease_id for event in seen.events))
    leases = [event.lease for event in own.events if event.lease.lease_id]
    assert leases == [mine]
    other.close()


def test_who_has_seen_more_than_there_is_is_told_of_a_rollback(admission: Caller) -> None:
    with pytest.raises(FabricError) as refused:
        Watching(admission, from_revision=10**6)
    assert refused.value.code == "ROLLBACK"


def test_a_watch_takes_up_again_where_a_killed_ledger_left_it(
    house: House, start: Callable[..., ServiceProcess], ledger: ServiceProcess, admission: Caller,
    node: Node, watch: Begin,
) -> None:  # fmt: skip
    before = watch()
    admission.grant(node)
    before.until(lambda seen: "lease.granted" in [event.kind for event in seen.events])
    last = before.history()[-1]
    ledger.kill()
    with pytest.raises(FabricError):
        before.until(lambda seen: False)
    caller = Caller(house, start().endpoint, "service/admission")
    after = watch(caller=caller, from_revision=last)
    after.until(lambda seen: bool(seen.events))
    assert after.history()[0] == last + 1
    assert after.events[0].kind == "ledger.started"
    caller.close()


def test_a_watcher_that_does_not_keep_up_is_let_go_and_told_to_resume() -> None:
    watchers, slow = Watchers(), Watcher("")
    watchers.join(slow)
    for revision in range(1, WAITING_MAX + 2):
        watchers.publish([Happening(revision, "lease.denied", b"x")], revision)
    with pytest.raises(FabricError) as refused:
        slow.take(0)
    assert refused.value.code == "RETRY_LATER"
    assert refused.value.retryable
    quick = Watcher("")
    watchers.join(quick)
    watchers.publish([Happening(1, "lease.denied", b"x")], 1)
    assert [each.revision for each in quick.take(0)] == [1]
    watchers.leave(slow)
    assert watchers.count() == 1


def test_the_watch_of_a_client_that_went_away_is_forgotten(
    ledger: ServiceProcess, admission: Caller, node: Node, watch: Begin
) -> None:
    gone = watch(live_only=True)
    gone.close()
    with pytest.raises((grpc.RpcError, StopIteration)):
        next(gone.call)
    assert admission.grant(node).epoch == 1
