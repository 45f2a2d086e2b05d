"""Kills, restarts, full disks: nothing acknowledged is lost, and what must go on goes on."""

from __future__ import annotations

import contextlib
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grafos_core import jws
from grafos_core.failure import FabricError
from grafos_core.lessor import Lessor
from grafos_core.receipt import Assurance, Outcome
from grafos_proto.v1 import admission_pb2, lease_pb2, ledger_pb2
from services.ledger.__main__ import replay
from services.ledger.store import Store
from tests.services.ledger.house import (
    Caller,
    House,
    Node,
    ServiceProcess,
    code,
    codes,
    grant,
    unpacked,
)

Start = Callable[..., ServiceProcess]
ACKNOWLEDGED_MIN = 200


def remembered(folder: Path) -> Lessor:
    """What the events of a stopped ledger add up to, every law checked."""
    store, lessor = Store.open(folder / "events"), Lessor()
    try:
        replay(store, lessor, jws.Keys())
    finally:
        store.close()
    lessor.check()
    return lessor


def everything(caller: Caller) -> Any:
    """Leases, quotas, keys and books, as the ledger tells them."""
    leases = caller("List", admission_pb2.ListLeasesRequest()).leases
    snapshot = caller("Snapshot", ledger_pb2.SnapshotRequest())
    held = [
        [(book.kind, book.total, book.leased, book.ending, book.fenced) for book in node.books]
        for node in snapshot.nodes
    ]
    quotas = [quota.SerializeToString(deterministic=True) for quota in snapshot.quotas]
    return leases, held, quotas, [key.key_id for key in snapshot.keys]


def test_a_restart_replays_to_the_same_state(
    house: House, start: Start, ledger: ServiceProcess, admission: Caller, operator: Caller,
    node: Node,
) -> None:  # fmt: skip
    quota = ledger_pb2.SetQuota(tenant="rival", kind=lease_pb2.KIND_MEM, amount=5, count=5)
    operator.commit(ledger_pb2.Command(set_quota=quota))
    leases = [admission.grant(node) for _ in range(6)]
    block = admission.grant(node, kind=lease_pb2.KIND_BLOCK, amount=7)
    for lease in leases[:4]:
        node.bound(lease)
    for lease in leases[:3]:
        admission.end(lease)
    node.credit(node.receipt(leases[0]))
    before = everything(admission)
    ledger.kill()
    again = start()
    caller = Caller(house, again.endpoint, "service/admission")
    assert everything(caller) == before
    assert code(caller.grant(node)) == "NODE_NOT_READY"  # not heard since
    node.caller = Caller(house, again.endpoint, "node/n1")
    node.live = [
        ledger_pb2.Bound(lease_id=lease.lease_id, epoch=lease.epoch, generation=1)
        for lease in (leases[3],)
    ]
    node.register()
    assert caller.grant(node).epoch == 7
    assert codes(node.credit(node.receipt(leases[1]))) == [""]  # its key is still believed
    assert caller("Get", admission_pb2.GetLeaseRequest(lease_id=block.lease_id)) == block
    caller.close()
    assert again.stop() == 0
    assert len(remembered(house.folder / "ledger").state.leases) == 6


def test_a_stop_by_sigterm_is_clean(ledger: ServiceProcess, admission: Caller, node: Node) -> None:
    admission.grant(node)
    assert ledger.stop() == 0


def test_a_second_ledger_on_the_same_folder_refuses_to_start(
    start: Start, ledger: ServiceProcess, admission: Caller, node: Node
) -> None:
    second = start()
    assert second.ready == {}
    assert second.process.returncode == 1
    assert "another ledger runs on this folder" in second.log()
    assert code(admission.grant(node)) == ""


def test_a_damaged_ledger_does_not_start_and_says_which_record(
    house: House, start: Start, ledger: ServiceProcess, admission: Caller, node: Node
) -> None:
    for _ in range(5):
        admission.grant(node)
    ledger.kill()
    log = house.folder / "ledger" / "events" / "ledger.sqlite3-wal"
    data = bytearray(log.read_bytes())
    data[len(data) * 2 // 3] ^= 0x40
    log.write_bytes(bytes(data))
    again = start()
    assert again.ready == {}
    assert again.process.returncode == 1
    assert "record " in again.log()


class Load:
    """Clients that grant, bind, release and credit, and note what was acknowledged to them."""

    def __init__(self, house: House, endpoint: str, node: Node, dice: random.Random) -> None:
        self._house, self._endpoint, self._node, self._dice = house, endpoint, node, dice
        self.granted: dict[str, Any] = {}
        self.credited: set[str] = set()
        self.operations = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(4)]
        for thread in self._threads:
            thread.start()

    def _run(self, seed: int) -> None:
        caller = Caller(self._house, self._endpoint, "service/admission")
        with contextlib.suppress(FabricError):
            while True:
                outcomes = caller.commit(*(grant(self._node) for _ in range(4)))
                leases = [each for each in outcomes if not isinstance(each, FabricError)]
                with self._lock:
                    self.granted |= {lease.lease_id: lease for lease in leases}
                    self.operations += len(leases)
                for lease in leases[:2]:
                    caller.end(lease)
                    done = self._node.credit(self._node.receipt(lease))
                    with self._lock:
                        self.operations += 2
                        self.credited |= {each.lease_id for each in done if not code(each)}
        caller.close()

    def wait(self, operations: int, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while self.operations < operations and time.monotonic() < end_s:
            threading.Event().wait(0.01)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_kill_under_load_loses_nothing_that_was_acknowledged(
    seed: int, house: House, ledger: ServiceProcess, node: Node
) -> None:
    dice = random.Random(seed)
    load = Load(house, ledger.endpoint, node, dice)
    load.wait(ACKNOWLEDGED_MIN, 30)
    threading.Event().wait(dice.random() / 10)
    ledger.kill()
    load.join()
    assert load.operations >= ACKNOWLEDGED_MIN
    state = remembered(house.folder / "ledger").state
    for lease_id, lease in load.granted.items():
        found = state.find(lease_id)  # type: ignore[arg-type]
        assert found is not None, f"an acknowledged grant is lost: {lease_id}"
        assert (found.epoch, found.amount) == (lease.epoch, lease.amount)
        assert (found.state == "released") >= (lease_id in load.credited)
    epochs = [lease.epoch for lease in load.granted.values()]
    assert len(set(epochs)) == len(epochs)


def grants_until_the_end(caller: Caller, node: Node) -> list[Any]:
    """What was acknowledged before the ledger went away."""
    granted: list[Any] = []
    with contextlib.suppress(FabricError):
        for _ in range(50):
            granted.append(caller("Commit", ledger_pb2.CommitRequest(commands=[grant(node)]), 3))
    assert len(granted) < 50, "the ledger never went away"
    return [unpacked(answer.outcomes[0]) for answer in granted]


@pytest.mark.parametrize("point", ["ledger.commit", "ledger.committed"])
def test_a_kill_inside_a_commit_leaves_the_whole_batch_or_nothing(
    point: str, house: House, start: Start
) -> None:
    """Before the transaction's end nothing was answered; after it all of it is there."""
    ledger = start("--mode", "development", environment={"GRAFOS_FAULT": f"{point}:kill:12"})
    node = Node(house, ledger.endpoint, "n1")
    caller = Caller(house, ledger.endpoint, "service/admission")
    node.register()
    granted = grants_until_the_end(caller, node)
    ledger.process.wait(10)
    state = remembered(house.folder / "ledger").state
    assert [lease.lease_id for lease in granted] == list(state.leases)[: len(granted)]
    assert len(state.leases) - len(granted) == (1 if point == "ledger.committed" else 0)
    caller.close()
    node.close()


def test_a_commit_that_fails_halts_the_ledger_and_the_next_one_goes_on(
    house: House, start: Start
) -> None:
    ledger = start("--mode", "development", environment={"GRAFOS_FAULT": "ledger.commit:EIO:5"})
    node = Node(house, ledger.endpoint, "n1")
    caller = Caller(house, ledger.endpoint, "service/admission")
    node.register()
    granted = grants_until_the_end(caller, node)
    assert ledger.process.wait(10) != 0
    caller.close()
    node.close()
    again = start()
    caller = Caller(house, again.endpoint, "service/admission")
    found = caller("List", admission_pb2.ListLeasesRequest()).leases
    assert {lease.lease_id for lease in found} == {lease.lease_id for lease in granted}
    caller.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir(mode=0o700)
    options = "size=12m,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.requires("mount", "umount")
def test_a_full_disk_ends_grants_and_nothing_else(
    house: House, start: Start, small_disk: Path
) -> None:
    ledger = start("--reserve-mib", "4", state="small/ledger")
    node = Node(house, ledger.endpoint, "n1")
    caller = Caller(house, ledger.endpoint, "service/admission")
    node.register()
    leases = [caller.grant(node) for _ in range(3)]
    filler = small_disk / "filler"
    filler.write_bytes(b"")
    with contextlib.suppress(OSError), filler.open("r+b", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    refused = ""
    for _ in range(4_000):
        refused = code(caller.grant(node))
        if refused:
            break
    assert refused == "DISK"
    renewal = ledger_pb2.LedgerRenew(
        request_id="renew-1", lease_id=leases[0].lease_id, ttl_ms=90_000, tenant="acme",
        holder=leases[0].holder,
    )  # fmt: skip
    answer = caller("Renew", ledger_pb2.LedgerRenewRequest(renewals=[renewal]))
    assert answer.outcomes[0].lease.generation == 2
    caller.end(leases[1])
    assert codes(node.credit(node.receipt(leases[1]))) == [""]
    failed = node.receipt(
        leases[2], outcome=Outcome.FENCED, assurance=Assurance.NONE, measured={"cause": "io"}
    )
    assert codes(node.credit(failed)) == [""]
    assert code(caller.grant(node)) == "DISK"
    filler.unlink()
    end_s = time.monotonic() + 10
    node.register()
    while code(caller.grant(node)) and time.monotonic() < end_s:
        threading.Event().wait(0.2)
        node.register()
    assert code(caller.grant(node)) == ""
    caller.close()
    node.close()
    assert ledger.stop() == 0
    found = remembered(small_disk / "ledger").state
    assert found.find(leases[1].lease_id).state == "released"  # type: ignore[union-attr]
    assert found.find(leases[2].lease_id).state == "fenced"  # type: ignore[union-attr]
