"""A whole fabric whose parties have wrong clocks, other clocks, or stand still (rows G13, S8, S11).

Whatever one party's clock says: what a holder was told holds to the end, nothing is granted beyond
it, nothing is given on before it was proved back, and when the clock is right again all serve.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from grafos import FabricError, MemBuilder
from grafos._cluster.programs import environment
from grafos._local import LocalFabric
from tests.chaos.laws import history_exclusive, node_history_exclusive
from tests.chaos.onlooker import Onlooker, open_memories
from tests.clocks import NODE, Clocks
from tests.integration.town import Refused, Visitor

MEMORY_BYTES, HALF = 8 << 20, 4 << 20
TTL_S, HOURS_MS = 1.2, 2 * 3_600_000
STOP_AFTER_S, GO_ON_AFTER_S = 0.3, 1.5
SOON_MS = 150
"""Of a lease that is in use to its end: the last operation is hardly earlier than that."""
SLACK_MS = 100
"""For an answer of some megabytes to arrive, after the last look at the gate; who was stopped goes
on later than that."""
BOUND_MS = 1_000
"""Far more than is published; a machine that is busy with other tests is no counter-example."""
OTHER_TIME = ("unshare", "--time", "--boottime", "31536000", "--monotonic", "77777")
PARTIES = {
    "ledger": ("ledger",),
    "admission": ("admission",),
    "audit": ("audit",),
    "node": NODE,
    "holder": ("holder",),
}


@pytest.fixture(scope="module")
def clocks(tmp_path_factory: pytest.TempPathFactory) -> Clocks:
    return Clocks(tmp_path_factory.mktemp("clocks"))


@pytest.fixture(scope="module")
def fabric(clocks: Clocks) -> Iterator[LocalFabric]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in clocks.environment().items():
            patch.setenv(name, value)
        running = LocalFabric(memory_bytes=MEMORY_BYTES, block_bytes=1 << 20).start()
    with running:
        yield running


@pytest.fixture
def onlooker(fabric: LocalFabric) -> Iterator[Onlooker]:
    looking = Onlooker(fabric)
    yield looking
    looking.close()


@pytest.fixture
def visitor(fabric: LocalFabric, clocks: Clocks) -> Iterator[Visitor]:
    visiting = Visitor([sys.executable, "-m", "tests.integration.visitor"], around(fabric, clocks))
    yield visiting
    clocks.right_wall()
    visiting.close()


def around(fabric: LocalFabric, clocks: Clocks | None) -> dict[str, str]:
    """What a holder in a process of its own finds around it."""
    shifted = clocks.environment() if clocks else {}
    paths = [shifted.get("PYTHONPATH", ""), *sys.path]
    found = environment(os.environ, "") | shifted
    found["GRAFOS_RUN_DIR"] = str(fabric.layout.run)
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def boot_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def acquired(visitor: Visitor, amount: int = HALF, **options: Any) -> tuple[str, int]:
    """The lease, and the instant at which it is certainly over."""
    got = visitor("acquire", kind="mem", node="n1", ttl=TTL_S, wait=10, amount=amount, **options)
    return got["lease_id"], boot_ms() + int(1000 * TTL_S)


def assert_lived_to_its_end(used: dict[str, Any], end_ms: int) -> None:
    assert used["failure"] == "LeaseExpired", used
    assert used["count"] > 0
    assert used["until_ms"] <= end_ms, "the holder stops first"
    assert used["until_ms"] - SOON_MS <= used["last_ms"] <= used["until_ms"], used


def assert_gone_by(lease_id: str, until_ms: int) -> None:
    """Its bytes, wherever they are open."""
    while any(bytes_open(lease_id)):
        assert boot_ms() < until_ms, "prolonged"
        time.sleep(0.01)


def bytes_open(lease_id: str) -> list[int]:
    return [each.size_bytes for each in open_memories() if each.lease_id == lease_id]


def assert_never_shared(onlooker: Onlooker) -> None:
    totals = {(book.node_id, book.kind): book.total for book in onlooker.books()}
    assert history_exclusive(onlooker.ledger_chain()) == []
    assert node_history_exclusive("n1", onlooker.node_chains()["n1"], totals) == []


def asked_for_more(lease: Any) -> None:
    """As far as the clocks let it: granted, or refused with a type."""
    before_ms = lease.remaining_ms()
    try:
        lease.renew()
    except FabricError:
        pass
    assert before_ms - 1_000 <= lease.remaining_ms() <= 60_000


@pytest.mark.parametrize("party", PARTIES)
def test_g13_hours_forwards_and_back_on_one_party_move_no_lease(
    fabric: LocalFabric, clocks: Clocks, onlooker: Onlooker, visitor: Visitor, party: str
) -> None:
    with MemBuilder().min_bytes(4096).lease_secs(60).acquire() as other:
        lease_id, end_ms = acquired(visitor)
        visitor.tell("use", lease_id=lease_id, verb="read")
        for step_ms in (HOURS_MS, -2 * HOURS_MS):
            clocks.step_wall(step_ms, *PARTIES[party])
            asked_for_more(other)
            other.mem().write(0, b"still ours")
            time.sleep(0.3)
        assert_lived_to_its_end(visitor.hear("use"), end_ms)
        assert_gone_by(lease_id, end_ms + BOUND_MS)
        clocks.right_wall()
        assert other.mem().read(0, 10) == b"still ours"
        assert onlooker.wait_settled([lease_id], 10) == []
    fabric.wait_ready()
    with MemBuilder().min_bytes(MEMORY_BYTES).wait(10).acquire() as whole:
        assert whole.mem().read(0, 16) == bytes(16)
    assert_never_shared(onlooker)


@pytest.mark.parametrize(
    "stopped",
    [
        ("ledger",),
        ("admission",),
        ("audit",),
        ("node-n1",),
        ("node-n1/warden",),
        ("node-n1", "node-n1/warden"),
    ],
    ids="+".join,
)
def test_whoever_stands_still_past_a_deadline_prolongs_nothing_and_serves_again(
    fabric: LocalFabric, onlooker: Onlooker, visitor: Visitor, stopped: tuple[str, ...]
) -> None:
    """The node alone has to refuse: the holder does not look at its clock."""
    lease_id, end_ms = acquired(visitor, MEMORY_BYTES)
    visitor.tell("use", lease_id=lease_id, verb="far read")
    time.sleep(STOP_AFTER_S)
    pids = fabric.pids()
    for name in stopped:
        os.kill(pids[name], signal.SIGSTOP)
    try:
        if stopped in (("audit",), ("node-n1/warden",), ("node-n1",)):
            with pytest.raises(FabricError):
                MemBuilder().min_bytes(MEMORY_BYTES).acquire()
        time.sleep(max(0.0, GO_ON_AFTER_S - STOP_AFTER_S))
        if "node-n1" not in stopped or "node-n1/warden" not in stopped:
            assert not any(bytes_open(lease_id)), "one of the two has kept the hour"
    finally:
        for name in stopped:
            resume(pids[name])
    used = visitor.hear("use")
    assert used["count"] > 0
    assert used["last_ms"] <= end_ms + SLACK_MS, "acknowledged after the deadline"
    assert used["failure"] in ("LeaseExpired", "Fenced", "Disconnected"), used
    with pytest.raises(Refused):
        visitor("read", lease_id=lease_id, length=16)
    with MemBuilder().min_bytes(MEMORY_BYTES).wait(10).acquire() as next_one:
        assert onlooker.wait_settled([lease_id], 0) == [], "given on before it was proved back"
        assert next_one.mem().read(0, 4096) == bytes(4096)
    fabric.wait_ready()
    assert_never_shared(onlooker)


def resume(pid: int) -> None:
    """Unless it was taken for hung and killed meanwhile, which is as good."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass


@pytest.mark.root
@pytest.mark.requires("root", "unshare")
def test_a_holder_with_another_boottime_keeps_the_same_hours(
    fabric: LocalFabric, onlooker: Onlooker
) -> None:
    """Another machine's boottime, or a container's: a year ahead of the node's."""
    words = [*OTHER_TIME, sys.executable, "-m", "tests.integration.visitor"]
    visitor = Visitor(words, around(fabric, None))
    try:
        lease_id, end_ms = acquired(visitor)
        assert onlooker.unsettled([lease_id]), "it has found this fabric, and no other"
        end_ms += 31_536_000_000
        visitor("renew", lease_id=lease_id)
        used = visitor("use", lease_id=lease_id, verb="read")
        assert_lived_to_its_end(used, end_ms + int(1000 * TTL_S))
        late = visitor("use", lease_id=lease_id, verb="far read")
        assert late["failure"] == "LeaseExpired", "by the node"
        assert late["last_ms"] <= used["until_ms"] + SLACK_MS
        assert onlooker.wait_settled([lease_id], 10) == []
    finally:
        visitor.close()
