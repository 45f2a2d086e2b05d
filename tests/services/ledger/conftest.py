"""A fabric with one ledger process, for the tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.services.ledger.house import Caller, House, Node, ServiceProcess


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
def start(house: House) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts a ledger on `state`; all are stopped at the end."""
    started: list[ServiceProcess] = []

    def start_ledger(*arguments: str, state: str = "ledger", **more: Any) -> ServiceProcess:
        started.append(ServiceProcess(house, "ledger", house.folder / state, *arguments, **more))
        return started[-1]

    yield start_ledger
    for each in started:
        if each.process.poll() is None:
            each.kill()


@pytest.fixture
def ledger(start: Callable[..., ServiceProcess]) -> ServiceProcess:
    return start()


@pytest.fixture
def admission(house: House, ledger: ServiceProcess) -> Iterator[Caller]:
    caller = Caller(house, ledger.endpoint, "service/admission")
    yield caller
    caller.close()


@pytest.fixture
def operator(house: House, ledger: ServiceProcess) -> Iterator[Caller]:
    caller = Caller(house, ledger.endpoint, "operator/alice")
    yield caller
    caller.close()


@pytest.fixture
def node(house: House, ledger: ServiceProcess) -> Iterator[Node]:
    """Registered, with its live leases (none) told."""
    made = Node(house, ledger.endpoint, "n1")
    made.register()
    yield made
    made.close()
