"""The lease timing rules as properties: whose clock counts, and who stops before whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core import commands as c
from grafos_core import token as tokens
from grafos_core.failure import FabricError
from grafos_core.holder import HolderLease
from grafos_core.lease import (
    CLOCK_ERROR_MS,
    LIFETIME_MS_MAX,
    RATE_ERROR,
    TTL_MS_MAX,
    TTL_MS_MIN,
    EndCause,
    Kind,
    Lease,
    LeaseState,
    NodeId,
    Policy,
    Priority,
    TenantId,
)
from grafos_core.lessor import Lessor
from grafos_core.node_effects import Answer, Bound, Extended, Instant, WardenRaise
from grafos_proto.v1 import node_pb2
from tests.core import lessor_script
from tests.core.node_script import WALL_MS, Script, lease_id, token

HOUR_MS = 3_600_000
JUMPS = st.sampled_from([0, 0, -HOUR_MS, HOUR_MS, -400, 400, -2_000, 2_000])
TTLS = st.integers(TTL_MS_MIN, 120_000)


def bound(script: Script, **options: str) -> int:
    """Lease a, bound; what its holder is told."""
    effects = script.core.bind(1, token("a", options, script.now), "K", "s", script.now)
    if not isinstance(effects[-1], Answer):
        script.core.device_created(lease_id("a"), script.now)
        effects = script.core.warden_held(lease_id("a"), script.now)
    answer = next(each.result for each in effects if isinstance(each, Answer))
    assert isinstance(answer, Bound)
    return answer.remaining_ms


@given(TTLS, st.lists(st.tuples(st.integers(0, 20_000), JUMPS, st.none() | TTLS), max_size=12))
def test_no_jump_of_the_wall_shortens_what_was_told_or_lengthens_what_was_granted(
    ttl_ms: int, steps: list[tuple[int, int, int | None]]
) -> None:
    """Boottime is right here and the ledger's wall too; the node's wall is wherever it jumped."""
    script = Script()
    script("node")
    told_until_ms = bound(script, ttl=str(ttl_ms))
    deadline_ms, generation, boot_ms, error_ms = told_until_ms, 1, 0, 0
    for passed_ms, jump_ms, renew_ms in steps:
        boot_ms += passed_ms
        error_ms += jump_ms
        right_ms = WALL_MS + boot_ms
        script.now = Instant(boot_ms, right_ms + error_ms)
        script.core.tick(script.now)
        script.core.check()
        verdict = script.core.verdict(lease_id("a"), 1, script.now)
        assert (verdict is None) == (boot_ms < deadline_ms), "its own hour, whatever the wall says"
        if verdict is not None:
            assert verdict.code == "LEASE_EXPIRED"
            return
        if renew_ms is None:
            continue
        generation += 1
        later = replace(
            token("a", {"ttl": str(renew_ms)}, Instant(boot_ms, right_ms)), generation=generation
        )
        answer = extended(script, later)
        if answer is None:
            continue
        deadline_ms = boot_ms + answer
        assert deadline_ms >= told_until_ms, "what a holder was told stands"
        behind_ms = max(0, -error_ms)
        assert deadline_ms <= max(told_until_ms, boot_ms + renew_ms), "no clock gives more than ttl"
        assert deadline_ms <= max(told_until_ms, later.lease_end_ms - WALL_MS + behind_ms)
        told_until_ms = deadline_ms


def extended(script: Script, later: tokens.LeaseToken) -> int | None:
    """What the holder is told, if the token is accepted; never before the warden has said so."""
    try:
        tokens.judge(
            later, issuer=later.issuer, audience=later.audience, holder_thumbprint="K",
            now_ms=script.now.wall_ms,
        )  # fmt: skip
    except FabricError as refused:
        assert refused.code in ("TOKEN_IMMATURE", "TOKEN_EXPIRED")
        return None
    effects = script.core.extend(2, later, "K", script.now)
    assert [type(each) for each in effects] == [WardenRaise]
    raised = effects[0]
    assert isinstance(raised, WardenRaise)
    before_ms = script.core.leases(script.now)[0].remaining_ms
    effects = script.core.warden_raised(lease_id("a"), raised.deadline_ms, script.now)
    answer = effects[-1]
    assert isinstance(answer, Answer)
    assert isinstance(answer.result, Extended)
    assert answer.result.remaining_ms >= before_ms
    return answer.result.remaining_ms


@given(
    ttl_ms=st.integers(TTL_MS_MIN, TTL_MS_MAX),
    way_ms=st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(0, 900)),
    walls_ms=st.tuples(st.integers(-250, 250), st.integers(-250, 250)),
    rates=st.tuples(st.sampled_from([-1, 0, 1]), st.sampled_from([-1, 0, 1])),
)
def test_in_true_time_the_holder_stops_then_the_node_then_the_ledger_counts_it_over(
    ttl_ms: int, way_ms: tuple[int, int, int], walls_ms: tuple[int, int],
    rates: tuple[int, int],
) -> None:  # fmt: skip
    """Clocks differ by at most eps, and run apart by at most rho: each half of it too fast or too
    slow."""
    ledger_error_ms, node_error_ms = walls_ms
    holder, node = (1 + rate / (2 * RATE_ERROR + 1) for rate in rates)
    minted_ms, asked_ms = 0, way_ms[0]
    bound_ms = asked_ms + way_ms[1]
    answered_ms = bound_ms + way_ms[2]
    script = Script()
    script("node")
    end_ms = WALL_MS + minted_ms + ledger_error_ms + ttl_ms
    script.now = Instant(int(bound_ms * node), WALL_MS + bound_ms + node_error_ms)
    made = {"ttl": str(ttl_ms), "end": str(end_ms), "iat": str(WALL_MS + ledger_error_ms)}
    if end_ms <= script.now.wall_ms:
        return  # it came too late
    remaining_ms = bound(script, **made)
    node_deadline_ms = (script.now.boot_ms + remaining_ms) / node
    belief = HolderLease(
        "a", remaining_ms=remaining_ms, sent_ms=int(asked_ms * holder),
        now_ms=int(answered_ms * holder),
    )  # fmt: skip
    assert belief.usable_until_ms / holder <= max(asked_ms, node_deadline_ms)
    late_ms = ttl_ms / RATE_ERROR + CLOCK_ERROR_MS
    assert node_deadline_ms + WALL_MS <= end_ms - ledger_error_ms + late_ms + 1
    lease = a_lease(ttl_ms, end_ms).moved(LeaseState.ENDING, cause=EndCause.EXPIRED)
    counted_over_ms = replace(lease, ended_at_ms=end_ms).receipt_due_ms - ledger_error_ms
    assert node_deadline_ms + WALL_MS <= counted_over_ms


def a_lease(ttl_ms: int, end_ms: int) -> Lease:
    return Lease(
        lease_id("a"), "r", TenantId("t"), "h", "k", Kind.MEM, NodeId("n1"), "cd" * 16, 4096, 0,
        1, 1, ttl_ms, end_ms - ttl_ms, end_ms, None, end_ms, state=LeaseState.ACTIVE,
    )  # fmt: skip


@given(
    st.integers(1_000, 60_000),
    st.lists(
        st.tuples(st.sampled_from(["asked", "failed", "answered"]), st.integers(0, 9_000), TTLS)
    ),
)
def test_only_the_nodes_answer_moves_the_holders_stop_and_never_to_an_earlier_instant(
    remaining_ms: int, steps: list[tuple[str, int, int]]
) -> None:
    """Between asking and the node's answer lies the ledger's, which moves nothing."""
    belief = HolderLease("a", remaining_ms=remaining_ms, sent_ms=0)
    now_ms, asked_ms = 0, None
    for what, passed_ms, answer_ms in steps:
        now_ms += passed_ms
        before_ms, was_usable = belief.usable_until_ms, belief.usable(now_ms)
        if what == "asked" and asked_ms is None:
            belief.renewal_sent(now_ms)
            asked_ms = now_ms
        elif what == "failed" and asked_ms is not None:
            belief.renewal_failed(now_ms)
            asked_ms = None
        elif what == "answered" and asked_ms is not None:
            belief.renewed(answer_ms, now_ms)
            assert before_ms <= belief.usable_until_ms <= max(before_ms, asked_ms + answer_ms)
            assert was_usable or belief.usable_until_ms == before_ms, "what is over stays over"
            asked_ms = None
            continue
        belief.tick(now_ms)
        assert belief.usable_until_ms == before_ms


@given(
    priority=st.sampled_from(Priority),
    lifetime_ms=st.none() | st.integers(TTL_MS_MIN, 200_000_000),
    steps=st.lists(st.tuples(st.integers(1, 80_000_000), st.integers(TTL_MS_MIN, TTL_MS_MAX))),
)
def test_no_renewal_passes_the_end_of_a_lifetime_nor_shortens(
    priority: Priority, lifetime_ms: int | None, steps: list[tuple[int, int]]
) -> None:
    lessor, now_ms = Lessor(), 1_000
    lessor.handle(lessor_script.register("n1", {"mem": 65_536, "live": "-"}), now_ms)
    granted = lessor.handle(
        c.Grant("r", lease_id("a"), TenantId("t"), "h", "k", Kind.MEM, NodeId("n1"),
                lessor_script.incarnation(1), 4096, TTL_MS_MAX, lifetime_ms, 30_000,
                Policy(priority=priority)), now_ms,
    )  # fmt: skip
    assert granted.lease is not None
    bounds = [each for each in (LIFETIME_MS_MAX[priority], lifetime_ms) if each is not None]
    until_ms = now_ms + min(bounds) if bounds else None
    assert granted.lease.lifetime_end_ms == until_ms
    end_ms = granted.lease.end_ms
    for number, (passed_ms, ttl_ms) in enumerate(steps):
        now_ms += passed_ms
        step = lessor.handle(
            c.Renew(f"q{number}", lease_id("a"), ttl_ms, TenantId("t"), "h"), now_ms
        )
        lessor.check()
        if step.failure is not None or step.lease is None:
            code = step.failure.code if step.failure else ""
            assert code == "LEASE_EXPIRED" if now_ms >= end_ms else code == "LIFETIME"
            assert now_ms >= end_ms or end_ms == until_ms
            return
        assert step.lease.end_ms >= end_ms
        assert until_ms is None or step.lease.end_ms <= until_ms
        end_ms = step.lease.end_ms


@given(ttl_ms=st.integers(TTL_MS_MIN, TTL_MS_MAX), later_ms=TTLS, part=st.floats(0, 0.99))
def test_access_counts_as_over_only_when_the_slowest_node_has_ended_it(
    ttl_ms: int, later_ms: int, part: float
) -> None:
    """Also where a renewal asked for less than was left, and never reached the node."""
    lessor, now_ms = Lessor(), 1_000
    lessor.handle(lessor_script.register("n1", {"mem": 65_536, "live": "-"}), now_ms)
    lessor.handle(
        c.Grant("r", lease_id("a"), TenantId("t"), "h", "k", Kind.MEM, NodeId("n1"),
                lessor_script.incarnation(1), 4096, ttl_ms, None, 30_000, Policy()), now_ms,
    )  # fmt: skip
    lessor.handle(
        c.ReportBound(NodeId("n1"), lessor_script.incarnation(1), lease_id("a"), 1, 1), now_ms
    )
    node_ends_ms = now_ms + ttl_ms + ttl_ms // RATE_ERROR + CLOCK_ERROR_MS
    now_ms += int(ttl_ms * part)
    lessor.handle(c.Renew("q", lease_id("a"), later_ms, TenantId("t"), "h"), now_ms)
    step = lessor.handle(c.End("e", lease_id("a"), EndCause.REVOKED, "operator", "why", 0), now_ms)
    assert step.lease is not None
    assert step.lease.closed_by_ms >= node_ends_ms


def test_instants_never_cross_machines_in_what_a_holder_is_told() -> None:
    """Durations alone: a field that is an instant would be read on another clock."""
    answers: list[Any] = [
        node_pb2.BindResponse, node_pb2.ExtendResponse, node_pb2.DetachResponse,
        node_pb2.ReadResponse, node_pb2.WriteResponse, node_pb2.Notice,
    ]  # fmt: skip
    for answer in answers:
        times = {name for name in answer.DESCRIPTOR.fields_by_name if name.endswith(("_ms", "_ns"))}
        assert times <= {"remaining_ms", "grace_ms"}


@pytest.mark.parametrize("ttl_ms", [TTL_MS_MIN - 1, TTL_MS_MAX + 1])
def test_a_ttl_beyond_its_bounds_is_refused(ttl_ms: int) -> None:
    script = lessor_script.Script()
    script.answer("register n1 mem=65536 live=-")
    assert "RANGE" in script.answer(f"grant a mem 4096 n1 ttl={ttl_ms}")
