"""Faults on purpose: named, described, and only where they may be."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grafos_core import failure
from grafos_core.failure import InvariantViolation
from services.runtime import faults

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    faults.arm("", development=True)


def test_a_point_that_is_not_armed_does_nothing() -> None:
    faults.fault("teardown.erase")
    faults.arm("ledger.commit:EIO", development=True)
    faults.fault("teardown.erase")


def test_an_armed_point_raises_what_was_named_at_every_passage() -> None:
    faults.arm("teardown.erase:EIO, ledger.commit:ENOSPC", development=True)
    for name, number in (("teardown.erase", errno.EIO), ("ledger.commit", errno.ENOSPC)):
        for _ in range(2):
            with pytest.raises(OSError, match=name) as caught:
                faults.fault(name)
            assert caught.value.errno == number


def test_a_numbered_fault_happens_at_that_passage_alone() -> None:
    faults.arm("ledger.commit:ENOSPC:3", development=True)
    failed = []
    for passage in range(1, 6):
        try:
            faults.fault("ledger.commit")
        except OSError:
            failed.append(passage)
    assert failed == [3]


def test_a_hang_takes_as_long_as_it_says() -> None:
    faults.arm("front.read:hang=60", development=True)
    started = time.monotonic()
    faults.fault("front.read")
    assert time.monotonic() - started >= 0.06


def test_a_kill_leaves_no_time_for_anything() -> None:
    code = (
        "from services.runtime import faults\n"
        "faults.arm('ledger.commit:kill:2', development=True)\n"
        "faults.fault('ledger.commit'); print('once', flush=True)\n"
        "faults.fault('ledger.commit'); print('twice', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": f"{ROOT}:{ROOT}/core:{ROOT}/protos"}, timeout=30,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "once\n"


def test_production_takes_no_faults() -> None:
    with pytest.raises(failure.Incompatible):
        faults.arm("teardown.erase:EIO", development=False)
    faults.arm("", development=False)


@pytest.mark.parametrize(
    "text", ["nothing:EIO", "teardown.erase", "teardown.erase:", "teardown.erase:EIO:x",
             "teardown.erase:hang=", "teardown.erase:hang=600001", "teardown.erase:EIO:-1"],
)  # fmt: skip
def test_what_is_not_well_formed_is_refused_and_changes_nothing(text: str) -> None:
    faults.arm("ledger.commit:EIO", development=True)
    with pytest.raises(failure.Incompatible) as caught:
        faults.arm(text, development=True)
    assert caught.value.code == "OPTION"
    with pytest.raises(OSError, match=r"ledger\.commit"):
        faults.fault("ledger.commit")


def test_every_point_in_the_services_is_described() -> None:
    used = set()
    for path in (ROOT / "services").rglob("*.py"):
        used |= set(re.findall(r"\bfault\(\s*\"([^\"]+)\"", path.read_text()))
    assert used <= set(faults.POINTS), "describe them in services/runtime/faults.py"
    faults.arm("ledger.commit:EIO", development=True)
    with pytest.raises(InvariantViolation):
        faults.fault("no.such.point")
