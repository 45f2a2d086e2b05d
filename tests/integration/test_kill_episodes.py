"""Every process of a fabric is killed in the middle of its work, and every law stays whole.

Per victim one fabric, in which it dies four times under load; afterwards everything that can be
seen from outside is judged, and nothing is left when the fabric is closed. `make chaos N=` does
the same with fabrics of their own, and a seed that failed there is run again by its number.
"""

from __future__ import annotations

import pytest

from tests.chaos.episode import OPERATIONS_MIN, VICTIMS, Episode, new_fabric
from tests.chaos.machine import left_behind

EPISODES = 4
"""Of each victim; with eight victims 32 in all."""


def test_every_process_is_a_victim_often_enough() -> None:
    assert {"ledger", "admission", "audit", "agent", "warden", "agent+warden"} <= set(VICTIMS)
    assert EPISODES >= 4
    assert EPISODES * len(VICTIMS) >= 24
    assert OPERATIONS_MIN >= 200


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_under_load_and_every_law_is_whole(victim: str) -> None:
    fabric = new_fabric().start()
    reports, pids = [], fabric.pids()
    try:
        for number in range(EPISODES):
            reports.append(Episode(fabric, 1_000 + number, victim).run())
            print(reports[-1].line())
            pids = fabric.pids()
    finally:
        fabric.close()
    wrong = [each for report in reports for each in report.wrong] + left_behind(pids)
    assert wrong == []
    assert len(reports) == EPISODES
    assert all(report.operations >= OPERATIONS_MIN for report in reports)
    assert all(report.at_kill < report.operations for report in reports)
    assert not fabric.layout.state.exists()
