"""What every test shares: how needs of the machine are met, repeatable random inputs, and how the
tests are dealt out to processes that run side by side."""

from typing import Any, Final

import pytest
from hypothesis import settings

from tests.requirements import add_system_path, require

add_system_path()

# The same inputs on every machine and every run: a red suite must be red again when repeated.
settings.register_profile("grafos", derandomize=True, deadline=None, database=None)
settings.load_profile("grafos")


LONG: Final = ("tests/integration/test_kill_episodes.py", "tests/sim/test_sim.py")
"""Their tests take half a minute each and share nothing: dealt out one by one, and first. The tests
of any other file stay together and in order, since they share what it has started."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith(LONG) else nodeid.partition("::")[0]

    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):
        require(*mark.args)
    for name in ("root", "gpu"):
        if item.get_closest_marker(name) is not None:
            require(name)
