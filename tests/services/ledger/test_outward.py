"""What the ledger does by itself: it tells nodes what they owe, hands its chain on, and counts."""

from __future__ import annotations

import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from grafos_core.failure import FabricError
from grafos_proto.v1 import audit_pb2, audit_pb2_grpc, ledger_pb2, node_pb2, node_pb2_grpc
from tests.services.ledger.house import Caller, House, Node, ServiceProcess

Start = Callable[..., ServiceProcess]


class Agent(node_pb2_grpc.NodeControlServicer):
    """A node's control listener that notes what it is told."""

    def __init__(self, house: House, name: str) -> None:
        self.told: list[tuple[str, Any]] = []
        self.receipt = ""
        self.fails = 0
        self.server = grpc.server(ThreadPoolExecutor(2))
        node_pb2_grpc.add_NodeControlServicer_to_server(self, self.server)
        mine = house.credentials(f"node/{name}")
        shown = grpc.ssl_server_credentials(
            [(mine.key_pem, mine.chain_pem)], mine.bundle_pem, require_client_auth=True
        )
        self.endpoint = f"127.0.0.1:{self.server.add_secure_port('127.0.0.1:0', shown)}"
        self.server.start()

    def _note(self, method: str, request: Any, context: Any) -> node_pb2.NodeActionResponse:
        if self.fails:
            self.fails -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        self.told.append((method, request))
        return node_pb2.NodeActionResponse(receipt=self.receipt)

    def Burn(self, request: Any, context: Any) -> node_pb2.NodeActionResponse:
        return self._note("Burn", request, context)

    def Revoke(self, request: Any, context: Any) -> node_pb2.NodeActionResponse:
        return self._note("Revoke", request, context)

    def Clear(self, request: Any, context: Any) -> node_pb2.NodeActionResponse:
        return self._note("Clear", request, context)

    def Probe(self, request: Any, context: Any) -> node_pb2.ProbeResponse:
        return node_pb2.ProbeResponse()

    def ListLeases(self, request: Any, context: Any) -> node_pb2.ListNodeLeasesResponse:
        return node_pb2.ListNodeLeasesResponse()


@pytest.fixture
def agent(house: House) -> Iterator[Agent]:
    made = Agent(house, "n1")
    yield made
    made.server.stop(None).wait(5)


def wait(seen: Callable[[], bool], timeout_s: float = 10) -> None:
    end_s = time.monotonic() + timeout_s
    while not seen():
        assert time.monotonic() < end_s, "it did not come"
        threading.Event().wait(0.02)


def test_a_node_is_told_at_once_of_an_end_and_again_until_its_receipt(
    admission: Caller, node: Node, agent: Agent
) -> None:
    node.control_endpoint, agent.fails = agent.endpoint, 1
    node.register()
    lease = admission.grant(node)
    node.bound(lease)
    admission.end(lease, "revoked")
    wait(lambda: len(agent.told) >= 1)
    method, request = agent.told[0]
    assert method == "Revoke"
    assert (request.lease_id, request.epoch, request.cause) == (lease.lease_id, 1, "revoked")
    wait(lambda: len(agent.told) >= 2)
    agent.receipt = node.receipt(lease)
    count = len(agent.told)
    wait(lambda: len(agent.told) > count)
    wait(lambda: not node.register().obligations)
    assert node.register().revocation_number == 1


def test_a_grant_that_nobody_binds_is_burnt_and_comes_back_by_a_receipt(
    admission: Caller, node: Node, agent: Agent
) -> None:
    node.control_endpoint = agent.endpoint
    node.register()
    lease = admission.grant(node, bind_within_ms=200)
    wait(lambda: bool(agent.told))
    method, request = agent.told[0]
    assert method == "Burn"
    assert request.lease.holder == lease.holder


def head(house: House, audit: ServiceProcess) -> Any:
    with house.channel(audit.endpoint, "operator/alice", "service/audit") as channel:
        stub = audit_pb2_grpc.AuditServiceStub(channel)
        ask = audit_pb2.HeadRequest(origin="ledger")
        heads = stub.Head(ask, timeout=10, wait_for_ready=True).heads
    return heads[0] if heads else audit_pb2.ChainHead()


def test_the_chain_reaches_the_collector_which_may_be_away_and_come_back(
    house: House, start: Start
) -> None:
    audit = ServiceProcess(house, "audit", house.folder / "audit")
    ledger = start("--audit", audit.endpoint)
    node = Node(house, ledger.endpoint, "n1")
    caller = Caller(house, ledger.endpoint, "service/admission")
    node.register()
    first = caller.grant(node)
    revision = caller.stream("Watch", ledger_pb2.WatchRequest(live_only=True)).next().revision
    wait(lambda: head(house, audit).number >= revision)
    audit.kill()
    for _ in range(150):
        assert not isinstance(caller.grant(node), FabricError)
        node.register()
    audit = ServiceProcess(house, "audit", house.folder / "audit", "--listen", audit.endpoint)
    revision = caller.stream("Watch", ledger_pb2.WatchRequest(live_only=True)).next().revision
    wait(lambda: head(house, audit).number >= revision, 20)
    assert first.epoch == 1
    caller.close()
    node.close()
    assert ledger.stop() == 0
    assert audit.stop() == 0


def test_a_ledger_restored_from_an_old_copy_is_found_out(house: House, start: Start) -> None:
    """G14 and U8: its chain would fork, so the gate says so and the collector quarantines it."""
    audit = ServiceProcess(house, "audit", house.folder / "audit")
    ledger = start()
    ledger.stop()
    backup = house.folder / "backup"
    shutil.copytree(house.folder / "ledger", backup)
    ledger = start("--audit", audit.endpoint)
    node = Node(house, ledger.endpoint, "n1")
    node.register()
    wait(lambda: head(house, audit).number >= 5)
    node.close()
    ledger.kill()
    shutil.rmtree(house.folder / "ledger")
    shutil.copytree(backup, house.folder / "ledger")
    ledger = start("--audit", audit.endpoint)
    wait(lambda: head(house, audit).quarantined)
    wait(lambda: "ROLLBACK" in fetch(ledger, "/api/v1/readiness", 503))
    ledger.kill()
    assert audit.stop() == 0


def fetch(service: ServiceProcess, path: str, status: int = 200) -> str:
    try:
        with urllib.request.urlopen(f"http://{service.http}{path}", timeout=5) as answer:
            assert status == 200
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            assert error.code == status
            return error.read().decode()


def test_the_numbers_add_up(ledger: ServiceProcess, admission: Caller, node: Node) -> None:
    lease = admission.grant(node)
    admission.grant(node)
    node.bound(lease)
    admission.end(lease)
    page = fetch(ledger, "/metrics")
    for line in (
        'grafos_leases{kind="mem",state="pending"} 1.0',
        'grafos_leases{kind="mem",state="ending"} 1.0',
        'grafos_capacity_bytes{kind="mem",state="leased"} 4096.0',
        'grafos_capacity_bytes{kind="mem",state="ending"} 4096.0',
        'grafos_ledger_imbalance_bytes{kind="mem"} 0.0',
        'grafos_ledger_imbalance_bytes{kind="block"} 0.0',
        "grafos_teardown_obligations 1.0",
    ):
        assert line in page, line
    assert "grafos_ledger_commit_seconds_count" in page
    assert '"state": "ready"' in fetch(ledger, "/api/v1/readiness")
