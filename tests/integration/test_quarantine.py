"""Slices that could not be proved back, at real nodes: looked at by themselves, freed by nobody.

The fault strikes the two tries of a teardown's measurement and is gone afterwards, as a disk that
had a bad moment: the slice is empty, and nobody knows it until it is looked at again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import grafos
from grafos import BlockBuilder, MemBuilder, audit
from grafos._cli import main
from grafos._local import LocalFabric
from grafos_core.quarantine import PROBE_MS_MIN

MIB = 1 << 20
BAD_MOMENT = "teardown.measure:EIO:1-2"
LOOK_S = PROBE_MS_MIN / 1000
SLACK_S = 15.0


@pytest.fixture(scope="module")
def careful() -> Iterator[LocalFabric]:
    """As everybody has it: nothing is freed by itself."""
    faults = {"node-n1": BAD_MOMENT}
    with LocalFabric(memory_bytes=64 * MIB, block_bytes=8 * MIB, faults=faults) as running:
        yield running


@pytest.fixture(scope="module")
def told_to() -> Iterator[LocalFabric]:
    faults = {"node-n1": "memory.measure:EIO:1-2"}
    with LocalFabric(
        memory_bytes=64 * MIB, block_bytes=8 * MIB, faults=faults, clear_proved_clean=True
    ) as running:
        yield running


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(fabric: LocalFabric, *words: str) -> tuple[int, str]:
        monkeypatch.setenv("GRAFOS_RUN_DIR", str(fabric.layout.run))
        monkeypatch.setenv("GRAFOS_STATE_DIR", str(fabric.layout.state))
        capsys.readouterr()
        status = main(list(words))
        return status, capsys.readouterr().out

    return run


def fenced(fabric: LocalFabric) -> str:
    lease = MemBuilder().min_bytes(MIB).fabric(fabric.connection).acquire()
    lease.mem().write(0, b"somebody's")
    with pytest.raises(grafos.Fenced):
        lease.release()
    return lease.lease_id


def wait_for(found: Any, within_s: float) -> Any:
    until = time.monotonic() + within_s
    while not (value := found()):
        assert time.monotonic() < until, "not in time"
        time.sleep(0.2)
    return value


def test_a_fence_is_looked_at_by_itself_and_stays_though_it_is_clean(
    careful: LocalFabric, ask: Any
) -> None:
    lease_id = fenced(careful)
    (fence,) = wait_for(careful.connection.fences, SLACK_S)
    assert (fence.lease_id, fence.node_id, fence.amount) == (lease_id, "n1", MIB)
    assert "EIO" in fence.cause
    assert 0 <= fence.age_ms < 60_000

    def looked() -> Any:
        status, out = ask(careful, "fence", "describe", lease_id, "-o", "json")
        assert status == 0
        return (json.loads(out)["probes"] or {}).get("latest") and json.loads(out)

    described = wait_for(looked, LOOK_S + SLACK_S)
    found = described["probes"]["latest"]
    assert (found["clean"], found["asked"], found["number"]) == (True, False, 1)
    assert found["evidence"]["measure_st_size"] == "0"
    assert "EIO" in described["fence_cause"], "the cause is what had failed then"
    assert "clean, " in ask(careful, "fence", "describe", lease_id)[1]
    with BlockBuilder().min_blocks(4).fabric(careful.connection).acquire() as neighbour:
        neighbour.block().write_block(0, b"x" * 4096)
    assert [each.lease_id for each in careful.connection.fences()] == [lease_id]


def test_what_was_found_survives_the_agent_and_an_operator_frees_it(
    careful: LocalFabric, ask: Any
) -> None:
    (fence,) = careful.connection.fences()
    careful.set_fault("node-n1", "")
    before = careful.kill("node-n1")
    careful.wait_replaced("node-n1", before)
    careful.wait_ready()
    _, out = ask(careful, "fence", "describe", fence.lease_id, "-o", "json")
    assert json.loads(out)["probes"]["findings"][0]["clean"]
    status, out = ask(careful, "fence", "clear", fence.lease_id, "--reason", "it was a moment")
    assert (status, out) == (0, f"{fence.lease_id} released\n")
    lease = careful.connection.describe(fence.lease_id)
    assert (lease.state, lease.cleared) == ("released", "operator")
    assert ask(careful, "fence", "list", "--residue", "-o", "name") == (0, "")


def test_residue_is_freed_by_its_flag_alone_and_marked_for_ever(
    careful: LocalFabric, ask: Any
) -> None:
    careful.set_fault("node-n1", "memory.erase:EIO")
    before = careful.kill("node-n1")
    careful.wait_replaced("node-n1", before)
    careful.wait_ready()
    lease_id = fenced(careful)
    clear = ("fence", "clear", lease_id, "--reason", "the machine goes")
    assert ask(careful, *clear)[0] == 1
    status, out = ask(careful, *clear, "--accept-residue")
    assert (status, out) == (0, f"{lease_id} released\n")
    assert ask(careful, "fence", "list", "--residue", "-o", "name") == (0, f"{lease_id}\n")
    ledger = careful.pids()["ledger"]
    careful.kill("ledger")
    careful.wait_replaced("ledger", ledger)
    careful.wait_ready()
    assert ask(careful, "fence", "list", "--residue", "-o", "name") == (0, f"{lease_id}\n")
    assert careful.connection.describe(lease_id).cleared == "residue"


def test_with_the_policy_it_comes_back_by_itself_with_a_receipt(
    told_to: LocalFabric, ask: Any, tmp_path: Path
) -> None:
    assert "clears what is proved clean" in ask(told_to, "status")[1]
    lease_id = fenced(told_to)
    lease = wait_for(
        lambda: (found := told_to.connection.describe(lease_id)).state == "released" and found,
        LOOK_S + SLACK_S,
    )
    assert lease.cleared == "policy"
    exported = tmp_path / "chains.jsonl"

    def recorded() -> Any:
        assert ask(told_to, "audit", "export", "--out", str(exported))[0] == 0
        records = audit.records(exported.read_text().splitlines())
        told = {each.kind: each for each in records if each.lease_id == lease_id}
        return {"agent.cleared", "lease.released"} <= set(told) and told

    told = wait_for(recorded, SLACK_S)
    assert told["agent.probed"].body["clean"]
    assert not told["agent.probed"].body["asked"]
    cleared, released = told["agent.cleared"], told["lease.released"].body
    assert (cleared.body["cleared"], cleared.body["operator"]) == ("policy", "")
    assert cleared.body["measured"]["measure_st_size"] == 0, "it was measured anew"
    assert cleared.number > told["agent.clear_begun"].number > told["agent.probed"].number
    assert (released["cleared"], released["record_number"]) == ("policy", cleared.number)
    assert released["record_hash"] == cleared.hash.hex()
    assert told_to.connection.fences() == []
    assert ask(told_to, "fence", "describe", lease_id)[0] == 3
