"""The steps of a teardown on real memory and a real file: what is left is never called gone."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from grafos_core.failure import FabricError
from grafos_core.lease import Kind, LeaseId, Policy
from grafos_core.node_effects import BoundFacts
from grafos_core.spiffe import holder_of_process
from grafos_core.teardown import Step
from services.nodeagent.devices.block import BlockDevice
from services.nodeagent.devices.memory import MemoryDevice
from services.nodeagent.exports import ANY_AGE
from services.nodeagent.leftovers import search
from services.nodeagent.orphans import recover_leftovers, start_ticks
from services.nodeagent.slices import Slices
from tests.services.nodeagent.fabric import eventually

INCARNATION = secrets.token_hex(16)
"""Its own: other tests have memory, too, and may run at the same time."""


def facts(kind: Kind, amount: int, holder: str = "") -> BoundFacts:
    lease_id = LeaseId(secrets.token_hex(16))
    return BoundFacts(lease_id, kind, 1, 1, amount, 2, holder, "k" * 43, 0, Policy())


def holder_id(uid: int) -> str:
    return str(holder_of_process("t", uid=uid, pid=1, start_ticks=1))


STRANGER: Final = 65_521
"""A user of whom no other test has processes."""
STRANGER_ID: Final = holder_id(STRANGER)
NOBODY: Final = 65_534


@contextmanager
def nobody() -> Generator[None, None, None]:
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def measures_clean(slices: Slices, bound: BoundFacts) -> bool:
    try:
        return slices.run(Step.MEASURE, bound)["clean"] is True
    except FabricError:
        return False


def keeper(slices: Slices, bound: BoundFacts) -> subprocess.Popen[bytes]:
    (fd,) = slices.descriptors(bound.lease_id)
    return subprocess.Popen(["sleep", "60"], pass_fds=[fd])


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


def test_memory_that_is_nowhere_is_gone(slices: Slices) -> None:
    bound = facts(Kind.MEM, 8192)
    slices.adopt(bound, None, "")
    slices.run(Step.ERASE, bound)
    assert slices.run(Step.MEASURE, bound) == {"found": 0, "clean": True}


@pytest.mark.root
class TestWhoCannotBeLookedInto:
    """Root looks into everybody, so the test gives up being root for a while."""

    def test_memory_that_may_live_there_is_not_called_gone_until_they_have_ended(
        self, slices: Slices
    ) -> None:
        bound = facts(Kind.MEM, 8192, holder=STRANGER_ID)
        with subprocess.Popen(["sleep", "60"], user=STRANGER) as stranger:
            slices.adopt(bound, None, "not looked yet")
            with nobody():
                assert slices.run(Step.ERASE, bound)["erased"] == "not reached"
                with pytest.raises(
                    FabricError, match=f"process {stranger.pid} \\(sleep\\) of user"
                ):
                    slices.run(Step.MEASURE, bound)
            stranger.kill()
        with nobody():
            eventually(lambda: measures_clean(slices, bound))

    def test_only_what_left_the_agent_may_be_there(self) -> None:
        out, kept = (facts(Kind.MEM, 8192, holder=STRANGER_ID) for _ in range(2))
        with subprocess.Popen(["sleep", "60"], user=STRANGER) as stranger:
            with nobody():
                found = search(
                    INCARNATION, [out, kept], lambda each: ANY_AGE if each == out.lease_id else None
                )
            stranger.kill()
        assert set(found.unreachable) == {out.lease_id}

    def test_another_users_doors_matter_only_where_the_holder_is_not_named(self) -> None:
        named = facts(Kind.MEM, 8192, holder=holder_id(STRANGER + 1))
        nameless = facts(Kind.MEM, 8192, holder="spiffe://t/tenant/acme/holder/alice")
        with nobody():
            found = search(INCARNATION, [named, nameless], lambda _: ANY_AGE)
        assert set(found.unreachable) == {nameless.lease_id}

    def test_one_that_is_older_than_whoever_was_given_it_cannot_have_it(self) -> None:
        bound = facts(Kind.MEM, 8192, holder=STRANGER_ID)
        with subprocess.Popen(["sleep", "60"], user=STRANGER) as stranger:
            began = start_ticks(Path(f"/proc/{stranger.pid}"))
            with nobody():
                younger = search(INCARNATION, [bound], lambda _: began + 1)
                same = search(INCARNATION, [bound], lambda _: began)
            stranger.kill()
        assert younger.unreachable == {}
        assert str(stranger.pid) in same.unreachable[bound.lease_id]

    def test_one_that_has_ended_and_is_not_buried_yet_holds_nothing(self) -> None:
        bound = facts(Kind.MEM, 8192, holder=STRANGER_ID)
        with subprocess.Popen(["true"], user=STRANGER) as ended:
            os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
            with nobody():
                assert os.path.exists(f"/proc/{ended.pid}")
                assert search(INCARNATION, [bound], lambda _: ANY_AGE).unreachable == {}


def test_where_proc_shows_us_nobody_nothing_is_proved(tmp_path: Path) -> None:
    (tmp_path / str(os.getpid())).mkdir()
    (closed,) = recover_leftovers(INCARNATION, tmp_path).closed
    assert closed.may_have(1_000, 2**63)
    assert "hidden" in str(closed)


def test_a_later_look_takes_the_memory_of_the_leases_that_are_over_and_of_no_other(
    slices: Slices,
) -> None:
    over, lives = (facts(Kind.MEM, 8192) for _ in range(2))
    for bound in (over, lives):
        slices.create(bound)
    keepers = [keeper(slices, bound) for bound in (over, lives)]
    try:
        slices.forget(over.lease_id)
        slices.adopt(over, None, "somebody could not be asked")
        slices.run(Step.ERASE, over)
        assert slices.run(Step.MEASURE, over)["st_size"] == 0
        (fd,) = slices.descriptors(lives.lease_id)
        assert os.fstat(fd).st_size == 8192
    finally:
        for each in keepers:
            each.kill()
            each.wait()


def test_what_is_proved_back_leaves_no_descriptor_behind(slices: Slices) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for kind, amount in ((Kind.MEM, 8192), (Kind.BLOCK, 4)):
        bound = facts(kind, amount)
        slices.create(bound)
        slices.forget(bound.lease_id)
    assert len(os.listdir("/proc/self/fd")) == before
