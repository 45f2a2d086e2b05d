"""A fabric for admission's tests: a real ledger, real admissions, and nodes that exist on paper.

A paper node says to the ledger all that a node agent says: it registers each second, reports what
is bound, signs receipts. So whole lives of leases are driven without a node.
"""

from __future__ import annotations

import json
import secrets
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from grafos_core.failure import FabricError
from grafos_proto.v1 import admission_pb2, admission_pb2_grpc, lease_pb2, ledger_pb2
from grafos_proto.wire import failures
from tests.services.ledger.house import CALL_S, DOMAIN, Caller, House, Node, ServiceProcess

BEAT_S = 0.5
PAGE = 4096
MEM, BLOCK = lease_pb2.KIND_MEM, lease_pb2.KIND_BLOCK
ENDING, RELEASED = lease_pb2.LEASE_STATE_ENDING, lease_pb2.LEASE_STATE_RELEASED
PENDING, ACTIVE = lease_pb2.LEASE_STATE_PENDING, lease_pb2.LEASE_STATE_ACTIVE


class PaperNode(Node):
    """Registers again and again from `begin` to `stop`; a ledger that is away is asked again."""

    def __init__(self, house: House, endpoint: str, name: str) -> None:
        super().__init__(house, endpoint, name)
        self.labels: dict[str, str] = {}
        self.closed_gates: dict[str, str] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def request(self) -> ledger_pb2.RegisterRequest:
        request = super().request()
        request.labels.update(self.labels)
        if self.closed_gates:
            request.readiness.Clear()
            request.readiness.closed_gates.update(self.closed_gates)
        return request

    def begin(self) -> None:
        self._stopped.clear()
        self._thread = threading.Thread(target=self._beat, name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Fall silent."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(CALL_S)
            self._thread = None

    def _beat(self) -> None:
        while not self._stopped.is_set():
            try:
                self.caller("Register", self.request(), timeout_s=2)
            except FabricError:
                pass  # away, or stopped: the next beat asks again
            self._stopped.wait(BEAT_S)

    def bound(self, lease: Any) -> Any:
        bound = ledger_pb2.Bound(
            lease_id=lease.lease_id, epoch=lease.epoch, generation=lease.generation
        )
        self.live = [*(self.live or []), bound]
        return super().bound(lease)

    def settle(self, lease: Any, **changes: Any) -> Any:
        """Prove that what was leased is free again."""
        self.live = [each for each in self.live or [] if each.lease_id != lease.lease_id]
        return self.credit(self.receipt(lease, **changes))[0]

    def close(self) -> None:
        self.stop()
        super().close()


class Client:
    """Somebody who calls admission; failures are raised as what they are."""

    def __init__(self, house: House, endpoint: str, path: str) -> None:
        self.path = f"spiffe://{DOMAIN}/{path}"
        self.credentials = house.credentials(path)
        self.channel = house.channel(endpoint, path, "service/admission")
        self._stub = admission_pb2_grpc.AdmissionServiceStub(self.channel)

    def __call__(self, method: str, request: Any, timeout_s: float | None = CALL_S) -> Any:
        with failures.status_to_failures():
            return getattr(self._stub, method)(request, timeout=timeout_s, wait_for_ready=True)

    def acquire(self, *, timeout_s: float = CALL_S, **fields: Any) -> Any:
        return self("Acquire", ask(**fields), timeout_s)

    def refused(self, method: str, request: Any, timeout_s: float = CALL_S) -> FabricError:
        """The failure that this call must end in."""
        try:
            answer = self(method, request, timeout_s)
        except FabricError as error:
            return error
        raise AssertionError(f"{method} was not refused: {answer}")

    def denied(self, *, timeout_s: float = CALL_S, **fields: Any) -> FabricError:
        return self.refused("Acquire", ask(**fields), timeout_s)

    def explain(self, **fields: Any) -> Any:
        return self("Explain", ask(**fields))

    def renew(self, lease: Any, **fields: Any) -> Any:
        return self("Renew", of_lease(admission_pb2.RenewRequest, lease, **fields))

    def attach(self, lease: Any) -> Any:
        return self("Attach", of_lease(admission_pb2.AttachRequest, lease))

    def release(self, lease: Any) -> Any:
        return self("Release", of_lease(admission_pb2.ReleaseRequest, lease)).lease

    def get(self, lease: Any) -> Any:
        return self("Get", admission_pb2.GetLeaseRequest(lease_id=lease.lease_id))

    def leases(self, **fields: Any) -> list[str]:
        """The ids of all that this caller is shown, page by page."""
        found: list[str] = []
        while True:
            page = self("List", admission_pb2.ListLeasesRequest(**fields))
            found += [lease.lease_id for lease in page.leases]
            if not page.next:
                return found
            assert page.next in found  # else it names a lease that the caller was not shown
            fields["after"] = page.next

    def watch(self, **fields: Any) -> Watching:
        request = admission_pb2.WatchLeasesRequest(**fields)
        return Watching(self._stub.Watch(request, timeout=20, wait_for_ready=True))

    def close(self) -> None:
        self.channel.close()


class Watching:
    """A watch that is read until something has come."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.events: list[tuple[str, str]] = []
        """(event, lease id), without progress."""
        self.revision = 0
        self.progress = 0

    def until(self, seen: Callable[[Watching], bool]) -> Watching:
        end_s = time.monotonic() + 10
        while not seen(self):
            assert time.monotonic() < end_s, self.events
            with failures.status_to_failures():
                answer = next(self.call)
            self.revision = answer.revision or self.revision
            if answer.event == "progress":
                self.progress += 1
            else:
                self.events.append((answer.event, answer.lease.lease_id))
        return self

    def begun(self) -> Watching:
        return self.until(lambda it: it.progress > 0)

    def close(self) -> None:
        self.call.cancel()


class Fabric:
    """One ledger, as many admissions as a test starts, and its nodes."""

    def __init__(self, folder: Path) -> None:
        self.house, self.folder = House(folder), folder
        self.processes: list[ServiceProcess] = []
        self._open: list[Any] = []
        self.ledger_endpoint = f"unix:{folder}/run/ledger"
        self.ledger = self.start_ledger()
        self.admission = self.start_admission()

    def start_ledger(self, fault: str = "") -> ServiceProcess:
        self.ledger = self._start("ledger", "ledger", fault, "--listen", self.ledger_endpoint)
        return self.ledger

    def start_admission(self, name: str = "admission", fault: str = "") -> ServiceProcess:
        listen = f"unix:{self.folder}/run/{name}"
        return self._start(
            "admission", name, fault, "--listen", listen, "--ledger", self.ledger_endpoint
        )

    def _start(self, service: str, state: str, fault: str, *arguments: str) -> ServiceProcess:
        more = {"GRAFOS_FAULT": fault} if fault else {}
        mode = ("--mode", "development") if fault else ()
        self.processes.append(
            ServiceProcess(
                self.house, service, self.folder / state, *arguments, *mode, environment=more
            )
        )
        return self.processes[-1]

    def node(self, name: str = "n1", *, begin: bool = True, **fields: Any) -> PaperNode:
        """Known to admission when it is given back, unless it has not begun."""
        made = PaperNode(self.house, self.ledger_endpoint, name)
        self._open.append(made)
        for field, value in fields.items():
            setattr(made, field, value)
        if begin:
            made.begin()
            self.until_ready(name)
        return made

    def until_ready(self, name: str = "n1", kind: Any = MEM) -> None:
        operator = self.client("operator/alice")
        eventually(lambda: operator.explain(where={"node": name}, kind=kind, amount=1).admissible)

    def client(self, path: str, admission: ServiceProcess | None = None) -> Client:
        made = Client(self.house, (admission or self.admission).endpoint, path)
        self._open.append(made)
        return made

    def holder(self, name: str = "web", tenant: str = "acme", **where: Any) -> Client:
        return self.client(f"tenant/{tenant}/holder/{name}", **where)

    def of_ledger(self, path: str = "service/admission") -> Caller:
        made = Caller(self.house, self.ledger_endpoint, path)
        self._open.append(made)
        return made

    def set_quota(self, tenant: str, *, amount: int = 2**62, count: int = 10**6) -> None:
        quota = ledger_pb2.SetQuota(tenant=tenant, kind=MEM, amount=amount, count=count)
        (outcome,) = self.of_ledger("operator/alice").commit(ledger_pb2.Command(set_quota=quota))
        assert not isinstance(outcome, FabricError), outcome

    def records(self, kind: str) -> list[bytes]:
        """The ledger's records of one kind, from the first."""
        caller = self.of_ledger()
        last = caller("Snapshot", ledger_pb2.SnapshotRequest()).revision
        found: list[bytes] = []
        call = caller.stream("Watch", ledger_pb2.WatchRequest())
        for answer in call:
            found += [event.record for event in answer.events if event.kind == kind]
            if answer.revision >= last:
                call.cancel()
                return found
        raise AssertionError("the watch ended")

    def close(self) -> None:
        for each in self._open:
            each.close()
        for process in self.processes:
            if process.process.poll() is None:
                process.process.send_signal(signal.SIGCONT)
                process.kill()


def ask(**fields: Any) -> admission_pb2.AcquireRequest:
    values: dict[str, Any] = {"request_id": secrets.token_hex(8), "kind": MEM, "amount": PAGE}
    values |= fields
    return admission_pb2.AcquireRequest(**values)


def of_lease(make: Any, lease: Any, **fields: Any) -> Any:
    """A request about one lease."""
    return make(**{"request_id": secrets.token_hex(8), "lease_id": lease.lease_id} | fields)


def readiness(process: ServiceProcess) -> dict[str, bool]:
    """Which gates are open."""
    try:
        with urllib.request.urlopen(f"http://{process.http}/api/v1/readiness", timeout=5) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        body = error.read()
        error.close()
    return {name: gate["open"] for name, gate in json.loads(body)["gates"].items()}


def metric(process: ServiceProcess, line: str) -> float:
    """The number behind `line`; 0 where it was never counted."""
    with urllib.request.urlopen(f"http://{process.http}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = [row for row in text.splitlines() if row.startswith(f"{line} ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


def eventually(what: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """What `what()` gives once it is true."""
    end_s, pause = time.monotonic() + timeout_s, threading.Event()
    while not (found := what()):
        assert time.monotonic() < end_s, "it did not come true"
        pause.wait(0.02)
    return found


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Run all in threads of their own, begun together; what each gave, or its failure."""
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int) -> None:
        barrier.wait(10)
        try:
            results[index] = calls[index]()
        except (FabricError, grpc.RpcError) as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def codes(results: list[Any]) -> list[str]:
    return sorted(each.code if isinstance(each, FabricError) else "" for each in results)
