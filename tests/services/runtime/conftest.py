"""One loopback server per test, closed after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.runtime.limits import Limits
from tests.services.runtime.local_world import LocalWorld
from tests.services.runtime.world import World


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(**how: Any) -> World:
        world = World(tmp_path / f"world-{len(made)}", **how)
        made.append(world)
        return world

    yield make
    for world in made:
        world.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


@pytest.fixture
def make_local(tmp_path: Path) -> Iterator[Callable[..., LocalWorld]]:
    """Worlds behind a unix socket, by their limits."""
    made: list[LocalWorld] = []

    def make(**limits: Any) -> LocalWorld:
        made.append(LocalWorld(tmp_path / str(len(made)), limits=Limits(**limits)))
        return made[-1]

    yield make
    for each in made:
        each.close()
