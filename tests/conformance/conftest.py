"""The fabric that the conformance suite runs on: real services, real processes, one per module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from grafos import local_fabric

if TYPE_CHECKING:
    from grafos._local import LocalFabric


@pytest.fixture(scope="module")
def running() -> Iterator[LocalFabric]:
    """Started once; the default of every builder while it runs."""
    with local_fabric() as fabric:
        yield fabric
