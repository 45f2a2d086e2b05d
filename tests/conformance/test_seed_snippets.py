"""The snippets that the project began with, translated line for line, on each kind of fabric.

Each test is one snippet. A line of theirs is a line here, under the same name; what is a keyword in
Python has a trailing underscore; `?` is an exception; the end of a scope is the end of a `with`.
What stands after the snippet, under "and so", looks at what it must have done.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from grafos import (
    BlockBuilder,
    Disconnected,
    FabricError,
    Failure,
    LeaseExpired,
    MemBuilder,
    MemLease,
    connect,
)
from grafos._clock import wall_ms
from grafos.audit import (
    AuditEvent,
    AuditEventData,
    AuditEventKind,
    ChainAssembler,
    Collector,
    DurableAnchor,
    Ed25519Signer,
    PreemptionReason,
)
from grafos.fence import Fenced, FenceEpoch, FenceGuard, StaleEpochError
from grafos.leasekit import RenewalManager, RenewalPolicy
from grafos.observe import FabricMetrics, instrument
from grafos_core import codec
from grafos_core.spiffe import Identity, Role
from tests.conformance.conftest import real_only

if TYPE_CHECKING:
    from grafos._local import LocalFabric

pytestmark = pytest.mark.usefixtures("running")


def test_memory() -> None:
    with MemBuilder.new().min_bytes(4096).acquire() as lease:
        lease.mem().write(0, b"hello fabric")
        data = lease.mem().read(0, 12)
    # lease drops → memory returns to fabric

    # and so
    assert data == b"hello fabric"
    assert lease.release().credited
    assert lease.release().frees
    with pytest.raises(LeaseExpired):
        lease.mem().read(0, 12)


def test_block() -> None:
    sector_data = bytes(range(256)) * 16
    with BlockBuilder.new().min_blocks(1024).acquire() as lease:
        lease.block().write_block(0, sector_data)

        # and so
        assert lease.block().read_block(0) == sector_data
        assert lease.block().num_blocks >= 1024
    assert lease.release().credited


def test_poll_driven_renewal(let_pass: Callable[[float], None]) -> None:
    with MemBuilder.new().min_bytes(4096).lease_secs(2).acquire() as lease:
        lease_id, expiry_ms = lease.lease_id, lease.expiry_ms
        mgr = RenewalManager.new()
        mgr.register(lease_id, expiry_ms, RenewalPolicy.default())
        # In main loop:
        now_ms = wall_ms()
        summary = mgr.tick(now_ms)

        # and so
        assert summary.due == ()
        renewed = 0
        while wall_ms() < expiry_ms + 500:
            renewed += len(mgr.tick(wall_ms()).renewed)
            lease.mem().write(0, b"alive")
            let_pass(0.002)
        assert renewed >= 1
        assert lease.mem().read(0, 5) == b"alive"


def test_fence() -> None:
    guard = FenceGuard(FenceEpoch.zero())
    msg = Fenced(42, FenceEpoch.zero())
    guard.check(msg.epoch())  # OK
    guard.advance()
    with pytest.raises(StaleEpochError):
        guard.check(msg.epoch())  # Err — stale epoch

    # and so
    assert msg.value == 42


def test_metrics() -> None:
    m = FabricMetrics.global_()
    before = m.leases_total.value(), m.op_latency.count()
    m.leases_total.inc()
    m.op_latency.observe(250)  # microseconds

    @instrument
    def process_request(req: str) -> str:
        return req.upper()

    # and so
    assert (m.leases_total.value(), m.op_latency.count()) == (before[0] + 1, before[1] + 1)
    assert process_request("get") == "GET"


class Workload:
    """Somebody with an identity, as the snippet has it."""

    def identity(self) -> Identity:
        return Identity("grafos.local", Role.HOLDER, "default", "trainer")


class Edge:
    """Something with canonical bytes, as the snippet has it."""

    def to_canonical_bytes(self) -> bytes:
        return codec.encode({"edge": 7, "state": "active"})


def test_audit_chain(tmp_path: Path) -> None:
    signer, workload, edge, edge_id = Ed25519Signer(), Workload(), Edge(), 7
    durable = DurableAnchor(tmp_path / "anchor")
    collector = Collector([signer.public_key])
    prior_anchor, sequence, now_ms = durable.audit_anchor(), 1, wall_ms()

    # Audit-chain assembler — sealed, hash-linked records
    assembler = ChainAssembler(prior_anchor, signer)
    record = assembler.seal(
        AuditEvent(
            kind=AuditEventKind.LeasePreempted,
            identity=workload.identity(),
            reason=PreemptionReason.QuotaPressure,
            sequence=sequence,
            timestamp=now_ms,
        )
    )
    collector.append(record)
    sequence += 1
    # Every committed rewrite seals one record per affected edge.
    edge_record = assembler.seal(
        AuditEvent(
            kind=AuditEventKind.EdgeRewritten,
            event_data=AuditEventData.EdgeRewritten(
                edge_id=edge_id,
                edge_record_bytes=edge.to_canonical_bytes(),
            ),
            identity=workload.identity(),
            sequence=sequence,
            timestamp=now_ms,
        )
    )
    # record.current_event_hash links to record.prev_event_hash
    # Persist anchor in the daemon's narrow durable surface
    durable.set_audit_anchor(edge_record.current_event_hash)
    collector.append(edge_record)

    # and so
    assert edge_record.prev_event_hash == record.current_event_hash
    assert DurableAnchor(tmp_path / "anchor").audit_anchor().hash == edge_record.current_event_hash
    data = edge_record.event_data
    assert isinstance(data, AuditEventData.EdgeRewritten)
    assert codec.decode(data.edge_record_bytes) == {"edge": 7, "state": "active"}
    with pytest.raises(FabricError):
        collector.append(record)


def write_for_ever(lease: MemLease, let_pass: Callable[[float], None]) -> None:
    while True:
        lease.mem().write(0, b"x")
        let_pass(0.001)


def test_failures(let_pass: Callable[[float], None]) -> None:
    """Every operation ends in a value or in one of eight named failures."""
    for failure, name in zip(
        [
            Failure.LeaseExpired,
            Failure.Revoked,
            Failure.Fenced,
            Failure.Disconnected,
            Failure.Degraded,
            Failure.Incompatible,
            Failure.RateLimited,
            Failure.InternalError,
        ],
        Failure,
        strict=True,
    ):
        assert failure is name

    # and so
    with MemBuilder.new().min_bytes(4096).lease_secs(1).acquire() as lease:
        with pytest.raises(FabricError) as failed:
            write_for_ever(lease, let_pass)
    assert failed.value.failure is Failure.LeaseExpired


SNIPPET = """
from grafos import MemBuilder
with MemBuilder().min_bytes(4096).acquire() as lease:
    lease.mem().write(0, b"hello fabric")
    print(lease.mem().read(0, 12))
"""


@real_only
def test_a_snippet_runs_as_it_stands_where_no_fabric_is(tmp_path: Path) -> None:
    """An embedded fabric is started for the process and gone with it."""
    empty = {"GRAFOS_RUN_DIR": str(tmp_path / "run"), "TMPDIR": str(tmp_path)}
    inherited = {name: value for name, value in os.environ.items() if "GRAFOS" not in name}
    path = os.pathsep.join(each for each in sys.path if each)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SNIPPET], capture_output=True, text=True, timeout=60,
        check=False, env={**inherited, **empty, "PYTHONPATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "b'hello fabric'\n"), done.stderr
    assert not list(tmp_path.glob("grafos-*")), "nothing is left behind"


@real_only
def test_the_first_lines_of_the_readme_run_as_they_stand(
    running: LocalFabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`connect()` finds the fabric that runs on this machine by its note."""
    monkeypatch.setenv("GRAFOS_RUN_DIR", str(running.layout.description.parent))
    monkeypatch.delenv("GRAFOS_ENDPOINT", raising=False)
    with connect() as fabric:
        with MemBuilder().min_bytes(4096).acquire() as lease:
            lease.mem().write(0, b"hello fabric")
            assert lease.mem().read(0, 12) == b"hello fabric"
        assert fabric.describe(lease.lease_id).state == "released"
    with pytest.raises(Disconnected, match="closed"):
        fabric.poll()
