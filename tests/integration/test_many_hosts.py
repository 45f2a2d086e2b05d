"""Services that share no user, no folder and no network are one fabric all the same."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.machine import processes_naming
from tests.integration.town import SERVED, Refused, Town, Visitor, town_in

TTL_S = 3.0
NOTICED_S = 4.0
"""After a cut: the node says something each second, and gives a peer 3 s to take it."""
SLACK_S = 2.0
BACK_S_MAX = 30.0


def eventually(look: Callable[[], bool], seconds: float = BACK_S_MAX) -> bool:
    until = time.monotonic() + seconds
    while not look() and time.monotonic() < until:
        time.sleep(0.1)
    return look()


def use_and_give_back(holder: Visitor, kind: str, node: str, path: str) -> None:
    """One whole life of a lease."""
    lease = holder("acquire", kind=kind, node=node, ttl=30, wait=BACK_S_MAX)
    assert lease["path"] == path
    holder("write", lease_id=lease["lease_id"], text=f"hello {node}")
    assert holder("read", lease_id=lease["lease_id"], length=8) == f"hello {node}"
    assert holder("renew", lease_id=lease["lease_id"]) > 20_000
    receipt = holder("release", lease_id=lease["lease_id"])
    assert receipt == {"outcome": "torndown", "credited": True}


def all_free(operator: Visitor, town: Town) -> bool:
    books = operator("books", endpoint=town.members["ledger"].endpoint)
    return len(books) == 4 and all(free == total for _, _, _, free, total in books)


def test_one_user_over_loopback_tcp(tmp_path: Path) -> None:
    with town_in(tmp_path / "town", walls=False) as town:
        town.start()
        holder, operator = town.visit("holder"), town.visit("operator")
        for node in ("n1", "n2"):
            use_and_give_back(holder, "mem", node, "shared")
            use_and_give_back(holder, "block", node, "port")
        assert eventually(lambda: all_free(operator, town))
        assert town.stop() == dict.fromkeys(SERVED, 0)
    assert processes_naming(str(town.folder)) == []


@pytest.mark.root
@pytest.mark.requires("ip", "nsenter", "unshare", "netns")
def test_every_member_another_user_in_another_network(tmp_path: Path) -> None:
    namespaces_before = _namespaces()
    with town_in(tmp_path / "town", walls=True) as town:
        town.start()
        holder, operator = town.visit("holder"), town.visit("operator")
        assert_apart(town, holder)
        for node in ("n1", "n2"):
            use_and_give_back(holder, "mem", node, "port")
            use_and_give_back(holder, "block", node, "port")
        holder_cut_off_and_healed(town, holder)
        cut_off_and_healed(town, holder, operator)
        assert eventually(lambda: all_free(operator, town))
        assert town.stop() == dict.fromkeys(SERVED, 0)
    assert processes_naming(str(town.folder)) == []
    assert _namespaces() == namespaces_before
    assert not town.folder.exists()


@pytest.mark.root
@pytest.mark.requires("ip", "nsenter", "unshare", "netns")
def test_nothing_is_left_of_a_town_whose_test_has_failed(tmp_path: Path) -> None:
    namespaces_before = _namespaces()
    folder = tmp_path / "town"
    with pytest.raises(ZeroDivisionError):
        build_and_fail(folder)
    assert _namespaces() == namespaces_before
    assert processes_naming(str(folder)) == []
    assert not folder.exists()


def build_and_fail(folder: Path) -> None:
    with town_in(folder, walls=True) as town:
        town.start("audit", "ledger")
        town.visit("holder")("who")
        assert len(processes_naming(str(folder))) >= 2
        raise ZeroDivisionError


def _namespaces() -> set[str]:
    shown = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in shown.stdout.splitlines()}


def assert_apart(town: Town, holder: Visitor) -> None:
    """No two of them have a user or a network in common, and none has this test's."""
    seen = [holder("who")]
    for name in SERVED:
        process = town.members[name].process
        assert process is not None
        status = Path(f"/proc/{process.pid}/status").read_text()
        uids = {line for line in status.splitlines() if line.startswith("Uid:")}
        uid = town.members[name].uid
        assert uids == {"\t".join(["Uid:"] + 4 * [str(uid)])}
        assert "CapEff:\t0000000000000000" in status
        network = Path(f"/proc/{process.pid}/ns/net").readlink()
        seen.append({"uid": uid, "net": str(network)})
    own = str(Path("/proc/self/ns/net").readlink())
    assert len({each["uid"] for each in seen}) == len(seen) == 6
    assert len({each["net"] for each in seen} | {own}) == 7


def holder_cut_off_and_healed(town: Town, holder: Visitor) -> None:
    """The node sees no end of the connection, only that nobody takes what it says."""
    there = town.members["n2"].control
    leases = {
        what: holder("acquire", kind="mem", node="n2", ttl=60, on_disconnect=what)["lease_id"]
        for what in ("release", 6, "keep")
    }
    at_n2 = town.visit("operator", at="n2")

    def living() -> set[str | int]:
        alive = _live(at_n2, there, "n2")
        return {what for what, lease_id in leases.items() if lease_id in alive}

    assert living() == {"release", 6, "keep"}
    town.cut("holder")
    assert eventually(lambda: living() == {6, "keep"}, NOTICED_S + 1 + SLACK_S)
    town.heal("holder")
    time.sleep(6)
    assert living() == {6, "keep"}, "it was back in time, without having been asked anything"
    with pytest.raises(Refused) as refused:
        holder("read", lease_id=leases["release"], length=14)
    assert refused.value.failure == "LeaseExpired"
    for what in (6, "keep"):
        assert holder("release", lease_id=leases[what])["credited"] is True


def cut_off_and_healed(town: Town, holder: Visitor, operator: Visitor) -> None:
    n1, ledger = town.members["n1"], town.members["ledger"].endpoint
    lost = {
        kind: holder("acquire", kind=kind, node="n1", ttl=TTL_S)["lease_id"]
        for kind in ("mem", "block")
    }
    kept = holder("acquire", kind="mem", node="n2", ttl=60)["lease_id"]
    for lease_id in (*lost.values(), kept):
        holder("write", lease_id=lease_id, text="before the cut")
    at_n1 = town.visit("operator", at="n1")
    assert {at_n1("node", endpoint=n1.control, node_id="n1")[each] for each in lost.values()} == {
        "live"
    }
    town.cut("n1")
    begun = time.monotonic()
    assert holder("read", lease_id=kept, length=14) == "before the cut"
    assert eventually(lambda: not set(lost.values()) & _live(at_n1, n1.control), TTL_S + 2), (
        "the cut off node ends its leases by itself"
    )
    assert time.monotonic() - begun > TTL_S - 2.5, "and not before their time"
    for lease_id in lost.values():
        with pytest.raises(Refused) as refused:
            holder("read", lease_id=lease_id, length=14)
        assert refused.value.failure == "LeaseExpired"
    assert eventually(lambda: _is_lost(operator, ledger, "n1"), 8)
    with pytest.raises(Refused) as refused:
        holder("acquire", kind="mem", node="n1", ttl=TTL_S)
    assert refused.value.code == "NODE_NOT_READY"
    use_and_give_back(holder, "mem", "n2", "port")
    use_and_give_back(holder, "block", "n2", "port")
    assert holder("renew", lease_id=kept) > 50_000
    for lease_id in lost.values():  # nothing is free because time has passed
        assert operator("ledger", endpoint=ledger, lease_id=lease_id) == "LEASE_STATE_ENDING"
    town.heal("n1")
    assert eventually(lambda: all(_is_released(operator, ledger, each) for each in lost.values()))
    use_and_give_back(holder, "mem", "n1", "port")
    assert holder("read", lease_id=kept, length=14) == "before the cut"
    assert holder("release", lease_id=kept)["credited"] is True


def _live(at_node: Visitor, endpoint: str, node_id: str = "n1") -> set[str]:
    stages = at_node("node", endpoint=endpoint, node_id=node_id)
    return {lease_id for lease_id, stage in stages.items() if stage == "live"}


def _is_lost(operator: Visitor, endpoint: str, node_id: str) -> bool:
    books = operator("books", endpoint=endpoint)
    return any(name == node_id and lost for name, lost, *_ in books)


def _is_released(operator: Visitor, endpoint: str, lease_id: str) -> bool:
    state = operator("ledger", endpoint=endpoint, lease_id=lease_id)
    return bool(state == "LEASE_STATE_RELEASED")
