"""A whole node agent, three processes and a disk, as ledger, holders and operators meet it."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grafos_core.failure import (
    Degraded,
    Denied,
    Disconnected,
    FabricError,
    Fenced,
    Incompatible,
    LeaseExpired,
    Revoked,
)
from grafos_core.lease import EndCause, Isolation, Kind, OnHolderExit, Policy
from grafos_core.receipt import Assurance, Outcome
from grafos_proto.v1 import lease_pb2, ledger_pb2, node_pb2
from tests.services.nodeagent.agents import (
    AgentUnderTest,
    agent_in,
    bound,
    child_of,
    code_of,
    fetched,
    renewed,
    tried,
)
from tests.services.nodeagent.collector import collector_of
from tests.services.nodeagent.fabric import (
    ADMISSION,
    LEDGER,
    Fabric,
    HolderSide,
    Signer,
    eventually,
    fabric_in,
)

BLOCKS = 16


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    with fabric_in(tmp_path_factory.mktemp("fabric")) as made:
        yield made


@pytest.fixture(scope="module")
def running(fabric: Fabric, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentUnderTest]:
    """One agent for all tests that leave it as they found it."""
    with agent_in(fabric, tmp_path_factory.mktemp("a")) as agent:
        agent.start()
        yield agent
        assert agent.stop() == 0


@pytest.fixture
def own(tmp_path: Path) -> Iterator[AgentUnderTest]:
    """An agent that the test may kill, in a fabric of its own; not started."""
    with fabric_in(tmp_path) as fabric, agent_in(fabric, tmp_path) as agent:
        yield agent


@pytest.fixture
def alice(running: AgentUnderTest) -> HolderSide:
    return running.holder()


class TestALease:
    def test_memory_is_bound_used_released_and_proved_back(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = bound(running, alice)
        alice.write(slip, 10, b"hello")
        assert alice.read(slip, 8, 9).data == b"\0\0hello\0\0"
        eventually(lambda: (slip.lease_id, slip.epoch, 1) in fabric.ledger.bound)
        assert alice.release(slip).credited
        receipt = fabric.ledger.receipt_of(slip.lease_id)
        assert (receipt.outcome, receipt.cause) == (Outcome.TORNDOWN, EndCause.RELEASE)
        assert receipt.assurance is Assurance.FREED, "its descriptor never left the agent"
        assert receipt.measured["measure_st_blocks"] == 0
        assert code_of(LeaseExpired, alice.read, slip) == "LEASE_RELEASED"

    def test_blocks_are_zeros_for_the_next_holder(
        self, running: AgentUnderTest, alice: HolderSide
    ) -> None:
        slip = bound(running, alice, kind=Kind.BLOCK, amount=BLOCKS)
        secret = secrets.token_bytes(4096)
        alice.write(slip, 4096, secret, flush=True)
        assert alice.read(slip, 4096, 4096).data == secret
        on_disk = (running.state / "blocks").read_bytes()[: BLOCKS * 4096]
        assert any(on_disk), "something was written"
        assert secret not in on_disk, "and it is ciphertext"
        alice.release(slip)
        assert not any((running.state / "blocks").read_bytes()[: BLOCKS * 4096])
        following = bound(running, alice, kind=Kind.BLOCK, amount=BLOCKS)
        assert alice.read(following, 4096, 4096).data == bytes(4096)
        alice.release(following)

    def test_an_expiry_in_mid_use_is_told_as_one_and_credited(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = bound(running, alice, ttl_ms=1_000)
        assert code_of(LeaseExpired, keep_writing, alice, slip) == "LEASE_EXPIRED"
        assert fabric.ledger.receipt_of(slip.lease_id).cause is EndCause.EXPIRED

    def test_a_renewal_moves_the_deadline_and_its_answer_can_be_asked_again(
        self, running: AgentUnderTest, alice: HolderSide
    ) -> None:
        slip = bound(running, alice, ttl_ms=1_500)
        _, text = renewed(running, slip, ttl_ms=30_000)
        assert 29_000 < alice.extend(text).remaining_ms <= 30_000
        assert alice.extend(text).generation == 2
        assert alice.read(slip).remaining_ms > 25_000
        alice.release(slip)

    def test_g8_a_second_release_is_answered_like_the_first(
        self, running: AgentUnderTest, alice: HolderSide
    ) -> None:
        slip = bound(running, alice)
        first, second = alice.release(slip), alice.release(slip)
        assert (second.credited, len(second.receipt) > 100) == (True, True)
        assert first.credited
        slip = running.fabric.token(alice.credentials)
        assert code_of(Denied, alice.release, slip) == "NOT_FOUND"

    def test_g8_nobody_else_releases_a_lease(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = bound(running, alice)
        mallory = running.holder(fabric.people.holder("mallory"))
        assert code_of(Denied, mallory.release, slip) == "NOT_FOUND"
        assert alice.read(slip).data == bytes(16)
        alice.release(slip)

    def test_a_ledger_that_does_not_answer_holds_no_release_up(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = bound(running, alice)
        fabric.ledger.credit_is_away = True
        try:
            answer = alice.release(slip, credit_wait_ms=200)
        finally:
            fabric.ledger.credit_is_away = False
        assert not answer.credited
        fabric.ledger.receipt_of(slip.lease_id)


class TestTokens:
    def test_k14_a_token_of_another_holder_is_refused(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        text = fabric.sign(fabric.token(fabric.people.holder("bob")))
        assert code_of(Denied, alice.bind, text) == "HOLDER_MISMATCH"

    def test_k14_a_certificate_renewed_over_the_same_key_keeps_the_lease(
        self, running: AgentUnderTest, alice: HolderSide
    ) -> None:
        slip = bound(running, alice)
        again = running.holder(alice.credentials)
        assert again.read(slip).data == bytes(16)
        alice.release(slip)

    def test_a_signature_by_an_unknown_or_wrong_key_is_refused(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = fabric.token(alice.credentials)
        stranger = Signer("lease", "nobody")
        text = fabric.sign(slip, by=stranger)
        assert code_of(Disconnected, alice.bind, text) == "RETRY_LATER", "a list may be on its way"
        eventually(lambda: code_of(FabricError, alice.bind, text) == "TOKEN_KEY_UNKNOWN")
        stranger.key_id = fabric.admission_key.key_id
        assert code_of(Denied, alice.bind, fabric.sign(slip, by=stranger)) == "TOKEN_SIGNATURE"

    def test_k15_a_generation_is_bound_once(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = fabric.token(alice.credentials)
        text = fabric.sign(slip)
        alice.bind(text)
        second = running.holder(alice.credentials)
        assert code_of(Incompatible, second.bind, text) == "LEASE_BOUND"
        assert code_of(Incompatible, second.attach, text) == "LEASE_BOUND"
        alice.release(slip)

    def test_p4_a_bind_whose_answer_was_lost_is_asked_for_again_and_answered(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = fabric.token(alice.credentials)
        text = fabric.sign(slip)
        first, second = alice.bind(text), alice.bind(text)
        assert (second.lease_id, second.generation, second.size_bytes) == (
            first.lease_id, first.generation, first.size_bytes,
        )  # fmt: skip
        assert 0 < second.remaining_ms <= first.remaining_ms
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            os.close(fetched(sock, second, alice.session))
            third = alice.bind(text)
        assert third.handover_secret not in (first.handover_secret, second.handover_secret)
        assert list(running.leases()).count(slip.lease_id) == 1
        alice.release(slip)

    def test_k15_a_higher_generation_takes_over(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = bound(running, alice, policy=Policy(on_holder_exit=OnHolderExit.KEEP))
        alice.write(slip, 0, b"mine")
        bob = running.holder(fabric.people.holder("bob"))
        later, text = renewed(
            running, slip, subject=str(bob.credentials.identity),
            holder_thumbprint=bob.credentials.thumbprint,
        )  # fmt: skip
        assert bob.attach(text).generation == 2
        assert bob.read(later, 0, 4).data == b"mine"
        assert code_of(Denied, alice.read, slip) == "NOT_FOUND"
        assert code_of(Denied, alice.extend, renewed(running, later)[1]) == "HOLDER_MISMATCH"
        bob.release(later)

    def test_k16_a_token_of_a_released_lease_is_burnt(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = fabric.token(alice.credentials)
        text = fabric.sign(slip)
        alice.bind(text)
        alice.release(slip)
        assert code_of(Fenced, alice.bind, text) == "EPOCH_BURNT"

    def test_k17_an_older_epoch_on_the_same_blocks_is_stale(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        older = fabric.token(alice.credentials, kind=Kind.BLOCK, amount=BLOCKS, extent_offset=32)
        newer = fabric.token(alice.credentials, kind=Kind.BLOCK, amount=BLOCKS, extent_offset=40)
        alice.bind(fabric.sign(newer))
        assert code_of(Fenced, alice.bind, fabric.sign(older)) == "EPOCH_STALE"
        alice.release(newer)
        assert code_of(Fenced, alice.bind, fabric.sign(older)) == "EPOCH_STALE"

    def test_k17_epochs_out_of_range_are_refused(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        for epoch in (0, 2**64 - 1):
            text = fabric.sign(fabric.token(alice.credentials, epoch=epoch))
            assert code_of(Incompatible, alice.bind, text) == "EPOCH_RANGE"

    def test_k18_a_revoked_lease_is_refused_as_revoked_bound_or_not(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = bound(running, alice)
        stream = alice.notices()
        order = node_pb2.NodeRevokeRequest(
            lease_id=slip.lease_id, epoch=slip.epoch, cause="operator", reason="maintenance"
        )
        running.order("Revoke", order)
        assert code_of(Revoked, alice.read, slip) == "REVOKED"
        notice = next(each for each in stream if each.lease_id == slip.lease_id)
        assert (notice.kind, notice.failure.failure) == ("revoked", "Revoked")
        stream.cancel()  # type: ignore[attr-defined]
        assert fabric.ledger.receipt_of(slip.lease_id).cause is EndCause.REVOKED
        assert code_of(Revoked, alice.bind, fabric.sign(slip)) == "REVOKED"

    def test_k19_what_the_token_does_not_allow_is_refused(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = bound(running, alice, ops=("read",))
        assert alice.read(slip).data == bytes(16)
        assert code_of(Denied, alice.write, slip, 0, b"x") == "SCOPE"
        alice.release(slip)
        gpu = fabric.sign(fabric.token(alice.credentials, kind=Kind.GPU))
        assert code_of(Denied, alice.bind, gpu) == "SCOPE"

    def test_s3_more_than_the_node_has_is_refused_whatever_the_token_says(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        text = fabric.sign(fabric.token(alice.credentials, amount=1 << 40))
        assert code_of(Incompatible, alice.bind, text) == "RANGE"

    def test_g13a_memory_that_is_lent_already_is_busy(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = bound(running, alice, amount=48 << 20)
        other = fabric.token(alice.credentials, amount=48 << 20)
        assert code_of(Fenced, alice.bind, fabric.sign(other)) == "SLOT_BUSY"
        alice.release(slip)
        alice.bind(fabric.sign(other))
        alice.release(other)


class TestOrders:
    def test_a_burnt_grant_is_answered_with_a_receipt_and_never_bound(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = fabric.token(alice.credentials)
        lease = lease_pb2.Lease(
            lease_id=slip.lease_id, kind=lease_pb2.KIND_MEM, amount=slip.amount, epoch=slip.epoch
        )
        order = node_pb2.NodeBurnRequest(lease_id=slip.lease_id, epoch=slip.epoch, lease=lease)
        answer = running.order("Burn", order, who=LEDGER)
        assert answer.receipt
        receipt = fabric.ledger.receipt_of(slip.lease_id)
        assert receipt.outcome is Outcome.NOTHING_CREATED
        assert code_of(Fenced, alice.bind, fabric.sign(slip)) == "EPOCH_BURNT"

    def test_what_the_ledger_asks_for_at_registration_is_done_however_often_it_asks(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = bound(running, alice)
        lease = lease_pb2.Lease(
            lease_id=slip.lease_id, kind=lease_pb2.KIND_MEM, amount=slip.amount, epoch=slip.epoch
        )
        fabric.ledger.obligations = [
            ledger_pb2.Obligation(
                lease_id=slip.lease_id, epoch=slip.epoch, action="revoke", lease=lease
            )
        ]
        try:
            receipt = fabric.ledger.receipt_of(slip.lease_id)
            eventually(lambda: len(fabric.ledger.receipts[slip.lease_id]) > 1)
        finally:
            fabric.ledger.obligations = []
        assert receipt.cause is EndCause.REVOKED
        assert len({r.record_hash for r in fabric.ledger.receipts[slip.lease_id]}) == 1

    def test_holders_have_no_business_at_the_control_listener(
        self, running: AgentUnderTest, fabric: Fabric
    ) -> None:
        request = node_pb2.ListNodeLeasesRequest()
        who = fabric.people.holder().identity
        assert code_of(Denied, running.order, "ListLeases", request, who) == "ROLE"

    def test_the_registration_carries_what_admission_must_know(
        self, running: AgentUnderTest, fabric: Fabric
    ) -> None:
        said: ledger_pb2.RegisterRequest = eventually(
            lambda: next(
                (each for each in fabric.ledger.registrations if each.readiness.ready), None
            )
        )
        assert {offer.kind for offer in said.offers} == {lease_pb2.KIND_MEM, lease_pb2.KIND_BLOCK}
        assert said.front_endpoint == running.front_endpoint
        assert (len(said.audit_head), said.boot_epoch) == (32, 1)
        assert set(said.readiness.ready_kinds) == {lease_pb2.KIND_MEM, lease_pb2.KIND_BLOCK}


class TestLocalHolders:
    def test_a_descriptor_that_left_the_agent_is_cut_and_the_receipt_says_detached(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = fabric.token(alice.credentials)
        answer = alice.bind(fabric.sign(slip))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            fd = fetched(sock, answer, alice.session)
            os.pwrite(fd, b"by hand", 0)
            assert alice.read(slip, 0, 7).data == b"by hand"
            alice.release(slip)
            assert os.pread(fd, 7, 0) == b"", "d6: the memory is gone from under its holder"
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 4096)
            os.close(fd)
        receipt = fabric.ledger.receipt_of(slip.lease_id)
        assert receipt.assurance is Assurance.DETACHED
        assert receipt.measured["measure_exported"] is True

    def test_an_isolated_lease_is_freed_for_certain(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = fabric.token(alice.credentials, policy=Policy(isolation=Isolation.CONTEXT))
        answer = alice.bind(fabric.sign(slip))
        assert not answer.descriptor
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            assert fetched(sock, answer, alice.session) == -1
        alice.release(slip)
        assert fabric.ledger.receipt_of(slip.lease_id).assurance is Assurance.FREED

    def test_a_holder_that_is_killed_loses_its_lease_at_once(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        slip = fabric.token(alice.credentials)
        answer = alice.bind(fabric.sign(slip))
        program = (
            "import json, socket, sys\n"
            "sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "sock.connect(sys.argv[1])\n"
            "sock.send(json.dumps({'v': 1, 'secret': sys.argv[2], 'session': sys.argv[3]})"
            ".encode())\n"
            "assert b'lease_id' in socket.recv_fds(sock, 4096, 4)[0]\n"
            "print('held', flush=True)\n"
            "sys.stdin.read()\n"
        )
        arguments = [answer.handover_path, answer.handover_secret.hex(), alice.session]
        with subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            holder.kill()
        assert fabric.ledger.receipt_of(slip.lease_id).cause is EndCause.HOLDER_EXIT

    def test_a_lost_connection_ends_the_lease_after_its_time_and_not_before(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        stream = alice.notices()
        slip = bound(running, alice, policy=Policy(reconnect_ms=400))
        stream.cancel()  # type: ignore[attr-defined]
        assert alice.read(slip).data == bytes(16)
        back = alice.notices()
        with pytest.raises(AssertionError, match="never came true"):
            eventually(lambda: slip.lease_id in fabric.ledger.receipts, 0.8)
        back.cancel()  # type: ignore[attr-defined]
        assert fabric.ledger.receipt_of(slip.lease_id).cause is EndCause.DISCONNECTED


class TestTheRecord:
    def test_all_that_happened_reaches_the_collector_linked_and_sealed(
        self, own: AgentUnderTest
    ) -> None:
        with collector_of(own.fabric.people) as collector:
            own.start("--audit", collector.endpoint)
            alice = own.holder()
            slip = bound(own, alice)
            alice.release(slip)
            eventually(lambda: "agent.credited" in collector.kinds_of(slip.lease_id))
            assert collector.kinds_of(slip.lease_id) == [
                "agent.bound", "agent.teardown_begin", "agent.teardown_end", "agent.credited",
            ]  # fmt: skip
            receipt = own.fabric.ledger.receipt_of(slip.lease_id)
            proof = collector.records[receipt.record_number - 1]
            assert (proof.hash.hex(), proof.kind) == (receipt.record_hash, "agent.teardown_end")

    def test_a_collector_that_was_away_gets_what_it_missed_across_a_restart(
        self, own: AgentUnderTest
    ) -> None:
        with collector_of(own.fabric.people) as collector:
            collector.is_away = True
            own.start("--audit", collector.endpoint)
            alice = own.holder()
            slips = [bound(own, alice) for _ in range(3)]
            own.kill()
            own.start("--audit", collector.endpoint)
            assert collector.number == 0
            collector.is_away = False
            credited = [(slip.lease_id, "agent.credited") for slip in slips]
            eventually(
                lambda: all(kind in collector.kinds_of(lease_id) for lease_id, kind in credited)
            )
            assert own.stop() == 0
            said = own.fabric.ledger.latest()
            assert said is not None
            assert collector.number >= said.audit_number
            assert {record.boot_epoch for record in collector.records} == {1, 2}


class TestEvidence:
    def test_k21_without_the_ledgers_word_nothing_new_is_bound_and_what_lives_goes_on(
        self, own: AgentUnderTest
    ) -> None:
        own.start()
        alice = own.holder()
        slip = bound(own, alice)
        stops = bound(own, alice, policy=Policy(stop_after_ms=1_000))
        own.fabric.ledger.is_away = True
        eventually(lambda: not own.is_ready())
        text = own.fabric.sign(own.fabric.token(alice.credentials))
        assert code_of(Degraded, alice.bind, text) == "REVOCATION_STALE"
        assert alice.read(slip).data == bytes(16)
        with pytest.raises(LeaseExpired):
            alice.read(stops)
        own.fabric.ledger.is_away = False
        eventually(own.is_ready)
        alice.bind(text)

    def test_before_the_keys_have_come_a_bind_is_told_to_come_again(
        self, own: AgentUnderTest
    ) -> None:
        own.start()
        alice = own.holder()
        own.kill()
        own.fabric.ledger.is_away = True
        own.start(ready=False)
        back = own.holder(alice.credentials)
        text = own.fabric.sign(own.fabric.token(alice.credentials))
        assert code_of(Disconnected, back.bind, text) == "RETRY_LATER"
        own.fabric.ledger.is_away = False
        eventually(own.is_ready)
        back.bind(text)

    def test_a_key_that_admission_has_just_begun_to_use_is_fetched(
        self, running: AgentUnderTest, fabric: Fabric, alice: HolderSide
    ) -> None:
        fresh = Signer("lease", str(ADMISSION))
        slip = fabric.token(alice.credentials)
        text = fabric.sign(slip, by=fresh)
        fabric.ledger.keys.append(fresh.published())
        assert eventually(lambda: tried(lambda: alice.bind(text))).lease_id == slip.lease_id
        alice.release(slip)

    def test_metrics_tell_of_teardowns_and_fences(
        self, running: AgentUnderTest, alice: HolderSide
    ) -> None:
        alice.release(bound(running, alice))
        text = running.metrics()
        assert 'grafos_teardown_seconds_count{kind="mem",result="torndown"}' in text
        assert 'grafos_capacity_bytes{kind="mem",state="free"} 6.7108864e+07' in text

    def test_a_second_agent_on_the_same_folder_is_refused(self, running: AgentUnderTest) -> None:
        second = AgentUnderTest(running.fabric, running.folder)
        with pytest.raises(AssertionError, match="did not start"):
            second.start(ready=False)
        assert second.process is not None
        assert second.process.wait(10) == 1
        assert child_of(running.pid, "front")


def keep_writing(holder: HolderSide, slip: Any) -> None:
    """Until it fails, at most for 5 s."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        holder.write(slip, 0, b"x" * 4096)
