"""The simulation: the laws hold over many seeds, and planted mistakes are found."""

import pytest

from tests.sim.bugs import BUGS, Bug, planted
from tests.sim.runs import Result, run

SEEDS = 300
PARTS = 10
JUDGED_MIN = 60
FOUND_BUGS_SEEDS: tuple[int, ...] = ()
"""Seeds that found a mistake of ours once; kept for good."""


@pytest.fixture(scope="module")
def totals() -> dict[str, int]:
    return {}


def _add(totals: dict[str, int], result: Result) -> None:
    totals["seeds"] = totals.get("seeds", 0) + 1
    for name, count in result.counts.items():
        totals[name] = totals.get(name, 0) + count


@pytest.mark.parametrize("part", range(PARTS))
def test_every_law_holds_after_every_event(part: int, totals: dict[str, int]) -> None:
    for seed in range(part * SEEDS // PARTS, (part + 1) * SEEDS // PARTS):
        _add(totals, run(seed))


def test_the_days_were_bad_enough_to_mean_something(totals: dict[str, int]) -> None:
    """A run without load proves nothing, nor one without faults. Of the seeds that this process has
    run; where others have run most of them, of some more."""
    for seed in range(JUDGED_MIN - totals.get("seeds", 0)):
        _add(totals, run(seed))
    at_least = {
        "events": 1000, "extended": 1,
        "lease.granted": 50, "bound": 15, "writes": 30, "acknowledged": 30,
        "lease.released": 50, "agent_crash": 2, "agent.fenced": 1, "agent.burnt": 10,
        "holder_deaths": 1, "taken_deadline": 1, "taken_agent_lost": 1, "lease.unconfirmed": 0.05,
        "lease.revoking": 0.2, "lease.revoke_sooner": 0.05, "checkpoint_reported": 0.02,
        "forced_teardown": 0.01, "agent.attached": 0.02, "agent.detached": 0.2,
        "agent.cleared": 0.5, "agent.probed": 1, "stirs": 0.1, "agent.clear_failed": 0.02,
        "lease.denied": 0, "hang_ups": 1, "disconnected": 0.5,
        "bundles": 1, "bundles_refused": 0.1, "key.revoked": 0.2, "ended_with_its_key": 0.5,
        "wall_steps": 1, "sleeps": 0.5,
    }  # fmt: skip
    lacking = {
        name: totals.get(name, 0) / totals["seeds"]
        for name, per_seed in at_least.items()
        if totals.get(name, 0) < per_seed * totals["seeds"]
    }
    assert not lacking


def test_a_seed_is_a_test_case() -> None:
    assert run(7).trace == run(7).trace
    assert run(7).trace != run(8).trace


@pytest.mark.parametrize("seed", FOUND_BUGS_SEEDS)
def test_what_found_a_mistake_once_is_kept(seed: int) -> None:
    run(seed)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.label)
def test_a_planted_mistake_is_found(bug: Bug) -> None:
    with planted(bug):
        for seed in range(100):
            try:
                run(seed)
            except Exception:
                return
    pytest.fail(f"law {bug.law}: 100 seeds did not notice that {bug.label}")


def test_there_is_a_planted_mistake_for_every_law() -> None:
    assert {bug.law for bug in BUGS} == set(range(1, 11))
