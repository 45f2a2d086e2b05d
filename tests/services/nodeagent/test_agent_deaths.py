"""A whole node agent whose processes are killed or hang, and whose devices fail under it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from grafos_core.failure import (
    Denied,
    FabricError,
    Fenced,
    LeaseExpired,
    Revoked,
)
from grafos_core.lease import EndCause, Kind, Policy
from grafos_core.receipt import Assurance, Outcome
from grafos_core.spiffe import holder_of_process
from grafos_proto.v1 import node_pb2
from tests.services.nodeagent.agents import (
    AgentUnderTest,
    agent_in,
    bound,
    code_of,
    fetched,
    tried,
)
from tests.services.nodeagent.fabric import (
    TRUST_DOMAIN,
    HolderSide,
    eventually,
    fabric_in,
)

BLOCKS = 16
STRANGER = 65_533
BLIND = ("setpriv", "--bounding-set=-sys_ptrace")
"""Root without the right to look into other users' processes."""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[AgentUnderTest]:
    """An agent that the test may kill, in a fabric of its own; not started."""
    with fabric_in(tmp_path) as fabric, agent_in(fabric, tmp_path) as agent:
        yield agent


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
        assert receipt.duration_us < 1_000_000, "nothing was in flight: nobody waits for the front"
        eventually(lambda: own.child("front") not in (front, 0))
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


def expired(holder: HolderSide, slip: Any) -> bool:
    try:
        holder.read(slip)
    except LeaseExpired:
        return True
    except Fenced:
        return True
    return False
