"""A memory lease is taken back by the kernel, and the receipt says no more than what is true."""

import ctypes
import faulthandler
import fcntl
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grafos_core import failure
from services.nodeagent.devices.memory import (
    HEADROOM_BYTES,
    MemoryDevice,
    advertised_bytes,
    machine_room_bytes,
)
from services.runtime import faults

MIB = 1 << 20
LEASE, INCARNATION = "ab" * 16, "cd" * 16
LIBC = ctypes.CDLL(None, use_errno=True)


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@pytest.fixture
def device() -> MemoryDevice:
    return MemoryDevice(64 * MIB)


@pytest.fixture
def fd(device: MemoryDevice) -> Iterator[int]:
    fd = device.create(LEASE, INCARNATION, MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def faulty() -> Iterator[Callable[[str], None]]:
    yield lambda text: faults.arm(text, development=True)
    faults.arm("", development=True)


def code(action: Callable[[], object]) -> str:
    with pytest.raises(failure.FabricError) as refused:
        action()
    return refused.value.code


def signal_in_child(action: Callable[[], object]) -> int:
    """The signal that ends a child which does this; 0 if it lives."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        signal.alarm(5)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def test_a_lease_is_zeroed_writable_memory_that_is_really_there(fd: int) -> None:
    assert os.fstat(fd).st_size == MIB
    assert os.fstat(fd).st_blocks * 512 == MIB, "reserved now, so no holder is refused a page later"
    assert not any(os.pread(fd, MIB, 0))
    os.pwrite(fd, b"held", MIB - 4)
    assert os.pread(fd, 4, MIB - 4) == b"held"


def test_its_name_says_whose_it_is(fd: int) -> None:
    assert f"grafos:{INCARNATION}:{LEASE}" in os.readlink(f"/proc/self/fd/{fd}")


def test_nobody_can_make_it_irrevocable_or_larger(fd: int) -> None:
    for seal in (2, 4, 8, 16):
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, 1033, seal)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 2 * MIB)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"beyond", MIB)


def test_after_the_erase_the_holder_has_nothing_and_cannot_grow_it_again(
    device: MemoryDevice, fd: int
) -> None:
    os.pwrite(fd, b"held", 0)
    mapping = mmap.mmap(fd, MIB)
    private = mmap.mmap(fd, MIB, mmap.MAP_PRIVATE)
    private[0:4] = b"copy"
    reopened = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    assert signal_in_child(lambda: mapping[0]) == 0
    device.erase(fd)
    for copy in (fd, reopened):
        assert os.pread(copy, 4, 0) == b""
        with pytest.raises(PermissionError):
            os.pwrite(copy, b"again", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(copy, MIB)
        with pytest.raises(PermissionError):
            os.posix_fallocate(copy, 0, MIB)
    assert signal_in_child(lambda: mapping[0]) == signal.SIGBUS
    assert signal_in_child(lambda: private[0]) == signal.SIGBUS
    os.close(reopened)


def test_what_never_left_the_agent_is_measured_freed(device: MemoryDevice, fd: int) -> None:
    assert device.measure(fd, exported=False)["clean"] is False
    device.erase(fd)
    device.erase(fd)
    assert device.measure(fd, exported=False) == {
        "st_size": 0,
        "st_blocks": 0,
        "readable_bytes": 0,
        "exported": False,
        "assurance": "freed",
        "clean": True,
    }


def pin_first_page(fd: int) -> int:
    """What a hostile holder can do: map the lease and splice the page itself into a pipe."""
    reader, writer = os.pipe()
    mapping = mmap.mmap(fd, 4096)
    keep = ctypes.c_char.from_buffer(mapping)
    vector = Iovec(ctypes.addressof(keep), 4096)
    assert LIBC.vmsplice(writer, ctypes.byref(vector), 1, 0) == 4096
    os.close(writer)
    return reader


def test_pages_pinned_by_a_holder_outlive_the_erase_so_the_receipt_says_detached(
    device: MemoryDevice, fd: int
) -> None:
    os.pwrite(fd, b"old secret", 0)
    pipe = pin_first_page(fd)
    device.erase(fd)
    evidence = device.measure(fd, exported=True)
    assert evidence["clean"] is True, "no number about the file shows the pin"
    assert evidence["assurance"] == "detached"
    assert os.read(pipe, 10) == b"old secret"
    os.close(pipe)


def test_scrubbed_first_a_pinned_page_reads_zeros(device: MemoryDevice, fd: int) -> None:
    os.pwrite(fd, b"old secret", 0)
    pipe = pin_first_page(fd)
    device.erase(fd, scrub=True)
    assert os.read(pipe, 10) == bytes(10)
    assert device.measure(fd, exported=True)["clean"] is True
    os.close(pipe)


def test_a_holder_that_cuts_it_short_hurts_nobody(device: MemoryDevice, fd: int) -> None:
    os.ftruncate(fd, 4096)
    device.erase(fd, scrub=True)
    assert device.measure(fd, exported=True)["clean"] is True
    assert device.lent_bytes() == 0


@pytest.mark.parametrize("size_bytes", [0, -4096, 1, 4095, 4097])
def test_only_whole_pages_are_lent(device: MemoryDevice, size_bytes: int) -> None:
    assert code(lambda: device.create(LEASE, INCARNATION, size_bytes)) == "RANGE"


def test_the_cap_is_kept_and_what_is_erased_is_free_again(device: MemoryDevice) -> None:
    assert code(lambda: device.create(LEASE, INCARNATION, 65 * MIB)) == "CAPACITY"
    fd = device.create(LEASE, INCARNATION, 48 * MIB)
    assert device.free_bytes() == 16 * MIB
    assert code(lambda: device.create(LEASE, INCARNATION, 17 * MIB)) == "NO_CAPACITY"
    device.erase(fd)
    assert device.free_bytes() == 64 * MIB
    os.close(fd)


def machine(
    root: Path, available_kib: int, cgroup: str, limits: dict[str, tuple[str, int, int]]
) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup that say this; limits: folder to (limit, usage, reclaimable)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {available_kib} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for folder, (limit, usage, reclaimable) in limits.items():
        path = root / "cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        old = folder.startswith("memory")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit_name, usage_name, stat_name = (
            names if old else ("memory.max", "memory.current", "inactive_file")
        )
        (path / limit_name).write_text(f"{limit}\n")
        (path / usage_name).write_text(f"{usage}\n")
        (path / "memory.stat").write_text(f"other 5\n{stat_name} {reclaimable}\n")
    return root / "proc", root / "cgroup"


V1 = "9:name=systemd:/\n4:memory:/job/inner\n0::/\n"
V2 = "0::/job/inner\n"


@pytest.mark.parametrize(
    ("cgroup", "limits", "room_mib"),
    [
        (V1, {}, 1000),
        (V1, {"memory/job/inner": (str(200 * MIB), 150 * MIB, 0)}, 50),
        (V1, {"memory/job": (str(300 * MIB), 150 * MIB, 20 * MIB)}, 170),
        (V1, {"memory": (str(70 * MIB), 10 * MIB, 0)}, 60),
        (V1, {"memory/job/inner": ("9223372036854771712", 0, 0)}, 1000),
        (V2, {"job/inner": (str(100 * MIB), 30 * MIB, 0), "job": ("max", 30 * MIB, 0)}, 70),
        (V2, {"job/inner": ("max", 0, 0), "job": (str(90 * MIB), 30 * MIB, 1 * MIB)}, 61),
        (V2, {"unified/job": (str(50 * MIB), 30 * MIB, 0)}, 20),
    ],
)
def test_each_cgroup_above_us_bounds_what_may_be_lent(
    tmp_path: Path, cgroup: str, limits: dict[str, tuple[str, int, int]], room_mib: int
) -> None:
    proc, cgroups = machine(tmp_path, 1000 * 1024, cgroup, limits)
    assert machine_room_bytes(proc, cgroups) == room_mib * MIB
    assert advertised_bytes(2, proc=proc, cgroups=cgroups) == room_mib * MIB // 8 // 4096 * 4096


def test_more_than_the_machine_has_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    proc, cgroups = machine(tmp_path, 100 * 1024, V2, {})
    device = MemoryDevice(1 << 40, proc=proc, cgroups=cgroups)
    assert device.free_bytes() == 100 * MIB - HEADROOM_BYTES
    assert code(lambda: device.create(LEASE, INCARNATION, 40 * MIB)) == "NO_CAPACITY"
    assert device.lent_bytes() == 0


def test_what_the_machine_lost_since_the_last_look_and_what_it_got_back_count(
    tmp_path: Path,
) -> None:
    proc, cgroups = machine(tmp_path, 100 * 1024, V2, {})
    device = MemoryDevice(1 << 40, proc=proc, cgroups=cgroups)
    fd = device.create(LEASE, INCARNATION, 20 * MIB)
    assert code(lambda: device.create(LEASE, INCARNATION, 40 * MIB)) == "NO_CAPACITY"
    (proc / "meminfo").write_text(f"MemAvailable:  {200 * 1024} kB\n")
    other = device.create(LEASE, INCARNATION, 40 * MIB)
    for each in (fd, other):
        device.erase(each)
        os.close(each)


def test_two_leases_do_not_share_the_room_of_one_look(tmp_path: Path) -> None:
    proc, cgroups = machine(tmp_path, 100 * 1024, V2, {})
    device = MemoryDevice(1 << 40, proc=proc, cgroups=cgroups)
    room_bytes = device.free_bytes()
    fd = device.create(LEASE, INCARNATION, 20 * MIB)
    assert device.free_bytes() <= room_bytes - 20 * MIB
    device.erase(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("fault", "refusal"), [("ENOMEM", "NO_CAPACITY"), ("EMFILE", "NO_CAPACITY"), ("EIO", "IO")]
)
def test_what_the_kernel_refuses_is_typed_and_costs_no_capacity(
    device: MemoryDevice, faulty: Callable[[str], None], fault: str, refusal: str
) -> None:
    faulty(f"memory.create:{fault}")
    assert code(lambda: device.create(LEASE, INCARNATION, MIB)) == refusal
    assert device.free_bytes() == device.capacity_bytes


def test_an_erase_that_fails_gives_no_capacity_back(
    device: MemoryDevice, fd: int, faulty: Callable[[str], None]
) -> None:
    faulty("memory.erase:EIO")
    with pytest.raises(OSError):
        device.erase(fd)
    assert device.lent_bytes() == MIB


def test_the_selftest_passes_and_lends_nothing(device: MemoryDevice) -> None:
    device.selftest()
    assert device.lent_bytes() == 0
