"""A bundle is granted whole or not at all, and its members are placed so that all of them fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from grafos_core import bundle, packing
from grafos_core import commands as c
from grafos_core.lease import EndCause, Kind, LeaseId, LeaseState, NodeId, TenantId
from grafos_core.lessor import Lessor
from grafos_core.placement import Request
from grafos_core.quota import Limit
from tests.core import lessor_script

HOLDER = "spiffe://f/tenant/t/holder/h"
NOW = 2_000


def lessor(**nodes: str) -> Lessor:
    """With nodes that offer, as `n1="mem=16384 block=8"`."""
    script = lessor_script.Script()
    lines = [f"register {name} {offers} live=-" for name, offers in nodes.items()]
    script.answer("\n".join(["at 1000", *lines]))
    return script.lessor


def grant(
    index: int, kind: Kind, amount: int, node: str = "n1", request_id: str = "b", **changes: str
) -> c.Grant:
    made = c.Grant(
        bundle.member_id(request_id, index), LeaseId(f"{index + 1:02x}" * 16), TenantId("t"),
        HOLDER, "K", kind, NodeId(node), lessor_script.incarnation(1), amount, 60_000, None, 30_000,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def ask(*grants: c.Grant, request_id: str = "b") -> c.GrantBundle:
    return c.GrantBundle(request_id, grants)


def refused(of: Lessor, whole: c.GrantBundle) -> tuple[str, int | None]:
    """The code and the member; nothing has changed."""
    before = repr(of.nodes(NOW)), dict(of.state.leases), list(of.state.quotas.entries())
    step = of.handle(whole, NOW)
    assert step.failure is not None
    assert (step.events, step.leases) == ((), ())
    assert (repr(of.nodes(NOW)), of.state.leases, list(of.state.quotas.entries())) == before
    of.check()
    return step.failure.code, bundle.member_of(step.failure)


class TestGranted:
    def test_all_members_in_one_step_each_with_an_epoch_and_a_place_of_its_own(self) -> None:
        of = lessor(n1="mem=16384 block=8", n2="mem=16384")
        whole = ask(
            grant(0, Kind.BLOCK, 3), grant(1, Kind.BLOCK, 5), grant(2, Kind.MEM, 4096, "n2"),
        )  # fmt: skip
        step = of.handle(whole, NOW)
        assert step.failure is None
        assert [x.kind for x in step.events] == ["lease.granted"] * 3
        assert {(x.body["bundle"], x.body["members"]) for x in step.events} == {("b", 3)}
        assert [(x.extent_offset, x.epoch) for x in step.leases] == [(0, 1), (3, 2), (0, 1)]
        of.check()

    def test_who_replays_the_events_has_the_same_state(self) -> None:
        of = lessor(n1="mem=16384 block=8")
        whole = ask(grant(0, Kind.BLOCK, 3), grant(1, Kind.MEM, 4096))
        again = lessor(n1="mem=16384 block=8")
        for event in of.handle(whole, NOW).events:
            again.replay(event)
        assert again.state.leases == of.state.leases
        assert list(again.state.quotas.entries()) == list(of.state.quotas.entries())

    def test_asked_again_it_is_answered_as_the_first_time(self) -> None:
        of = lessor(n1="block=8")
        first = of.handle(ask(grant(0, Kind.BLOCK, 4), grant(1, Kind.BLOCK, 4)), NOW)
        other_ids = [
            grant(0, Kind.BLOCK, 4, lease_id=LeaseId("aa" * 16)),
            grant(1, Kind.BLOCK, 4, lease_id=LeaseId("bb" * 16)),
        ]
        again = of.handle(ask(*other_ids), NOW + 1)
        assert again.leases == first.leases
        assert again.events == ()

    def test_asked_again_when_one_member_is_over_it_says_what_has_become_of_it(self) -> None:
        of = lessor(n1="block=8")
        whole = ask(grant(0, Kind.BLOCK, 4), grant(1, Kind.BLOCK, 4))
        first = of.handle(whole, NOW)
        ended = first.leases[0].lease_id
        of.handle(c.End("e", ended, EndCause.RELEASE, HOLDER, tenant=TenantId("t"),
                        holder=HOLDER), NOW)  # fmt: skip
        again = of.handle(whole, NOW + 1)
        assert [x.state for x in again.leases] == [LeaseState.ENDING, LeaseState.PENDING]


class TestRefused:
    def test_nothing_is_granted_where_one_has_no_room(self) -> None:
        of = lessor(n1="mem=16384 block=8")
        whole = ask(grant(0, Kind.MEM, 4096), grant(1, Kind.BLOCK, 5), grant(2, Kind.BLOCK, 4))
        assert refused(of, whole) == ("NO_CAPACITY", 2)

    def test_members_count_together_against_the_quota(self) -> None:
        of = lessor(n1="mem=65536")
        of.handle(c.SetQuota(TenantId("t"), Kind.MEM, Limit(amount=8192)), 1500)
        pages = [grant(index, Kind.MEM, 4096) for index in range(3)]
        assert refused(of, ask(*pages)) == ("QUOTA", 2)
        of.handle(c.SetQuota(TenantId("t"), Kind.MEM, Limit(count=1)), 1500)
        assert refused(of, ask(*pages)) == ("QUOTA", 1)

    def test_a_member_without_its_node_is_named(self) -> None:
        of = lessor(n1="mem=65536")
        gone, strange = grant(1, Kind.MEM, 4096, "n9"), grant(1, Kind.BLOCK, 1)
        assert refused(of, ask(grant(0, Kind.MEM, 4096), gone)) == ("NOT_FOUND", 1)
        assert refused(of, ask(grant(0, Kind.MEM, 4096), strange)) == ("NO_MATCH", 1)

    def test_what_is_no_bundle(self) -> None:
        of, page = lessor(n1="mem=1048576"), grant(0, Kind.MEM, 4096)
        too_many = [grant(index, Kind.MEM, 4096) for index in range(bundle.MEMBERS_MAX + 1)]
        assert refused(of, ask()) == ("EMPTY", None)
        assert refused(of, ask(*too_many)) == ("RANGE", None)
        assert refused(of, ask(page, request_id="b" * 61)) == ("IDENTIFIER", None)
        assert refused(of, ask(page, page)) == ("INVALID", None)
        others = grant(1, Kind.MEM, 4096, holder="spiffe://f/tenant/t/holder/x")
        assert refused(of, ask(page, others)) == ("INVALID", None)
        same_id = grant(1, Kind.MEM, 4096, lease_id=page.lease_id)
        assert refused(of, ask(page, same_id)) == ("PRECONDITION", None)

    @pytest.mark.parametrize(
        "other",
        [
            (grant(0, Kind.BLOCK, 4),),
            (grant(0, Kind.BLOCK, 4), grant(1, Kind.BLOCK, 3)),
            (grant(0, Kind.BLOCK, 4), grant(1, Kind.MEM, 4096)),
            (grant(0, Kind.BLOCK, 4), grant(1, Kind.BLOCK, 4), grant(2, Kind.BLOCK, 1)),
        ],
        ids=["fewer", "another amount", "another kind", "more"],
    )
    def test_a_request_id_stands_for_one_content(self, other: tuple[c.Grant, ...]) -> None:
        of = lessor(n1="mem=65536 block=64")
        of.handle(ask(grant(0, Kind.BLOCK, 4), grant(1, Kind.BLOCK, 4)), NOW)
        assert refused(of, ask(*other)) == ("PRECONDITION", None)

    def test_a_bundle_of_somebody_else_is_not_shown(self) -> None:
        of = lessor(n1="block=64")
        of.handle(ask(grant(0, Kind.BLOCK, 4)), NOW)
        theirs = grant(0, Kind.BLOCK, 4, holder="spiffe://f/tenant/t/holder/x")
        assert refused(of, ask(theirs)) == ("DENIED", None)


def place(of: Lessor, *asks: Request) -> list[str] | tuple[int, str]:
    """The node of each member, or whose refusal it is and which."""
    found = packing.place_all(asks, of.nodes(NOW))
    if isinstance(found, packing.NoPlace):
        return found.member, found.deny.code
    return [each.node_id for each in found]


def wants(kind: Kind, amount: int, **where: str) -> Request:
    return Request("r", kind, amount, where=where)


class TestPlaced:
    def test_the_hardest_goes_first_and_the_others_beside_it(self) -> None:
        of = lessor(n1="block=8", n2="block=6")
        assert place(of, wants(Kind.BLOCK, 6), wants(Kind.BLOCK, 8)) == ["n2", "n1"]
        assert place(of, wants(Kind.BLOCK, 2), wants(Kind.BLOCK, 6, node="n2")) == ["n1", "n2"]

    def test_one_that_took_the_only_place_of_another_moves(self) -> None:
        of = lessor(n1="mem=8192 block=8", n2="mem=4096")
        placed = place(of, wants(Kind.MEM, 4096), wants(Kind.MEM, 4096), wants(Kind.MEM, 4096))
        assert sorted(placed) == ["n1", "n1", "n2"]

    def test_what_fits_on_no_empty_fabric_is_refused_for_good(self) -> None:
        of = lessor(n1="block=8")
        assert place(of, wants(Kind.BLOCK, 5), wants(Kind.BLOCK, 4)) == (1, "CAPACITY")
        assert place(of, wants(Kind.BLOCK, 1), wants(Kind.BLOCK, 9)) == (1, "CAPACITY")
        assert place(of, wants(Kind.BLOCK, 1), wants(Kind.MEM, 9)) == (1, "NO_MATCH")

    def test_what_would_fit_later_is_refused_for_now(self) -> None:
        of = lessor(n1="block=8")
        of.handle(ask(grant(0, Kind.BLOCK, 4)), NOW)
        assert place(of, wants(Kind.BLOCK, 4), wants(Kind.BLOCK, 3)) == (1, "NO_CAPACITY")

    def test_a_search_that_cannot_succeed_ends(self) -> None:
        of = lessor(**{f"n{number}": "block=8" for number in range(1, 9)})
        asks = [wants(Kind.BLOCK, 5) for _ in range(16)]
        assert place(of, *asks)[1] == "CAPACITY"
