"""Every disk that a power cut leaves is started by the real stores, and every promise is kept.

Each store works once as it does in its process, recorded call by call; half of them were killed
before a sync and went on. `python -m tests.disk` tries every kill and many more disks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.disk.board import Op
from tests.disk.crash import Step, Verdict, judged, record
from tests.disk.judges import JUDGES
from tests.disk.workload import WORKLOADS

Kills = tuple[tuple[str, Op, int], ...]
SUBSETS = 2
KILLED: Kills = (("-wal", Op.SYNC, 7),)
"""Of the collector: all of a transaction is written and none of it synced."""
CASES: dict[str, tuple[str, Kills, int]] = {
    "ledger": ("ledger", (), 400),
    "audit": ("audit", KILLED, 250),
    "agent": ("agent", (("spool.0", Op.SYNC, 4), ("head", Op.SYNC, 4)), 80),
    "warden": ("warden", (("journal", Op.SYNC, 2),), 30),
}
"""Workload, where it is killed, and at least so many disks."""

Recorded = Callable[[str], list[Step]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    made: dict[str, list[Step]] = {}

    def steps(case: str) -> list[Step]:
        if case not in made:
            folder, disk = tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("disk")
            workload, kills, _ = CASES[case]
            made[case] = record(workload, folder, disk, kills)
        return made[case]

    return steps


def verdict(case: str, steps: list[Step], wrong_max: int = 10) -> Verdict:
    judge = JUDGES[CASES[case][0]]
    return judged(steps, judge, seed=1, subsets=SUBSETS, wrong_max=wrong_max)


def test_every_store_that_keeps_promises_is_tried() -> None:
    assert set(WORKLOADS) == set(JUDGES) == {case[0] for case in CASES.values()}


@pytest.mark.requires("cc")
@pytest.mark.parametrize("case", CASES)
def test_no_power_cut_takes_a_promise_back_or_keeps_the_store_from_starting(
    case: str, recorded: Recorded
) -> None:
    found = verdict(case, recorded(case))
    assert found.wrong == []
    assert found.states >= CASES[case][2]


def without(steps: list[Step], op: Op, text: str) -> list[Step]:
    return [step for step in steps if step.op is not op or text not in step.path]


@pytest.mark.requires("cc")
@pytest.mark.parametrize(
    ("case", "unsynced"),
    [("ledger", "-wal"), ("audit", "-wal"), ("agent", "spool"), ("agent", "head"),
     ("warden", "journal")],
)  # fmt: skip
def test_a_sync_that_was_left_out_is_found(case: str, unsynced: str, recorded: Recorded) -> None:
    assert verdict(case, without(recorded(case), Op.SYNC, unsynced), 1).wrong


def mark_written_in_place(steps: list[Step]) -> list[Step]:
    """As if `acknowledged` were made where it stands, and not beside it and then renamed."""
    drafts = [step.path for step in steps if step.path.startswith("events/acknowledged.")]
    made = [step for step in steps if step.op is not Op.RENAME or step.path not in drafts]
    return [
        Step(step.op, "events/acknowledged", step.offset, step.data)
        if step.path in drafts
        else step
        for step in made
    ]


@pytest.mark.requires("cc")
def test_a_file_that_appears_before_it_is_whole_is_found(recorded: Recorded) -> None:
    wrong = verdict("ledger", mark_written_in_place(recorded("ledger")), 1).wrong
    assert any("`acknowledged` is damaged" in each for each in wrong)
