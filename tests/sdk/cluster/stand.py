"""Fabrics of stand-in services, for what a supervisor does whatever its services are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from grafos._clock import boot_ms, sleep_ms
from grafos._local import LocalFabric

STAND_IN = "tests.sdk.cluster.service"
MODULES = dict.fromkeys(("ledger", "admission", "audit", "node"), STAND_IN)


@contextmanager
def stand_in_fabric(**options: Any) -> Iterator[LocalFabric]:
    with LocalFabric(modules=MODULES, **options) as fabric:
        yield fabric


def eventually(what: Callable[[], Any], timeout_ms: int = 10_000) -> Any:
    """What `what` gives as soon as that is true; fails when it never is."""
    until_ms = boot_ms() + timeout_ms
    while True:
        found = what()
        if found or boot_ms() > until_ms:
            assert found, "it never came true"
            return found
        sleep_ms(20)
