"""A view of leased memory outlives its lease as zeros and a verdict, never as a dead process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy
import pytest

from grafos import (
    Disconnected,
    FabricView,
    Fenced,
    Incompatible,
    LeaseExpired,
    MemBuilder,
    MemLease,
    RateLimited,
    Revoked,
    local_fabric,
)  # fmt: skip
from grafos import _view as view_module
from grafos._connection import Fabric
from grafos._local import LocalFabric
from tests.sdk.cluster.stand import eventually
from tests.sdk.world import World

SIZE = 64 * 1024


@pytest.fixture(scope="module")
def real() -> Iterator[LocalFabric]:
    with local_fabric() as started:
        yield started


@pytest.fixture
def lease(fabric: Fabric) -> Iterator[MemLease]:
    with MemBuilder().fabric(fabric).min_bytes(SIZE).lease_secs(30).acquire() as made:
        yield made


class TestBytes:
    def test_view_and_handle_are_the_same_bytes(self, lease: MemLease) -> None:
        memory = lease.mem()
        with memory.map() as view:
            assert (len(view), view[0], view[:4]) == (SIZE, 0, bytes(4))
            memory.write(10, b"by hand")
            assert view[10:17] == b"by hand"
            view[10:12] = b"MY"
            view[0] = 7
            assert memory.read(0, 17) == b"\x07" + bytes(9) + b"MY hand"

    @pytest.mark.parametrize(("offset", "length"), [(0, 1), (1, 100), (4095, 2), (5000, 40_000)])
    def test_a_part_at_any_place(self, lease: MemLease, offset: int, length: int) -> None:
        whole = bytes(number % 251 for number in range(SIZE))
        lease.mem().write(0, whole)
        with lease.mem().map(offset, length) as view:
            assert len(view) == length
            assert bytes(view.memory) == whole[offset : offset + length]
            view[length - 1] = 255
        assert lease.mem().read(offset + length - 1, 1) == b"\xff"

    @pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 0), (0, SIZE + 1), (SIZE, None)])
    def test_nothing_outside_the_lease(
        self, lease: MemLease, offset: int, length: int | None
    ) -> None:
        with pytest.raises(Incompatible, match="outside"):
            lease.mem().map(offset, length)

    def test_numpy_works_on_it_without_a_copy(self, lease: MemLease) -> None:
        with lease.mem().map() as view:
            numbers = numpy.frombuffer(view.memory, dtype="<u4")
            numbers[:] = numpy.arange(SIZE // 4)
            del numbers
        assert lease.mem().read(400, 4) == (100).to_bytes(4, "little")

    def test_what_has_another_length_is_refused_and_nothing_written(self, lease: MemLease) -> None:
        with lease.mem().map() as view:
            with pytest.raises(ValueError, match="different structures"):
                view[0:4] = b"12345"
            assert view[0:8] == bytes(8)


class TestTheEnd:
    def test_released_it_shows_zeros_and_says_so(self, fabric: Fabric) -> None:
        lease = MemBuilder().fabric(fabric).min_bytes(SIZE).acquire()
        view = lease.mem().map()
        view[0:5] = b"bytes"
        held = view.memory
        lease.release()
        assert bytes(held[:5]) == bytes(5)
        held[0] = 1  # goes nowhere, and kills nobody
        for look in (lambda: view[0], lambda: view.memory, view.check):
            with pytest.raises(LeaseExpired):
                look()
        view.close()

    def test_cut_off_by_the_node_a_touch_gives_zeros(self, world: World, fabric: Fabric) -> None:
        """Nobody has told us: the kernel's signal is the first that is heard of it."""
        lease = MemBuilder().fabric(fabric).min_bytes(SIZE).acquire()
        view = lease.mem().map()
        view[0:5] = b"bytes"
        held = view.memory
        world.control.silent_end = True
        os.ftruncate(world.book.grants[lease.lease_id].fd, 0)
        assert bytes(held) == bytes(SIZE)
        held[100] = 5
        with pytest.raises(Fenced) as refused:
            view.check()
        assert refused.value.code == "TORN"
        view.close()

    def test_leaving_the_block_is_the_verdict(self, real: LocalFabric) -> None:
        lease = MemBuilder().min_bytes(SIZE).lease_secs(1).acquire()
        view = lease.mem().map()
        numbers = numpy.frombuffer(view.__enter__().memory, dtype="u1")
        numbers[:] = 1
        eventually(lambda: numbers.sum() == 0)
        with pytest.raises(LeaseExpired):
            view.__exit__(None, None, None)
        assert numbers.sum() == 0

    def test_numpy_in_another_thread_meets_zeros_when_it_is_revoked(
        self, real: LocalFabric
    ) -> None:
        """The touch comes from a thread that has let go of the interpreter's lock."""
        lease = MemBuilder().min_bytes(8 << 20).acquire()
        view = lease.mem().map()
        numbers = numpy.frombuffer(view.memory, dtype="u1")
        numbers[:] = 1
        sums: list[int] = []

        def add(numbers: Any) -> None:
            while not sums or sums[-1] != 0:
                sums.append(int(numbers.sum()))

        adding = threading.Thread(target=add, args=[numbers])
        adding.start()
        lease._fabric.revoke(lease.lease_id, reason="tried")
        adding.join(20)
        assert not adding.is_alive()
        with pytest.raises(Revoked):
            view.check()
        del numbers
        view.close()

    def test_closed_it_is_closed_and_what_others_hold_shows_zeros(self, lease: MemLease) -> None:
        view = lease.mem().map()
        view[0] = 9
        held = view.memory
        view.close()
        view.close()
        assert held[0] == 0
        with pytest.raises(Disconnected) as refused:
            view.check()
        assert refused.value.code == "CLOSED"
        assert lease.mem().read(0, 1) == b"\x09"


class TestTheGuard:
    def open(self) -> int:
        words = view_module.the_guard()._words[2::3].tolist()
        return sum(1 for start in words if start)

    def test_no_view_is_left_behind(self, lease: MemLease) -> None:
        gc.collect()
        before = self.open()
        views = [lease.mem().map() for _ in range(20)]
        held = views[0].memory
        assert self.open() == before + 20
        del views
        gc.collect()
        assert self.open() == before
        assert held[0] == 0

    def test_there_is_a_bound(self, lease: MemLease, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(view_module, "VIEWS_MAX", self.open() + 2)
        kept: list[FabricView] = []
        with pytest.raises(RateLimited):
            kept.extend(lease.mem().map() for _ in range(3))

    @pytest.mark.parametrize("how", ["a fault elsewhere", "somebody's kill"])
    def test_what_is_not_ours_dies_as_ever(self, how: str) -> None:
        program = (
            "import mmap, os, signal\n"
            "from grafos import _view\n"
            "_view.the_guard()\n"
            "fd = os.memfd_create('x'); os.ftruncate(fd, 4096)\n"
            "mapped = mmap.mmap(fd, 4096); os.ftruncate(fd, 0)\n"
        )
        program += "mapped[0]\n" if how == "a fault elsewhere" else "os.kill(0, signal.SIGBUS)\n"
        program = program.replace("os.kill(0", "os.kill(os.getpid()")
        child = subprocess.run([sys.executable, "-c", program], check=False)
        assert child.returncode == -signal.SIGBUS

    def test_the_handler_before_us_gets_what_is_not_ours(self) -> None:
        program = (
            "import faulthandler, mmap, os; faulthandler.enable()\n"
            "from grafos import _view\n"
            "_view.the_guard()\n"
            "fd = os.memfd_create('x'); os.ftruncate(fd, 4096)\n"
            "mapped = mmap.mmap(fd, 4096); os.ftruncate(fd, 0)\n"
            "mapped[0]\n"
        )
        child = subprocess.run(
            [sys.executable, "-c", program], check=False, capture_output=True, text=True
        )
        assert child.returncode == -signal.SIGBUS
        assert "Fatal Python error: Bus error" in child.stderr

    def test_on_another_machine_it_is_refused_and_says_what_works(
        self, world: World, fabric: Fabric
    ) -> None:
        world.control.descriptor = False
        with (
            MemBuilder().fabric(fabric).min_bytes(SIZE).acquire() as lease,
            pytest.raises(Incompatible, match="read and write"),
        ):
            lease.mem().map()

    def test_a_forked_child_has_zeros_and_no_say(self, lease: MemLease) -> None:
        view = lease.mem().map()
        view[0] = 3
        held = view.memory
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if held[0] == 0:
                    view.check()
            except Disconnected as refused:
                status = 0 if refused.code == "FORKED_CHILD" else 2
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert view[0] == 3
        view.close()
