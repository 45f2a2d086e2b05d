"""Who sees which leases, and that a watch which is taken up again has missed nothing."""

from __future__ import annotations

import pytest

from grafos_core.failure import FabricError
from grafos_proto.v1 import admission_pb2, lease_pb2
from tests.services.admission.world import Fabric, PaperNode, Watching, eventually


def test_everybody_sees_their_own_and_operators_all(shared: Fabric) -> None:
    """Also no page of a list names a lease of somebody else as the place to go on from."""
    web, batch = shared.holder(tenant="seen"), shared.holder("batch", tenant="seen")
    rival = shared.holder(tenant="rival")
    own, theirs, other = (
        {client.acquire().lease.lease_id for _ in range(4)} for client in (web, batch, rival)
    )
    for limit in (0, 1, 3, 10_000):
        assert web.leases(limit=limit) == sorted(own)
        assert batch.leases(limit=limit) == sorted(theirs)
    assert web.leases(tenant="rival") == sorted(own)
    assert web.leases(holder=batch.path) == []
    operator = shared.client("operator/alice")
    assert own | theirs | other <= set(operator.leases(limit=3))
    assert operator.leases(tenant="seen") == sorted(own | theirs)
    for lease_id in theirs | other:
        found = web.refused("Get", admission_pb2.GetLeaseRequest(lease_id=lease_id))
        assert (found.code, found.lease_id) == ("NOT_FOUND", lease_id)


def test_another_process_of_the_same_local_user_sees_its_leases(shared: Fabric) -> None:
    first = shared.client("tenant/default/holder/uid-5/100-1")
    lease = first.acquire().lease
    assert shared.client("tenant/default/holder/uid-5/200-2").get(lease) == lease
    assert shared.client("tenant/default/holder/uid-6/300-3").leases() == []


def test_whoever_holds_leases_may_have_the_keys_of_the_nodes(
    fabric: Fabric, node: PaperNode
) -> None:
    """Also of a node that came after the first question, and of one that fell silent."""
    holder, operator = fabric.holder(), fabric.client("operator/alice")
    request = admission_pb2.KeysRequest()
    before = list(holder("Keys", request).keys)
    assert [(key.use, key.owner.rpartition("/")[2]) for key in before] == [("receipt", "n1")]
    node.stop()
    fabric.node("n2")
    after = list(holder("Keys", request).keys)
    assert list(operator("Keys", request).keys) == after
    assert {key.owner.rpartition("/")[2] for key in after} == {"n1", "n2"}
    assert list(holder("Keys", admission_pb2.KeysRequest(node_id="n1")).keys) == before
    assert not holder("Keys", admission_pb2.KeysRequest(node_id="n3")).keys
    assert holder.refused("Keys", admission_pb2.KeysRequest(node_id="../x")).code == "IDENTIFIER"


@pytest.mark.parametrize("limit", [10_001, 2**32 - 1])
def test_a_page_has_a_bound(limit: int, shared: Fabric) -> None:
    request = admission_pb2.ListLeasesRequest(limit=limit)
    assert shared.holder().refused("List", request).code == "RANGE"


def has(watching: Watching, *events: str) -> bool:
    return [event for event, _ in watching.events] == list(events)


def test_a_watch_shows_the_callers_own_leases_and_no_others(shared: Fabric) -> None:
    web, rival = shared.holder(tenant="watching"), shared.holder(tenant="rival")
    before, noise = web.acquire().lease, rival.acquire().lease
    mine, all_ = web.watch().begun(), shared.client("operator/alice").watch().begun()
    assert mine.events == [("snapshot", before.lease_id)]
    assert ("snapshot", noise.lease_id) in all_.events
    rival.renew(noise)
    after = web.acquire().lease
    mine.until(lambda it: has(it, "snapshot", "lease.granted"))
    assert mine.events[1] == ("lease.granted", after.lease_id)
    all_.until(lambda it: ("lease.renewed", noise.lease_id) in it.events)
    for watching in (mine, all_):
        watching.close()


def test_a_watch_of_one_lease_shows_that_lease(shared: Fabric) -> None:
    web = shared.holder(tenant="watching-one")
    first, second = web.acquire().lease, web.acquire().lease
    watching = web.watch(lease_id=second.lease_id).begun()
    web.release(first)
    web.release(second)
    watching.until(lambda it: has(it, "snapshot", "lease.ending"))
    assert {lease_id for _, lease_id in watching.events} == {second.lease_id}
    watching.close()


def test_a_watch_taken_up_again_has_missed_nothing_and_repeats_nothing(shared: Fabric) -> None:
    node, web = shared.node("watched"), shared.holder(tenant="resuming")
    first = web.watch().begun()
    lease = web.acquire(where={"node": "watched"}).lease
    first.until(lambda it: has(it, "lease.granted"))
    revision = first.revision
    first.close()
    node.bound(lease)
    web.renew(lease)
    node.settle(web.release(lease))
    again = web.watch(from_revision=revision)
    again.until(lambda it: len(it.events) == 4)
    assert has(again, "lease.bound", "lease.renewed", "lease.ending", "lease.released")
    again.close()
    node.stop()


def test_a_snapshot_carries_no_revision_to_resume_from_halfway(shared: Fabric) -> None:
    """Else whoever is cut off in the middle of it would never hear of the rest."""
    web = shared.holder(tenant="halfway")
    ids = {web.acquire().lease.lease_id for _ in range(3)}
    cut = web.watch().until(lambda it: len(it.events) == 2)
    assert cut.revision == 0
    cut.close()
    again = web.watch(from_revision=cut.revision).begun()
    assert {lease_id for _, lease_id in again.events} == ids
    again.close()


def test_a_watcher_hears_how_far_it_is_while_only_others_act(shared: Fabric) -> None:
    web, rival = shared.holder(tenant="silent"), shared.holder(tenant="rival")
    watching = web.watch().begun()
    revision = watching.revision
    rival.acquire()
    watching.until(lambda it: it.revision > revision)
    assert watching.events == []
    watching.close()


def test_a_revision_from_the_future_is_refused(shared: Fabric) -> None:
    with pytest.raises(FabricError) as refused:
        shared.holder().watch(from_revision=2**40).begun()
    assert refused.value.code == "ROLLBACK"


def test_watches_are_bounded_and_a_place_is_free_again_when_one_ends(shared: Fabric) -> None:
    """They share one connection to the ledger with everybody's requests."""
    web = shared.holder(tenant="curious")
    watches = [web.watch().begun() for _ in range(8)]
    with pytest.raises(FabricError) as refused:
        web.watch().begun()
    assert refused.value.code == "STREAMS"
    watches.pop().close()

    def again() -> bool:
        try:
            watches.append(web.watch().begun())
        except FabricError:
            return False
        return True

    eventually(again)
    for watching in watches:
        watching.close()


def test_a_state_a_kind_and_a_prefix_narrow_a_list(shared: Fabric) -> None:
    web = shared.holder(tenant="narrowed")
    kept, ended = web.acquire().lease, web.acquire().lease
    web.release(ended)
    assert web.leases(state=lease_pb2.LEASE_STATE_PENDING) == [kept.lease_id]
    assert web.leases(state=lease_pb2.LEASE_STATE_ENDING) == [ended.lease_id]
    assert web.leases(prefix=kept.lease_id[:31]) == [kept.lease_id]
    assert web.leases(kind=lease_pb2.KIND_BLOCK) == []
    refusal = web.refused("List", admission_pb2.ListLeasesRequest(kind=99))  # type: ignore[arg-type]
    assert refusal.code == "INVALID"
