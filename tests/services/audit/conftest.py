"""A fabric with one collector process, for the tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.services.ledger.house import House, ServiceProcess


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
def start(house: House) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts a collector on `state`; all are stopped at the end."""
    started: list[ServiceProcess] = []

    def start_collector(*arguments: str, state: str = "audit", **more: Any) -> ServiceProcess:
        folder = house.folder / state
        started.append(ServiceProcess(house, "audit", folder, *arguments, **more))
        return started[-1]

    yield start_collector
    for each in started:
        if each.process.poll() is None:
            each.kill()
