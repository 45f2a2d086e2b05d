"""The fabrics that the conformance suite runs on, one after the other, each started once.

    processes   real services in real processes, in real time
    virtual     the same cores in this process, by `grafos.testing`, in a time of its own

What holds on the one must hold on the other: a test says which it is on only in order to wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from grafos import local_fabric
from grafos._local import LocalFabric
from grafos.testing import VirtualFabric, fabric

Running = LocalFabric | VirtualFabric
real_only = pytest.mark.parametrize("running", ["processes"], indirect=True)


@pytest.fixture(scope="module", params=["processes", "virtual"])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """Started once; the default of every builder while it runs."""
    with local_fabric() if request.param == "processes" else fabric() as made:
        yield made


@pytest.fixture
def let_pass(running: Running) -> Callable[[float], None]:
    """Lets seconds pass, by whichever clock the fabric lives."""
    if isinstance(running, VirtualFabric):
        return running.advance

    def wait(seconds: float) -> None:
        threading.Event().wait(seconds)

    return wait
