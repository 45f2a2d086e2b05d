"""The steps of a teardown on real memory and a real file: what is left is never called gone."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from grafos_core.failure import FabricError
from grafos_core.lease import Kind, LeaseId, Policy
from grafos_core.node_effects import BoundFacts
from grafos_core.teardown import Step
from services.nodeagent.devices.block import BlockDevice
from services.nodeagent.devices.memory import MemoryDevice
from services.nodeagent.slices import Slices

INCARNATION = "cd" * 16


def facts(kind: Kind, amount: int) -> BoundFacts:
    lease_id = LeaseId(secrets.token_hex(16))
    return BoundFacts(lease_id, kind, 1, 1, amount, 2, "", "k" * 43, 0, Policy())


@pytest.fixture
def slices(tmp_path: Path) -> Slices:
    block = BlockDevice(tmp_path / "blocks", 64 * 4096)
    return Slices(INCARNATION, MemoryDevice(1 << 24, headroom_bytes=0), block)


def test_memory_that_was_not_erased_does_not_measure_clean(slices: Slices) -> None:
    bound = facts(Kind.MEM, 8192)
    slices.create(bound)
    with pytest.raises(FabricError, match="left"):
        slices.run(Step.MEASURE, bound)
    slices.run(Step.ERASE, bound)
    assert slices.run(Step.MEASURE, bound)["clean"] is True


def test_blocks_that_were_not_erased_do_not_measure_clean(slices: Slices, tmp_path: Path) -> None:
    bound = facts(Kind.BLOCK, 4)
    slices.create(bound)
    with (tmp_path / "blocks").open("r+b") as file:
        file.seek(bound.extent_offset * 4096)
        file.write(b"x")
        os.fsync(file.fileno())
    with pytest.raises(FabricError, match="left"):
        slices.run(Step.MEASURE, bound)
    slices.run(Step.ERASE, bound)
    assert slices.run(Step.MEASURE, bound)["clean"] is True


def test_a_key_that_was_destroyed_is_nowhere(slices: Slices) -> None:
    bound = facts(Kind.BLOCK, 4)
    slices.create(bound)
    held = slices.held(bound.lease_id)
    assert held is not None
    key = held.key
    assert key is not None
    slices.destroy_key(bound.lease_id)
    assert (held.key, bytes(key)) == (None, bytes(32))


def test_memory_that_may_live_where_nobody_can_look_is_not_called_gone(slices: Slices) -> None:
    bound = facts(Kind.MEM, 8192)
    slices.adopt(bound, None, "processes of other users may still have it")
    slices.run(Step.ERASE, bound)
    with pytest.raises(FabricError, match="other users"):
        slices.run(Step.MEASURE, bound)


def test_memory_that_is_nowhere_is_gone(slices: Slices) -> None:
    bound = facts(Kind.MEM, 8192)
    slices.adopt(bound, None, "")
    slices.run(Step.ERASE, bound)
    assert slices.run(Step.MEASURE, bound) == {"found": 0, "clean": True}


def test_what_is_proved_back_leaves_no_descriptor_behind(slices: Slices) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for kind, amount in ((Kind.MEM, 8192), (Kind.BLOCK, 4)):
        bound = facts(kind, amount)
        slices.create(bound)
        slices.forget(bound.lease_id)
    assert len(os.listdir("/proc/self/fd")) == before
