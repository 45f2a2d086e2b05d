"""Effects in their order: what is told waits for what is written; what gathers is written once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from grafos_core import failure
from grafos_core.chain import Record
from grafos_core.lease import Kind, LeaseId, Policy
from grafos_core.node import NodeCore
from grafos_core.node_effects import (
    Answer,
    BoundFacts,
    CloseGate,
    Detached,
    Effect,
    Instant,
    Notify,
    OpenGate,
    Persist,
    ReceiptFacts,
    Recovered,
    ReportBound,
    Result,
    RunStep,
    WardenRaise,
)
from grafos_core.teardown import Step
from services.nodeagent.devices.memory import MemoryDevice
from services.nodeagent.gatepage import GatePage, Verdict
from services.nodeagent.ipc import Message
from services.nodeagent.performer import Partners, Performer, Tools
from services.nodeagent.slices import Slices

NOW = Instant(1_000, 2_000)
LEASE = LeaseId("ab" * 16)


class Scribe:
    """Stands at the other end of everything and writes down what arrives, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.halted = False

    # the durable surface
    def append(
        self,
        events: Sequence[tuple[str, str, int, Mapping[str, Any]]],
        *,
        now: Instant,
        time_floor_ms: int,
    ) -> Sequence[Record]:
        if self.halted:
            raise failure.of("STORAGE")
        self.lines.append("write " + " ".join(kind for kind, _, _, _ in events))
        return []

    # front and warden
    def expect(self, message: Mapping[str, Any]) -> None:
        self.lines.append(f"expect {message['op']}")

    def send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> bool:
        self.lines.append(f"send {message['op']}")
        return True

    def ask(
        self,
        message: Mapping[str, Any],
        fds: Sequence[int],
        answered: Callable[[Message | None], None],
    ) -> None:
        self.lines.append(f"ask {message['op']}")

    # the ledger
    def send_receipt(self, receipt: ReceiptFacts) -> None:
        self.lines.append("receipt")

    def report_bound(self, report: tuple[str, int, int, str]) -> None:
        self.lines.append("report")

    def forget_bound(self, lease_id: str) -> None: ...

    # those who asked, and those who count
    def answer(self, number: int, result: Result) -> None:
        self.lines.append(f"answer {number}")

    def closed(self, lease_id: str, kind: Kind, deadline_ns: int) -> None: ...

    def erased(self, lease_id: str) -> None: ...

    def settled(self, receipt: ReceiptFacts) -> None: ...


@pytest.fixture
def scribe() -> Scribe:
    return Scribe()


@pytest.fixture
def gate() -> GatePage:
    return GatePage.create(4)


@pytest.fixture
def performer(scribe: Scribe, gate: GatePage) -> Performer:
    core = NodeCore("n1", "cd" * 16, {Kind.MEM: 1 << 20}, Recovered(), NOW)
    slices = Slices("cd" * 16, MemoryDevice(1 << 20), None)
    tools = Tools(
        core, gate, slices, scribe, scribe, lambda verb: None, lambda: NOW, scribe.answer,
        lambda facts, session: False, scribe,
    )  # fmt: skip
    return Performer(tools, Partners(scribe, scribe, lambda why: None))


class Sick(Slices):
    """A device whose measurements of one kind hang until somebody lets them go."""

    def __init__(self) -> None:
        super().__init__("cd" * 16, MemoryDevice(1 << 20), None)
        self.begun: list[str] = []
        self.hanging = threading.Event()

    def run(self, step: Step, facts: BoundFacts) -> dict[str, int | str | bool]:
        self.begun.append(f"{step} {facts.kind} {facts.lease_id[:2]}")
        if facts.kind is Kind.BLOCK:
            self.hanging.wait(20)
        return {}


def slice_of(name: str, kind: Kind) -> BoundFacts:
    return BoundFacts(LeaseId(name * 16), kind, 1, 1, 4096, 0, "", "", 0, Policy())


def test_a_device_that_hangs_under_a_fence_is_in_nobodys_way(
    scribe: Scribe, gate: GatePage
) -> None:
    """And a fence whose step hangs gets no second one to queue behind it."""
    sick, told = Sick(), threading.Semaphore(0)
    core = NodeCore("n1", "cd" * 16, {Kind.MEM: 1 << 20}, Recovered(), NOW)

    def post(verb: Callable[[Instant], list[Effect]]) -> None:
        verb(NOW)
        told.release()

    tools = Tools(
        core, gate, sick, scribe, scribe, post, lambda: NOW, scribe.answer,
        lambda facts, session: False, scribe,
    )  # fmt: skip
    performer = Performer(tools, Partners(scribe, scribe, lambda why: None))

    def measure(name: str, kind: Kind, attempt: int, *, aside: bool) -> RunStep:
        facts = slice_of(name, kind)
        return RunStep(facts.lease_id, Step.MEASURE, attempt, facts, aside)

    performer.perform([measure("aa", Kind.BLOCK, number, aside=True) for number in range(1, 20)])
    performer.perform([measure("bb", Kind.MEM, 1, aside=True)])
    assert told.acquire(timeout=5), "a fence of another device waits behind the one that hangs"
    performer.perform([measure("cc", Kind.MEM, 1, aside=False)])
    assert told.acquire(timeout=5), "a teardown waits behind a fence"
    assert sick.begun.count("measure block aa") == 1
    sick.hanging.set()
    assert told.acquire(timeout=5)
    performer.perform([measure("aa", Kind.BLOCK, 20, aside=True)])
    assert told.acquire(timeout=5)
    assert sick.begun.count("measure block aa") == 2
    performer.stop()


def persist(*kinds: str) -> Persist:
    return Persist(tuple((kind, LEASE, 1, {}) for kind in kinds), seal_now=True)


def test_an_answer_comes_after_its_record(performer: Performer, scribe: Scribe) -> None:
    performer.perform([persist("agent.bound"), Answer(1, Detached(5)), ReportBound(LEASE, 1, 1)])
    assert scribe.lines == ["write agent.bound", "answer 1", "report"]


def test_the_records_of_several_lists_share_the_write_of_the_first(
    performer: Performer, scribe: Scribe
) -> None:
    effects: list[Effect] = [
        WardenRaise(LEASE, 9_000),
        persist("agent.bound"),
        Answer(1, Detached(5)),
        persist("agent.teardown_begin", "agent.teardown_end"),
        Answer(2, Detached(5)),
    ]
    performer.perform(effects)
    assert scribe.lines == [
        "ask raise",
        "write agent.bound agent.teardown_begin agent.teardown_end",
        "answer 1",
        "answer 2",
    ]


def test_a_gate_closes_without_waiting_for_a_record(
    performer: Performer, scribe: Scribe, gate: GatePage
) -> None:
    performer.perform([OpenGate(LEASE, 2, 1, 9_000)])
    scribe.halted = True
    with pytest.raises(failure.Fenced):
        performer.perform([CloseGate(LEASE, 2), persist("agent.fenced"), Answer(1, Detached(0))])
    assert gate.verdict(2, bytes.fromhex(LEASE), 1, 0) is Verdict.CLOSED
    assert scribe.lines == [], "and nobody was told what is not written"


def test_a_disk_that_fails_ends_the_list(performer: Performer, scribe: Scribe) -> None:
    scribe.halted = True
    with pytest.raises(failure.Fenced):
        performer.perform(
            [Notify(LEASE, "s", "expired", ""), persist("agent.bound"), Answer(1, Detached(0))]
        )
    assert scribe.lines == ["send notice"]


def later(*kinds: str) -> Persist:
    return Persist(tuple((kind, LEASE, 1, {}) for kind in kinds), seal_now=False, may_wait=True)


def test_a_record_that_nothing_rests_on_goes_with_the_next_one_and_before_it(
    performer: Performer, scribe: Scribe
) -> None:
    performer.perform([later("agent.credited"), Answer(1, Detached(5))])
    assert scribe.lines == ["answer 1"], "the answer does not wait for it"
    performer.perform([persist("agent.bound"), Answer(2, Detached(5))])
    assert scribe.lines[1:] == ["write agent.credited agent.bound", "answer 2"]
    assert performer.flush(NOW.boot_ms + 10_000) is None
    performer.flush_all()
    assert len(scribe.lines) == 3, "and it is written once"


def test_a_record_that_may_wait_waits_a_tenth_of_a_second_at_most(
    performer: Performer, scribe: Scribe
) -> None:
    performer.perform([later("agent.credited")])
    assert performer.flush(NOW.boot_ms + 60) == 40
    performer.perform([later("agent.credited")])
    assert scribe.lines == []
    assert performer.flush(NOW.boot_ms + 100) is None
    assert scribe.lines == ["write agent.credited agent.credited"]


def test_what_waits_when_the_agent_stops_is_written_then(
    performer: Performer, scribe: Scribe
) -> None:
    performer.perform([later("agent.credited")])
    performer.flush_all()
    assert scribe.lines == ["write agent.credited"]


def test_a_fresh_front_is_told_of_ends_in_messages_that_fit_the_link(performer: Performer) -> None:
    from grafos_core import codec
    from services.nodeagent.ipc import MESSAGE_BYTES_MAX

    for number in range(200):
        facts = BoundFacts(
            LeaseId(f"{number:032x}"), Kind.MEM, 1, 1, 4096, 0, "h", "k" * 43, 0, Policy()
        )
        performer.remember_end(facts, failure.of("REVOKED", "x" * 200, cause="preempted"))
    messages = list(performer.ended_messages())
    assert sum(len(message["leases"]) for message in messages) == 200
    assert max(len(codec.encode(message)) for message in messages) < MESSAGE_BYTES_MAX
