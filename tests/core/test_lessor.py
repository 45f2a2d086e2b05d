"""The lessor against its written-down conversations, and against random ones under its laws."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from grafos_core import commands as c
from grafos_core.failure import InvariantViolation
from grafos_core.lease import (
    HELD,
    REVOKE_STAGES,
    TRANSITIONS,
    EndCause,
    Kind,
    Lease,
    LeaseId,
    LeaseState,
    NodeId,
    RevokeStage,
    TenantId,
)
from grafos_core.lessor import Lessor
from grafos_core.quota import Limit
from tests.core import lessor_script
from tests.golden import run_golden, scripts

HERE = Path(__file__).parent
A_LEASE = Lease(
    LeaseId("ab" * 16), "r", TenantId("t"), "h", "k", Kind.MEM, NodeId("n1"), "cd" * 16, 4096, 0,
    1, 1, 60_000, 0, 60_000, None, 30_000,
)  # fmt: skip


@pytest.mark.parametrize("path", scripts(HERE, "lessor"), ids=lambda path: path.stem)
def test_the_lessor_answers_as_written_down(path: Path) -> None:
    run_golden(path, lessor_script.interpreter())


@pytest.mark.parametrize("path", scripts(HERE, "placement"), ids=lambda path: path.stem)
def test_placement_answers_as_written_down(path: Path) -> None:
    run_golden(path, lessor_script.interpreter())


def ends_of_all_kinds() -> lessor_script.Script:
    """Leases in every state that is charged: pending, active, ending, fenced, with a clear ordered
    and without."""
    script = lessor_script.Script()
    script.answer(
        """at 1000
register n1 block=64 live=- policy=on
grant a block 4 n1
grant b block 4 n1
grant c block 4 n1
grant d block 4 n1
grant e block 4 n1
bound b
bound c
bound d
bound e
end c release
credit d fenced
credit e fenced
clear e reason=looked residue=accept"""
    )
    return script


@pytest.mark.parametrize(
    "words",
    [
        "bound a", "end a release", "end b release", "end b revoked grace=500", "end b revoked",
        "burn a", "burn c", "clear d reason=looked", "clear e reason=again residue=accept",
        "renew b", "attach b", "mode n1 draining", "register n1 block=64 live=- policy=on boot=2",
        "register n1 block=64 live=-", "forget n1", "quota t block amount=1", "publish k",
        "credit a fenced", "credit b fenced", "credit c fenced", "credit d fenced",
        "credit d torndown", "credit d nothing_created", "credit d cleared by=operator",
        "credit d cleared by=residue", "credit b nothing_created", "credit b cleared by=operator",
        "credit b cleared by=policy", "credit c cleared by=residue", "credit b torndown epoch=9",
        "credit b torndown signer=n2", "credit b torndown node=n2", "at 9000000\ntick",
        "at 9000000\ntick\nregister n1 block=64 live=- boot=2\ntick",
    ],
)  # fmt: skip
def test_nothing_but_the_receipt_of_its_end_frees_capacity(words: str) -> None:
    script = ends_of_all_kinds()
    before = script.lessor.node_view(NodeId("n1"), script.now_ms).books[Kind.BLOCK]
    script.answer(words)
    if "n1" in script.lessor.state.nodes:
        book = script.lessor.state.nodes[NodeId("n1")].books[Kind.BLOCK]
        assert book.view(available=True).free <= before.free


@pytest.mark.parametrize(
    "words",
    [
        "credit a nothing_created", "credit b torndown", "credit c torndown",
        "credit d cleared by=policy", "credit e cleared by=operator", "credit e cleared by=residue",
    ],
)  # fmt: skip
def test_the_receipt_of_its_end_frees_exactly_that_slice(words: str) -> None:
    script = ends_of_all_kinds()
    before = script.lessor.node_view(NodeId("n1"), script.now_ms).books[Kind.BLOCK]
    script.answer(words)
    after = script.lessor.node_view(NodeId("n1"), script.now_ms).books[Kind.BLOCK]
    assert after.free == before.free + 4


def test_no_lease_leaves_released() -> None:
    assert not TRANSITIONS[LeaseState.RELEASED]
    assert {LeaseState.RELEASED} | HELD == set(LeaseState)


def test_every_revocation_ends_torn_down_at_last() -> None:
    assert {stage for stage in RevokeStage if not REVOKE_STAGES[stage]} == {RevokeStage.TORNDOWN}


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"cause": EndCause.RELEASE}, "forced_teardown torndown"),
        ({"cause": EndCause.EXPIRED}, "expired failed_closed torndown"),
        ({"cause": EndCause.REVOKED}, "forced_teardown failed_closed fenced torndown"),
        ({"cause": EndCause.REVOKED, "grace_ms": 500}, "revoke_warning fenced torndown"),
        ({"cause": EndCause.REVOKED, "grace_ms": 500}, "revoke_warning failed_closed torndown"),
        ({"cause": EndCause.BURNT}, "forced_teardown failed_closed torndown"),
    ],
)
def test_the_stage_that_is_shown_follows_the_end_of_the_lease(
    changes: dict[str, Any], stages: str
) -> None:
    lease = replace(A_LEASE, state=LeaseState.ACTIVE)
    assert lease.staged().stage is RevokeStage.ACTIVE
    lease = lease.moved(LeaseState.ENDING, **changes)
    seen = [lease.stage]
    for stage in stages.split()[1:]:
        if stage == "failed_closed":
            lease = replace(lease, unconfirmed=True).at_stage(RevokeStage.FAILED_CLOSED)
        else:
            state = LeaseState.FENCED if stage == "fenced" else LeaseState.RELEASED
            lease = lease.moved(state, unconfirmed=False)
        seen.append(lease.stage)
    assert [each.value for each in seen] == stages.split()


def test_a_stage_never_goes_back() -> None:
    ended = replace(A_LEASE, state=LeaseState.ENDING, stage=RevokeStage.FAILED_CLOSED)
    with pytest.raises(InvariantViolation):
        ended.at_stage(RevokeStage.GRACE_RUNNING)


def test_time_that_goes_back_halts_the_ledger() -> None:
    lessor = Lessor()
    lessor.handle(lessor_script.register("n1", {"mem": 4096}), 1000)
    with pytest.raises(InvariantViolation):
        lessor.tick(999)


NODES = [NodeId("n1"), NodeId("n2")]
TENANTS = [TenantId("t"), TenantId("u")]
KINDS = [Kind.MEM, Kind.BLOCK]


class LessorMachine(RuleBasedStateMachine):
    """Any order of requests, receipts and time; every law after each step; replay at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.lessor, self.now_ms, self.count = Lessor(), 1000, 0
        self.events: list[c.Event] = []
        self.epochs: dict[tuple[NodeId, Kind], int] = {}
        self.ids: list[LeaseId] = []
        for node in NODES:
            self.hear(node)
        for tenant in TENANTS:
            self.do(c.SetQuota(tenant, Kind.MEM, Limit(5 * 4096, 4)))

    def do(self, command: c.Command) -> c.Step:
        step = self.lessor.handle(command, self.now_ms)
        self.events += step.events
        return step

    def lease(self, data: st.DataObject) -> Lease:
        return self.lessor.lease(data.draw(st.sampled_from(self.ids)))

    @rule(node=st.sampled_from(NODES))
    def hear(self, node: NodeId) -> None:
        held = self.lessor.state.nodes[node].held if node in self.lessor.state.nodes else set()
        ask = lessor_script.register(node, {"mem": 8 * 4096, "block": 8})
        live = tuple(c.LiveLease(i, 1, 1) for i in sorted(held))
        self.do(dataclasses.replace(ask, live=live))

    @rule(
        node=st.sampled_from(NODES), kind=st.sampled_from(KINDS), size=st.integers(1, 4),
        tenant=st.sampled_from(TENANTS), ttl_ms=st.sampled_from([1000, 5000, 60_000]),
    )  # fmt: skip
    def grant(self, node: NodeId, kind: Kind, size: int, tenant: TenantId, ttl_ms: int) -> None:
        self.count += 1
        identity = LeaseId(f"{self.count:032x}")
        amount = size if kind is Kind.BLOCK else size * 4096
        step = self.do(
            c.Grant(
                f"r{self.count}", identity, tenant, f"spiffe://f/tenant/{tenant}/holder/h", "K",
                kind, node, lessor_script.incarnation(1), amount, ttl_ms, None, 1000,
            )
        )  # fmt: skip
        if step.lease:
            assert step.lease.epoch > self.epochs.get((node, kind), 0), "law 7: epochs rise"
            self.epochs[node, kind] = step.lease.epoch
            self.ids.append(identity)

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def bind(self, data: st.DataObject) -> None:
        lease = self.lease(data)
        self.do(c.ReportBound(lease.node_id, lease.incarnation, lease.lease_id, lease.epoch, 1))

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), ttl_ms=st.sampled_from([1000, 30_000]))
    def renew(self, data: st.DataObject, ttl_ms: int) -> None:
        lease = self.lease(data)
        self.count += 1
        step = self.do(
            c.Renew(f"r{self.count}", lease.lease_id, ttl_ms, lease.tenant, lease.holder)
        )
        if step.lease:
            assert step.lease.end_ms >= lease.end_ms, "a renewal never shortens"

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), cause=st.sampled_from([EndCause.RELEASE, EndCause.REVOKED]))
    def end(self, data: st.DataObject, cause: EndCause) -> None:
        self.do(c.End("e", self.lease(data).lease_id, cause, by="x"))

    @precondition(lambda self: self.ids)
    @rule(
        data=st.data(),
        outcome=st.sampled_from(["torndown", "fenced", "nothing_created", "cleared"]),
    )
    def credit(self, data: st.DataObject, outcome: str) -> None:
        lease = self.lease(data)
        free = self._free(lease)
        step = self.do(c.Credit(lessor_script.receipt(lease, outcome, {}), lease.node_id))
        if self._free(lease) > free:
            assert any(event.kind == "lease.released" for event in step.events), "law 3"

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        self.do(c.ClearFence("r", self.lease(data).lease_id, "why", False, "op", "0f" * 16))

    @rule(passed_ms=st.sampled_from([1, 400, 2000, 40_000]))
    def pass_time(self, passed_ms: int) -> None:
        self.now_ms += passed_ms
        before = {x: self._free_of(x) for x in NODES}
        self.events += self.lessor.tick(self.now_ms).events
        assert before == {x: self._free_of(x) for x in NODES}, "law 3: time frees nothing"

    def _free_of(self, node: NodeId) -> list[int]:
        books = self.lessor.state.nodes[node].books
        return [books[kind].view(available=True).free for kind in KINDS]

    def _free(self, lease: Lease) -> int:
        return self.lessor.state.nodes[lease.node_id].books[lease.kind].view(available=True).free

    @invariant()
    def laws_hold(self) -> None:
        self.lessor.check()

    def teardown(self) -> None:
        again = Lessor()
        for event in self.events:
            again.replay(event)
        again.check()
        mine, theirs = self.lessor.state, again.state
        assert mine.leases == theirs.leases
        assert mine.released == theirs.released
        assert list(mine.quotas.entries()) == list(theirs.quotas.entries())
        assert [n.epochs for n in mine.nodes.values()] == [n.epochs for n in theirs.nodes.values()]


LessorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_any_order_of_requests_keeps_the_laws = LessorMachine.TestCase
