"""A virtual fabric behaves as a fabric, with time and faults in the hands of the test."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest

from grafos import (
    BlockBuilder,
    Degraded,
    Denied,
    Disconnected,
    FabricError,
    Fenced,
    Incompatible,
    LeaseExpired,
    LeaseStatus,
    MemBuilder,
    MemLease,
    Notice,
    RateLimited,
    Revoked,
    _clock,
)
from grafos.leasekit import RenewalManager
from grafos.observe import FabricMetrics
from grafos.testing import VirtualFabric, assert_no_leaks, fabric, leaks
from grafos_core.lease import LeaseId
from tests.sdk.world import World

MIB = 1 << 20


@pytest.fixture
def two() -> Iterator[VirtualFabric]:
    """Two nodes; every law is looked at once more when the test is over."""
    with fabric(nodes=2, memory="1MiB", blocks="1MiB") as made:
        yield made
        made.check()


@contextmanager
def refused(kind: type[FabricError], code: str) -> Generator[None, None, None]:
    with pytest.raises(kind) as raised:
        yield
    assert raised.value.code == code


def page() -> MemBuilder:
    return MemBuilder().min_bytes(4096)


def on(node: str) -> MemLease:
    return page().where(node=node).acquire()


# Leases and time


@pytest.mark.parametrize("shared", [True, False])
def test_memory_holds_real_bytes_by_both_paths_and_gives_none_of_a_dead_lease(shared: bool) -> None:
    with fabric(shared=shared) as world:
        with page().lease_secs(5).acquire() as lease:
            memory = lease.mem()
            assert memory.path == ("shared" if shared else "rpc")
            memory.write(4090, b"hello ")
            assert memory.read(4090, 6) == b"hello "
            with refused(Incompatible, "EXTENT"):
                memory.read(4092, 6)
            world.advance(6)
            for use in (lambda: memory.read(0, 1), lambda: memory.write(0, b"x")):
                with pytest.raises(LeaseExpired):
                    use()
        world.check()


def test_blocks_hold_real_bytes(two: VirtualFabric) -> None:
    with BlockBuilder().min_blocks(4).acquire() as lease:
        block = lease.block()
        assert block.read_block(3) == bytes(4096)
        block.write_blocks(1, b"a" * 4096 + b"b" * 4096)
        block.flush()
        assert block.read_blocks(1, 2) == b"a" * 4096 + b"b" * 4096


def test_a_lease_lives_to_its_deadline_by_the_clock_and_not_a_moment_longer(
    two: VirtualFabric,
) -> None:
    lease = page().lease_secs(10).acquire()
    two.advance(9.9)
    lease.mem().write(0, b"x")
    assert lease.status == "active"
    two.advance(0.1)
    assert (lease.valid, lease.status.value) == (False, "expired")
    assert two.leases() == []
    assert lease.release().cause == "expired"


def test_a_renewal_moves_the_deadline_and_each_way_of_renewing_works(two: VirtualFabric) -> None:
    by_hand, managed = page().lease_secs(10).acquire(), page().lease_secs(10).acquire()
    by_thread, not_at_all = (
        page().lease_secs(10).auto_renew().acquire(),
        page().lease_secs(10).acquire(),
    )
    manager = RenewalManager()
    manager.register(managed)
    for _ in range(15):
        two.advance(2)
        manager.tick()
        by_hand.renew()
    assert [each.valid for each in (by_hand, managed, by_thread, not_at_all)] == [
        True, True, True, False,
    ]  # fmt: skip
    for each in (by_hand, managed, by_thread):
        each.release()


def test_what_renews_itself_lives_however_far_time_is_advanced(two: VirtualFabric) -> None:
    lease = page().lease_secs(10).auto_renew().acquire()
    two.advance(3_600)
    lease.mem().write(0, b"x")
    assert lease.generation > 300
    lease.release()


def test_each_end_comes_at_its_own_instant(two: VirtualFabric) -> None:
    began_ms = two.now_ms
    held = [page().lease_secs(seconds).acquire() for seconds in (7, 3, 5)]
    two.advance(60)
    assert [each.release().begin_ms - began_ms for each in held] == [7_000, 3_000, 5_000]


def test_a_day_is_over_in_no_time_and_nothing_is_passed_over(two: VirtualFabric) -> None:
    lease = page().lease_secs(86_400).acquire()
    two.advance(86_000)
    lease.mem().write(0, b"x")
    two.advance(400)
    assert not lease.valid
    with on("n2"):  # the nodes were heard all day
        pass


def test_a_request_waits_in_virtual_time_until_there_is_room(two: VirtualFabric) -> None:
    first = MemBuilder().min_bytes(MIB).lease_secs(3).where(node="n1").acquire()
    before_ms = two.now_ms
    with MemBuilder().min_bytes(MIB).where(node="n1").wait(60).acquire():
        assert 3_000 <= two.now_ms - before_ms < 4_000
    assert not first.valid


def test_the_same_seed_gives_the_same_ids_placement_and_signatures() -> None:
    def told(seed: int) -> list[tuple[str, str, str]]:
        with fabric(nodes=5, seed=seed) as world:
            found = []
            for _ in range(5):
                lease = page().acquire()
                world.advance(1)
                found.append((lease.lease_id, lease.node_id, lease.release().signed))
            return found

    assert told(7) == told(7)
    assert told(7) != told(8)


def test_a_receipt_is_signed_and_anyone_with_the_keys_can_verify_it(two: VirtualFabric) -> None:
    lease = page().acquire()
    found = lease.release()
    assert found.credited
    assert found.frees
    assert found.measured == {"measure_size_bytes": 0}
    keys = two.connection.keys()
    assert found.verify(keys) is found
    with refused(Denied, "RECEIPT"):
        found.verify([key for key in keys if not key.owner.endswith(found.node_id)])


def test_metrics_count_what_happens_here(two: VirtualFabric) -> None:
    metrics = FabricMetrics.global_()
    before = metrics.leases_total.value()
    page().acquire().release()
    assert metrics.leases_total.value() == before + 1


def test_a_kept_lease_is_taken_up_by_the_next_process(two: VirtualFabric) -> None:
    lease = page().keep().acquire()
    lease.mem().write(0, b"still there")
    lease_id = lease.lease_id
    two.kill_holder()
    with MemBuilder().fabric(two.connect()).attach(lease_id) as again:
        assert again.mem().read(0, 11) == b"still there"
        assert again.generation == 2


def test_another_user_sees_nothing_of_a_lease(two: VirtualFabric) -> None:
    with page().acquire() as lease:
        stranger = two.connect("mallory", tenant="others")
        assert list(stranger.leases()) == []
        with refused(Denied, "NOT_FOUND"):
            stranger.describe(lease.lease_id)


def test_a_dead_holders_leases_end_at_once(two: VirtualFabric) -> None:
    lease = page().acquire()
    two.kill_holder()
    assert two.leases() == []
    assert not lease.valid


# Faults


def test_a_killed_node_takes_everything_back_and_proves_it_when_it_returns(
    two: VirtualFabric,
) -> None:
    lease, other = on("n1"), on("n2")
    heard: list[Notice] = []
    lease.on_notice(heard.append)
    two.kill_node("n1")
    with pytest.raises(Fenced) as lost:
        lease.mem().read(0, 1)
    assert lost.value.code == "AGENT_LOST"
    other.mem().write(0, b"x")
    two.advance(4)
    with refused(Degraded, "NODE_NOT_READY"):
        page().where(node="n1").wait(0).acquire()
    assert {each.node_id for each in two.leases()} == {"n1", "n2"}
    two.start_node("n1")
    two.advance(1)
    assert [each.node_id for each in two.leases()] == ["n2"]
    assert two.capacity("n1").free == MIB
    with on("n1"):
        pass
    other.release()


def test_a_stopped_node_is_silent_and_its_warden_gives_it_up(two: VirtualFabric) -> None:
    lease = page().where(node="n1").lease_secs(8).acquire()
    with two.stop_node("n1"):
        with refused(Degraded, "JEOPARDY"):
            lease.renew()
        two.advance(1.5)
        with refused(Fenced, "AGENT_LOST"):
            lease.mem().read(0, 1)
    two.advance(2)
    assert two.leases() == []
    with on("n1"):
        pass


def test_a_short_stop_costs_no_lease(two: VirtualFabric) -> None:
    lease = on("n1")
    with two.stop_node("n1"):
        two.advance(2)
    lease.mem().write(0, b"x")
    lease.release()


def test_without_the_control_plane_a_lease_goes_on_and_ends_at_its_deadline(
    two: VirtualFabric,
) -> None:
    lease = page().lease_secs(20).where(node="n1").acquire()
    heard: list[Notice] = []
    lease.on_notice(heard.append)
    with two.partition("holder", "control"):
        with refused(Degraded, "JEOPARDY"):
            lease.renew()
        lease.mem().write(0, b"x")
        assert lease.status is LeaseStatus.JEOPARDY
        with pytest.raises(Disconnected):
            page().acquire()
    two.connection.poll()
    assert [each.kind for each in heard] == ["degraded"]
    two.advance(20)
    two.connection.poll()
    assert [each.kind for each in heard] == ["degraded", "expired"]


def test_a_node_cut_off_from_the_ledger_owes_its_receipt_until_it_can_send_it(
    two: VirtualFabric,
) -> None:
    lease = on("n1")
    with two.partition("n1", "control"):
        found = lease.release()
        assert found.frees
        assert not found.credited
        assert len(two.leases()) == 1
    two.advance(6)
    assert two.leases() == []


def test_a_lost_session_is_waited_for_and_then_its_leases_end(two: VirtualFabric) -> None:
    brief, lost = on("n1"), on("n2")
    with two.partition("holder", "n1"):
        two.advance(2)
    brief.mem().write(0, b"x")
    with two.partition("holder", "n2"):
        two.advance(6)
    with pytest.raises(FabricError) as ended:
        lost.mem().read(0, 1)
    assert ended.value.code in ("LEASE_EXPIRED", "AGENT_LOST")
    brief.mem().write(0, b"x")
    brief.release()


@pytest.mark.parametrize("step", ["reap", "erase", "measure"])
def test_a_teardown_that_fails_is_fenced_and_cleared_by_an_operator(
    two: VirtualFabric, step: str
) -> None:
    lease = on("n1")
    with two.fail_teardown("n1", step):
        with refused(Fenced, "QUARANTINED"):
            lease.release()
        (fence,) = two.fences()
        assert fence.lease_id == lease.lease_id
        assert step in fence.fence_cause
        assert two.capacity("n1").fenced == 4096
        with on("n2"):
            pass
    with on("n1"):  # the rest of the node serves on
        pass
    assert two.clear_fence(fence.lease_id, "looked at it").state == "released"
    assert two.fences() == []
    assert two.capacity("n1").free == MIB


def test_a_clear_that_meets_the_same_fault_leaves_the_fence(two: VirtualFabric) -> None:
    lease = on("n1")
    with two.fail_teardown("n1"):
        with pytest.raises(Fenced):
            lease.release()
        assert two.clear_fence(lease, "hope").state == "fenced"
        assert two.clear_fence(lease, "I know", accept_residue=True).state == "released"


def test_a_fault_that_passes_is_tried_again_and_fences_nothing(two: VirtualFabric) -> None:
    lease = on("n1")
    two.fail_teardown("n1", times=1)
    assert lease.release().credited


def test_a_fence_outlives_its_agent(two: VirtualFabric) -> None:
    lease = on("n1")
    with two.fail_teardown("n1"):
        with pytest.raises(Fenced):
            lease.release()
    with two.kill_node("n1"):
        two.advance(5)
    two.advance(2)
    assert [each.lease_id for each in two.fences()] == [lease.lease_id]
    two.clear_fence(lease, "looked at it")
    assert two.fences() == []


def test_capacity_can_be_used_up_by_somebody_else(two: VirtualFabric) -> None:
    with two.exhaust():
        with refused(RateLimited, "NO_CAPACITY"):
            page().acquire()
        assert_no_leaks(two)
    with two.exhaust("n1", "block", leave=2), two.exhaust("n2", "block"):
        with BlockBuilder().min_blocks(2).acquire() as lease:
            assert lease.node_id == "n1"
    with page().acquire():
        pass


def test_a_quota_is_the_ledgers(two: VirtualFabric) -> None:
    two.set_quota(leases=1)
    with page().acquire():
        with refused(RateLimited, "QUOTA"):
            page().acquire()
    page().acquire().release()


def test_a_node_refuses_what_a_revoked_key_signed_as_soon_as_it_has_heard(
    two: VirtualFabric,
) -> None:
    lease = page().where(node="n1").acquire()
    control, agent = two._control, two._control.agents["n1"]
    granted, old = control.lessor.lease(LeaseId(lease.lease_id)), control.token_key
    token, who = control._mint(granted), two.connection.who  # type: ignore[attr-defined]
    with two.partition("control", "n1"):
        two.revoke(key=old.key_id)
        assert agent.accept(token, who).lease_id == lease.lease_id
    with refused(Revoked, "REVOKED"):
        agent.accept(token, who)
    two.advance(1)
    with pytest.raises(Revoked):
        lease.mem().read(0, 1)


def test_a_lost_connection_ends_what_it_is_to_end(two: VirtualFabric) -> None:
    built = page().where(node="n1").lease_secs(30)
    brief, kept = built.on_disconnect("release").acquire(), built.on_disconnect("keep").acquire()
    usual = built.acquire()
    ends = []
    with two.partition("holder", "n1"):
        for seconds in (0.9, 0.2, 3.8, 0.2, 20):
            two.advance(seconds)
            live = {lease.lease_id for lease in two.leases()}
            ends.append([each.lease_id in live for each in (brief, usual, kept)])
    assert ends == [
        [True, True, True], [False, True, True], [False, True, True], [False, False, True],
        [False, False, True],
    ]  # fmt: skip
    for each in (brief, usual):
        with pytest.raises(LeaseExpired):
            each.mem().read(0, 1)
    kept.mem().read(0, 1)
    kept.release()


def test_a_revocation_warns_and_then_ends(two: VirtualFabric) -> None:
    lease = page().acquire()
    heard: list[Notice] = []
    lease.on_notice(heard.append)
    two.revoke(lease, "maintenance", grace=5)
    lease.mem().write(0, b"saved")
    two.advance(5)
    with pytest.raises(Revoked):
        lease.mem().read(0, 1)
    assert [(each.kind, each.grace_ms) for each in heard] == [
        ("revoke_warning", 5_000), ("revoked", 0),
    ]  # fmt: skip
    assert two.leases() == []


@pytest.mark.parametrize("method", ["Acquire", "Bind"])
def test_a_lost_answer_costs_nothing_since_the_request_is_known(
    two: VirtualFabric, method: str
) -> None:
    two.lose_answers(method)
    lease = page().acquire()
    assert len(two.leases()) == 1
    lease.release()


def test_a_request_that_never_arrives_is_sent_again(two: VirtualFabric) -> None:
    two.lose_requests("Acquire", times=2)
    two.lose_requests("Renew")
    lease = page().acquire()
    lease.renew()
    lease.release()


def test_a_lost_answer_to_a_release_still_gives_the_lease_back(two: VirtualFabric) -> None:
    lease = page().acquire()
    two.lose_answers("Release", times=100)
    lease.release()
    assert two.leases() == []


def test_a_bind_that_fails_gives_the_grant_back(two: VirtualFabric) -> None:
    two.fail_bind("n1")
    with refused(RateLimited, "NO_CAPACITY"):
        on("n1")
    two.advance(1)
    assert two.leases() == []
    with on("n1"):
        pass


def test_threads_share_one_fabric(two: VirtualFabric) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                with page().lease_secs(60).acquire() as lease:
                    lease.mem().write(0, bytes([number]) * 64)
                    assert lease.mem().read(0, 64) == bytes([number]) * 64
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for _ in range(5):
        two.advance(1)
    for each in threads:
        each.join(30)
    assert failed == []
    assert two.leases() == []


@pytest.mark.parametrize("seed", range(12))
def test_no_law_breaks_on_a_day_of_random_faults(seed: int) -> None:
    dice = random.Random(seed)
    with fabric(nodes=3, memory="64KiB", blocks="64KiB", seed=seed) as world:
        held: list[MemLease] = []
        for _ in range(60):
            try:
                _something(world, dice, held)
            except FabricError:
                pass
            world.check()
        _calm_down(world)
        for lease in held:
            try:
                lease.release()
            except FabricError:
                pass
        world.advance(90)
        for fence in world.fences():
            world.clear_fence(fence.lease_id, "after the day")
        world.advance(10)
        world.check()
        assert world.leases() == []
        for node in world.nodes:
            assert world.capacity(node).free == 65_536


def _something(world: VirtualFabric, dice: random.Random, held: list[MemLease]) -> None:
    node = dice.choice(world.nodes)
    match dice.randrange(10):
        case 0 | 1 | 2:
            held.append(MemBuilder().min_bytes(4096 * dice.randint(1, 4)).lease_secs(20).acquire())
        case 3 if held:
            dice.choice(held).mem().write(0, b"x")
        case 4 if held:
            dice.choice(held).renew()
        case 5 if held:
            held.pop(dice.randrange(len(held))).release()
        case 6:
            harm = dice.choice([world.kill_node, world.stop_node, world.fail_teardown])
            with harm(node):
                world.advance(dice.choice([0.5, 4, 9]))
        case 7:
            with world.partition(dice.choice(["holder", "control"]), node):
                world.advance(dice.choice([0.5, 4, 9]))
        case 8 if held:
            world.revoke(dice.choice(held), grace=dice.choice([0, 2]))
        case _:
            world.lose_answers(dice.choice(["Acquire", "Bind", "Renew", "Extend", "Release"]))
            world.advance(dice.choice([0, 1, 5]))


def _calm_down(world: VirtualFabric) -> None:
    for method in ("Acquire", "Bind", "Renew", "Extend", "Release"):
        world.lose_answers(method, times=0)


# Beside the real one


def test_time_is_real_again_once_the_fabric_is_closed() -> None:
    real = _clock.boot_ns()
    with fabric():
        assert _clock.boot_ns() < 10**13
        assert _clock.boot_ns() == _clock.boot_ns()
    assert real <= _clock.boot_ns() < real + 60 * 10**9
    from grafos import _block, _lease, _memory

    for module in (_lease, _memory, _block):
        assert vars(module)["boot_ns"] is _clock.boot_ns


def test_two_of_them_share_the_clock() -> None:
    with fabric() as outer, fabric(seed=1) as inner:
        lease = page().fabric(outer).lease_secs(5).acquire()
        with page().acquire():
            assert len(inner.leases()) == 1
        inner.advance(6)
        assert not lease.valid
        assert outer.leases() == []


def test_it_is_refused_beside_leases_of_a_real_fabric(world: World) -> None:
    real = world.fabric()
    lease = page().fabric(real).acquire()
    with pytest.raises(Incompatible, match="real fabric"):
        fabric().start()
    lease.release()
    with fabric():
        with pytest.raises(Incompatible, match="time is not the real one"):
            page().fabric(real).acquire()
    page().fabric(real).acquire().release()


def test_it_starts_in_no_time() -> None:
    with fabric(nodes=2):
        pass
    started_ns = _clock.boot_ns()
    fabric(nodes=2).start().close()
    assert _clock.boot_ns() - started_ns < 50_000_000


def test_nothing_of_the_services_is_loaded_and_nothing_at_all_before_it_is_used() -> None:
    script = (
        "import sys, grafos.testing, grafos.testing.pytest_plugin\n"
        "assert 'grpc' not in sys.modules and 'cryptography' not in sys.modules\n"
        "import grafos\n"
        "with grafos.testing.fabric() as world:\n"
        "    grafos.MemBuilder().min_bytes(1).acquire().release()\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'services']\n"
    )
    path = [each for each in sys.path if each]
    subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path[:0] = {path!r}\n{script}"],
        timeout=60, check=True,
    )  # fmt: skip


# Leaks


def test_what_is_left_behind_is_named_with_where_it_was_acquired(two: VirtualFabric) -> None:
    lease = page().acquire()
    (leak,) = leaks(two)
    assert (leak.what, leak.lease_id) == ("lease", lease.lease_id)
    assert f"{__file__}:" in leak.acquired_at
    assert "named_with_where" in leak.acquired_at
    with pytest.raises(AssertionError, match=r"1 left behind:\n  lease .*test_testing.py"):
        assert_no_leaks(two)
    lease.release()
    assert_no_leaks(two)


def test_a_lease_that_nobody_holds_any_more_is_left_behind(two: VirtualFabric) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        page().acquire()
        gc.collect()
    assert [leak.what for leak in leaks(two)] == ["lease"]
    two.connection.poll()  # gives it back
    assert_no_leaks(two)


def test_a_fence_is_left_behind_until_it_is_cleared(two: VirtualFabric) -> None:
    lease = on("n1")
    with two.fail_teardown("n1"), pytest.raises(Fenced):
        lease.release()
    assert [leak.what for leak in leaks(two)] == ["fence"]
    two.clear_fence(lease, "looked at it")
    assert_no_leaks(two)


def test_a_failure_that_nobody_heard_of_is_left_behind(two: VirtualFabric) -> None:
    unheard, asked, told, used = (page().lease_secs(5).acquire() for _ in range(4))
    told.on_notice(lambda notice: None)
    two.advance(6)
    two.connection.poll()
    assert not asked.valid
    with pytest.raises(LeaseExpired):
        used.mem().read(0, 1)
    (leak,) = leaks(two)
    assert (leak.what, leak.lease_id) == ("failure", unheard.lease_id)
    assert "LEASE_EXPIRED" in leak.detail
    assert unheard.status is LeaseStatus.EXPIRED
    assert_no_leaks(two)


def test_a_registration_for_a_lease_that_is_over_is_left_behind(two: VirtualFabric) -> None:
    manager = RenewalManager()
    lease = page().acquire()
    manager.register(lease)
    lease.release()
    assert [leak.what for leak in leaks(two)] == ["registration"]
    manager.tick()
    assert_no_leaks(two)


def test_a_receipt_that_is_not_the_nodes_own_credits_nothing(
    two: VirtualFabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger here believes signatures and nothing else."""
    lease = on("n1")
    with monkeypatch.context() as patch:
        patch.setattr(two._agent("n1"), "key", two._agent("n2").key)
        assert not lease.release().credited
        assert two.capacity("n1").free < MIB
    two.advance(10)
    assert two.capacity("n1").free == MIB
