"""One small fabric per test, closed after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from grafos._connection import Fabric
from tests.sdk.world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def fabric(world: World) -> Fabric:
    """A holder's connection to `world`."""
    return world.fabric()
