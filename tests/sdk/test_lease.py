"""A lease's life in its holder's hands: time, renewal, loss in two steps, and giving back."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing.pool
import pickle
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from grafos import (
    BlockBuilder,
    Degraded,
    Denied,
    Disconnected,
    FabricError,
    Failure,
    Fenced,
    Incompatible,
    LeaseExpired,
    LeaseStatus,
    MemBuilder,
    MemLease,
    Notice,
    Revoked,
)
from grafos._connection import Fabric
from grafos._session import LocalSession
from grafos_core import failure
from grafos_proto.v1 import lease_pb2
from tests.sdk.world import NODE_ID, World

EVENT_S = 10.0


def eventually(what: Callable[[], Any]) -> None:
    end = time.monotonic() + EVENT_S
    while not what():
        assert time.monotonic() < end, "it never came true"
        threading.Event().wait(0.005)


def polled(fabric: Fabric) -> bool:
    fabric.poll()
    return True


def take(fabric: Fabric, ttl_s: float = 30) -> MemLease:
    return MemBuilder().fabric(fabric).min_bytes(8192).lease_secs(ttl_s).acquire()


def forgotten(held: list[Any]) -> bool:
    """Let go of all of them, and let the collector run."""
    held.clear()
    gc.collect()
    return True


def elapse(lease: MemLease, milliseconds: float) -> None:
    """Wait until this much of the lease's time has gone by."""
    threading.Event().wait(milliseconds / 1000)


class TestWhatALeaseSays:
    def test_it_says_what_was_granted(self, world: World, fabric: Fabric) -> None:
        with take(fabric, 30) as lease:
            granted = world.book.grants[lease.lease_id].lease
            assert (lease.kind, lease.node_id) == ("mem", "n1")
            assert (lease.epoch, lease.generation) == (granted.epoch, granted.generation)
            assert lease.ttl_ms == 30_000
            assert 29_000 < lease.remaining_ms() < 30_000, "the holder stops before the node"
            assert abs(lease.expiry_ms - granted.end_ms) < 1_000
            assert lease.lifetime_end_ms == granted.lifetime_end_ms
            assert lease.valid
            assert lease.status is LeaseStatus.ACTIVE
            assert lease.lease_id in repr(lease)

    def test_it_knows_nothing_after_its_end(self, fabric: Fabric) -> None:
        lease = take(fabric)
        lease.release()
        assert not lease.valid
        assert lease.remaining_ms() == 0
        assert lease.status is LeaseStatus.RELEASED

    def test_the_holder_stops_before_the_node_does(self, world: World, fabric: Fabric) -> None:
        with take(fabric, 30) as lease:
            from grafos import _clock

            stop_ms = _clock.boot_ms() + lease.remaining_ms()
            assert stop_ms < world.book.grants[lease.lease_id].deadline_ms


class TestGivingBack:
    def test_a_receipt_says_what_the_node_measured_and_can_be_verified(
        self, world: World, fabric: Fabric
    ) -> None:
        lease = take(fabric)
        receipt = lease.release()
        assert (receipt.outcome, receipt.assurance) == ("torndown", "detached")
        assert receipt.measured == {"size_bytes": 0}
        assert receipt.credited
        assert receipt.frees
        assert receipt.verify(world.control.keys()) is receipt
        with pytest.raises(Denied) as refused:
            receipt.verify([])
        assert refused.value.code == "RECEIPT"

    def test_the_fabric_gives_out_the_keys_that_verify_it(
        self, world: World, fabric: Fabric
    ) -> None:
        (own,) = world.control.keys()
        own.owner = f"spiffe://test.local/node/{NODE_ID}"
        world.admission.keys = [own]
        receipt = take(fabric).release()
        keys = fabric.keys(node=NODE_ID)
        assert world.admission.requests("Keys")[-1].node_id == NODE_ID
        assert receipt.verify(keys) is receipt
        for foreign in (
            replace(keys[0], owner="spiffe://test.local/node/n11"),
            replace(keys[0], owner=f"spiffe://test.local/service/{NODE_ID}"),
            replace(keys[0], owner=f"{NODE_ID}/{'cd' * 16}"),
            replace(keys[0], use="seal"),
            replace(keys[0], public_key=keys[0].public_key[::-1]),
            replace(keys[0], public_key=b"short"),
        ):
            with pytest.raises(Denied) as refused:
                receipt.verify([foreign])
            assert refused.value.code == "RECEIPT"

    def test_a_receipt_that_was_changed_does_not_verify(self, world: World, fabric: Fabric) -> None:
        receipt = take(fabric).release()
        for forged in (
            replace(receipt, assurance="freed"),
            replace(receipt, lease_id="0" * 32),
            replace(receipt, signed=receipt.signed[:-4] + "AAAA"),
            replace(receipt, signed=""),
        ):
            with pytest.raises(FabricError) as refused:
                forged.verify(world.control.keys())
            assert refused.value.code == "RECEIPT"

    def test_releasing_again_gives_the_same_receipt(self, world: World, fabric: Fabric) -> None:
        lease = take(fabric)
        first = lease.release()
        assert lease.release() is first
        assert lease.drop() is first
        assert world.control.asked.count("release") == 1

    def test_what_was_not_credited_in_time_says_so_and_is_asked_again(
        self, world: World, fabric: Fabric
    ) -> None:
        world.control.credits = False
        lease = take(fabric)
        assert not lease.release().credited
        world.control.credits = True
        assert lease.release().credited

    def test_a_lease_that_ran_out_can_still_be_released(self, world: World, fabric: Fabric) -> None:
        lease = take(fabric, 1)
        eventually(lambda: world.book.grants[lease.lease_id].cause)
        receipt = lease.release()
        assert receipt.credited
        assert lease.status in (LeaseStatus.EXPIRED, LeaseStatus.RELEASED)

    def test_a_node_that_cannot_be_reached_is_released_through_admission(
        self, world: World, fabric: Fabric
    ) -> None:
        lease = take(fabric)
        world.stop_node()
        receipt = lease.release()
        assert not receipt.credited
        assert receipt.outcome == "unknown"
        assert len(world.admission.requests("Release")) == 1
        with pytest.raises(Denied, match="no receipt came"):
            receipt.verify(world.control.keys())

    def test_the_ledgers_credit_counts_where_the_node_is_silent(
        self, world: World, fabric: Fabric
    ) -> None:
        lease = take(fabric)
        world.stop_node()
        world.control.end(lease.lease_id, failure.of("LEASE_RELEASED"))
        assert lease.release().credited

    def test_with_everything_away_release_still_ends_soon(
        self, world: World, fabric: Fabric
    ) -> None:
        lease = take(fabric)
        world.stop_node()
        world.stop_admission()
        began = time.monotonic()
        assert not lease.release().credited
        assert time.monotonic() - began < 5
        assert not lease.valid

    def test_a_teardown_that_failed_is_raised_every_time(
        self, world: World, fabric: Fabric
    ) -> None:
        def refuse(op: str) -> None:
            if op == "release":
                raise failure.of("QUARANTINED", cause="teardown")

        world.control.before = refuse
        lease = take(fabric)
        for _ in range(2):
            with pytest.raises(Fenced, match="QUARANTINED"):
                lease.release()

    @pytest.mark.parametrize("who", ["node", "receipt", "ledger"])
    def test_a_failed_teardown_has_one_name_whoever_says_it(
        self, who: str, world: World, fabric: Fabric
    ) -> None:
        lease = take(fabric)
        grant = world.book.grants[lease.lease_id]

        def refuse(op: str) -> None:
            if op == "release" and who == "node":
                raise failure.of("FENCED", cause="release")
            if op == "release" and who == "receipt":
                grant.cause, grant.receipt = (
                    failure.of("LEASE_RELEASED"),
                    world.control.fenced(grant),
                )

        world.control.before = refuse
        if who == "ledger":
            grant.lease.state = lease_pb2.LEASE_STATE_FENCED
            world.stop_node()
        with pytest.raises(Fenced) as failed:
            lease.release()
        assert failed.value.code == "QUARANTINED"
        assert failed.value.lease_id == lease.lease_id

    @pytest.mark.parametrize("told", ["fenced", ""])
    def test_a_teardown_that_failed_while_nobody_looked_has_it_too(
        self, told: str, world: World, fabric: Fabric
    ) -> None:
        lease, heard = take(fabric), list[Notice]()
        lease.on_notice(heard.append)
        world.control.end(lease.lease_id, failure.of("FENCED", cause="agent_lost"), told)
        with pytest.raises(Fenced) as failed:
            eventually(lambda: lease.mem().read(0, 1) and False)
        assert (failed.value.code, failed.value.cause) == ("QUARANTINED", "agent_lost")
        fabric.poll()
        (notice,) = heard
        assert notice.failure is not None
        assert (notice.kind, notice.failure.code) == ("fenced", "QUARANTINED")

    def test_two_threads_that_release_get_one_receipt(self, world: World, fabric: Fabric) -> None:
        lease = take(fabric)
        with multiprocessing.pool.ThreadPool(8) as pool:
            receipts = pool.map(lambda _: lease.release(), range(8))
        assert len({id(each) for each in receipts}) == 1
        assert world.control.asked.count("release") == 1


class TestBlocks:
    def test_the_end_of_a_block_releases(self, world: World, fabric: Fabric) -> None:
        with take(fabric) as lease:
            assert world.control.asked.count("release") == 0
        assert world.control.asked.count("release") == 1
        assert not lease.valid

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_it_releases_however_the_block_ends(
        self, world: World, fabric: Fabric, error: type[BaseException]
    ) -> None:
        with pytest.raises(error):
            with take(fabric):
                raise error
        assert world.control.asked.count("release") == 1

    def test_a_block_whose_lease_is_fenced_does_not_succeed(
        self, world: World, fabric: Fabric
    ) -> None:
        def refuse(op: str) -> None:
            if op == "release":
                raise failure.of("QUARANTINED")

        world.control.before = refuse
        with pytest.raises(Fenced):
            with take(fabric):
                pass
        with pytest.raises(Fenced) as raised:
            with take(fabric):
                raise ValueError("first")
        assert isinstance(raised.value.__cause__, ValueError)
        with pytest.raises(KeyboardInterrupt) as interrupted:
            with take(fabric):
                raise KeyboardInterrupt
        assert "could not be given back" in interrupted.value.__notes__[0]

    def test_a_block_that_released_early_ends_quietly(self, world: World, fabric: Fabric) -> None:
        with take(fabric) as lease:
            lease.release()
        assert world.control.asked.count("release") == 1

    def test_an_asynchronous_block_releases_too(self, world: World, fabric: Fabric) -> None:
        async def work() -> None:
            async with take(fabric) as lease:
                lease.mem().write(0, b"x")

        asyncio.run(work())
        assert world.control.asked.count("release") == 1


class TestRenewal:
    def test_only_the_nodes_answer_moves_the_deadline(self, world: World, fabric: Fabric) -> None:
        with take(fabric, 4) as lease:
            before_ms = lease.remaining_ms()

            def silent(op: str) -> None:
                if op == "extend":
                    raise failure.of("RETRY_LATER")

            world.control.before = silent
            with pytest.raises(Degraded) as jeopardy:
                lease.renew(60)
            assert jeopardy.value.code == "JEOPARDY"
            assert jeopardy.value.lease_id == lease.lease_id
            left = lease.remaining_ms() / before_ms
            assert left > 0.4, "there is time to save what can be saved"
            assert len(world.admission.requests("Renew")) == 1, "the ledger has renewed it"
            assert lease.remaining_ms() <= before_ms
            assert lease.status == "jeopardy"
            world.control.before = lambda op: None
            assert lease.renew(60) > 50_000
            assert lease.status == "active"

    def test_a_renewal_raises_end_generation_and_ttl(self, fabric: Fabric) -> None:
        with take(fabric, 5) as lease:
            before = lease.generation, lease.expiry_ms
            assert lease.renew(40) > 39_000
            assert lease.generation > before[0]
            assert lease.expiry_ms > before[1] + 30_000
            assert lease.ttl_ms == 40_000

    def test_a_shorter_renewal_takes_nothing_away(self, fabric: Fabric) -> None:
        with take(fabric, 30) as lease:
            lease.renew(1)
            assert lease.remaining_ms() > 28_000

    def test_a_refusal_with_a_reason_is_raised_as_it_is(self, world: World, fabric: Fabric) -> None:
        def refuse(method: str) -> None:
            if method == "Renew":
                raise failure.of("LIFETIME")

        world.admission.before = refuse
        with take(fabric) as lease:
            with pytest.raises(LeaseExpired) as refused:
                lease.renew()
            assert refused.value.code == "LIFETIME"
            assert lease.valid, "it still lives to its deadline"

    def test_a_dead_lease_is_not_renewed(self, world: World, fabric: Fabric) -> None:
        lease = take(fabric)
        lease.release()
        with pytest.raises(LeaseExpired, match="LEASE_RELEASED"):
            lease.renew()
        assert not world.admission.requests("Renew")

    def test_auto_renew_keeps_it_alive_past_its_ttl(self, world: World, fabric: Fabric) -> None:
        builder = MemBuilder().fabric(fabric).min_bytes(1).lease_secs(1).auto_renew()
        with builder.acquire() as lease:
            lease.mem().write(0, b"still here")
            elapse(lease, 2_500)
            assert lease.mem().read(0, 10) == b"still here"
            assert lease.generation >= 3
        count = len(world.admission.requests("Renew"))
        elapse(lease, 1_000)
        assert len(world.admission.requests("Renew")) == count, "a released lease is let go"

    def test_auto_renew_holds_no_lease_alive(self, world: World, fabric: Fabric) -> None:
        held = [MemBuilder().fabric(fabric).min_bytes(1).lease_secs(1).auto_renew().acquire()]
        lease_id = held[0].lease_id
        with pytest.warns(ResourceWarning):
            eventually(lambda: forgotten(held) and lease_id not in fabric._leases)
        fabric.poll()
        assert world.book.grants[lease_id].cause is not None


class TestLoss:
    def test_loss_comes_in_two_steps(self, world: World, fabric: Fabric) -> None:
        """First `Degraded`, so that work can be saved, then `LeaseExpired`."""
        heard: list[Notice] = []
        builder = MemBuilder().fabric(fabric).min_bytes(1).lease_secs(1).auto_renew()
        lease = builder.acquire()
        lease.on_notice(heard.append)
        world.stop_admission()
        eventually(lambda: polled(fabric) and heard)
        assert [(each.kind, type(each.failure)) for each in heard] == [("degraded", Degraded)]
        assert heard[0].failure is not None
        assert heard[0].failure.code == "JEOPARDY"
        assert lease.mem().read(0, 1) == b"\0", "jeopardy takes nothing away"
        eventually(lambda: polled(fabric) and len(heard) > 1)
        assert [(each.kind, type(each.failure)) for each in heard[1:]] == [
            ("expired", LeaseExpired)
        ]
        assert not lease.valid
        with pytest.raises(LeaseExpired):
            lease.mem().read(0, 1)

    def test_each_end_is_told_once_though_clock_and_node_both_know(
        self, world: World, fabric: Fabric
    ) -> None:
        heard: list[Notice] = []
        ended, released = take(fabric, 1), take(fabric)
        for lease in (ended, released):
            lease.on_notice(heard.append)
        released.release()
        world.control.tell(released.lease_id, "released")
        eventually(lambda: polled(fabric) and heard)
        eventually(lambda: world.book.grants[ended.lease_id].cause)
        for _ in range(20):
            fabric.poll()
            elapse(ended, 10)
        assert [(each.lease_id, each.kind) for each in heard] == [(ended.lease_id, "expired")]

    def test_a_lease_runs_out_without_a_word_from_anybody(
        self, world: World, fabric: Fabric
    ) -> None:
        world.control.silent_end = True
        lease = take(fabric, 1)
        memory = lease.mem()
        memory.write(0, b"secret")
        eventually(lambda: not lease.valid)
        for use in (lambda: memory.read(0, 6), lambda: memory.write(0, b"x"), lease.renew):
            with pytest.raises(LeaseExpired) as expired:
                use()
            assert expired.value.code == "LEASE_EXPIRED"
        assert lease.status is LeaseStatus.EXPIRED

    @pytest.mark.parametrize(
        ("code", "notice", "kind", "status"),
        [
            ("REVOKED", "revoked", Revoked, LeaseStatus.REVOKED),
            ("FENCED", "fenced", Fenced, LeaseStatus.FENCED),
            ("AGENT_LOST", "fenced", Fenced, LeaseStatus.FENCED),
            ("LEASE_EXPIRED", "expired", LeaseExpired, LeaseStatus.EXPIRED),
        ],
    )
    @pytest.mark.parametrize("told", [True, False])
    def test_the_cause_of_the_end_is_raised_whether_it_was_told_or_not(
        self, world: World, fabric: Fabric, code: str, notice: str, kind: type[FabricError],
        status: LeaseStatus, told: bool,
    ) -> None:  # fmt: skip
        heard: list[Notice] = []
        lease = take(fabric)
        lease.on_notice(heard.append)
        memory = lease.mem()
        memory.write(0, b"secret")
        world.control.end(lease.lease_id, failure.of(code, cause="operator"), notice * told)
        for _ in range(2):
            with pytest.raises(kind) as ended:
                memory.read(0, 6)
            assert (ended.value.code, ended.value.cause) == (code, "operator")
            assert (ended.value.lease_id, ended.value.epoch) == (lease.lease_id, lease.epoch)
        assert lease.status is status
        fabric.poll()
        assert [each.kind for each in heard] == [notice]

    def test_a_warning_before_a_revocation_ends_nothing(self, world: World, fabric: Fabric) -> None:
        heard: list[Notice] = []
        with take(fabric) as lease:
            lease.on_notice(heard.append)
            world.control.tell(lease.lease_id, "revoke_warning", "make room", grace_ms=500)
            eventually(lambda: polled(fabric) and heard)
            assert (heard[0].kind, heard[0].reason, heard[0].grace_ms) == (
                "revoke_warning", "make room", 500,
            )  # fmt: skip
            assert lease.valid
            assert lease.mem().read(0, 1) == b"\0"

    @pytest.mark.parametrize("seen", ["valid", "status"])
    def test_an_end_that_has_arrived_is_known_without_a_use(
        self, seen: str, world: World, fabric: Fabric
    ) -> None:
        lease, heard = take(fabric), list[Notice]()
        lease.on_notice(heard.append)
        lease.mem().read(0, 1)
        world.control.end(lease.lease_id, failure.of("REVOKED"), "revoked")
        if seen == "valid":
            eventually(lambda: not lease.valid)
        else:
            eventually(lambda: lease.status is LeaseStatus.REVOKED)
        assert (lease.valid, lease.status) == (False, "revoked")
        assert not heard
        fabric.poll()
        assert [each.kind for each in heard] == ["revoked"]

    def test_looking_at_a_lease_waits_for_nobody(self, fabric: Fabric) -> None:
        lease = take(fabric)
        session = lease._grip.node._session
        assert isinstance(session, LocalSession)
        with session._lock:  # as while another thread is handed a lease over
            began = time.monotonic()
            assert (lease.valid, lease.status) == (True, "active")
            assert time.monotonic() - began < 0.5
        lease.release()

    def test_callbacks_run_at_an_operation(self, world: World, fabric: Fabric) -> None:
        heard: list[Notice] = []
        with take(fabric) as lease:
            lease.on_notice(heard.append)
            lease.mem().read(0, 1)
            world.control.tell(lease.lease_id, "revoke_warning")
            eventually(lambda: (lease.mem().read(0, 1), heard)[1])

    def test_the_thread_that_renews_calls_nobody_back_unless_told_to(
        self, world: World, fabric: Fabric
    ) -> None:
        heard: list[str] = []
        builder = MemBuilder().fabric(fabric).min_bytes(1).lease_secs(1).auto_renew()
        with builder.acquire() as lease:
            lease.on_notice(lambda notice: heard.append(threading.current_thread().name))
            world.control.tell(lease.lease_id, "revoke_warning")
            renewed = lease.generation + 1
            eventually(lambda: lease.generation > renewed)
            assert heard == []
            fabric.poll()
            assert heard == [threading.current_thread().name]

    def test_start_lets_the_sdks_thread_call_back(self, world: World, fabric: Fabric) -> None:
        heard: list[str] = []
        with take(fabric) as lease:
            lease.on_notice(lambda notice: heard.append(threading.current_thread().name))
            fabric.start()
            world.control.tell(lease.lease_id, "revoke_warning")
            eventually(lambda: heard)
        assert heard == ["grafos"]

    def test_a_callback_that_fails_harms_nobody(
        self, world: World, fabric: Fabric, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(notice: Notice) -> None:
            raise RuntimeError("mine")

        heard: list[Notice] = []
        with take(fabric) as lease:
            lease.on_notice(broken)
            lease.on_notice(heard.append)
            world.control.tell(lease.lease_id, "revoke_warning")
            eventually(lambda: polled(fabric) and heard)
        assert lease.lease_id in caplog.text

    def test_a_failure_names_lease_epoch_code_and_what_to_do(
        self, world: World, fabric: Fabric
    ) -> None:
        lease = take(fabric)
        world.control.end(lease.lease_id, failure.of("REVOKED", cause="preempted"), "revoked")
        with pytest.raises(Revoked) as revoked:
            lease.mem().read(0, 1)
        text = str(revoked.value)
        for part in (lease.lease_id, f"epoch {lease.epoch}", "REVOKED", "n1", "do not retry"):
            assert part in text
        assert revoked.value.failure is Failure.Revoked
        again = pickle.loads(pickle.dumps(revoked.value))
        assert again == revoked.value

    def test_a_node_that_has_forgotten_the_lease_has_lost_it(
        self, world: World, fabric: Fabric
    ) -> None:
        world.control.descriptor = False
        lease = take(fabric)
        world.table.shut(lease.lease_id)
        with pytest.raises(Fenced) as fenced:
            lease.mem().read(0, 1)
        assert fenced.value.code == "AGENT_LOST"
        assert not lease.valid

    def test_memory_that_went_with_its_agent_is_fenced(self, world: World, fabric: Fabric) -> None:
        import os

        lease = take(fabric)
        lease.mem().write(0, b"secret")
        world.stop_node()
        os.ftruncate(world.book.grants[lease.lease_id].fd, 0)
        with pytest.raises(Fenced) as fenced:
            lease.mem().read(0, 6)
        assert fenced.value.code == "AGENT_LOST"

    def test_a_poll_sees_that_the_memory_is_gone(self, world: World, fabric: Fabric) -> None:
        heard: list[Notice] = []
        lease = take(fabric)
        lease.on_notice(heard.append)
        world.control.end(lease.lease_id, failure.of("REVOKED"))
        fabric.poll()
        assert [(each.kind, type(each.failure)) for each in heard] == [("revoked", Revoked)]
        assert not lease.valid

    def test_a_front_that_is_briefly_away_does_not_cost_the_receipt(
        self, world: World, fabric: Fabric
    ) -> None:
        left = [failure.of("RETRY_LATER"), failure.of("RETRY_LATER")]

        def refuse(op: str) -> None:
            if op == "release" and left:
                raise left.pop()

        world.control.before = refuse
        assert take(fabric).release().outcome == "torndown"


class TestForgetting:
    def test_a_lease_that_nobody_holds_warns_and_goes_back_at_the_next_call(
        self, world: World, fabric: Fabric
    ) -> None:
        held = [take(fabric)]
        lease_id = held[0].lease_id
        with pytest.warns(ResourceWarning, match=lease_id):
            forgotten(held)
        assert world.control.asked.count("release") == 0, "nothing is sent by a finalizer"
        fabric.poll()
        assert world.control.asked.count("release") == 1
        assert world.book.grants[lease_id].cause is not None

    def test_the_next_acquire_gives_it_back_too(self, world: World, fabric: Fabric) -> None:
        with pytest.warns(ResourceWarning):
            forgotten([take(fabric)])
        with take(fabric):
            assert world.control.asked.count("release") == 1

    def test_a_handle_keeps_its_lease(self, world: World, fabric: Fabric) -> None:
        memory = take(fabric).mem()
        gc.collect()
        memory.write(0, b"x")
        held = memory._lease
        assert isinstance(held, MemLease)
        held.release()

    def test_what_is_over_or_kept_is_forgotten_quietly(self, world: World, fabric: Fabric) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            take(fabric).release()
            kept = MemBuilder().fabric(fabric).min_bytes(1).keep().acquire()
            del kept
            detached = take(fabric)
            detached.detach()
            del detached
            gc.collect()
        fabric.poll()
        assert world.control.asked.count("release") == 1

    def test_closing_gives_back_all_but_what_is_kept(self, world: World) -> None:
        fabric = world.fabric()
        held, kept = take(fabric), MemBuilder().fabric(fabric).min_bytes(1).keep().acquire()
        fabric.close()
        assert world.book.grants[held.lease_id].cause is not None
        assert world.book.grants[kept.lease_id].cause is None
        fabric.close()
        with pytest.raises(Disconnected, match="closed"):
            take(fabric)


class TestHandingOn:
    def test_a_detached_lease_survives_its_block_and_is_attached(self, world: World) -> None:
        first, second = world.fabric("alice"), world.fabric("alice")
        with take(first) as lease:
            lease.mem().write(0, b"for the next one")
            lease.detach()
        assert world.book.grants[lease.lease_id].cause is None
        first.close()
        with MemBuilder().fabric(second).attach(lease.lease_id) as again:
            assert again.lease_id == lease.lease_id
            assert again.epoch == lease.epoch
            assert again.generation > lease.generation
            assert again.mem().read(0, 16) == b"for the next one"

    def test_attach_works_on_the_class_as_well(self, world: World, fabric: Fabric) -> None:
        from tests.sdk.test_builder import default_of

        lease = take(fabric)
        with default_of(fabric):
            again = MemBuilder.attach(lease.lease_id)
        assert again.lease_id == lease.lease_id
        again.release()

    def test_a_handle_whose_lease_another_took_up_neither_works_nor_releases_it(
        self, world: World
    ) -> None:
        first, second = world.fabric("alice"), world.fabric("alice")
        with take(first) as old:
            new = MemBuilder().fabric(second).attach(old.lease_id)
            eventually(lambda: polled(first) and not old.valid)
            with pytest.raises(Fenced, match="another holder attached"):
                old.mem().read(0, 1)
        assert not old.release().credited
        assert not world.admission.requests("Release")
        assert world.book.grants[old.lease_id].cause is None
        new.mem().write(0, b"mine")
        assert new.release().credited

    def test_even_where_the_node_cannot_be_asked(self, world: World) -> None:
        first, second = world.fabric("alice"), world.fabric("alice")
        old = take(first)
        new = MemBuilder().fabric(second).attach(old.lease_id)
        world.stop_node()
        old.release()
        assert not world.admission.requests("Release")
        new.release()
        assert len(world.admission.requests("Release")) == 1

    def test_of_two_handles_in_one_connection_the_later_goes_on(
        self, world: World, fabric: Fabric
    ) -> None:
        with take(fabric) as old:
            new = MemBuilder().fabric(fabric).attach(old.lease_id)
            with pytest.raises(Fenced, match="EPOCH_STALE"):
                old.mem().read(0, 1)
        assert world.book.grants[old.lease_id].cause is None
        assert new.release().credited

    def test_attaching_what_is_gone_says_why(self, world: World, fabric: Fabric) -> None:
        with pytest.raises(Denied) as unknown:
            MemBuilder().fabric(fabric).attach("0" * 32)
        assert unknown.value.code == "NOT_FOUND"
        lease = take(fabric)
        world.control.end(lease.lease_id, failure.of("REVOKED"), "revoked")
        with pytest.raises(Revoked):
            MemBuilder().fabric(fabric).attach(lease.lease_id)

    def test_attaching_as_another_kind_is_refused_and_harms_nothing(
        self, world: World, fabric: Fabric
    ) -> None:
        with take(fabric) as lease:
            with pytest.raises(Denied, match="kind mem"):
                BlockBuilder().fabric(fabric).attach(lease.lease_id)
            assert world.book.grants[lease.lease_id].cause is None

    @pytest.mark.parametrize("move", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_leases_handles_and_connections_stay_in_their_process(
        self, fabric: Fabric, move: Callable[[Any], Any]
    ) -> None:
        with take(fabric) as lease:
            for each in (lease, lease.mem(), fabric):
                with pytest.raises(TypeError, match=r"attach|connect"):
                    move(each)


class TestLooking:
    def test_the_ledgers_view_of_leases(self, world: World, fabric: Fabric) -> None:
        with take(fabric) as lease, BlockBuilder().fabric(fabric).min_blocks(1).acquire() as block:
            assert fabric.describe(lease.lease_id).epoch == lease.epoch
            assert {each.lease_id for each in fabric.leases()} == {lease.lease_id, block.lease_id}
            assert [each.lease_id for each in fabric.leases(kind="block")] == [block.lease_id]
            with pytest.raises(Incompatible, match="kind"):
                list(fabric.leases(kind="gold"))

    def test_a_holder_may_revoke_its_own(self, world: World, fabric: Fabric) -> None:
        lease = take(fabric)
        fabric.revoke(lease.lease_id, reason="drill")
        with pytest.raises(Revoked):
            lease.mem().read(0, 1)
