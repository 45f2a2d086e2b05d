"""The ledger as a process, called over real gRPC with real certificates."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from grafos_core import jws
from grafos_core.failure import FabricError
from grafos_core.lease import Kind
from grafos_core.receipt import Assurance, Cleared, Outcome, verify_clear
from grafos_proto.v1 import admission_pb2, lease_pb2, ledger_pb2
from services.runtime import signing
from tests.services.ledger.house import Caller, House, Node, ServiceProcess, code, codes, grant

ENDING, RELEASED = lease_pb2.LEASE_STATE_ENDING, lease_pb2.LEASE_STATE_RELEASED
ACTIVE, FENCED = lease_pb2.LEASE_STATE_ACTIVE, lease_pb2.LEASE_STATE_FENCED


def book(caller: Caller, kind: Any = lease_pb2.KIND_MEM) -> Any:
    (node,) = caller("Snapshot", ledger_pb2.SnapshotRequest()).nodes
    return next(each for each in node.books if each.kind == kind)


def test_a_lease_goes_from_grant_to_credit_and_its_capacity_comes_back(
    admission: Caller, node: Node
) -> None:
    lease = admission.grant(node)
    assert lease.epoch == 1
    assert node.bound(lease).state == ACTIVE
    assert book(admission).leased == 4096
    assert admission.end(lease).state == ENDING
    assert book(admission).ending == 4096
    (credited,) = node.credit(node.receipt(lease))
    assert credited.state == RELEASED
    assert book(admission).free == book(admission).total


def test_a_retried_grant_gives_the_same_lease_and_charges_once(
    admission: Caller, node: Node
) -> None:
    """P4."""
    ask = grant(node)
    first, second = admission.commit(ask, ask)
    assert first == second
    assert admission.commit(ask) == [first]
    assert book(admission).leased == 4096


def test_two_admissions_racing_for_a_quota_cannot_pass_it_together(
    house: House, ledger: ServiceProcess, operator: Caller, node: Node
) -> None:
    """G5."""
    quota = ledger_pb2.SetQuota(tenant="acme", kind=lease_pb2.KIND_MEM, amount=10 * 4096, count=99)
    assert codes(operator.commit(ledger_pb2.Command(set_quota=quota))) == [""]
    callers = [Caller(house, ledger.endpoint, "service/admission") for _ in range(2)]
    outcomes: list[Any] = []

    def race(caller: Caller) -> None:
        for _ in range(15):
            outcomes.append(caller.grant(node))

    threads = [threading.Thread(target=race, args=(caller,)) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes(outcomes)) == [""] * 10 + ["QUOTA"] * 20
    (entry,) = operator("Snapshot", ledger_pb2.SnapshotRequest()).quotas
    assert entry.used_amount == entry.amount
    for caller in callers:
        caller.close()


def test_a_release_is_idempotent_and_tells_outsiders_nothing(admission: Caller, node: Node) -> None:
    """G8."""
    lease = admission.grant(node)
    assert [admission.end(lease).state, admission.end(lease).state] == [ENDING, ENDING]
    other = grant(node).grant
    foreign = lease_pb2.Lease()
    foreign.CopyFrom(lease)
    foreign.lease_id = other.lease_id
    assert code(admission.end(foreign)) == "NOT_FOUND"
    foreign.CopyFrom(lease)
    foreign.tenant, foreign.holder = "rival", "spiffe://grafos.local/tenant/rival/holder/x"
    assert code(admission.end(foreign)) == "NOT_FOUND"


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 2}, {"incarnation": "0" * 32}, {"amount": 8192}, {"node_id": "n2"},
        {"key": Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)},
    ],
    ids=["epoch", "incarnation", "amount", "node", "key"],
)  # fmt: skip
def test_a_forged_receipt_frees_nothing(
    changes: dict[str, Any], admission: Caller, node: Node
) -> None:
    """G10."""
    lease = admission.grant(node)
    admission.end(lease)
    assert codes(node.credit(node.receipt(lease, **changes))) == ["RECEIPT"]
    assert book(admission).ending == 4096


def test_a_receipt_is_answered_the_same_when_it_is_repeated(admission: Caller, node: Node) -> None:
    """G10, replayed."""
    lease = admission.grant(node)
    admission.end(lease)
    text = node.receipt(lease)
    assert node.credit(text) == node.credit(text)
    assert book(admission).free == book(admission).total


def test_a_node_cannot_credit_in_the_name_of_another(
    house: House, ledger: ServiceProcess, admission: Caller, node: Node
) -> None:
    other = Node(house, ledger.endpoint, "n2")
    other.register()
    lease = admission.grant(node)
    admission.end(lease)
    assert codes(other.credit(node.receipt(lease))) == ["RECEIPT"]
    forged = other.receipt(lease, node_id="n1", incarnation=node.incarnation)
    assert codes(other.credit(forged)) == ["RECEIPT"]
    other.close()


def test_a_node_cannot_take_over_the_key_of_another(
    house: House, ledger: ServiceProcess, node: Node
) -> None:
    thief = Node(house, ledger.endpoint, "n2")
    thief.key, thief.public_key = node.key, node.public_key
    with pytest.raises(FabricError) as refused:
        thief.register()
    assert refused.value.code == "DENIED"
    thief.close()


def fenced(admission: Caller, node: Node) -> Any:
    lease = admission.grant(node)
    node.bound(lease)
    failed = node.receipt(
        lease, outcome=Outcome.FENCED, assurance=Assurance.NONE,
        measured={"cause": "erase", "size_bytes": 4096},
    )  # fmt: skip
    (held,) = node.credit(failed)
    assert held.state == FENCED
    assert held.fence_cause == "erase"
    return held


def clear(lease: Any, reason: str = "swapped the module") -> ledger_pb2.Command:
    ask = ledger_pb2.ClearFence(request_id="c", lease_id=lease.lease_id, reason=reason)
    return ledger_pb2.Command(clear=ask)


def test_a_fence_is_left_only_by_an_order_that_the_node_carried_out(
    admission: Caller, operator: Caller, node: Node
) -> None:
    lease = fenced(admission, node)
    cleared = node.receipt(lease, outcome=Outcome.CLEARED, cleared=Cleared.OPERATOR)
    assert codes(node.credit(cleared)) == ["RECEIPT"]  # nobody has ordered it
    assert codes(operator.commit(clear(lease))) == [""]
    answer = node.register()
    (owed,) = answer.obligations
    keys = jws.Keys()
    for key in answer.keys:
        if key.use == "clear":
            keys.add(jws.CLEAR, key.key_id, signing.verifier(key.public_key), owner=key.owner)
    order = verify_clear(owed.clear_order, keys)
    assert (order.lease_id, order.node_id, order.epoch) == (lease.lease_id, "n1", lease.epoch)
    assert "alice" in order.reason
    assert codes(node.credit(cleared)) == [""]
    assert book(admission).free == book(admission).total


def test_a_node_clears_by_itself_only_where_it_is_registered_to(
    admission: Caller, operator: Caller, node: Node
) -> None:
    lease = fenced(admission, node)
    cleared = node.receipt(lease, outcome=Outcome.CLEARED, cleared=Cleared.POLICY)
    assert codes(node.credit(cleared)) == ["RECEIPT"]
    node.clears_proved_clean = True
    node.register()
    (released,) = node.credit(cleared)
    assert (released.state, released.cleared) == (lease_pb2.LEASE_STATE_RELEASED, "policy")
    assert book(admission).free == book(admission).total
    snapshot = operator("Snapshot", ledger_pb2.SnapshotRequest())
    assert [each.clears_proved_clean for each in snapshot.nodes] == [True]


def test_residue_counts_only_where_an_operator_accepted_it(
    admission: Caller, operator: Caller, node: Node
) -> None:
    lease = fenced(admission, node)
    left = node.receipt(
        lease, outcome=Outcome.CLEARED, cleared=Cleared.RESIDUE, assurance=Assurance.NONE
    )
    assert codes(operator.commit(clear(lease))) == [""]
    assert codes(node.credit(left)) == ["RECEIPT"]
    accepting = clear(lease)
    accepting.clear.accept_residue = True
    assert codes(operator.commit(accepting, clear(lease))) == ["", ""]
    (released,) = node.credit(left)
    assert released.cleared == "residue"
    listed = operator("List", admission_pb2.ListLeasesRequest(state=lease_pb2.LEASE_STATE_RELEASED))
    assert [each.cleared for each in listed.leases] == ["residue"]


def test_a_clear_that_fits_no_fence_is_refused(
    admission: Caller, operator: Caller, node: Node
) -> None:
    """G11."""
    lease = admission.grant(node)
    assert codes(operator.commit(clear(lease))) == ["CLEAR"]
    assert codes(operator.commit(clear(fenced(admission, node), reason=""))) == ["CLEAR"]
    assert codes(admission.commit(clear(lease))) == ["ROLE"]


def test_everybody_does_only_what_is_theirs(
    house: House, ledger: ServiceProcess, admission: Caller, operator: Caller, node: Node
) -> None:
    quota = ledger_pb2.SetQuota(tenant="acme", kind=lease_pb2.KIND_MEM, amount=1, count=1)
    assert codes(admission.commit(ledger_pb2.Command(set_quota=quota))) == ["ROLE"]
    assert codes(operator.commit(grant(node))) == ["ROLE"]
    with pytest.raises(FabricError) as refused:
        node.caller("Commit", ledger_pb2.CommitRequest(commands=[grant(node)]))
    assert refused.value.code == "ROLE"
    stranger = Node(house, ledger.endpoint, "n2")
    stranger.name = "n1"
    with pytest.raises(FabricError) as refused:
        stranger.register()
    assert refused.value.code == "DENIED"
    stranger.close()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("amount", 0, "RANGE"), ("amount", 2**63, "RANGE"), ("ttl_ms", 1, "RANGE"),
        ("lifetime_ms", 2**64 - 1, "RANGE"), ("lease_id", "../etc", "IDENTIFIER"),
        ("tenant", "a/b", "IDENTIFIER"), ("node_id", "n\u202e1", "IDENTIFIER"),
        ("node_id", "nowhere", "NOT_FOUND"), ("kind", 99, "INVALID"), ("kind", 0, "MISSING_FIELD"),
        ("incarnation", "f" * 32, "PRECONDITION"), ("request_id", "", "IDENTIFIER"),
        ("holder_key", "short", "IDENTIFIER"), ("amount", 1 << 40, "NO_CAPACITY"),
    ],
)  # fmt: skip
def test_a_grant_that_is_not_in_order_is_refused_and_changes_nothing(
    field: str, value: Any, expected: str, admission: Caller, node: Node
) -> None:
    """G1, G2."""
    before = admission("Snapshot", ledger_pb2.SnapshotRequest()).revision
    good, bad = admission.commit(grant(node), grant(node, **{field: value}))
    assert (code(good), code(bad)) == ("", expected)
    assert admission("Snapshot", ledger_pb2.SnapshotRequest()).revision == before + 1


def test_a_nodes_wild_claims_are_refused_and_the_ledger_goes_on(
    admission: Caller, node: Node
) -> None:
    assert code(admission.grant(node, kind=lease_pb2.KIND_BLOCK, amount=1 << 16)) == ""
    node.live = None
    for field, value in (
        ("high_waters", {Kind.MEM: 2**64 - 1}), ("offers", {Kind.MEM: 2**64 - 1}),
        ("offers", {Kind.MEM: 1 << 30, Kind.BLOCK: 5}), ("boot_epoch", 0), ("version", 2),
        ("incarnation", "f" * 32),
    ):  # fmt: skip
        kept = getattr(node, field)
        setattr(node, field, value)
        with pytest.raises(FabricError):
            node.register()
        setattr(node, field, kept)
    node.register()
    assert code(admission.grant(node)) == ""


def test_a_block_offer_that_would_cut_off_leased_blocks_is_refused(
    admission: Caller, node: Node
) -> None:
    first = admission.grant(node, kind=lease_pb2.KIND_BLOCK, amount=100)
    second = admission.grant(node, kind=lease_pb2.KIND_BLOCK, amount=100)
    admission.end(first)
    node.credit(node.receipt(first))  # what is leased now begins at block 100
    node.offers[Kind.BLOCK] = 150
    with pytest.raises(FabricError) as refused:
        node.register()
    assert refused.value.code == "LIVE_LEASES"
    assert admission("Get", admission_pb2.GetLeaseRequest(lease_id=second.lease_id)) == second


def test_list_pages_through_everything_that_matches(admission: Caller, node: Node) -> None:
    made = {admission.grant(node).lease_id for _ in range(7)}
    admission.grant(node, tenant="rival", holder="spiffe://grafos.local/tenant/rival/holder/x")
    found: list[str] = []
    after = ""
    while True:
        ask = admission_pb2.ListLeasesRequest(tenant="acme", limit=3, after=after)
        answer = admission("List", ask)
        found += [lease.lease_id for lease in answer.leases]
        after = answer.next
        if not after:
            break
    assert found == sorted(made)


def test_nothing_is_granted_on_a_node_before_its_live_leases_are_read(
    house: House, ledger: ServiceProcess, admission: Caller
) -> None:
    """G14, the ledger's part: what lives there and is unknown here is asked to end."""
    node = Node(house, ledger.endpoint, "n1")
    node.live = None
    assert node.register().send_live
    assert code(admission.grant(node)) == "LEDGER_BEHIND"
    node.live = [ledger_pb2.Bound(lease_id="a" * 32, epoch=9, generation=1)]
    node.high_waters = {Kind.MEM: 9}
    answer = node.register()
    assert [(each.lease_id, each.action) for each in answer.obligations] == [("a" * 32, "release")]
    assert code(admission.grant(node)) == "LEDGER_BEHIND"
    assert answer.send_live
    node.live = []
    node.register()
    assert admission.grant(node).epoch == 10
    node.close()
