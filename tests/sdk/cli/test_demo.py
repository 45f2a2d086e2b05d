"""The demonstration runs as it should, and does not call well what is not."""

from __future__ import annotations

import pytest

from grafos._demo import Demo, Eye, Teller
from grafos._local import LocalFabric
from tests.sdk.cli.conftest import Cli


def test_the_demonstration_succeeds_within_a_minute_and_says_each_step(cli: Cli) -> None:
    done = cli("demo", timeout_s=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[9/9]" in done.stdout
    assert "\n   NO " not in done.stdout
    assert done.stdout.count("\n   ok ") >= 18
    assert done.stderr == ""


def test_a_teardown_that_should_have_failed_and_did_not_is_a_fault_of_the_demonstration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    teller = Teller(1)
    with LocalFabric(nodes=2, memory_bytes=64 << 20) as fabric:  # nothing is broken here
        Demo(fabric, teller).fenced()
    assert teller.faults == 1
    assert "NO release raised NoneType" in capsys.readouterr().out


def test_pages_that_stay_are_seen_from_outside() -> None:
    from grafos import MemBuilder

    with LocalFabric(memory_bytes=64 << 20) as fabric:
        with MemBuilder().min_bytes(1 << 20).acquire() as lease:
            lease.mem().write(0, b"\xff" * (1 << 20))
            eye = Eye(fabric.pids()["node-n1/warden"], lease.lease_id)
            assert eye.resident_bytes() == 1 << 20
            lease.release()
            assert eye.resident_bytes() == 0
            eye.close()
