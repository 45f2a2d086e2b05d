"""`grafos up`, `status`, `down`, as a user types them, with stand-ins in the place of services."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grafos._cluster import description as descriptions
from grafos._cluster.launch import Wanted, end, launch
from grafos._cluster.layout import Layout
from grafos_core import failure
from tests.sdk.cli.conftest import Cli
from tests.sdk.cluster.stand import MODULES, eventually


@pytest.fixture
def up(place: Path) -> Iterator[Layout]:
    """A fabric of stand-ins in the folders that `cli` uses."""
    layout = Layout(place / "state", place / "run")
    launched = launch(layout, Wanted(nodes=1, modules=MODULES))
    launched.wait_ready(20_000)
    launched.close()
    found = descriptions.load(layout.description)
    assert found is not None
    yield layout
    end(found.supervisor_pid, found.supervisor_start)
    launched.process.wait(10)


def test_status_names_each_process_with_its_pid_endpoints_and_readiness(
    cli: Cli, up: Layout
) -> None:
    done = cli("status", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    status = json.loads(done.stdout)
    assert {each["name"] for each in status["processes"]} == {
        "ledger", "admission", "audit", "node-n1",
    }  # fmt: skip
    assert all(each["pid"] and each["ready"] and each["endpoints"] for each in status["processes"])


def test_the_table_has_a_line_per_process_and_can_do_without_headers(cli: Cli, up: Layout) -> None:
    with_headers = cli("status").stdout.splitlines()
    assert with_headers[0].split()[:3] == ["PROCESS", "PID", "STATE"]
    assert len(with_headers) == 6
    assert len(cli("status", "--no-headers").stdout.splitlines()) == 5
    assert cli("status", "-o", "name").stdout.splitlines()[1:] == [
        "ledger", "admission", "audit", "node-n1",
    ]  # fmt: skip
    assert "unix:" in cli("status", "-o", "wide").stdout


def test_up_on_a_running_fabric_says_so_and_is_no_failure(cli: Cli, up: Layout) -> None:
    done = cli("up")
    assert done.returncode == 0
    assert "up already" in done.stderr
    assert str(up.state) in done.stdout


def test_down_stops_everything_says_so_and_keeps_the_state(cli: Cli, up: Layout) -> None:
    pids = [each["pid"] for each in json.loads(cli("status", "-o", "json").stdout)["processes"]]
    done = cli("down")
    assert done.returncode == 0
    assert "is stopped" in done.stderr
    assert all(descriptions.start_ticks(pid) is None for pid in pids)
    assert (up.state / "ca" / "authority.json").exists()
    again = cli("down")
    assert (again.returncode, "nothing to stop" in again.stderr) == (0, True)


def test_status_of_nothing_is_one_line_on_standard_error(cli: Cli) -> None:
    done = cli("status", "-o", "json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("grafos: Disconnected (UNREACHABLE): no fabric runs in ")


def test_what_does_not_fit_is_a_usage_error(cli: Cli) -> None:
    assert cli("frobnicate").returncode == 2
    assert cli("up", "--nodes", "many").returncode == 2
    assert cli().returncode == 2


def test_a_size_that_is_none_is_named_before_anything_starts(cli: Cli, place: Path) -> None:
    done = cli("up", "--memory", "lots")
    assert done.returncode == 1
    assert "256MiB" in done.stderr
    assert not (place / "run").exists()


def test_what_a_dead_supervisor_left_behind_is_not_taken_for_a_fabric(cli: Cli, up: Layout) -> None:
    found = descriptions.load(up.description)
    assert found is not None
    killed = subprocess.run(["kill", f"-{signal.SIGKILL}", str(found.supervisor_pid)], check=False)
    assert killed.returncode == 0
    assert up.description.exists()
    assert cli("status").returncode == 1


def test_up_status_and_down_load_neither_grpc_nor_cryptography() -> None:
    program = (
        "import sys, grafos._cli.parser, grafos._cluster.launch;"
        "print([name for name in ('grpc', 'cryptography', 'google') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_what_is_not_ready_in_time_goes_on_and_is_stopped_by_down(cli: Cli, place: Path) -> None:
    layout = Layout(place / "state", place / "run")
    launched = launch(layout, Wanted(modules=MODULES, faults={"audit": "mute"}))
    with pytest.raises(failure.DeadlineExceeded, match="told to be mute"):
        launched.wait_ready(3_000)
    launched.close()
    assert cli("up").returncode == 1
    done = cli("down")
    assert (done.returncode, "is stopped" in done.stderr) == (0, True)
    launched.process.wait(10)


def test_a_fabric_that_is_only_starting_is_stopped_too(cli: Cli, place: Path) -> None:
    layout = Layout(place / "state", place / "run")
    launched = launch(layout, Wanted(modules=MODULES))
    eventually(lambda: descriptions.supervisor(layout.run))
    done = cli("down")
    assert (done.returncode, "is stopped" in done.stderr) == (0, True), done.stderr
    launched.process.wait(10)
    launched.close()


def test_a_machine_joins_once_with_its_token(cli: Cli, place: Path) -> None:
    layout = Layout(place / "state", place / "run")
    launched = launch(layout, Wanted(modules=MODULES, join_listen="127.0.0.1:0"))
    launched.wait_ready(20_000)
    launched.close()
    found = descriptions.load(layout.description)
    assert found is not None
    try:
        token = cli("node", "token", "create", "n7").stdout.strip()
        join = ("node", "join", found.join, "--token", token, "--out")
        first = cli(*join, str(place / "n7"))
        assert first.returncode == 0, first.stderr
        assert first.stdout.startswith("spiffe://grafos.local/node/n7 in ")
        assert (place / "n7" / "tls.crt").exists()
        second = cli(*join, str(place / "other"))
        assert second.returncode == 4
        assert "JOIN_TOKEN" in second.stderr
        assert token not in second.stderr
    finally:
        end(found.supervisor_pid, found.supervisor_start)
        launched.process.wait(10)


def test_a_fabric_comes_up_again_after_its_supervisor_was_killed(cli: Cli, up: Layout) -> None:
    before = descriptions.load(up.description)
    assert before is not None
    killed = subprocess.run(["kill", "-9", str(before.supervisor_pid)], check=False)
    assert killed.returncode == 0
    again = launch(up, Wanted(modules=MODULES))
    again.wait_ready(20_000)
    again.close()
    found = descriptions.load(up.description)
    assert found is not None
    assert found.supervisor_pid != before.supervisor_pid
    assert cli("status").returncode == 0
    assert end(found.supervisor_pid, found.supervisor_start) == "stopped"
    again.process.wait(10)
