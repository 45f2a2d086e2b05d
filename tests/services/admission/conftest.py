"""A fabric for each module, for tests that leave it as it was; one of its own where they do not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.admission.world import Fabric, PaperNode


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    """With the node `n1`. Tests keep apart by their tenants."""
    fabric = Fabric(tmp_path_factory.mktemp("fabric"))
    fabric.node("n1")
    yield fabric
    fabric.close()


@pytest.fixture
def fabric(tmp_path: Path) -> Iterator[Fabric]:
    made = Fabric(tmp_path)
    yield made
    made.close()


@pytest.fixture
def node(fabric: Fabric) -> PaperNode:
    return fabric.node("n1")
