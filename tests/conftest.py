"""What every test shares: how needs of the machine are met, and repeatable random inputs."""

import pytest
from hypothesis import settings

from tests.requirements import add_system_path, require

add_system_path()

# The same inputs on every machine and every run: a red suite must be red again when repeated.
settings.register_profile("grafos", derandomize=True, deadline=None, database=None)
settings.load_profile("grafos")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):
        require(*mark.args)
    for name in ("root", "gpu"):
        if item.get_closest_marker(name) is not None:
            require(name)
