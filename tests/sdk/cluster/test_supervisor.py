"""The supervisor: starts everything, starts again what dies, and takes everything along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grafos._authority import ca_init
from grafos._clock import wall_ms
from grafos._cluster import description as descriptions
from grafos._cluster.child import BACK_OFF_MS_MAX, FRESH_MS, BackOff
from grafos._cluster.launch import Wanted, end, launch
from grafos._cluster.layout import Layout
from grafos._cluster.logfile import last_words, open_log, rotate
from grafos._cluster.programs import Plan
from grafos._cluster.remembered import remembered
from grafos._local import LocalFabric
from grafos_core import failure
from tests.sdk.cluster.stand import MODULES, eventually, stand_in_fabric

ALL = {"ledger", "admission", "audit", "node-n1", "node-n2"}


@pytest.fixture(scope="module")
def fabric() -> Iterator[LocalFabric]:
    with stand_in_fabric(nodes=2) as started:
        yield started


def is_gone(pid: int) -> bool:
    return descriptions.start_ticks(pid) is None


def test_every_process_is_started_and_named_with_pid_endpoints_and_readiness(
    fabric: LocalFabric,
) -> None:
    status = fabric.status()
    assert {each["name"] for each in status["processes"]} == ALL
    for each in status["processes"]:
        assert each["ready"], each
        assert each["ready_kinds"] == ["mem"]
        assert each["endpoints"]["listen"].startswith("unix:")
        assert Path(f"/proc/{each['pid']}").exists()


def test_every_process_gets_the_identity_it_was_started_as(fabric: LocalFabric) -> None:
    def said(name: str) -> str:
        line = (fabric.state_dir / name / "log.jsonl").read_text().splitlines()[0]
        return str(json.loads(line)["id"])

    assert said("ledger") == "spiffe://grafos.local/service/ledger"
    assert said("node-n2") == "spiffe://grafos.local/node/n2"


def test_the_description_names_every_address_and_is_for_its_owner_alone(
    fabric: LocalFabric,
) -> None:
    found = fabric.description
    assert found.is_alive()
    assert [node.node_id for node in found.nodes] == ["n1", "n2"]
    assert all(node.http for node in found.nodes)
    assert fabric.layout.description.stat().st_mode & 0o077 == 0
    for endpoint in (found.admission, found.ledger, found.audit):
        assert endpoint.startswith(f"unix:{fabric.layout.run}/")


def test_a_killed_process_is_started_again_under_the_same_name(fabric: LocalFabric) -> None:
    before = fabric.pids()["node-n1"]
    assert fabric.kill("node-n1") == before
    fabric.wait_ready(10_000)
    again = next(p for p in fabric.status()["processes"] if p["name"] == "node-n1")
    assert again["pid"] != before
    assert again["restarts"] >= 1
    assert again["last_status"] == -signal.SIGKILL
    assert fabric.description.node("n1") is not None


def test_a_new_address_of_a_restarted_process_is_described(fabric: LocalFabric) -> None:
    fabric.kill("ledger")
    fabric.wait_ready(10_000)
    ledger = next(p for p in fabric.status()["processes"] if p["name"] == "ledger")
    assert eventually(lambda: fabric.description.http["ledger"] == ledger["endpoints"]["http"])


def test_a_fault_takes_effect_at_the_next_start_and_shows_as_a_closed_gate(
    fabric: LocalFabric,
) -> None:
    fabric.set_fault("audit", "mute")
    fabric.kill("audit")
    with pytest.raises(failure.DeadlineExceeded, match="told to be mute"):
        fabric.wait_ready(3_000)
    fabric.set_fault("audit", "")
    fabric.kill("audit")
    fabric.wait_ready(10_000)


def test_nothing_is_left_after_the_end() -> None:
    with stand_in_fabric() as fabric:
        pids = fabric.pids()
        folder = fabric.layout.state.parent
    assert all(is_gone(pid) for pid in pids.values())
    assert not folder.exists()


def test_a_process_that_does_not_drain_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_fabric(faults={"node-n1": "stubborn"}) as fabric:
        pids = fabric.pids()
    assert all(is_gone(pid) for pid in pids.values())


def test_everything_ends_when_its_supervisor_is_killed() -> None:
    with stand_in_fabric() as fabric:
        pids = fabric.pids()
        fabric.kill("supervisor")
        eventually(lambda: all(is_gone(pid) for pid in pids.values()))


PROGRAM = """
import os, sys
from tests.sdk.cluster.stand import MODULES
from grafos._local import LocalFabric
fabric = LocalFabric(modules=MODULES).start()
if os.fork() == 0:  # a fork must not keep the fabric alive
    os.read(0, 1)
    os._exit(0)
print(fabric.layout.state.parent, *fabric.pids().values(), flush=True)
sys.stdin.read()
"""


def test_a_fabric_ends_with_its_program_also_by_sigkill_and_though_it_has_forked() -> None:
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        folder, *pids = program.stdout.readline().split()
        program.kill()
        eventually(lambda: all(is_gone(int(pid)) for pid in pids))
        eventually(lambda: not Path(folder).exists())
    finally:
        program.kill()
        program.stdin.close()
        program.stdout.close()
        program.wait()


def test_a_process_that_refuses_its_flags_is_named_with_its_words(tmp_path: Path) -> None:
    fabric = LocalFabric(modules=MODULES, faults={"admission": "usage"})
    with pytest.raises(failure.Incompatible, match=r"admission .* this flag does not fit"):
        fabric.start()


def test_a_second_supervisor_on_the_same_folders_is_refused(fabric: LocalFabric) -> None:
    second = launch(fabric.layout, Wanted(modules=MODULES))
    with pytest.raises(failure.Incompatible, match="another supervisor"):
        second.wait_ready(10_000)
    second.close()
    assert second.process.wait(10) == 1
    assert fabric.status()["ready"]


def test_a_supervisor_is_not_ended_by_a_stale_number(fabric: LocalFabric) -> None:
    found = fabric.description
    assert end(found.supervisor_pid, found.supervisor_start + 1) == "gone"
    assert found.is_alive()


def test_folders_that_are_too_deep_for_sockets_are_refused_by_name(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    with pytest.raises(failure.Incompatible, match="too deep"):
        Layout(deep / "s", deep / "r").prepare()


def test_folders_that_others_may_enter_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(failure.Denied, match="ours alone"):
        Layout(folder, tmp_path / "r").prepare()


def test_pauses_double_to_five_seconds_and_a_long_life_resets_them() -> None:
    back_off = BackOff()
    pauses = [back_off.died(started_ms=n, now_ms=n + 1) for n in range(8)]
    assert pauses == [100, 200, 400, 800, 1600, 3200, BACK_OFF_MS_MAX, BACK_OFF_MS_MAX]
    assert not back_off.take(5_006)
    assert back_off.take(5_008)
    assert not back_off.take(6_000)
    assert back_off.died(started_ms=0, now_ms=FRESH_MS) == 100


def test_what_cannot_start_is_given_up_with_its_last_words() -> None:
    fabric = LocalFabric(modules=MODULES, faults={"audit": "refuse"})
    with pytest.raises(failure.Degraded, match=r"audit ended 6 times: .*the disk is not ours"):
        fabric.start()


def test_a_state_remembers_what_it_was_made_with(tmp_path: Path) -> None:
    first = remembered(Plan(1, 1 << 20, block_bytes=8 << 20), tmp_path)
    assert first.trust_domain == "grafos.local"
    later = remembered(Plan(2, 2 << 20), tmp_path)
    assert (later.nodes, later.memory_bytes, later.block_bytes) == (2, 2 << 20, 8 << 20)
    with pytest.raises(failure.Incompatible, match=r"8\.0 MiB of blocks"):
        remembered(Plan(1, 1 << 20, block_bytes=16 << 20), tmp_path)
    with pytest.raises(failure.Incompatible, match=r"trust domain grafos\.local"):
        remembered(Plan(1, 1 << 20, trust_domain="other.local"), tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(failure.Incompatible, match="cannot be read"):
        remembered(Plan(1, 1 << 20), tmp_path)


def test_a_fabric_takes_the_name_of_the_authority_that_was_made_for_it(tmp_path: Path) -> None:
    ca_init(tmp_path / "ca", now_ms=wall_ms(), trust_domain="made.before")
    assert remembered(Plan(1, 1 << 20), tmp_path).trust_domain == "made.before"


def test_logs_are_cut_when_they_have_grown_and_writers_go_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    descriptor = open_log(path)
    os.write(descriptor, b"x" * 2_000)
    assert not rotate(path, 4_000)
    os.write(descriptor, b"y" * 2_001)
    assert rotate(path, 4_000)
    os.write(descriptor, b"the next line\n")
    os.close(descriptor)
    assert path.read_text() == "the next line\n"
    assert (tmp_path / "log.jsonl.1").stat().st_size == 4_001


def test_last_words_are_those_of_the_failure(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "service.refused", "traceback": ["a", "VERSION: too old"]}\n')
    assert last_words(path) == "VERSION: too old"
    path.write_text('{"event": "service.halted"}\nplain words\n')
    assert last_words(path) == "plain words"
    assert last_words(tmp_path / "none") == ""
