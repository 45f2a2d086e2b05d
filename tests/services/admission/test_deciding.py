"""Where a request goes, what it waits for, and what it is told when it goes nowhere."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest

from grafos_core.failure import FabricError
from grafos_core.lease import Kind
from grafos_proto.v1 import admission_pb2, ledger_pb2
from tests.services.admission.world import (
    PAGE,
    Client,
    Fabric,
    PaperNode,
    ask,
    at_once,
    codes,
    eventually,
    metric,
    of_lease,
)

WAIT_S = 3.0
COMMITS = 'grafos_call_seconds_count{method="/grafos.v1.LedgerService/Commit"}'


class Later(threading.Thread):
    """An acquire that waits, in a thread of its own."""

    def __init__(self, client: Client, **fields: Any) -> None:
        super().__init__(daemon=True)
        self._client, self._fields = client, fields
        self._began_s = time.monotonic()
        self._got: Any = None
        self.took_s = 0.0
        self.start()

    def run(self) -> None:
        try:
            self._got = self._client.acquire(**self._fields).lease
        except FabricError as error:
            self._got = error
        self.took_s = time.monotonic() - self._began_s

    def result(self) -> Any:
        self.join(20)
        return self._got


def failed_term(client: Client, name: str, **fields: Any) -> Any:
    """The term at which this node fell out, and its report."""
    answer = client.explain(where={"node": name}, **fields)
    (report,) = [each for each in answer.nodes if each.node_id == name]
    return next((term.name for term in report.terms if not term.holds), ""), report, answer


# evidence


@pytest.mark.parametrize("why", ["gates", "boot", "silence"])
def test_without_fresh_evidence_a_request_waits_and_is_then_refused(
    why: str, shared: Fabric
) -> None:
    """G6."""
    node, web = shared.node(f"late-{why}"), shared.holder()
    where = {"node": node.name}
    node.stop()
    if why == "gates":
        node.closed_gates = {"surface": "full"}
        node.begin()
        eventually(lambda: failed_term(web, node.name)[0] == "readiness")
    elif why == "boot":
        node.boot_epoch, node.live = 2, None
        node.begin()
        eventually(lambda: failed_term(web, node.name)[0] == "live")
    else:
        eventually(lambda: failed_term(web, node.name)[0] in ("evidence", "registration"))
    waiting = Later(web, where=where)
    assert waiting.result().code == "NODE_NOT_READY"
    assert WAIT_S - 0.1 <= waiting.took_s < WAIT_S + 1.5
    assert web.denied(where=where, wait_ms=0, has_wait=True).code == "NODE_NOT_READY"
    node.stop()


@pytest.mark.parametrize("why", ["gates", "boot", "silence"])
def test_a_node_that_becomes_ready_meanwhile_is_granted(why: str, shared: Fabric) -> None:
    """G6."""
    node, web = shared.node(f"soon-{why}"), shared.holder()
    node.stop()
    if why == "gates":
        node.closed_gates = {"surface": "full"}
        node.register()
    elif why == "boot":
        node.boot_epoch, node.live = 2, None
        node.register()
    eventually(lambda: failed_term(web, node.name)[0])
    waiting = Later(web, where={"node": node.name}, wait_ms=8_000, has_wait=True)
    node.closed_gates, node.live = {}, []
    node.begin()
    assert waiting.result().node_id == node.name
    node.stop()


def test_evidence_is_too_old_after_three_seconds_and_good_before(shared: Fabric) -> None:
    """G6: 3.001 s is too old, by the ledger's own clock as by admission's."""
    node, web = shared.node("ageing"), shared.holder()
    node.stop()
    node.register()
    heard_s = time.monotonic()
    web.acquire(where={"node": "ageing"}, wait_ms=0, has_wait=True)
    threading.Event().wait(max(0.0, heard_s + 3.1 - time.monotonic()))
    assert web.denied(where={"node": "ageing"}, wait_ms=0, has_wait=True).code == "NODE_NOT_READY"


def test_the_callers_deadline_ends_the_wait_and_it_hears_why(shared: Fabric) -> None:
    node, web = shared.node("never", closed_gates={"key": "lost"}, begin=False), shared.holder()
    node.begin()
    eventually(lambda: any(n.node_id == "never" for n in web.explain().nodes))
    began_s = time.monotonic()
    refusal = web.denied(where={"node": "never"}, timeout_s=1.0)
    assert (refusal.code, time.monotonic() - began_s < 1.0) == ("NODE_NOT_READY", True)
    node.stop()


# capacity and quota


def test_a_request_waits_for_capacity_only_where_it_says_so(shared: Fabric) -> None:
    node, web = shared.node("one-page", offers={Kind.MEM: PAGE}), shared.holder(tenant="waiters")
    where = {"node": "one-page"}
    first = web.acquire(where=where).lease
    began_s = time.monotonic()
    refusal = web.denied(where=where)
    assert (refusal.code, refusal.retry_after_ms) == ("NO_CAPACITY", 1000)
    assert time.monotonic() - began_s < 1
    waiting = Later(web, where=where, wait_ms=8_000, has_wait=True)
    node.settle(web.release(first))
    assert waiting.result().node_id == "one-page"
    node.stop()


def test_a_request_waits_for_quota_where_it_says_so(shared: Fabric) -> None:
    web = shared.holder(tenant="frugal")
    shared.set_quota("frugal", count=1)
    first = web.acquire().lease
    assert web.denied().code == "QUOTA"
    waiting = Later(web, wait_ms=8_000, has_wait=True)
    waiting.join(0.5)
    assert waiting.is_alive()
    web.release(first)
    assert waiting.result().tenant == "frugal"


@pytest.mark.parametrize("what", ["quota", "capacity"])
def test_two_admissions_never_give_away_the_last_of_something_twice(
    what: str, fabric: Fabric
) -> None:
    """G5, S16."""
    fabric.node("n1", offers={Kind.MEM: 10 * PAGE if what == "capacity" else 1 << 30})
    if what == "quota":
        fabric.set_quota("acme", amount=10 * PAGE)
    second = fabric.start_admission("second")
    clients = [fabric.holder(f"h{n}", admission=(None, second)[n % 2]) for n in range(6)]
    eventually(lambda: clients[1].explain().admissible)

    def spend(client: Client) -> list[Any]:
        outcomes: list[Any] = []
        for _ in range(5):
            try:
                outcomes.append(client.acquire().lease.lease_id)
            except FabricError as error:
                outcomes.append(error)
        return outcomes

    outcomes = [x for each in at_once(*(lambda c=c: spend(c) for c in clients)) for x in each]
    refused = "QUOTA" if what == "quota" else "NO_CAPACITY"
    assert codes(outcomes) == [""] * 10 + [refused] * 20
    assert len({x for x in outcomes if isinstance(x, str)}) == 10
    (node,) = fabric.of_ledger()("Snapshot", ledger_pb2.SnapshotRequest()).nodes
    assert next(book for book in node.books if book.kind == 1).leased == 10 * PAGE


def test_what_acquires_take_and_which_renewals_fail_is_counted(
    fabric: Fabric, node: PaperNode
) -> None:
    holder = fabric.holder()
    lease = holder.acquire().lease
    assert holder.denied(amount=2**40).code == "CAPACITY"
    node.bound(lease)
    holder.renew(lease)
    assert metric(fabric.admission, 'grafos_lease_acquire_seconds_count{kind="mem"}') == 2
    assert 0 < metric(fabric.admission, 'grafos_lease_acquire_seconds_sum{kind="mem"}') < 10
    failed = 'grafos_lease_renew_failures_total{reason="%s"}'
    assert metric(fabric.admission, failed % "DENIED") == 0
    request = of_lease(admission_pb2.RenewRequest, lease)
    assert fabric.holder("other").refused("Renew", request).code == "DENIED"
    assert metric(fabric.admission, failed % "DENIED") == 1


# many at a time


def test_many_requests_at_a_time_are_few_messages_and_each_has_its_own_answer(
    fabric: Fabric,
) -> None:
    """One of them is refused by the ledger; the others do not notice."""
    fabric.node("n1")
    clients = [fabric.holder(f"h{n}") for n in range(8)]
    asks = [ask(amount=PAGE * (n + 1)) for n in range(64)]
    asks[40].lifetime_ms = 1
    for client in clients:
        client.leases()
    before = metric(fabric.ledger, COMMITS)
    fabric.ledger.process.send_signal(signal.SIGSTOP)  # so that all of them gather
    go_on = threading.Timer(1.0, lambda: fabric.ledger.process.send_signal(signal.SIGCONT))
    go_on.start()
    answers = at_once(*(lambda n=n: clients[n % 8]("Acquire", asks[n]) for n in range(64)))
    go_on.join()
    assert codes(answers) == [""] * 63 + ["RANGE"]
    assert answers[40].code == "RANGE"
    for number, answer in enumerate(answers):
        if number != 40:
            assert answer.lease.request_id == asks[number].request_id
            assert answer.lease.amount == PAGE * (number + 1)
            assert answer.lease.holder == clients[number % 8].path
    assert metric(fabric.ledger, COMMITS) - before <= 8


# explaining


def test_an_explanation_names_for_each_node_the_term_that_failed(shared: Fabric) -> None:
    web = shared.holder(tenant="asking")
    node = shared.node("small", offers={Kind.MEM: 4 * PAGE}, labels={"zone": "a"})
    where = {"node": "small"}
    lease = web.acquire(where=where, amount=3 * PAGE).lease
    eventually(lambda: failed_term(web, "small", amount=2 * PAGE)[0] == "capacity")
    assert web.explain(where=where).node_id == "small"
    assert failed_term(web, "small", amount=5 * PAGE)[0] == "total"
    assert failed_term(web, "small", kind=3)[0] == "kind"
    zone = web.explain(where={"zone": "b"})
    found = {each.node_id: each.terms[0] for each in zone.nodes}
    assert zone.code == "NO_MATCH"
    assert (found["small"].name, found["small"].detail) == ("label:zone", "b asked, a found")
    _, report, answer = failed_term(web, "small", amount=2 * PAGE)
    assert [term.holds for term in report.terms] == [True] * (len(report.terms) - 1) + [False]
    assert report.terms[-1].detail == f"{2 * PAGE} asked, {PAGE} free"
    assert list(report.held_by) == [lease.lease_id]
    assert (answer.code, answer.admissible) == ("NO_CAPACITY", False)
    node.stop()


def test_an_explanation_bounds_the_wait_and_does_not_name_the_leases_of_others(
    shared: Fabric,
) -> None:
    node = shared.node("shared-page", offers={Kind.MEM: 2 * PAGE})
    where = {"node": "shared-page"}
    web, rival = shared.holder(tenant="asking"), shared.holder(tenant="rival")
    mine = web.acquire(where=where, lifetime_ms=60_000).lease
    theirs = rival.acquire(where=where, lifetime_ms=90_000).lease
    eventually(lambda: failed_term(web, "shared-page")[0] == "capacity")
    _, report, answer = failed_term(web, "shared-page")
    assert (answer.earliest_ms, answer.no_bound) == (mine.lifetime_end_ms, False)
    assert list(report.held_by) == [mine.lease_id]
    _, report, answer = failed_term(web, "shared-page", amount=2 * PAGE)
    assert answer.earliest_ms == report.free_by_ms == theirs.lifetime_end_ms
    assert list(report.held_by) == [mine.lease_id, "another holder's"]
    assert theirs.lease_id.encode() not in answer.SerializeToString()
    operator = shared.client("operator/alice")
    assert list(failed_term(operator, "shared-page", amount=2 * PAGE)[1].held_by) == [
        mine.lease_id, theirs.lease_id
    ]  # fmt: skip
    node.stop()


def test_without_a_lifetime_there_is_no_bound_and_it_says_so(shared: Fabric) -> None:
    node, web = shared.node("forever", offers={Kind.MEM: PAGE}), shared.holder(tenant="asking")
    request = ask(where={"node": "forever"})
    request.policy.priority = "guaranteed"
    web("Acquire", request)
    eventually(lambda: failed_term(web, "forever")[0] == "capacity")
    _, report, answer = failed_term(web, "forever")
    assert (answer.no_bound, answer.earliest_ms, report.free_by_ms) == (True, 0, 0)
    node.stop()


def test_a_node_that_was_given_up_is_explained_no_longer(shared: Fabric) -> None:
    node, operator = shared.node("given-up"), shared.client("operator/alice")
    node.stop()

    assert "given-up" in {each.node_id for each in operator.explain().nodes}
    forget = ledger_pb2.ForgetNode(node_id="given-up", reason="burnt down")
    caller = shared.of_ledger("operator/alice")

    def forgotten() -> bool:
        """Not before its registration has run out."""
        (outcome,) = caller.commit(ledger_pb2.Command(forget_node=forget))
        return not isinstance(outcome, FabricError)

    eventually(forgotten)
    eventually(lambda: "given-up" not in {each.node_id for each in operator.explain().nodes})


# refusals


def test_refusals_are_on_the_record(shared: Fabric) -> None:
    web = shared.holder(tenant="recorded")
    request = ask(request_id="refused-1", where={"node": "nowhere"})
    assert web.refused("Acquire", request).code == "NO_MATCH"
    shared.set_quota("recorded", count=0)
    assert web.refused("Acquire", ask(request_id="refused-2")).code == "QUOTA"

    def recorded() -> bool:
        text = b"\n".join(shared.records("lease.denied"))
        return all(part in text for part in (b"refused-1", b"NO_MATCH", b"refused-2", b"QUOTA"))

    eventually(recorded)
