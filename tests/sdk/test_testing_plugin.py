"""The pytest plugin, tried as its users would: by running pytest on their tests."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

import grafos.testing._fabric
import grafos.testing._leaks  # noqa: F401 - before pytester notes what is loaded, to unload the rest

NAME = "grafos.testing.pytest_plugin"
HEAD = """
import pytest
from grafos import MemBuilder, Fenced
from grafos.testing import fabric

def page():
    return MemBuilder().min_bytes(4096)
"""


Run = Callable[..., tuple[dict[str, int], str]]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Runs tests of this text; the outcome by kind, and what was printed."""
    loaded = [] if entry_points(group="pytest11", name="grafos") else ["-p", NAME]

    def go(text: str, ini: str = "") -> tuple[dict[str, int], str]:
        pytester.makeini(f"[pytest]\n{ini}")
        pytester.makepyfile(HEAD + text)
        done = pytester.runpytest_inprocess("-q", "--strict-markers", "-p", "no:randomly", *loaded)
        outcomes = done.parseoutcomes()
        outcomes.pop("warnings", None)  # about what was loaded when
        return outcomes, done.stdout.str()

    return go


def test_the_fixtures_give_a_fabric_and_its_clock(run: Run) -> None:
    outcomes, _ = run("""
def test_one(grafos_fabric, grafos_clock):
    lease = page().lease_secs(5).acquire()
    grafos_clock.advance(6)
    assert not lease.valid
    assert grafos_clock.now_ms == grafos_fabric.now_ms

@pytest.mark.grafos(nodes=3, seed=4)
def test_three(grafos_fabric):
    assert grafos_fabric.nodes == ("n1", "n2", "n3")
    assert grafos_fabric.seed == 4
""")
    assert outcomes == {"passed": 2}


def test_a_marked_test_fails_by_what_it_leaves_and_says_where_it_came_from(run: Run) -> None:
    outcomes, shown = run("""
KEPT = []

@pytest.mark.grafos_no_leaks
def test_leaves_a_lease(grafos_fabric):
    KEPT.append(page().acquire())

@pytest.mark.grafos_no_leaks
def test_leaves_a_fence_on_a_fabric_that_it_closed():
    with fabric() as world, world.fail_teardown("n1"), pytest.raises(Fenced):
        page().acquire().release()

@pytest.mark.grafos_no_leaks
def test_leaves_nothing(grafos_fabric):
    page().acquire().release()

def test_is_not_looked_at(grafos_fabric):
    KEPT.append(page().acquire())
""")
    assert outcomes == {"passed": 2, "failed": 2}
    assert "LeakFound: 1 left behind" in shown
    assert "acquired at" in shown
    assert "in test_leaves_a_lease" in shown
    assert "fence " in shown


def test_the_ini_file_can_ask_it_of_every_test_and_a_marker_can_excuse_one(run: Run) -> None:
    outcomes, _ = run(
        """
KEPT = []

def test_leaves_a_lease(grafos_fabric):
    KEPT.append(page().acquire())

@pytest.mark.grafos_no_leaks(False)
def test_may(grafos_fabric):
    KEPT.append(page().acquire())
""",
        "grafos_no_leaks = true",
    )
    assert outcomes == {"passed": 1, "failed": 1}


def test_what_a_wider_fixture_holds_is_not_the_tests(run: Run) -> None:
    outcomes, _ = run(
        """
@pytest.fixture(scope="module")
def lease():
    with fabric(), page().acquire() as lease:
        yield lease

def test_one(lease):
    lease.mem().write(0, b"x")

def test_two(lease):
    with page().acquire():
        assert lease.mem().read(0, 1) == b"x"
""",
        "grafos_no_leaks = true",
    )
    assert outcomes == {"passed": 2}


def test_a_test_that_fails_by_itself_is_told_by_its_own_failure(run: Run) -> None:
    outcomes, shown = run(
        """
KEPT = []

def test_fails(grafos_fabric):
    KEPT.append(page().acquire())
    assert "this" == "that"
""",
        "grafos_no_leaks = true",
    )
    assert outcomes == {"failed": 1}
    assert "left behind" not in shown
