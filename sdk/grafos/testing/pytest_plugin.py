"""For pytest: a fabric and its clock as fixtures, and tests that fail when they leave something.

    def test_it(grafos_fabric, grafos_clock): …

    @pytest.mark.grafos(nodes=3, memory="1MiB")     what this test's fabric is like
    @pytest.mark.grafos_no_leaks                    it fails if it leaves anything behind
    grafos_no_leaks = true                          in the ini file: every test does

Rules. Only what came during the test counts: what a wider fixture holds is that fixture's. A test
that fails by itself is not blamed for its leaks too. Nothing of the SDK is loaded before a test
asks for it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from grafos.testing._fabric import VirtualFabric
    from grafos.testing._leaks import Leak
    from grafos.testing._time import VirtualTime

MARKERS = (
    "grafos(**options): what the test's `grafos_fabric` is like, as for grafos.testing.fabric",
    "grafos_no_leaks(enabled=True): fail if leases, fences, registrations or failures are left",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "grafos_no_leaks", "every test fails that leaves something on a virtual fabric", "bool",
        default=False,
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for line in MARKERS:
        config.addinivalue_line("markers", line)


@pytest.fixture
def grafos_fabric(request: pytest.FixtureRequest) -> Iterator[VirtualFabric]:
    """A virtual fabric, and the default of every builder during the test."""
    from grafos.testing import fabric

    marker = request.node.get_closest_marker("grafos")
    with fabric(**(marker.kwargs if marker is not None else {})) as made:
        yield made


@pytest.fixture
def grafos_clock(grafos_fabric: VirtualFabric) -> VirtualTime:
    """The test's clock: `advance(seconds)`, `now_ms`."""
    return grafos_fabric.clock


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    if not _is_wanted(item):
        return (yield)
    watch = Watch()
    try:
        result = yield
    finally:
        watch.end()
    watch.check()
    return result


def _is_wanted(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("grafos_no_leaks")
    if marker is None:
        return bool(item.config.getini("grafos_no_leaks"))
    return bool(marker.args[0] if marker.args else marker.kwargs.get("enabled", True))


class Watch:
    """What is left on virtual fabrics by one test: on open ones, and on those that it closed."""

    def __init__(self) -> None:
        from grafos.testing import _fabric

        self._fabrics = _fabric
        self._before = {leak for fabric in _fabric.opened for leak in fabric.leaks()}
        self._closed: list[Leak] = []
        _fabric.closing.append(self._is_closing)

    def end(self) -> None:
        self._fabrics.closing.remove(self._is_closing)

    def check(self) -> None:
        """Raises `LeakFound`."""
        from grafos.testing._leaks import LeakFound, told

        now = [leak for fabric in self._fabrics.opened for leak in fabric.leaks()]
        found = [leak for leak in [*self._closed, *now] if leak not in self._before]
        if found:
            raise LeakFound(told(found))

    def _is_closing(self, fabric: VirtualFabric) -> None:
        self._closed += fabric.leaks()
