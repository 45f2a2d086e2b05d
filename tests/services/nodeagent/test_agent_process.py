"""A whole node agent, three processes and a disk, as ledger, holders and operators meet it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from grafos_core import failure
from grafos_core.failure import (
    Degraded,
    Denied,
    FabricError,
    Fenced,
    Incompatible,
    LeaseExpired,
    Revoked,
)
from grafos_core.lease import EndCause, Isolation, Kind, OnHolderExit, Policy
from grafos_core.receipt import Assurance, Outcome
from grafos_core.spiffe import holder_of_process
from grafos_proto.v1 import lease_pb2, ledger_pb2, node_pb2
from tests.services.nodeagent.agents import AgentUnderTest, agent_in, child_of
from tests.services.nodeagent.collector import collector_of
from tests.services.nodeagent.fabric import (
    LEDGER,
    TRUST_DOMAIN,
    Fabric,
    HolderSide,
    Signer,
    eventually,
    fabric_in,
    now_ms,
)

BLOCKS = 16
STRANGER = 65_533
BLIND = ("setpriv", "--bounding-set=-sys_ptrace")
"""Root without the right to look into other users' processes."""


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


def code_of(expected: type[FabricError], call: Any, *arguments: Any) -> str:
    with pytest.raises(expected) as refusal:
        call(*arguments)
    return refusal.value.code


def bound(agent: AgentUnderTest, holder: HolderSide, **changes: Any) -> Any:
    slip = agent.fabric.token(holder.credentials, **changes)
    holder.bind(agent.fabric.sign(slip))
    return slip


def renewed(agent: AgentUnderTest, slip: Any, **changes: Any) -> tuple[Any, str]:
    from dataclasses import replace

    at_ms = now_ms()
    fields = {
        "generation": slip.generation + 1, "lease_end_ms": at_ms + 60_000,
        "iat_ms": at_ms // 1000 * 1000, "nbf_ms": at_ms // 1000 * 1000, "exp_ms": at_ms + 30_000,
        "jti": secrets.token_hex(16),
    }  # fmt: skip
    later = replace(slip, **{**fields, **changes})
    return later, agent.fabric.sign(later)


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
        assert code_of(Denied, alice.bind, fabric.sign(slip, by=stranger)) == "TOKEN_KEY_UNKNOWN"
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


class TestWhenThingsDie:
    def test_a_killed_front_is_replaced_and_leases_go_on(self, own: AgentUnderTest) -> None:
        own.start()
        alice = own.holder()
        memory = bound(own, alice, policy=Policy(reconnect_ms=300))
        blocks = bound(own, alice, kind=Kind.BLOCK, amount=BLOCKS)
        released = bound(own, alice)
        listening = own.holder(own.fabric.people.holder("bob"))
        stream = listening.notices()
        left = bound(own, listening, policy=Policy(reconnect_ms=300))
        alice.release(released)
        alice.write(memory, 0, b"still here")
        alice.write(blocks, 0, b"b" * 8192)
        front = own.child("front")
        os.kill(front, signal.SIGKILL)
        eventually(lambda: own.child("front") not in (0, front))
        assert eventually(lambda: tried(lambda: alice.read(memory, 0, 10).data)) == b"still here"
        assert alice.read(blocks, 0, 8192).data == b"b" * 8192
        assert code_of(LeaseExpired, alice.read, released) == "LEASE_RELEASED"
        alice.write(blocks, 4096, b"c" * 4096)
        assert alice.read(blocks, 4096, 4096).data == b"c" * 4096
        stream.cancel()  # type: ignore[attr-defined]
        receipt = own.fabric.ledger.receipt_of(left.lease_id)
        assert receipt.cause is EndCause.DISCONNECTED, "who listened has not come back in time"
        assert alice.read(memory, 0, 10).data == b"still here", "who did not had nothing to lose"

    def test_a_killed_warden_is_replaced_and_guards_what_lives(self, own: AgentUnderTest) -> None:
        own.start()
        alice = own.holder()
        slip = bound(own, alice, ttl_ms=3_000)
        warden = own.child("warden")
        os.kill(warden, signal.SIGKILL)
        eventually(lambda: own.child("warden") not in (0, warden))
        alice.release(eventually(lambda: tried(lambda: bound(own, alice))))
        if taken_back(own, alice, slip):
            return  # a machine too busy to start a warden within its second
        os.kill(own.pid, signal.SIGSTOP)  # only the new warden can keep the deadline now
        try:
            eventually(lambda: expired(alice, slip))
        finally:
            os.kill(own.pid, signal.SIGCONT)
        receipt = own.fabric.ledger.receipt_of(slip.lease_id)
        assert receipt.cause is EndCause.EXPIRED

    def test_a_warden_that_hangs_is_replaced_like_a_dead_one(self, own: AgentUnderTest) -> None:
        own.start()
        alice = own.holder()
        slip = bound(own, alice)
        warden = own.child("warden")
        os.kill(warden, signal.SIGSTOP)
        eventually(lambda: own.child("warden") not in (0, warden))
        alice.release(eventually(lambda: tried(lambda: bound(own, alice))))
        taken_back(own, alice, slip)

    def test_a_front_that_hangs_holds_no_release_up(self, own: AgentUnderTest) -> None:
        own.start()
        alice = own.holder()
        slip, other = bound(own, alice), bound(own, alice)
        front = own.child("front")
        os.kill(front, signal.SIGSTOP)
        order = node_pb2.NodeRevokeRequest(
            lease_id=slip.lease_id, epoch=slip.epoch, cause="operator", reason="tried"
        )
        own.order("Revoke", order)
        receipt = own.fabric.ledger.receipt_of(slip.lease_id)
        assert receipt.outcome is Outcome.TORNDOWN
        assert receipt.duration_us < 1_000_000, "a front that does not empty is killed at 250 ms"
        assert own.child("front") != front
        assert eventually(lambda: tried(lambda: alice.read(other).data)) == bytes(16)
        assert code_of(Revoked, alice.read, slip) == "REVOKED"

    def test_a_killed_agents_memory_is_taken_back_and_its_receipts_follow(
        self, own: AgentUnderTest
    ) -> None:
        own.start()
        alice = own.holder()
        slip = own.fabric.token(alice.credentials)
        answer = alice.bind(own.fabric.sign(slip))
        blocks = bound(own, alice, kind=Kind.BLOCK, amount=BLOCKS)
        alice.write(blocks, 0, b"b" * 8192)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            fd = fetched(sock, answer, alice.session)
            own.kill()
            eventually(lambda: os.fstat(fd).st_size == 0, 2)
            os.close(fd)
        assert slip.lease_id not in own.fabric.ledger.receipts
        own.start()
        for each in (slip, blocks):
            receipt = own.fabric.ledger.receipt_of(each.lease_id)
            assert (receipt.cause, receipt.outcome) == (EndCause.AGENT_LOST, Outcome.TORNDOWN)
            assert receipt.boot_epoch == 2
        assert not list((own.state / "warden").glob("1.*")), "the old warden has gone"
        back = own.holder(alice.credentials)
        assert code_of(Fenced, back.read, slip) == "AGENT_LOST"
        assert code_of(Fenced, back.bind, own.fabric.sign(slip)) == "EPOCH_BURNT"
        back.release(bound(own, back))

    def test_agent_and_warden_killed_together_leave_nothing_open(self, own: AgentUnderTest) -> None:
        own.start()
        alice = own.holder()
        slip = own.fabric.token(alice.credentials)
        answer = alice.bind(own.fabric.sign(slip))
        keeper = keeping(answer, alice.session)
        try:
            warden, front = own.child("warden"), own.child("front")
            os.kill(warden, signal.SIGKILL)
            own.kill()
            eventually(lambda: not Path(f"/proc/{front}").exists())
            own.start()
            receipt = own.fabric.ledger.receipt_of(slip.lease_id)
            assert receipt.outcome in (Outcome.TORNDOWN, Outcome.FENCED)
            if os.geteuid() == 0:
                assert receipt.outcome is Outcome.TORNDOWN
                assert receipt.measured["measure_st_size"] == 0
        finally:
            keeper.kill()
            keeper.communicate()

    @pytest.mark.root
    @pytest.mark.requires("setpriv")
    def test_who_cannot_be_looked_into_fences_what_was_handed_out_and_nothing_else(
        self, own: AgentUnderTest
    ) -> None:
        own.start()
        named = holder_of_process(TRUST_DOMAIN, uid=STRANGER, pid=1, start_ticks=1)
        alice = own.holder(own.fabric.people.make(named))
        kept, out = bound(own, alice), own.fabric.token(alice.credentials)
        answer = alice.bind(own.fabric.sign(out))
        with keeping_as(STRANGER, answer, alice.session) as keeper:
            warden, front = own.child("warden"), own.child("front")
            os.kill(warden, signal.SIGKILL)
            own.kill()
            eventually(lambda: not Path(f"/proc/{front}").exists())
            own.start(under=BLIND)
            ended = own.fabric.ledger.receipt_of(kept.lease_id)
            assert (ended.outcome, ended.assurance) == (Outcome.TORNDOWN, Assurance.FREED)
            fenced = own.fabric.ledger.receipt_of(out.lease_id)
            assert fenced.outcome is Outcome.FENCED
            why = f"measure: IO: process {keeper.pid} (python3"
            assert str(fenced.measured["cause"]).startswith(why)
            own.kill()
            own.start(under=BLIND)
            probe = node_pb2.ProbeRequest(lease_id=out.lease_id)
            assert not own.order("Probe", probe).clean, "a restart proves nothing either"
            keeper.kill()
        eventually(lambda: own.order("Probe", probe).clean)
        order = own.fabric.clear_order(
            lease_id=out.lease_id, node_id="n1", incarnation=fenced.incarnation,
            epoch=out.epoch, nonce=secrets.token_hex(16),
        )  # fmt: skip
        assert own.order("Clear", node_pb2.NodeClearRequest(order=order)).stage == "sealed"

    def test_sigterm_takes_every_lease_back_with_its_receipt(self, own: AgentUnderTest) -> None:
        own.start()
        alice = own.holder()
        slips = [bound(own, alice) for _ in range(3)]
        assert own.stop() == 0
        for slip in slips:
            receipt = own.fabric.ledger.receipts[slip.lease_id][-1]
            assert (receipt.cause, receipt.boot_epoch) == (EndCause.AGENT_LOST, 1)
        assert not list((own.state / "warden").glob("*.journal"))


class TestWhenTheDeviceFails:
    def test_an_erase_that_fails_fences_its_slice_alone_until_it_is_cleared(
        self, own: AgentUnderTest
    ) -> None:
        own.start(fault="teardown.erase:EIO")
        alice = own.holder()
        slip, neighbour = bound(own, alice), bound(own, alice)
        assert code_of(Fenced, alice.release, slip) == "FENCED"
        receipt = own.fabric.ledger.receipt_of(slip.lease_id)
        assert (receipt.outcome, receipt.assurance) == (Outcome.FENCED, Assurance.NONE)
        assert code_of(Fenced, alice.read, slip) == "FENCED"
        assert alice.read(neighbour).data == bytes(16)
        assert own.leases()[slip.lease_id].stage == "fenced"
        own.kill()
        own.start()
        assert own.leases()[slip.lease_id].stage == "fenced", "it outlives a restart"
        probe = own.order("Probe", node_pb2.ProbeRequest(lease_id=slip.lease_id))
        assert probe.clean
        order = own.fabric.clear_order(
            lease_id=slip.lease_id, node_id="n1", incarnation=receipt.incarnation,
            epoch=slip.epoch, nonce=secrets.token_hex(16),
        )  # fmt: skip
        answer = own.order("Clear", node_pb2.NodeClearRequest(order=order))
        assert answer.stage == "sealed"
        eventually(lambda: own.fabric.ledger.receipt_of(slip.lease_id).outcome is Outcome.CLEARED)
        assert slip.lease_id not in own.leases()
        again = node_pb2.NodeClearRequest(order=order)
        assert code_of(Denied, own.order, "Clear", again) == "CLEAR"

    def test_D5_an_extent_whose_disk_fails_is_fenced_and_the_agent_goes_on(
        self, own: AgentUnderTest
    ) -> None:
        own.start(fault="block.write:EIO:5")  # beyond what the self-test writes
        alice = own.holder()
        slip = bound(own, alice, kind=Kind.BLOCK, amount=4)
        neighbour = bound(own, alice)
        for _ in range(4):
            alice.write(slip, 0, bytes(4096))
        assert code_of(Fenced, alice.write, slip, 0, bytes(4096)) == "IO"
        eventually(lambda: own.fabric.ledger.receipts.get(slip.lease_id))
        receipt = own.fabric.ledger.receipt_of(slip.lease_id)
        assert (receipt.outcome, receipt.cause) == (Outcome.FENCED, EndCause.DEVICE_FAILED)
        assert own.leases()[slip.lease_id].fence_cause == "device: block: write"
        assert code_of(Fenced, alice.write, slip, 0, bytes(4096)) == "FENCED"
        assert alice.read(neighbour).data == bytes(16)

    def test_a_device_that_cannot_be_made_is_refused_and_its_epoch_given_up(
        self, own: AgentUnderTest
    ) -> None:
        own.start(fault="bind.device:ENOMEM:1")
        alice = own.holder()
        slip = own.fabric.token(alice.credentials)
        with pytest.raises(FabricError):
            alice.bind(own.fabric.sign(slip))
        receipt = own.fabric.ledger.receipt_of(slip.lease_id)
        assert receipt.outcome is Outcome.NOTHING_CREATED
        alice.release(bound(own, alice))

    def test_a_disk_that_fails_ends_the_agent_before_it_tells_a_lie(
        self, own: AgentUnderTest
    ) -> None:
        own.start(fault="surface.sync:EIO:6")
        alice = own.holder()
        code_of(FabricError, lambda: [alice.release(bound(own, alice)) for _ in range(20)])
        assert own.process is not None
        assert own.process.wait(10) == 70
        own.start()
        back = own.holder(alice.credentials)
        back.release(bound(own, back))


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


def fetched(sock: socket.socket, answer: node_pb2.BindResponse, session: str) -> int:
    """The descriptor, or -1 where there is none to have."""
    sock.settimeout(5)
    sock.connect(answer.handover_path)
    secret = answer.handover_secret.hex()
    sock.send(json.dumps({"v": 1, "secret": secret, "session": session}).encode())
    packet, fds, _, _ = socket.recv_fds(sock, 4096, 4)
    assert json.loads(packet)["descriptor"] is bool(fds)
    return fds[0] if fds else -1


def keeping(answer: node_pb2.BindResponse, session: str) -> subprocess.Popen[bytes]:
    """A process that holds the memory and does nothing else."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        fd = fetched(sock, answer, session)
    kept = subprocess.Popen(["sleep", "60"], pass_fds=[fd])
    os.close(fd)
    return kept


@contextmanager
def keeping_as(
    uid: int, answer: node_pb2.BindResponse, session: str
) -> Generator[subprocess.Popen[bytes], None, None]:
    """The same as another user, who comes for the memory himself."""
    folder, name = os.path.split(answer.handover_path)
    program = (
        "import json, socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"sock.connect({name!r})\n"
        "sock.send(json.dumps({'v': 1, 'secret': sys.argv[1], 'session': sys.argv[2]}).encode())\n"
        "packet, fds, _, _ = socket.recv_fds(sock, 4096, 4)\n"
        "assert len(fds) == 1, packet\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", program, answer.handover_secret.hex(), session],
        cwd=folder,
        user=uid,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as keeper:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"held\n"
        yield keeper
        keeper.kill()


def taken_back(agent: AgentUnderTest, holder: HolderSide, slip: Any) -> bool:
    """Whether the new warden came too late for what lived: then that is over, with its proof."""
    try:
        return bool(holder.read(slip).data != bytes(16))
    except Fenced as refusal:
        assert refusal.code == "AGENT_LOST"
        assert agent.fabric.ledger.receipt_of(slip.lease_id).outcome is Outcome.TORNDOWN
        return True


def keep_writing(holder: HolderSide, slip: Any) -> None:
    """Until it fails, at most for 5 s."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        holder.write(slip, 0, b"x" * 4096)


def expired(holder: HolderSide, slip: Any) -> bool:
    try:
        holder.read(slip)
    except LeaseExpired:
        return True
    except Fenced:
        return True
    return False


def tried(call: Any) -> Any:
    """What `call` gives, or nothing while it fails for reasons that pass."""
    try:
        return call()
    except (failure.Disconnected, failure.InternalError, Degraded):
        return None
